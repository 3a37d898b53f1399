"""Every setting of every part and stage, as frozen dataclasses.

A file under configs/ returns a `Config`; `Config` values turn into an `ml_collections.ConfigDict`
(`to_config_dict`) so that `--config.a.b=v` can override a field, and back (`from_dict`), where an
unknown key, a wrong type or a value that cannot work is an error that names the field. A field's
annotation says what it may hold (fields.py); what concerns several fields is checked by the group
that holds them. Fields of a network carry the names of the library class it matches (transformers,
diffusers), so a published config.json reads straight into them.
"""

import dataclasses
import math
import typing
from typing import Annotated, Any, Literal

from blip3o_jax import fields
from blip3o_jax.fields import (
    Bounds,
    ConfigGroup,
    Count,
    Decay,
    Depth,
    Epsilon,
    Finite,
    Fraction,
    Heads,
    Length,
    NonNegative,
    Path,
    Positive,
    PositiveInt,
    Regex,
    Seed,
    Side,
    Text,
    Width,
    check,
    check_choice,
)
from blip3o_jax.fields import ConfigError as ConfigError
from blip3o_jax.fields import UserError as UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "full", "dots", "offload"]
REMAT: tuple[str, ...] = typing.get_args(Remat)
Part = Literal[
    "tokenizer",
    "text_tower",
    "ar",
    "connector",
    "dit",
    "vae",
    "patch_readout",
    "latent_connector",
    "feature_connector",
]
PerStage = Length(2, 12)  # resolutions of an autoencoder, one entry of a tuple each
TableRows = Annotated[int, Bounds(1, 2**24)]  # of a vocabulary, of a codebook
VaeBlock = Literal["ResBlock", "EfficientViTBlock"]
VaeLayers = Annotated[int, Bounds(0, 64)]
VaeScales = Annotated[tuple[Annotated[int, Bounds(1, 63)], ...], Length(0, 8)]
DataFormat = Literal["auto", "tfds", "webdataset", "parquet", "folder"]
BatchSize = Annotated[int, Bounds(1, 2**24)]
LearningRate = Annotated[float, Bounds(0, 100)]
MeshSize = Annotated[int, Bounds(-1, 2**20, note="-1 takes what is left")]
StrategyName = Literal[
    "dp",
    "fsdp",
    "fsdp_tp",
    "fsdp_sp",
    "hybrid",
    "hybrid_dp",
    "hybrid_fsdp",
    "hybrid_fsdp_tp",
    "hybrid_fsdp_sp",
]
ClipDown = Annotated[float, Bounds(1e-6, 1, open_high=True)]
Seconds = Annotated[float, Bounds(1e-3, 1e7)]
Guidance = Annotated[float, Bounds(-1000, 1000)]


@dataclasses.dataclass(frozen=True)
class LoraConfig(ConfigGroup, path="lora"):
    """Low-rank adapters (arXiv 2106.09685) beside the kernels of a part's stacked layers: y = x W +
    alpha / rank (x A) B, A [in, rank] drawn, B [rank, out] zero at first. They are float32 whatever
    the kernels are; `trainable=('.*/lora_.*',)` trains nothing else. `blip3o convert export` writes
    the sums.
    """

    rank: Annotated[int, Bounds(0, 2**14)] = 0  # 0: none
    alpha: Finite = 32.0
    targets: tuple[Text, ...] = ()  # names of the linear layers that have them

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0

    def of(self, name: str) -> "LoraConfig | None":
        """What the linear layer of this name has, or None."""
        return self if self.rank and name in self.targets else None

    def check(self, part: str, names: tuple[str, ...]) -> None:
        """ConfigError unless `names`, the layers that can have them, hold all targets."""
        check(
            bool(self.targets) or not self.rank,
            f"{part}.lora.targets is empty: name some of {', '.join(names)}, or rank 0",
        )
        for name in self.targets:
            check_choice(f"{part}.lora.targets", name, names)


QWEN3_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
SANA_LINEAR = (
    "q",
    "k",
    "v",
    "o",
    "expand",
    "contract",
)  # of both attentions, and of the feed-forward around its convolution


