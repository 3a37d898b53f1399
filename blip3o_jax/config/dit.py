"""Settings of the diffusion head and of the connector that conditions it."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup, PartConfig
from blip3o_jax.config.lora import LoraConfig
from blip3o_jax.config.types import (
    Depth,
    Dtype,
    Epsilon,
    Finite,
    Heads,
    Positive,
    Remat,
    Side,
    Width,
)

# Linear layers of both attentions, and of the feed-forward around its convolution.
SANA_LINEAR = ("q", "k", "v", "o", "expand", "contract")


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(ConfigGroup, path="model.connector"):
    """Set the connector, Linear -> GELU(tanh) -> Linear -> RMSNorm between the AR's hidden states
    and the DiT's caption channels.
    """

    # Adds sine-cosine positions to the hidden states. The published model does without: its
    # training was long enough to learn a token's place in the image from rotary attention alone.
    positions: bool = False
    rms_norm_eps: Epsilon = 1e-5
    norm_init: Finite = 5.5**0.5
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"


class DiffusionHeadConfig(PartConfig, path="model.dit"):
    """Declare the settings that all diffusion heads have.

    Their networks implement `dit.protocol.DiffusionHead`.
    """

    # Whether a velocity depends on how many equal condition tokens there are. Where it does not,
    # one token stands for all of the unconditional branch.
    counts_condition_tokens: ClassVar[bool] = False

    in_channels: int
    out_channels: int
    num_layers: int
    patch_size: int  # latents along a side of a token
    sample_size: int  # side of the latents that positions are counted on
    dtype: str
    param_dtype: str
    remat: str
    unroll: bool
    lora: LoraConfig

    @property
    def hidden_size(self) -> int:
        """Return the width of the residual stream."""
        raise NotImplementedError

    @property
    def caption_channels(self) -> int:
        """Return the width of the condition tokens."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SanaConfig(DiffusionHeadConfig, path="model.dit", model_type="sana"):
    """Hold the fields of `diffusers.SanaTransformer2DModel` (SANA 1.5 1.6B by default)."""

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
        """Return the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora.check("model.dit", SANA_LINEAR)
        check(
            self.num_cross_attention_heads * self.cross_attention_head_dim
            == self.cross_attention_dim,
            "model.dit.cross_attention_dim must equal "
            "num_cross_attention_heads * cross_attention_head_dim",
        )
        check(
            self.cross_attention_dim == self.hidden_size,
            "model.dit.cross_attention_dim must equal the hidden size",
        )
        check(
            int(self.mlp_ratio * self.hidden_size) >= 1,
            f"model.dit.mlp_ratio={self.mlp_ratio} leaves the feed-forward no channel at hidden "
            f"size {self.hidden_size}",
        )


MMDIT_LINEAR = ("q", "k", "v", "o", "up", "down")  # of both streams


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(DiffusionHeadConfig, path="model.dit", model_type="mmdit"):
    """Hold the fields of `diffusers.SD3Transformer2DModel` (the sizes of SD3 medium, for the
    latents of DC-AE, by default). Its pooled projection is made of the mean of the condition
    tokens.
    """

    counts_condition_tokens: ClassVar[bool] = True  # they are in one softmax with the latents

    sample_size: Side = 32
    patch_size: Side = 1
    in_channels: Width = 32
    out_channels: Width = 32
    num_layers: Annotated[Depth, Bounds(2, 1024)] = 24
    attention_head_dim: Width = 64
    num_attention_heads: Heads = 24
    joint_attention_dim: Width = 2304
    caption_projection_dim: Width = 1536
    pooled_projection_dim: Width = 2304
    # Tokens along a side of the table of positions, of which a map takes the middle.
    pos_embed_max_size: Side = 96
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "full"
    unroll: bool = False  # lay the layer loop out: faster on CPUs, slower to compile
    lora: LoraConfig = LoraConfig(targets=MMDIT_LINEAR)

    @property
    def hidden_size(self) -> int:
        """Return the width of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def caption_channels(self) -> int:
        """Return the width of the condition tokens."""
        return self.joint_attention_dim

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora.check("model.dit", MMDIT_LINEAR)
        check(
            self.hidden_size % 4 == 0,
            f"model.dit.num_attention_heads * attention_head_dim={self.hidden_size} must be a "
            "multiple of 4: sines and cosines of rows and columns",
        )
        check(
            self.caption_projection_dim == self.hidden_size,
            f"model.dit.caption_projection_dim={self.caption_projection_dim} must equal "
            f"num_attention_heads * attention_head_dim={self.hidden_size}",
        )
        check(
            self.pooled_projection_dim == self.joint_attention_dim,
            f"model.dit.pooled_projection_dim={self.pooled_projection_dim} must equal "
            f"model.dit.joint_attention_dim={self.joint_attention_dim}, whose mean it takes",
        )


@dataclasses.dataclass(frozen=True)
class FlowConfig(ConfigGroup, path="model.flow"):
    """Hold the fields of `diffusers.FlowMatchEulerDiscreteScheduler` that this package uses."""

    num_train_timesteps: Annotated[int, Bounds(1, 10**6)] = 1000
    shift: Annotated[float, Bounds(1e-3, 1e3)] = 1.0
