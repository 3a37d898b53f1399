"""Settings of the autoregressive language model."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, Multiple
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import PartConfig
from blip3o_jax.config.lora import LoraConfig
from blip3o_jax.config.types import Depth, Dtype, Epsilon, Heads, Remat, TableRows, Width

QWEN_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


class LanguageModelConfig(PartConfig, path="model.ar"):
    """Declare the settings that all language models have (networks: `ar.protocol.LanguageModel`).

    `vocab_size` counts the rows in use; the rows stored are padded up to a multiple of
    `vocab_multiple` so that the table shards evenly (`Vocabulary` in text/ owns the ids).
    """

    vocab_size: int
    """Ids of the vocabulary, text and image tokens together: rows of the embedding table."""
    spare_rows: int
    """Rows among `vocab_size`, the last ones, that no id stands for. Some published checkpoints
    have them.
    """
    vocab_multiple: int
    """Number of which the stored rows of the table are a multiple, so that it shards evenly."""
    hidden_size: int
    """Width of the hidden states."""
    num_hidden_layers: int
    """Number of layers."""
    num_attention_heads: int
    """Heads of the queries, a multiple of those of keys and values."""
    num_key_value_heads: int
    """Heads of the keys and values."""
    tie_word_embeddings: bool
    """Use the embedding table as the output layer."""
    initializer_range: float
    """Standard deviation of the initial weights."""
    embedding_range: float | None
    """Standard deviation of the initial token embeddings; `None` takes `initializer_range`. A model
    trained from random weights learns faster if its embeddings are not small compared with what the
    layers add to them.
    """
    dtype: str
    """Dtype of the computation."""
    param_dtype: str
    """Dtype of the parameters."""
    remat: str
    """Activations that a layer stores for its backward pass: `none` all, `full` its input alone,
    `dots` the results of its linear layers and of attention, `offload` the results of its linear
    layers, in the host's memory. All others are computed again.
    """
    unroll: bool
    """Unroll the loop over the layers: faster on CPUs, slower to compile."""
    attention: str
    """Attention over whole rows: `xla`, `splash` (TPU), `cudnn` (GPU, 16-bit dtypes), or `auto`, by
    the platform. Decoding with a cache takes `xla` for `auto`.
    """
    lora: LoraConfig
    """Low-rank adapters of the layers."""

    @property
    def head_dim(self) -> int:
        """Return the width of a head's keys, queries and values."""
        raise NotImplementedError

    @property
    def embedding_std(self) -> float:
        """Return the standard deviation that the token embeddings start with."""
        return self.initializer_range if self.embedding_range is None else self.embedding_range

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows that are stored of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class QwenConfig(LanguageModelConfig, path="model.ar"):
    """Hold the fields that `transformers.Qwen2Config` and `Qwen3Config` share, and this package's
    own.
    """

    vocab_size: TableRows = 217210
    hidden_size: Width = 2048
    intermediate_size: Width = 6144
    """Width of the feed-forward layers."""
    num_hidden_layers: Depth = 28
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads = 8
    rope_theta: Annotated[float, Bounds(1, 1e12)] = 1e6
    """Base of the wavelengths of the rotary embedding."""
    rms_norm_eps: Epsilon = 1e-6
    """Term that is added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    initializer_range: Annotated[float, Bounds(0, 100)] = 0.02
    embedding_range: Annotated[float, Bounds(0, 100)] | None = None
    vocab_multiple: Annotated[int, Bounds(1, 2**16)] = 512
    spare_rows: Annotated[int, Bounds(0, 2**24)] = 0
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "full"
    unroll: bool = False
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    lora: LoraConfig = LoraConfig(targets=QWEN_LINEAR)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora.check("model.ar", QWEN_LINEAR)
        check(
            self.spare_rows < self.vocab_size,
            f"model.ar.spare_rows={self.spare_rows} must be less than "
            f"model.ar.vocab_size={self.vocab_size}: they are its last rows",
        )
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"model.ar.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"model.ar.num_key_value_heads={self.num_key_value_heads}",
        )


@dataclasses.dataclass(frozen=True)
class Qwen3Config(QwenConfig, path="model.ar", model_type="qwen3"):
    """Hold the fields of `transformers.Qwen3Config`: a norm over each head of queries and keys, no
    biases.
    """

    head_dim: Annotated[Width, Multiple(2, "rotary embedding")] = 128
    """Width of a head's queries, keys and values."""


@dataclasses.dataclass(frozen=True)
class Qwen2Config(QwenConfig, path="model.ar", model_type="qwen2"):
    """Hold the fields of `transformers.Qwen2Config` (Qwen2.5 1.5B with the vocabulary of Tar by
    default): biases of queries, keys and values, no norm over heads.
    """

    vocab_size: TableRows = 217206
    hidden_size: Width = 1536
    intermediate_size: Width = 8960
    num_attention_heads: Heads = 12
    num_key_value_heads: Heads = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"model.ar.hidden_size={self.hidden_size} must be a multiple of twice "
            f"model.ar.num_attention_heads={self.num_attention_heads}: heads of an even width",
        )

    @property
    def head_dim(self) -> int:
        """Return the width of a head's keys, queries and values."""
        return self.hidden_size // self.num_attention_heads