@dataclasses.dataclass(frozen=True)
class Qwen3Config(ConfigGroup, path="model.ar"):
    """Fields of `transformers.Qwen3Config`. `vocab_size` counts the rows in use; the rows stored
    are padded up to a multiple of `vocab_multiple` so that the table shards evenly (`Vocabulary` in
    text/ owns the ids).
    """

    vocab_size: TableRows = 217210
    hidden_size: Width = 2048
    intermediate_size: Width = 6144
    num_hidden_layers: Depth = 28
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads = 8
    head_dim: Width = 128
    rope_theta: Annotated[float, Bounds(1, 1e12)] = 1e6
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: Annotated[float, Bounds(0, 100)] = 0.02
    # Deviation the token embeddings start with; None: initializer_range. Training from nothing
    # learns faster where the embeddings are not small beside what the layers add to them.
    embedding_range: Annotated[float, Bounds(0, 100)] | None = None
    vocab_multiple: Annotated[int, Bounds(1, 2**16)] = 512
    # Of vocab_size: rows at the end that no id stands for, as some published checkpoints
    # have.
    spare_rows: Annotated[int, Bounds(0, 2**24)] = 0
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "full"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile
    # Over whole rows: by the platform ("auto"), or "xla", "splash" (TPU), "cudnn" (GPU).
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    lora: LoraConfig = LoraConfig(targets=QWEN3_LINEAR)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora.check("ar", QWEN3_LINEAR)
        check(
            self.spare_rows < self.vocab_size,
            f"ar.spare_rows={self.spare_rows} must be less than ar.vocab_size={self.vocab_size}: they are its last rows",
        )
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"ar.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"ar.num_key_value_heads={self.num_key_value_heads}",
        )
        check(
            self.head_dim % 2 == 0, f"ar.head_dim={self.head_dim} must be even (rotary embedding)"
        )

    @property
    def embedding_deviation(self) -> float:
        return self.initializer_range if self.embedding_range is None else self.embedding_range

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _check_heads(part: str, width: int, heads: int) -> None:
    check(
        width % heads == 0,
        f"{part}.hidden_size={width} must be a multiple of {part}.num_attention_heads={heads}",
    )


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(ConfigGroup, path="model.tokenizer.encoder"):
    """Fields of `transformers.SiglipVisionConfig`: the encoder of the vision tokenizer."""

    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    num_hidden_layers: Depth = 27
    num_attention_heads: Heads = 16
    image_size: Side = 384
    patch_size: Side = 14
    layer_norm_eps: Epsilon = 1e-6
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads("tokenizer.encoder", self.hidden_size, self.num_attention_heads)
        check(
            self.patch_size <= self.image_size,
            f"tokenizer.encoder.patch_size={self.patch_size} must be at most tokenizer.encoder.image_size={self.image_size}",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TaTokDecoderConfig(ConfigGroup, path="model.tokenizer.decoder"):
    """Fields of `transformers.Siglip2VisionConfig` with patch_size 1: the decoder that reconstructs
    SigLIP2 features.
    """

    hidden_size: Width = 1152
    intermediate_size: Width = 3072
    num_hidden_layers: Depth = 3
    num_attention_heads: Heads = 12
    num_patches: Annotated[int, Bounds(1, 2**24)] = 256
    layer_norm_eps: Epsilon = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads("tokenizer.decoder", self.hidden_size, self.num_attention_heads)
        check(
            math.isqrt(self.num_patches) ** 2 == self.num_patches,
            f"tokenizer.decoder.num_patches={self.num_patches} must be a square number",
        )


@dataclasses.dataclass(frozen=True)
class TaTokConfig(ConfigGroup, path="model.tokenizer"):
    """The vision tokenizer: SigLIP2 encoder -> bottleneck -> SimVQ codebook -> decoder (section
    "TA-Tok" of docs/).
    """

    encoder: SiglipVisionConfig = SiglipVisionConfig()
    decoder: TaTokDecoderConfig = TaTokDecoderConfig()
    bottleneck_dim: Width = 1536
    codebook_size: TableRows = 65536
    select_layer: Annotated[int, Bounds(-1025, -1, note="it counts from the end")] = -2
    pool_scale: Annotated[int, Bounds(1, 3)] = 1
    l2_normalized: bool = True
    stochastic: bool = False
    stochastic_temperature: Positive = 0.03
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.encoder.num_hidden_layers
        check(
            -layers - 1 <= self.select_layer,
            f"tokenizer.select_layer={self.select_layer} must be -{layers + 1} or more: the encoder has {layers} layers",
        )
        check(
            self.pool_scale <= self.encoder.grid,
            f"tokenizer.pool_scale={self.pool_scale} is more than the encoder's {self.encoder.grid} patches along a side",
        )

    @property
    def grid(self) -> int:
        """Image tokens along one side: 27, 13 or 9 for pool scales 1, 2, 3 of the published
        encoder.
        """
        return self.encoder.grid // self.pool_scale

    @property
    def num_tokens(self) -> int:
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(ConfigGroup, path="model.text_tower"):
    """The caption encoder of the contrastive stage (SigLIP's text side); dropped once the vision
    encoder is trained.
    """

    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    num_hidden_layers: Depth = 27
    num_attention_heads: Heads = 16
    layer_norm_eps: Epsilon = 1e-6
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads("text_tower", self.hidden_size, self.num_attention_heads)


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(ConfigGroup, path="model.connector"):
    """Linear -> GELU(tanh) -> Linear -> RMSNorm between the AR's hidden states and the DiT's
    caption channels.
    """

    # Adds sine-cosine positions to the hidden states. The published model does without: it has had
    # the training in which rotary attention alone comes to tell a token its place in the image.
    positions: bool = False
    rms_norm_eps: Epsilon = 1e-5
    norm_init: Finite = 5.5**0.5
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"


@dataclasses.dataclass(frozen=True)
class EditingConfig(ConfigGroup, path="model.editing"):
    """Images in: how reference images reach the model (BLIP3o-NEXT, arXiv 2510.15857, section 4).
    With `references` 0 rows are text to image alone, and connectors that are there are kept and
    converted, but not read.
    """

    # Places for reference images in every row, taken or not.
    references: Annotated[int, Bounds(0, 64)] = 0
    # What stands for an image in the user's turn: its tokens, or with `features` its SigLIP2
    # features through `feature_connector`.
    features: bool = False
    # Conditioning routes of the diffusion head, each by itself or both: latents through
    # `latent_connector` after the condition tokens, and latents beside the noisy ones along the
    # width.
    latents: bool = False
    beside: bool = False
    # The latents beside the noise stand in the null condition as well, as published. False drops
    # them there, for `sampling.reference_guidance`.
    null_beside: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.beside or self.references > 0,
            "model.editing.beside=True needs model.editing.references of 1 or more",
        )


