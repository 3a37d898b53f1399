"""Every setting of every part and stage, as frozen dataclasses.

A file under configs/ returns a `Config`; `Config` values turn into an `ml_collections.ConfigDict` (`to_config_dict`) so that
`--config.a.b=v` can override a field, and back (`from_config_dict`), where an unknown key, a wrong type or a value that
cannot work is an error that names the field. Fields of a network carry the names of the library class it matches
(transformers, diffusers), so a published config.json reads straight into them.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any


class UserError(ValueError):
    """What a user can cause and cure: one line that says what, where and what to do. The command prints it without a
    traceback; any other exception is a bug and keeps its traceback."""


class ConfigError(UserError):
    """A setting that cannot be used; the message names the field and says what to do."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_choice(field: str, value: str, choices: typing.Iterable[str]) -> None:
    choices = tuple(choices)
    check(value in choices, f"{field}={value!r} is not one of {', '.join(choices)}")


REMAT = ("none", "full", "dots", "offload")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) beside the kernels of a part's stacked layers: y = x W + alpha / rank (x A) B,
    A [in, rank] drawn, B [rank, out] zero at first. They are float32 whatever the kernels are; `trainable=('.*/lora_.*',)`
    trains nothing else. `blip3o convert export` writes the sums."""

    rank: int = 0  # 0: none
    alpha: float = 32.0
    targets: tuple[str, ...] = ()  # names of the linear layers that have them

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0

    def of(self, name: str) -> "LoraConfig | None":
        """What the linear layer of this name has, or None."""
        return self if self.rank and name in self.targets else None

    def check(self, part: str, names: tuple[str, ...]) -> None:
        """ConfigError unless `names`, the layers that can have them, hold all targets."""
        check(self.rank >= 0, f"{part}.lora.rank={self.rank} must be 0 (off) or more")
        check(math.isfinite(self.alpha), f"{part}.lora.alpha={self.alpha} must be a finite number")
        check(bool(self.targets) or not self.rank, f"{part}.lora.targets is empty: name some of {', '.join(names)}, or rank 0")
        for name in self.targets:
            check_choice(f"{part}.lora.targets", name, names)


QWEN3_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
SANA_LINEAR = ("q", "k", "v", "o", "expand", "contract")  # of both attentions, and of the feed-forward around its convolution


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Fields of `transformers.Qwen3Config`. `vocab_size` counts the rows in use; the rows stored are padded up to a multiple
    of `vocab_multiple` so that the table shards evenly (`Vocabulary` in text/ owns the ids)."""

    vocab_size: int = 217210
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    # Deviation the token embeddings start with; None: initializer_range. Training from nothing learns faster where the
    # embeddings are not small beside what the layers add to them.
    embedding_range: float | None = None
    vocab_multiple: int = 512
    spare_rows: int = 0  # of vocab_size: rows at the end that no id stands for, as some published checkpoints have
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile
    attention: str = "auto"  # over whole rows: by the platform ("auto"), or "xla", "splash" (TPU), "cudnn" (GPU)
    lora: LoraConfig = LoraConfig(targets=QWEN3_LINEAR)

    def __post_init__(self) -> None:
        self.lora.check("ar", QWEN3_LINEAR)
        check_choice("ar.remat", self.remat, REMAT)
        check_choice("ar.attention", self.attention, ("auto", "xla", "splash", "cudnn"))
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"ar.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"ar.num_key_value_heads={self.num_key_value_heads}",
        )
        check(self.head_dim % 2 == 0, f"ar.head_dim={self.head_dim} must be even (rotary embedding)")

    @property
    def embedding_deviation(self) -> float:
        return self.initializer_range if self.embedding_range is None else self.embedding_range

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """Fields of `transformers.SiglipVisionConfig`: the encoder of the vision tokenizer."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TaTokDecoderConfig:
    """Fields of `transformers.Siglip2VisionConfig` with patch_size 1: the decoder that reconstructs SigLIP2 features."""

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 3
    num_attention_heads: int = 12
    num_patches: int = 256
    layer_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class TaTokConfig:
    """The vision tokenizer: SigLIP2 encoder -> bottleneck -> SimVQ codebook -> decoder (section "TA-Tok" of docs/)."""

    encoder: SiglipVisionConfig = SiglipVisionConfig()
    decoder: TaTokDecoderConfig = TaTokDecoderConfig()
    bottleneck_dim: int = 1536
    codebook_size: int = 65536
    select_layer: int = -2
    pool_scale: int = 1
    l2_normalized: bool = True
    stochastic: bool = False
    stochastic_temperature: float = 0.03
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check(self.pool_scale in (1, 2, 3), f"tokenizer.pool_scale={self.pool_scale} must be 1, 2 or 3")
        check(self.select_layer < 0, f"tokenizer.select_layer={self.select_layer} counts from the end: use -1, -2, ...")

    @property
    def grid(self) -> int:
        """Image tokens along one side: 27, 13 or 9 for pool scales 1, 2, 3 of the published encoder."""
        return self.encoder.grid // self.pool_scale

    @property
    def num_tokens(self) -> int:
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """The caption encoder of the contrastive stage (SigLIP's text side); dropped once the vision encoder is trained."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Linear -> GELU(tanh) -> Linear -> RMSNorm between the AR's hidden states and the DiT's caption channels."""

    # Adds sine-cosine positions to the hidden states. The published model does without: it has had the training in which
    # rotary attention alone comes to tell a token its place in the image.
    positions: bool = False
    rms_norm_eps: float = 1e-5
    norm_init: float = 5.5**0.5
    dtype: str = "bfloat16"
    param_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """Images in: how reference images reach the model (BLIP3o-NEXT, arXiv 2510.15857, section 4). With `references` 0 rows are
    text to image alone, and connectors that are there are kept and converted, but not read."""

    references: int = 0  # places for reference images in every row, taken or not
    # What stands for an image in the user's turn: its tokens, or with `features` its SigLIP2 features through
    # `feature_connector`.
    features: bool = False
    # Conditioning routes of the diffusion head, each by itself or both: latents through `latent_connector` after the condition
    # tokens, and latents beside the noisy ones along the width.
    latents: bool = False
    beside: bool = False
    # The latents beside the noise stand in the null condition as well, as published. False drops them there, for
    # `sampling.reference_guidance`.
    null_beside: bool = True

    def __post_init__(self) -> None:
        check(self.references >= 0, f"model.editing.references={self.references} must be 0 or more")
        check(not self.beside or self.references > 0, "model.editing.beside=True needs model.editing.references of 1 or more")


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """Fields of `diffusers.SanaTransformer2DModel` (SANA 1.5 1.6B by default)."""

    in_channels: int = 32
    out_channels: int = 32
    num_layers: int = 20
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    sample_size: int = 32  # side of the latents that positions are counted on; others are sampled at any size too
    patch_size: int = 1
    # A number adds sine-cosine positions to the patches, divided by it; None leaves finding them to the convolutions.
    interpolation_scale: float | None = None
    qk_norm: str | None = "rms_norm_across_heads"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile
    lora: LoraConfig = LoraConfig(targets=SANA_LINEAR)

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        self.lora.check("dit", SANA_LINEAR)
        check_choice("dit.remat", self.remat, REMAT)
        check(
            self.num_cross_attention_heads * self.cross_attention_head_dim == self.cross_attention_dim,
            "dit.cross_attention_dim must equal num_cross_attention_heads * cross_attention_head_dim",
        )
        check(self.cross_attention_dim == self.hidden_size, "dit.cross_attention_dim must equal the hidden size")
        check(self.qk_norm in (None, "rms_norm_across_heads"), f"dit.qk_norm={self.qk_norm!r} is not supported")


@dataclasses.dataclass(frozen=True)
class DcAeConfig:
    """Fields of `diffusers.AutoencoderDC` (f32c32 by default)."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "interpolate"
    downsample_block_type: str = "Conv"
    decoder_norm_types: str = "rms_norm"
    decoder_act_fns: str = "silu"
    scaling_factor: float = 0.41407
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Fields of `diffusers.FlowMatchEulerDiscreteScheduler` that matter here."""

    num_train_timesteps: int = 1000
    shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tokenizer. `path`: a SentencePiece .model, or Qwen's tokenizer.json (or the directory that holds it).

    With `train_size` > 0 and no path, a SentencePiece tokenizer of that many pieces is trained on the run's own captions, and
    `ar.vocab_size` becomes what it and the image tokens come to.
    """

    kind: str = "bpe"
    path: str = ""
    train_size: int = 0

    def __post_init__(self) -> None:
        check_choice("text.kind", self.kind, ("bpe", "sentencepiece"))
        check(
            not self.train_size or self.kind == "sentencepiece",
            "text.train_size trains a SentencePiece tokenizer: set text.kind=sentencepiece, or text.train_size=0",
        )


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
    """The chat template: what the user says for each task. `<image>` stands where the reference images are shown; an empty
    `system` leaves the system turn out."""

    system: str = "You are a helpful assistant."
    generate: str = "Please generate image based on the following caption: {caption}"
    edit: str = "Please edit this image according to the following instruction: {instruction}.\n<image>"
    edit_several: str = "Please edit these {count} images according to the following instruction: {instruction}.\n<image>"
    reconstruct: str = "<image>\nPlease reconstruct the given image."
    understand: str = "<image>\n{question}"
    # The reference also trains on the prompt's own tokens; kept as an option for comparison.
    supervise_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    text: TextConfig = TextConfig()
    template: TemplateConfig = TemplateConfig()
    tokenizer: TaTokConfig = TaTokConfig()
    text_tower: TextTowerConfig = TextTowerConfig()
    ar: Qwen3Config = Qwen3Config()
    connector: ConnectorConfig = ConnectorConfig()
    editing: EditingConfig = EditingConfig()
    dit: SanaConfig = SanaConfig()
    flow: FlowConfig = FlowConfig()
    vae: DcAeConfig = DcAeConfig()
    # Side of the square target image in pixels; the latent grid is image_size / vae.spatial_compression.
    image_size: int = 1024
    # (height, width) in pixels of the images that are drawn and shown, each cut to the nearest shape; the square alone where
    # there are none.
    buckets: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for bucket in self.buckets:
            self.check_size(tuple(bucket), "model.buckets")
        check(len(set(self.buckets)) == len(self.buckets), f"model.buckets={self.buckets} names a size twice")
        check(
            self.image_size % self.vae.spatial_compression == 0,
            f"model.image_size={self.image_size} must be a multiple of the autoencoder's {self.vae.spatial_compression}",
        )
        check(
            self.dit.in_channels == self.vae.latent_channels,
            f"model.dit.in_channels={self.dit.in_channels} must equal model.vae.latent_channels={self.vae.latent_channels}",
        )

    @property
    def latent_size(self) -> int:
        return self.image_size // self.vae.spatial_compression

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every image."""
        return self.buckets or ((self.image_size, self.image_size),)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The one of `sizes` whose shape is nearest to an image's, by the ratio of their ratios."""
        return min(self.sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """ConfigError unless latents and patches cut it evenly."""
        unit = self.vae.spatial_compression * self.dit.patch_size
        fits = len(size) == 2 and all(side > 0 and side % unit == 0 for side in size)
        check(
            fits, f"{name}={size} must be (height, width), both multiples of {unit}: the autoencoder's factor times the patch"
        )


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set. `format`: tfds (ArrayRecord directory), webdataset (tar file, glob or directory), parquet, folder
    (images + captions.jsonl), or auto (told from the path). `task` "reconstruct" has captioned images shown, and drawn again
    from their tokens; otherwise a record says what it is for."""

    path: str = ""
    format: str = "auto"
    weight: float = 1.0
    split: str = "train"
    task: str = ""

    def __post_init__(self) -> None:
        check_choice("data.sources.format", self.format, ("auto", "tfds", "webdataset", "parquet", "folder"))
        check(self.weight > 0, f"data.sources.weight={self.weight} must be positive")
        check_choice("data.sources.task", self.task, ("", "reconstruct"))
        check_choice("data.sources.task", self.task, ("", "reconstruct"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # A single source can be given as `path` (and `format`, `split`); a mixture as `sources`.
    path: str = ""
    format: str = "auto"
    split: str = "train"
    sources: tuple[SourceConfig, ...] = ()
    batch_size: int = 512  # global, in examples
    max_length: int = 1152  # tokens of one row, prompt and image together
    pack: int = 1  # examples that share a row, one after the other: short ones leave room for long ones
    crop: str = "shared"  # "shared": one centre crop for tokenizer and autoencoder; "reference": tokenizer squashed
    workers: int = 8  # decoding processes per host; 0 decodes in threads of the training process
    prefetch: int = 2  # batches each worker keeps ready
    shuffle: bool = True
    max_bad_share: float = 0.01  # of the records seen; above it the run stops
    # What becomes of a record whose text leaves no room for its image in the row: "skip" (counted),
    # "truncate" (the text is cut, never the image's tokens) or "error" (the run ends).
    too_long: str = "skip"
    # Of an image, counted from its header; a record with a larger one cannot be read.
    max_pixels: int = 80_000_000
    cache_dir: str = ""  # where ids and latents of the frozen encoders are kept; "" encodes inside the step

    def __post_init__(self) -> None:
        check_choice("data.crop", self.crop, ("shared", "reference"))
        check(self.batch_size > 0, f"data.batch_size={self.batch_size} must be positive")
        check(
            self.pack > 0 and self.batch_size % self.pack == 0,
            f"data.batch_size={self.batch_size} must be a multiple of data.pack={self.pack}, a positive number",
        )
        check(self.workers >= 0, f"data.workers={self.workers} must be 0 or more")
        check_choice("data.too_long", self.too_long, ("skip", "truncate", "error"))
        check(self.max_pixels > 0, f"data.max_pixels={self.max_pixels} must be positive")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        single = (SourceConfig(self.path, self.format, 1.0, self.split),) if self.path else ()
        return single + self.sources


STAGES = ("autoencoder", "contrastive", "tokenizer", "joint")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Linear warm-up to `learning_rate`, then a cosine to `end_learning_rate` at the last step."""

    name: str = "adamw"  # or "muon": the matrices of the layer stacks by Muon, the rest by AdamW (train/optimizer.py)
    learning_rate: float = 5e-5
    end_learning_rate: float = 1e-5
    warmup_share: float = 0.01
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95
    clip_norm: float = 1.0
    accumulate: int = 1  # micro-batches per step
    ema_decay: float = 0.0  # 0 keeps no averaged weights

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, ("adamw", "muon"))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, and the constants of each stage's own."""

    ce: float = 1.0
    flow: float = 1.0
    condition_dropout: float = 0.1  # share of rows whose hidden states are zeroed before the connector
    # Share of rows whose image tokens see no caption, for `sampling.token_guidance`. Where it equals condition_dropout these
    # are the same rows.
    caption_dropout: float = 0.0
    # Share of rows whose hidden states are zeroed while their references stay, for `sampling.reference_guidance`.
    instruction_dropout: float = 0.0
    flow_draws: int = 1  # noises and noise levels drawn for each example: more of them for one pass of the AR
    # "exact" takes the hidden states of <S0>, I_1 .. I_n; "last" the reference's last n + 1 positions of the row.
    condition_span: str = "exact"
    ce_chunk: int = 512  # tokens per block of the cross entropy
    gradient: float = 0.4  # autoencoder: weight of the image-gradient term beside L1
    squared: float = 4.0  # autoencoder: weight of the squared error beside L1
    # autoencoder: weight of the term that holds each channel of the scaled latents at unit variance, which flow matching
    # expects, and deviation of the noise put on them, which makes the decoder forgive what sampling gets slightly wrong.
    latent_scale: float = 0.0
    latent_noise: float = 0.0
    dense: float = 0.0  # contrastive: weight of reading each patch's pixels off its feature
    commitment: float = 0.25  # tokenizer: weight of the commitment term
    code_entropy: float = 0.1  # tokenizer: weight of the usage-entropy term that keeps codes alive

    def __post_init__(self) -> None:
        check(self.flow_draws > 0, f"loss.flow_draws={self.flow_draws} must be positive")
        check_choice("loss.condition_span", self.condition_span, ("exact", "last"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left. The batch lies over data x fsdp, the tokens of a row over sequence
    where the strategy says so."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    strategy: str = "fsdp"
    sequence: int = 1
    slices: int = 1  # of chips that only the data centre's network joins; data lies over them first
    # Strategies of single parts in place of `strategy`'s own: {part: strategy}, {"dit": "dp"} keeps a whole DiT on each device.
    parts: tuple[tuple[str, str], ...] = ()
    # Devices that a machine without an accelerator is split into, if this run is the first to ask for devices; 0 leaves it
    # whole. XLA spreads small operations badly over cores, but runs one device a core without loss.
    cpu_devices: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    keep: int = 3
    # Parts to start from: {part: checkpoint directory}, part one of the model's (blip3o.PARTS).
    init_from: tuple[tuple[str, str], ...] = ()
    # What the AR's rows of the image tokens start from: "drawn" (or as init_from has them), or the tokenizer's "codes", also in
    # place of those of an AR from init_from (joint stage).
    image_rows: str = "drawn"

    def __post_init__(self) -> None:
        check_choice("checkpoint.image_rows", self.image_rows, ("drawn", "codes"))


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0  # of the image tokens; 0 takes the likeliest
    top_k: int = 1200  # image tokens kept at each position; 0 keeps all
    top_p: float = 0.95  # probability mass kept at each position; 1 keeps all
    steps: int = 30  # Euler steps of the diffusion head
    guidance: float = 2.0  # classifier-free, of the velocity; 1 leaves the unconditional branch out
    # Towards the reference images: v = v_null + g_r (v_references - v_null) + g (v - v_references); 0 has the guidance above
    # for both. A model learns the branch of the references alone by loss.instruction_dropout.
    reference_guidance: float = 0.0
    # Classifier-free guidance of the image tokens; 1 leaves the branch without a caption out, which only means something to
    # a model trained with loss.caption_dropout.
    token_guidance: float = 1.0
    batch_size: int = 16  # prompts drawn at once

    def __post_init__(self) -> None:
        check(
            0 <= self.temperature < math.inf, f"sampling.temperature={self.temperature} must be 0 (the likeliest token) or more"
        )
        check(self.top_k >= 0, f"sampling.top_k={self.top_k} must be 0 (off) or more")
        check(0 < self.top_p <= 1, f"sampling.top_p={self.top_p} must lie in (0, 1]; 1 switches it off")
        check(self.steps > 0, f"sampling.steps={self.steps} must be positive")
        for name, off in (("guidance", 1), ("token_guidance", 1), ("reference_guidance", 0)):
            value = getattr(self, name)
            check(math.isfinite(value), f"sampling.{name}={value} must be a finite number; {off} switches it off")
        check(self.batch_size > 0, f"sampling.batch_size={self.batch_size} must be positive")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One term of the weighted sum of rewards. `name`: one of rl/rewards/ or "python:MODULE.FUNCTION"; `options`, {option:
    value}, are the reward's own. `clip`: bounds that its score is clipped to before it is weighed."""

    name: str = ""
    weight: float = 1.0
    clip: tuple[float, float] | None = None
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check(
            math.isfinite(self.weight) and self.weight != 0,
            f"rl.rewards: weight={self.weight} of {self.name} must be finite and not 0",
        )
        check(not self.clip or self.clip[0] < self.clip[1], f"rl.rewards: clip={self.clip} of {self.name} must be (low, high)")


@dataclasses.dataclass(frozen=True)
class FlowPolicyConfig:
    """Flow-GRPO (arXiv 2505.05470): the sampler of the diffusion head as a policy."""

    steps: int = 10  # of the stochastic sampler in a rollout
    trained: int = 4  # of these, drawn at random for each rollout, are kept and trained on
    noise: float = 0.7  # the stochastic sampler's a; 0 would be the Euler sampler, which has no probabilities
    clip: float = 1e-3  # of the ratio, on both sides: a step's log-probability is a mean over the latents
    kl: float = 0.01  # weight of the KL divergence to the policy that the run starts from

    def __post_init__(self) -> None:
        check(self.steps > 1, f"rl.flow.steps={self.steps} must be 2 or more")
        check(
            0 < self.trained < self.steps,
            f"rl.flow.trained={self.trained} must lie between 1 and {self.steps - 1}: the last of rl.flow.steps has no noise",
        )
        check(self.noise > 0, f"rl.flow.noise={self.noise} must be positive")
        check(self.clip > 0, f"rl.flow.clip={self.clip} must be positive")
        check(self.kl >= 0, f"rl.flow.kl={self.kl} must be 0 (off) or more")


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """Online reinforcement learning (`blip3o rl`) from the checkpoint that `checkpoint.init_from` names. Defaults are the
    published recipe's (arXiv 2510.15857)."""

    policy: str = "ar"  # "ar": GRPO on the image tokens; "flow": Flow-GRPO on the diffusion head; "both"
    prompts_file: str = ""  # JSON lines {"prompt" or "caption": ..., and what the rewards read}, or plain text, one a line
    prompts: int = 8  # prompts of a rollout
    group: int = 16  # images of each, which are compared with each other
    # How image tokens and latents are drawn in a rollout; `rollout.batch_size` images at once.
    rollout: SamplingConfig = SamplingConfig(top_k=0, top_p=1.0)
    updates: int = 1  # optimizer steps on a rollout
    advantage: str = "std"  # reward - mean of the group, over its deviation ("std") or not ("mean", as in Dr. GRPO)
    advantage_epsilon: float = 1e-4
    # Sum of the token losses over: all tokens ("bnpo"), each row's own and then rows ("grpo"), a constant ("dr_grpo").
    normalise: str = "bnpo"
    ratio: str = "token"  # or "sequence": one ratio an image, the geometric mean over its tokens (GSPO)
    clip: tuple[float, float] = (0.2, 0.2)  # of the ratio, downwards and upwards; DAPO clips higher upwards
    kl: float = 0.001  # weight of the KL divergence to the policy that the run starts from; 0 keeps no second policy
    refill: int = 0  # DAPO: up to so many further rollouts to put other prompts in the place of groups without a difference
    logits_chunk: int = 128  # image tokens a row whose logits are held at once
    max_ratio_gap: float = 0.0  # largest |ratio - 1| before the first update above which the run stops; 0 only warns
    rewards: tuple[RewardConfig, ...] = ()
    workers: int = 0  # reward processes of each host; 0: as many as it has cores
    timeout: float = 60.0  # seconds that a worker may take for one image
    retries: int = 1  # of an image whose reward failed
    max_failed: float = 0.1  # share of a rollout's images without a reward above which the run stops
    stale: bool = False  # train on the rollout before, while rewards of this one are computed
    samples_every: int = 10  # rollouts between two pictures of the best and worst samples
    keep_images: bool = False  # every image as a PNG file under the workdir, which `blip3o rl rescore` can judge again
    flow: FlowPolicyConfig = FlowPolicyConfig()

    def __post_init__(self) -> None:
        check_choice("rl.policy", self.policy, ("ar", "flow", "both"))
        check_choice("rl.advantage", self.advantage, ("std", "mean"))
        check_choice("rl.normalise", self.normalise, ("bnpo", "grpo", "dr_grpo"))
        check_choice("rl.ratio", self.ratio, ("token", "sequence"))
        for name in ("prompts", "updates", "logits_chunk", "samples_every"):
            check(getattr(self, name) > 0, f"rl.{name}={getattr(self, name)} must be positive")
        check(self.group > 1, f"rl.group={self.group} must be 2 or more: an image is compared with others of its prompt")
        for name in ("kl", "refill", "max_ratio_gap", "workers", "retries"):
            check(getattr(self, name) >= 0, f"rl.{name}={getattr(self, name)} must be 0 or more")
        check(min(self.clip) > 0 and self.clip[0] < 1, f"rl.clip={self.clip} must be (downwards, upwards), as in (0.2, 0.2)")
        check(
            not (self.refill and self.stale), "rl.refill looks at rewards before the next rollout, rl.stale after: turn one off"
        )
        check(self.timeout > 0, f"rl.timeout={self.timeout} is a number of seconds")
        check(0 <= self.max_failed <= 1, f"rl.max_failed={self.max_failed} is a share of the images: 0 to 1")
        check(
            self.policy == "flow" or self.rollout.temperature > 0,
            f"rl.rollout.temperature=0 leaves rl.policy={self.policy} nothing to compare: tokens of a group must differ",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: one stage on one model, data mixture and mesh."""

    stage: str = "joint"
    seed: int = 0
    steps: int = 1000
    log_every: int = 10
    preview: int = 8  # rows of a batch drawn into TensorBoard at each checkpoint; 0 for none
    # Regular expressions over parameter paths ("ar/layers/mlp/up/kernel"): what is trained. () takes the stage's own:
    # for joint the published freezing (AR, connector, the DiT's caption layers).
    trainable: tuple[str, ...] = ()
    max_nonfinite: int = 10  # steps in a row with a non-finite loss or gradient before the run stops
    watchdog: float = 600.0  # seconds without progress after which stderr tells which host is stuck in what; 0 for never
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    rl: RlConfig = RlConfig()

    def __post_init__(self) -> None:
        check_choice("stage", self.stage, STAGES)
        check(self.steps > 0, f"steps={self.steps} must be positive")
        check(self.watchdog >= 0, f"watchdog={self.watchdog} is a number of seconds; 0 switches it off")
        check(
            self.data.batch_size % self.optimizer.accumulate == 0,
            f"data.batch_size={self.data.batch_size} must be a multiple of optimizer.accumulate={self.optimizer.accumulate}",
        )
        check(
            self.stage == "joint" or self.checkpoint.image_rows == "drawn",
            f"checkpoint.image_rows={self.checkpoint.image_rows!r} belongs to stage 'joint'; stage {self.stage!r} has no AR",
        )
        for name in ("condition_dropout", "caption_dropout"):
            share = getattr(self.loss, name)
            check(0 <= share <= 1, f"loss.{name}={share} is a share of the rows: it must lie between 0 and 1")
        alone, both = self.loss.instruction_dropout, self.loss.condition_dropout
        check(
            0 <= alone <= 1 - both,
            f"loss.instruction_dropout={alone} is a share of the rows beside loss.condition_dropout={both}: 0 to 1 together",
        )
        check(
            self.data.pack == 1 or (self.stage == "joint" and self.loss.condition_span == "exact"),
            f"data.pack={self.data.pack} is for stage 'joint' with loss.condition_span='exact': 1 has a row for each example",
        )
        check(
            not (
                self.stage == "joint" and self.data.cache_dir and self.model.editing.references and self.model.editing.features
            ),
            "data.cache_dir keeps no features, which model.editing.features reads: empty data.cache_dir",
        )
        check(
            not (self.loss.caption_dropout and self.model.template.supervise_prompt),
            "loss.caption_dropout hides prompts that model.template.supervise_prompt trains on: turn one of them off",
        )

    @property
    def title(self) -> str:
        """What messages call the run."""
        return "rl" if self.rl.rewards else self.stage


def to_dict(value: Any) -> Any:
    """Nested plain dicts, lists and scalars: what config.json in a checkpoint holds."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    return value


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as {"a.b": value}."""
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in flat(child, f"{path}.{key}" if path else str(key)).items()}
    return {path: value}


def to_config_dict(config: Config) -> Any:
    """`Config` as an `ml_collections.ConfigDict`, so that command-line flags can override fields."""
    import ml_collections

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return ml_collections.ConfigDict({f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, tuple):
            return tuple(to_dict(v) if dataclasses.is_dataclass(v) else v for v in value)
        return value

    return convert(config)


def from_dict(values: Any, cls: Any = Config, path: str = "") -> Any:
    """The inverse of `to_dict` and `to_config_dict`: validated, with the nearest valid key for an unknown one."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    prefix = f"{path}." if path else ""
    check(isinstance(values, dict), f"{path or 'config'} must be a group of fields, not {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"it takes {', '.join(hints)}"
            raise ConfigError(f"unknown config key {prefix}{key}: {hint}")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def _convert(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(value, hint, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(value, next(a for a in args if a is not types.NoneType), path)
    if origin is tuple:
        check(isinstance(value, list | tuple), f"{path}={value!r} must be a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
        check(len(value) == len(args), f"{path}={value!r} must hold {len(args)} values")
        return tuple(_convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    check(right, f"{path}={value!r} must be of type {hint.__name__}")
    return value
