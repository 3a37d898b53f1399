"""Settings of the vision tokenizer, and of the caption encoder that it is pretrained with."""

import dataclasses
from typing import Annotated, NamedTuple

from blip3o_jax.config.constraints import Bounds, Square
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup, PartConfig
from blip3o_jax.config.types import (
    Depth,
    Dtype,
    Epsilon,
    Heads,
    Positive,
    Remat,
    Side,
    TableRows,
    Width,
    check_heads,
)


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(ConfigGroup, path="model.tokenizer.encoder"):
    """Hold the fields of `transformers.SiglipVisionConfig`: the encoder of the vision tokenizer."""

    hidden_size: Width = 1152
    """Width of the features, a multiple of the heads."""
    intermediate_size: Width = 4304
    """Width of the feed-forward layers."""
    num_hidden_layers: Depth = 27
    """Number of layers."""
    num_attention_heads: Heads = 16
    """Attention heads."""
    image_size: Side = 384
    """Side in pixels of the square images that the tokenizer sees."""
    patch_size: Side = 14
    """Side of a patch in pixels."""
    layer_norm_eps: Epsilon = 1e-6
    """Term that is added to the variance in layer norms."""
    dtype: Dtype = "bfloat16"
    """Dtype of the computation."""
    param_dtype: Dtype = "float32"
    """Dtype of the parameters."""
    remat: Remat = "none"
    """Activations that a layer stores for its backward pass: `none` all, `full` its input alone,
    `dots` the results of its linear layers and of attention, `offload` the results of its linear
    layers, in the host's memory. All others are computed again.
    """
    unroll: bool = False
    """Unroll the loop over the layers: faster on CPUs, slower to compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads("model.tokenizer.encoder", self.hidden_size, self.num_attention_heads)
        check(
            self.patch_size <= self.image_size,
            f"model.tokenizer.encoder.patch_size={self.patch_size} must be at most "
            f"model.tokenizer.encoder.image_size={self.image_size}",
        )

    @property
    def grid(self) -> int:
        """Return the patches along one side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TaTokDecoderConfig(ConfigGroup, path="model.tokenizer.decoder"):
    """Hold the fields of `transformers.Siglip2VisionConfig` with patch_size 1: the decoder that
    reconstructs SigLIP2 features.
    """

    hidden_size: Width = 1152
    """Width of the hidden states, a multiple of the heads."""
    intermediate_size: Width = 3072
    """Width of the feed-forward layers."""
    num_hidden_layers: Depth = 3
    """Number of layers."""
    num_attention_heads: Heads = 12
    """Attention heads."""
    num_patches: Annotated[int, Bounds(1, 2**24), Square()] = 256
    """Rows of the table of positions, which is resized to the image tokens along a side."""
    layer_norm_eps: Epsilon = 1e-6
    """Term that is added to the variance in layer norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads("model.tokenizer.decoder", self.hidden_size, self.num_attention_heads)


class EncoderSizes(NamedTuple):
    """Hold the sizes of the transformer that encodes an image."""

    setting: str  # the one that makes it see more patches
    patches: int
    layers: int
    width: int
    heads: int
    dtype: str


class ImageTokenizerConfig(PartConfig, path="model.tokenizer"):
    """Declare the settings that all vision tokenizers have.

    Their networks implement `image_tokens.protocol.ImageTokenizer`.
    """

    codebook_size: int
    """Codes of the codebook: image tokens of the vocabulary."""
    pool_scale: int
    """Patches along a side of an image token: 1, 2 or 3, which `<S0>` to `<S2>` name in a row."""
    dtype: str
    """Dtype of the computation."""
    param_dtype: str
    """Dtype of the parameters."""

    @property
    def image_size(self) -> int:
        """Return the side of the square images that it takes, pixels."""
        raise NotImplementedError

    @property
    def feature_channels(self) -> int:
        """Return the width of the features that it makes tokens of."""
        raise NotImplementedError

    @property
    def patch_values(self) -> int:
        """Return the number of pixel values of a patch, three a pixel."""
        raise NotImplementedError

    @property
    def encoder_sizes(self) -> EncoderSizes:
        """Return the sizes of the encoder, by which the memory of a step is estimated."""
        raise NotImplementedError

    @property
    def grid(self) -> int:
        """Return the image tokens along one side."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """Return the image tokens of an image."""
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class TaTokConfig(ImageTokenizerConfig, path="model.tokenizer", model_type="ta_tok"):
    """Set the vision tokenizer: SigLIP2 encoder -> bottleneck -> SimVQ codebook -> decoder (section
    "TA-Tok" of docs/).
    """

    encoder: SiglipVisionConfig = SiglipVisionConfig()
    """SigLIP2 encoder."""
    decoder: TaTokDecoderConfig = TaTokDecoderConfig()
    """Decoder of the features."""
    bottleneck_dim: Width = 1536
    """Width of the codes."""
    codebook_size: TableRows = 65536
    select_layer: Annotated[int, Bounds(-1025, -1, note="it counts from the end")] = -2
    """Layer of the encoder whose output is quantised: -1 is the last one."""
    pool_scale: Annotated[int, Bounds(1, 3)] = 1
    l2_normalized: bool = True
    """Select codes by cosine similarity; `False` selects them by distance."""
    stochastic: bool = False
    """Sample codes in training by their similarity; `False` takes the nearest code."""
    stochastic_temperature: Positive = 0.03
    """Temperature of the similarities, in sampling and in the entropy term of the loss."""
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.encoder.num_hidden_layers
        check(
            -layers - 1 <= self.select_layer,
            f"model.tokenizer.select_layer={self.select_layer} must be -{layers + 1} or more: "
            f"the encoder has {layers} layers",
        )
        check(
            self.pool_scale <= self.encoder.grid,
            f"model.tokenizer.pool_scale={self.pool_scale} is more than the encoder's "
            f"{self.encoder.grid} patches along a side",
        )

    @property
    def grid(self) -> int:
        """Return the image tokens along one side: 27, 13 or 9 for pool scales 1, 2, 3 of the
        published encoder.
        """
        return self.encoder.grid // self.pool_scale

    @property
    def image_size(self) -> int:
        """Return the side of the square images that it takes, pixels."""
        return self.encoder.image_size

    @property
    def feature_channels(self) -> int:
        """Return the width of the SigLIP2 features."""
        return self.encoder.hidden_size

    @property
    def patch_values(self) -> int:
        """Return the number of pixel values of a patch, three a pixel."""
        return 3 * self.encoder.patch_size**2

    @property
    def encoder_sizes(self) -> EncoderSizes:
        """Return the sizes of the SigLIP2 encoder."""
        return EncoderSizes(
            f"model.tokenizer.encoder.image_size={self.encoder.image_size}",
            self.encoder.grid**2,
            self.encoder.num_hidden_layers,
            self.encoder.hidden_size,
            self.encoder.num_attention_heads,
            self.encoder.dtype,
        )


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(ConfigGroup, path="model.text_tower"):
    """Set the caption encoder of the contrastive stage (SigLIP's text side), which is dropped once
    the vision encoder is trained.
    """

    hidden_size: Width = 1152
    """Width of the hidden states and of the caption's embedding, a multiple of the heads."""
    intermediate_size: Width = 4304
    """Width of the feed-forward layers."""
    num_hidden_layers: Depth = 27
    """Number of layers."""
    num_attention_heads: Heads = 16
    """Attention heads."""
    layer_norm_eps: Epsilon = 1e-6
    """Term that is added to the variance in layer norms."""
    dtype: Dtype = "bfloat16"
    """Dtype of the computation."""
    param_dtype: Dtype = "float32"
    """Dtype of the parameters."""
    remat: Remat = "none"
    """Activations that a layer stores for its backward pass: `none` all, `full` its input alone,
    `dots` the results of its linear layers and of attention, `offload` the results of its linear
    layers, in the host's memory. All others are computed again.
    """
    unroll: bool = False
    """Unroll the loop over the layers: faster on CPUs, slower to compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads("model.text_tower", self.hidden_size, self.num_attention_heads)