@dataclasses.dataclass(frozen=True)
class SanaConfig(ConfigGroup, path="model.dit"):
    """Fields of `diffusers.SanaTransformer2DModel` (SANA 1.5 1.6B by default)."""

    in_channels: Width = 32
    out_channels: Width = 32
    num_layers: Depth = 20
    num_attention_heads: Heads = 70
    attention_head_dim: Width = 32
    num_cross_attention_heads: Heads = 20
    cross_attention_head_dim: Width = 112
    cross_attention_dim: Width = 2240
    caption_channels: Width = 2304
    mlp_ratio: Annotated[float, Bounds(1e-3, 64)] = 2.5
    # Side of the latents that positions are counted on; others are sampled at any size too.
    sample_size: Side = 32
    patch_size: Side = 1
    # A number adds sine-cosine positions to the patches, divided by it; None leaves finding them to
    # the convolutions.
    interpolation_scale: Positive | None = None
    qk_norm: Literal["rms_norm_across_heads"] | None = "rms_norm_across_heads"
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "full"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile
    lora: LoraConfig = LoraConfig(targets=SANA_LINEAR)

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora.check("dit", SANA_LINEAR)
        check(
            self.num_cross_attention_heads * self.cross_attention_head_dim
            == self.cross_attention_dim,
            "dit.cross_attention_dim must equal num_cross_attention_heads * cross_attention_head_dim",
        )
        check(
            self.cross_attention_dim == self.hidden_size,
            "dit.cross_attention_dim must equal the hidden size",
        )
        check(
            int(self.mlp_ratio * self.hidden_size) >= 1,
            f"dit.mlp_ratio={self.mlp_ratio} leaves the feed-forward no channel at hidden size {self.hidden_size}",
        )


