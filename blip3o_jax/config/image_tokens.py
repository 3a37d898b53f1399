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
    intermediate_size: Width = 3072
    num_hidden_layers: Depth = 3
    num_attention_heads: Heads = 12
    num_patches: Annotated[int, Bounds(1, 2**24), Square()] = 256
    layer_norm_eps: Epsilon = 1e-6

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
    # Of the tokens an image is cut to: 1, 2 or 3, which `<S0>` .. `<S2>` name in a prompt.
    pool_scale: int
    dtype: str
    param_dtype: str

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
        check_heads("model.text_tower", self.hidden_size, self.num_attention_heads)