@dataclasses.dataclass(frozen=True)
class DcAeConfig(ConfigGroup, path="model.vae"):
    """Fields of `diffusers.AutoencoderDC` (f32c32 by default)."""

    in_channels: Width = 3
    latent_channels: Width = 32
    attention_head_dim: Width = 32
    encoder_block_types: Annotated[tuple[VaeBlock, ...], PerStage] = ("ResBlock",) * 3 + (
        "EfficientViTBlock",
    ) * 3
    decoder_block_types: Annotated[tuple[VaeBlock, ...], PerStage] = ("ResBlock",) * 3 + (
        "EfficientViTBlock",
    ) * 3
    encoder_block_out_channels: Annotated[tuple[Width, ...], PerStage] = (
        128,
        256,
        512,
        512,
        1024,
        1024,
    )
    decoder_block_out_channels: Annotated[tuple[Width, ...], PerStage] = (
        128,
        256,
        512,
        512,
        1024,
        1024,
    )
    encoder_layers_per_block: Annotated[tuple[VaeLayers, ...], PerStage] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: Annotated[tuple[VaeLayers, ...], PerStage] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: Annotated[tuple[VaeScales, ...], PerStage] = (
        (),
        (),
        (),
        (5,),
        (5,),
        (5,),
    )
    decoder_qkv_multiscales: Annotated[tuple[VaeScales, ...], PerStage] = (
        (),
        (),
        (),
        (5,),
        (5,),
        (5,),
    )
    upsample_block_type: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    downsample_block_type: Literal["Conv", "pixel_unshuffle"] = "Conv"
    decoder_norm_types: Literal["rms_norm"] = "rms_norm"
    decoder_act_fns: Literal["silu"] = "silu"
    scaling_factor: Positive = 0.41407
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.encoder_block_out_channels)
        names = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
        for side in ("encoder", "decoder"):
            columns = [getattr(self, f"{side}_{name}") for name in names]
            for name, values in zip(names, columns, strict=True):
                check(
                    len(values) == stages,
                    f"vae.{side}_{name} has {len(values)} entries, one for each of {stages} stages needed",
                )
            self._check_blocks(side, *columns)
            self._check_channels(side)

    def _check_blocks(
        self,
        side: str,
        kinds: tuple[str, ...],
        channels: tuple[int, ...],
        layers: tuple[int, ...],
        scales: tuple[tuple[int, ...], ...],
    ) -> None:
        check(
            all(layers[1:-1]),
            f"vae.{side}_layers_per_block={layers}: only the first and the last stage may be empty",
        )
        for i, kind in enumerate(kinds):
            check(
                all(size % 2 for size in scales[i]),
                f"vae.{side}_qkv_multiscales[{i}]={scales[i]} must be odd kernel sizes",
            )
            check(
                kind != "EfficientViTBlock" or channels[i] >= self.attention_head_dim,
                f"vae.{side}_block_out_channels[{i}]={channels[i]} must be at least "
                f"vae.attention_head_dim={self.attention_head_dim}",
            )

    def _check_channels(self, side: str) -> None:
        """Shortcuts average or repeat whole runs of channels."""
        channels = getattr(self, f"{side}_block_out_channels")
        field = f"vae.{side}_block_out_channels={channels}"
        first = 0 if getattr(self, f"{side}_layers_per_block")[0] else 1
        for fine, coarse in zip(channels[first:], channels[first + 1 :], strict=False):
            check(
                4 * fine % coarse == 0,
                f"{field}: 4 x {fine} must be a multiple of the next stage's {coarse}",
            )
        check(
            channels[-1] % self.latent_channels == 0,
            f"{field}: the last must be a multiple of vae.latent_channels={self.latent_channels}",
        )
        if side == "encoder" and self.downsample_block_type == "pixel_unshuffle":
            check(
                all(c % 4 == 0 for c in channels[1:]),
                f"{field}: with pixel_unshuffle every stage after the first needs multiples of 4",
            )

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class FlowConfig(ConfigGroup, path="model.flow"):
    """Fields of `diffusers.FlowMatchEulerDiscreteScheduler` that matter here."""

    num_train_timesteps: Annotated[int, Bounds(1, 10**6)] = 1000
    shift: Annotated[float, Bounds(1e-3, 1e3)] = 1.0


@dataclasses.dataclass(frozen=True)
class TextConfig(ConfigGroup, path="model.text"):
    """The text tokenizer. `path`: a SentencePiece .model, or Qwen's tokenizer.json (or the
    directory that holds it).

    With `train_size` > 0 and no path, a SentencePiece tokenizer of that many pieces is trained on
    the run's own captions, and `ar.vocab_size` becomes what it and the image tokens come to.
    """

    kind: Literal["bpe", "sentencepiece"] = "bpe"
    path: Path = ""
    train_size: Annotated[int, Bounds(0, 2**20)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.train_size or self.kind == "sentencepiece",
            "text.train_size trains a SentencePiece tokenizer: set text.kind=sentencepiece, or text.train_size=0",
        )


@dataclasses.dataclass(frozen=True)
class TemplateConfig(ConfigGroup, path="model.template"):
    """The chat template: what the user says for each task. `<image>` stands where the reference
    images are shown; an empty `system` leaves the system turn out.
    """

    system: Text = "You are a helpful assistant."
    generate: Text = "Please generate image based on the following caption: {caption}"
    edit: Text = (
        "Please edit this image according to the following instruction: {instruction}.\n<image>"
    )
    edit_several: Text = "Please edit these {count} images according to the following instruction: {instruction}.\n<image>"
    reconstruct: Text = "<image>\nPlease reconstruct the given image."
    understand: Text = "<image>\n{question}"
    # The reference also trains on the prompt's own tokens; kept as an option for comparison.
    supervise_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig(ConfigGroup, path="model"):
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
    # Side of the square target image in pixels; the latent grid is image_size /
    # vae.spatial_compression.
    image_size: Side = 1024
    # (height, width) in pixels of the images that are drawn and shown, each cut to the nearest
    # shape; the square alone where there are none.
    buckets: Annotated[tuple[tuple[Side, Side], ...], Length(0, 1024)] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for bucket in self.buckets:
            self.check_size(tuple(bucket), "model.buckets")
        check(
            len(set(self.buckets)) == len(self.buckets),
            f"model.buckets={self.buckets} names a size twice",
        )
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
            fits,
            f"{name}={size} must be (height, width), both multiples of {unit}: the autoencoder's factor times the patch",
        )


@dataclasses.dataclass(frozen=True)
class SourceConfig(ConfigGroup, path="data.sources"):
    """One data set. `format`: tfds (ArrayRecord directory), webdataset (tar file, glob or
    directory), parquet, folder (images + captions.jsonl), or auto (told from the path). `task`
    "reconstruct" has captioned images shown, and drawn again from their tokens; otherwise a record
    says what it is for.
    """

    path: Path = ""
    format: DataFormat = "auto"
    weight: Positive = 1.0
    split: Path = "train"
    task: Literal["", "reconstruct"] = ""
    # Format folder: where images lie, and are named from, beside the directory of captions.jsonl.
    images: Path = ""


@dataclasses.dataclass(frozen=True)
class DataConfig(ConfigGroup, path="data"):
    # A single source can be given as `path` (and `format`, `split`, `images`); a mixture as
    # `sources`.
    path: Path = ""
    format: DataFormat = "auto"
    split: Path = "train"
    images: Path = ""
    sources: tuple[SourceConfig, ...] = ()
    batch_size: BatchSize = 512  # global, in examples
    # Tokens of one row, prompt and image together.
    max_length: Annotated[int, Bounds(1, 2**20)] = 1152
    # Examples that share a row, one after the other: short ones leave room for long ones.
    pack: Annotated[int, Bounds(1, 4096)] = 1
    # "shared": one centre crop for tokenizer and autoencoder; "reference": tokenizer
    # squashed.
    crop: Literal["shared", "reference"] = "shared"
    # Decoding processes per host; 0 decodes in threads of the training process.
    workers: Annotated[int, Bounds(0, 1024)] = 8
    prefetch: Annotated[int, Bounds(1, 1024)] = 2  # batches each worker keeps ready
    shuffle: bool = True
    max_bad_fraction: Fraction = 0.01  # of the records seen; above it the run stops
    # What becomes of a record whose text leaves no room for its image in the row: "skip" (counted),
    # "truncate" (the text is cut, never the image's tokens) or "error" (the run ends).
    too_long: Literal["skip", "truncate", "error"] = "skip"
    # Of an image, counted from its header; a record with a larger one cannot be read.
    max_pixels: Annotated[int, Bounds(1, 2**31)] = 80_000_000
    # Where ids and latents of the frozen encoders are kept; "" encodes inside the step.
    cache_dir: Path = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.batch_size % self.pack == 0,
            f"data.batch_size={self.batch_size} must be a multiple of data.pack={self.pack}",
        )

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        single = (
            (SourceConfig(self.path, self.format, 1.0, self.split, images=self.images),)
            if self.path
            else ()
        )
        return single + self.sources


Stage = Literal["autoencoder", "contrastive", "tokenizer", "joint"]
STAGES: tuple[str, ...] = typing.get_args(Stage)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(ConfigGroup, path="optimizer"):
    """Linear warm-up to `learning_rate`, then a cosine to `end_learning_rate` at the last step."""

    # Or "muon": the matrices of the layer stacks by Muon, the rest by AdamW
    # (train/optimizer.py).
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: LearningRate = 5e-5
    end_learning_rate: LearningRate = 1e-5
    warmup_fraction: Fraction = 0.01
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Epsilon = 1e-8
    muon_beta: Decay = 0.95
    clip_norm: Annotated[float, Bounds(0, 1e6, note="0 switches it off")] = 1.0
    accumulate: Annotated[int, Bounds(1, 2**16)] = 1  # micro-batches per step
    ema_decay: Decay = 0.0  # 0 keeps no averaged weights


@dataclasses.dataclass(frozen=True)
class LossConfig(ConfigGroup, path="loss"):
    """Weights of the losses, and the constants of each stage's own."""

    ce: NonNegative = 1.0
    flow: NonNegative = 1.0
    # Share of rows whose hidden states are zeroed before the connector.
    condition_dropout: Fraction = 0.1
    # Share of rows whose image tokens see no caption, for `sampling.token_guidance`. Where it
    # equals condition_dropout these are the same rows.
    caption_dropout: Fraction = 0.0
    # Share of rows whose hidden states are zeroed while their references stay, for
    # `sampling.reference_guidance`.
    instruction_dropout: Fraction = 0.0
    # Noises and noise levels drawn for each example: more of them for one pass of the AR.
    flow_draws: Annotated[int, Bounds(1, 1024)] = 1
    # "exact" takes the hidden states of <S0>, I_1 .. I_n; "last" the reference's last n + 1
    # positions of the row.
    condition_span: Literal["exact", "last"] = "exact"
    ce_chunk: PositiveInt = 512  # tokens per block of the cross entropy
    gradient: NonNegative = 0.4  # autoencoder: weight of the image-gradient term beside L1
    squared: NonNegative = 4.0  # autoencoder: weight of the squared error beside L1
    # autoencoder: weight of the term that holds each channel of the scaled latents at unit
    # variance, which flow matching expects, and deviation of the noise put on them, which makes the
    # decoder forgive what sampling gets slightly wrong.
    latent_scale: NonNegative = 0.0
    latent_noise: NonNegative = 0.0
    dense: NonNegative = 0.0  # contrastive: weight of reading each patch's pixels off its feature
    commitment: NonNegative = 0.25  # tokenizer: weight of the commitment term
    # Tokenizer: weight of the usage-entropy term that keeps codes alive.
    code_entropy: NonNegative = 0.1


@dataclasses.dataclass(frozen=True)
class MeshConfig(ConfigGroup, path="mesh"):
    """Devices along each mesh axis; -1 takes what is left. The batch lies over data x fsdp, the
    tokens of a row over sequence where the strategy says so.
    """

    data: MeshSize = 1
    fsdp: MeshSize = -1
    tensor: MeshSize = 1
    strategy: StrategyName = "fsdp"
    sequence: MeshSize = 1
    # Of chips that only the data centre's network joins; data lies over them first.
    slices: Annotated[int, Bounds(1, 2**16)] = 1
    # Strategies of single parts in place of `strategy`'s own: {part: strategy}, {"dit": "dp"} keeps
    # a whole DiT on each device.
    parts: tuple[tuple[Part, StrategyName], ...] = ()
    # Devices that a machine without an accelerator is split into, if this run is the first to ask
    # for devices; 0 leaves it whole. XLA spreads small operations badly over cores, but runs one
    # device a core without loss.
    cpu_devices: Annotated[int, Bounds(0, 1024)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}
        listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
        good = 0 not in sizes.values() and list(sizes.values()).count(-1) <= 1
        check(good, f"mesh sizes {listed}: positive, and -1 (what is left) at most once")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(ConfigGroup, path="checkpoint"):
    every: PositiveInt = 1000
    keep: PositiveInt = 3
    # Parts to start from: {part: checkpoint directory}, part one of the model's (blip3o.PARTS).
    init_from: tuple[tuple[Part, Path], ...] = ()
    # What the AR's rows of the image tokens start from: "drawn" (or as init_from has them), or the
    # tokenizer's "codes", also in place of those of an AR from init_from (joint stage).
    image_rows: Literal["drawn", "codes"] = "drawn"


@dataclasses.dataclass(frozen=True)
class SamplingConfig(ConfigGroup, path="sampling"):
    # Of the image tokens; 0 takes the likeliest.
    temperature: Annotated[float, Bounds(0, 1000)] = 1.0
    top_k: Count = 1200  # image tokens kept at each position; 0 keeps all
    # Probability mass kept at each position; 1 keeps all.
    top_p: Annotated[float, Bounds(0, 1, open_low=True, note="1 switches it off")] = 0.95
    steps: Annotated[int, Bounds(1, 10_000)] = 30  # Euler steps of the diffusion head
    # Classifier-free, of the velocity; 1 leaves the unconditional branch out.
    guidance: Guidance = 2.0
    # Towards the reference images: v = v_null + g_r (v_references - v_null) + g (v - v_references);
    # 0 has the guidance above for both. A model learns the branch of the references alone by
    # loss.instruction_dropout.
    reference_guidance: Guidance = 0.0
    # Classifier-free guidance of the image tokens; 1 leaves the branch without a caption out, which
    # only means something to a model trained with loss.caption_dropout.
    token_guidance: Guidance = 1.0
    batch_size: BatchSize = 16  # prompts drawn at once


@dataclasses.dataclass(frozen=True)
class RewardConfig(ConfigGroup, path="rl.rewards"):
    """One term of the weighted sum of rewards. `name`: one of rl/rewards/ or
    "python:MODULE.FUNCTION"; `options`, {option: value}, are the reward's own. `clip`: bounds that
    its score is clipped to before it is weighed.
    """

    name: Text = ""
    weight: Finite = 1.0
    clip: tuple[Finite, Finite] | None = None
    options: tuple[tuple[Text, Path], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.weight != 0, f"rl.rewards: weight={self.weight} of {self.name} must not be 0")
        check(
            not self.clip or self.clip[0] < self.clip[1],
            f"rl.rewards: clip={self.clip} of {self.name} must be (low, high)",
        )


@dataclasses.dataclass(frozen=True)
class FlowPolicyConfig(ConfigGroup, path="rl.flow"):
    """Flow-GRPO (arXiv 2505.05470): the sampler of the diffusion head as a policy."""

    steps: Annotated[int, Bounds(2, 10_000)] = 10  # of the stochastic sampler in a rollout
    trained: PositiveInt = 4  # of these, drawn at random for each rollout, are kept and trained on
    # The stochastic sampler's a; 0 would be the Euler sampler, which has no probabilities.
    noise: Annotated[float, Bounds(1e-6, 100)] = 0.7
    # Of the ratio, on both sides: a step's log-probability is a mean over the latents.
    clip: Positive = 1e-3
    kl: NonNegative = 0.01  # weight of the KL divergence to the policy that the run starts from

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.trained < self.steps,
            f"rl.flow.trained={self.trained} must lie between 1 and {self.steps - 1}: the last of rl.flow.steps has no noise",
        )


@dataclasses.dataclass(frozen=True)
class RlConfig(ConfigGroup, path="rl"):
    """Online reinforcement learning (`blip3o rl`) from the checkpoint that `checkpoint.init_from`
    names. Defaults are the published recipe's (arXiv 2510.15857).
    """

    # "ar": GRPO on the image tokens; "flow": Flow-GRPO on the diffusion head; "both".
    policy: Literal["ar", "flow", "both"] = "ar"
    # JSON lines {"prompt" or "caption": ..., and what the rewards read}, or plain text, one a
    # line.
    prompts_file: Path = ""
    prompts: Annotated[int, Bounds(1, 2**20)] = 8  # prompts of a rollout
    # Images of each, which are compared with each other.
    group: Annotated[
        int, Bounds(2, 2**14, note="an image is compared with others of its prompt")
    ] = 16
    # How image tokens and latents are drawn in a rollout; `rollout.batch_size` images at once.
    rollout: SamplingConfig = SamplingConfig(top_k=0, top_p=1.0)
    updates: Annotated[int, Bounds(1, 1024)] = 1  # optimizer steps on a rollout
    # Reward - mean of the group, over its deviation ("std") or not ("mean", as in Dr. GRPO).
    advantage: Literal["std", "mean"] = "std"
    advantage_epsilon: Epsilon = 1e-4
    # Sum of the token losses over: all tokens ("bnpo"), each row's own and then rows ("grpo"), a
    # constant ("dr_grpo").
    normalise: Literal["bnpo", "grpo", "dr_grpo"] = "bnpo"
    # Or "sequence": one ratio an image, the geometric mean over its tokens (GSPO).
    ratio: Literal["token", "sequence"] = "token"
    # Of the ratio, downwards and upwards; DAPO clips higher upwards.
    clip: tuple[ClipDown, Positive] = (0.2, 0.2)
    # Weight of the KL divergence to the policy that the run starts from; 0 keeps no second
    # policy.
    kl: NonNegative = 0.001
    # DAPO: up to so many further rollouts to put other prompts in the place of groups without
    # a difference.
    refill: Annotated[int, Bounds(0, 1024)] = 0
    logits_chunk: PositiveInt = 128  # image tokens a row whose logits are held at once
    # Largest |ratio - 1| before the first update above which the run stops; 0 only warns.
    max_ratio_gap: NonNegative = 0.0
    rewards: tuple[RewardConfig, ...] = ()
    # Reward processes of each host; 0: as many as it has cores.
    workers: Annotated[int, Bounds(0, 1024)] = 0
    timeout: Seconds = 60.0  # seconds that a worker may take for one image
    retries: Annotated[int, Bounds(0, 1000)] = 1  # of an image whose reward failed
    # Share of a rollout's images without a reward above which the run stops.
    max_failed: Fraction = 0.1
    stale: bool = False  # train on the rollout before, while rewards of this one are computed
    samples_every: PositiveInt = 10  # rollouts between two pictures of the best and worst samples
    keep_images: bool = False  # every image as a PNG file under the workdir, which `blip3o rl rescore` can judge again
    flow: FlowPolicyConfig = FlowPolicyConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not (self.refill and self.stale),
            "rl.refill looks at rewards before the next rollout, rl.stale after: turn one off",
        )
        check(
            self.policy == "flow" or self.rollout.temperature > 0,
            f"rl.rollout.temperature=0 leaves rl.policy={self.policy} nothing to compare: tokens of a group must differ",
        )


@dataclasses.dataclass(frozen=True)
class Config(ConfigGroup):
    """A run: one stage on one model, data mixture and mesh."""

    stage: Stage = "joint"
    seed: Seed = 0
    steps: Annotated[int, Bounds(1, 2**30)] = 1000
    log_every: PositiveInt = 10
    # Rows of a batch drawn into TensorBoard at each checkpoint; 0 for none.
    preview: Annotated[int, Bounds(0, 1024)] = 8
    # Regular expressions over parameter paths ("ar/layers/mlp/up/kernel"): what is trained. ()
    # takes the stage's own: for joint the published freezing (AR, connector, the DiT's caption
    # layers).
    trainable: tuple[Regex, ...] = ()
    # Steps in a row with a non-finite loss or gradient before the run stops.
    max_nonfinite: PositiveInt = 10
    # Seconds without progress after which stderr tells which host is stuck in what; 0 for
    # never.
    watchdog: Annotated[float, Bounds(0, 1e7, note="0 switches it off")] = 600.0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    rl: RlConfig = RlConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.data.batch_size % self.optimizer.accumulate == 0,
            f"data.batch_size={self.data.batch_size} must be a multiple of optimizer.accumulate={self.optimizer.accumulate}",
        )
        check(
            self.stage == "joint" or self.checkpoint.image_rows == "drawn",
            f"checkpoint.image_rows={self.checkpoint.image_rows!r} belongs to stage 'joint'; stage {self.stage!r} has no AR",
        )
        alone, both = self.loss.instruction_dropout, self.loss.condition_dropout
        check(
            alone <= 1 - both,
            f"loss.instruction_dropout={alone} is a share of the rows beside loss.condition_dropout={both}: 0 to 1 together",
        )
        check(
            self.data.pack == 1 or (self.stage == "joint" and self.loss.condition_span == "exact"),
            f"data.pack={self.data.pack} is for stage 'joint' with loss.condition_span='exact': 1 has a row for each example",
        )
        check(
            not (
                self.stage == "joint"
                and self.data.cache_dir
                and self.model.editing.references
                and self.model.editing.features
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
        return {
            k: v
            for key, child in value.items()
            for k, v in flat(child, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}


def to_config_dict(config: Config) -> Any:
    """`Config` as an `ml_collections.ConfigDict`, so that command-line flags can override fields."""
    import ml_collections

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return ml_collections.ConfigDict(
                {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, tuple):
            return tuple(to_dict(v) if dataclasses.is_dataclass(v) else v for v in value)
        return value

    return convert(config)


def from_dict(values: Any, cls: Any = Config, path: str = "") -> Any:
    """Return the group `cls` that `to_dict` or `to_config_dict` wrote as `values`; see
    `fields.from_dict`.
    """
    return fields.from_dict(values, cls, path)
