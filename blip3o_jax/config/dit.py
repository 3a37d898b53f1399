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

    positions: bool = False
    """Add sine-cosine positions to the hidden states. The published model does without them: its
    training was long enough to learn a token's place in the image from rotary attention alone.
    """
    rms_norm_eps: Epsilon = 1e-5
    """Term that is added to the mean square in RMSNorm."""
    norm_init: Finite = 5.5**0.5
    """Initial value of the weights of RMSNorm: the scale of the captions that SANA was trained
    with.
    """
    dtype: Dtype = "bfloat16"
    """Dtype of the computation."""
    param_dtype: Dtype = "float32"
    """Dtype of the parameters."""


class DiffusionHeadConfig(PartConfig, path="model.dit"):
    """Declare the settings that all diffusion heads have.

    Their networks implement `dit.protocol.DiffusionHead`.
    """

    # Whether a velocity depends on how many equal condition tokens there are. Where it does not,
    # one token stands for all of the unconditional branch.
    counts_condition_tokens: ClassVar[bool] = False

    in_channels: int
    """Channels of the latents, those of the autoencoder."""
    out_channels: int
    """Channels of the velocity, those of the latents."""
    num_layers: int
    """Number of layers."""
    patch_size: int
    """Latents along a side of a token."""
    sample_size: int
    """Side, in latents, of the square image that positions are counted on. Images of other sizes
    can be sampled too.
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
    lora: LoraConfig
    """Low-rank adapters of the layers."""

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
    """Heads of the linear self-attention."""
    attention_head_dim: Width = 32
    """Width of a head of the self-attention; heads times it is the hidden size."""
    num_cross_attention_heads: Heads = 20
    """Heads of the attention to the condition tokens."""
    cross_attention_head_dim: Width = 112
    """Width of a head of the attention to the condition tokens."""
    cross_attention_dim: Width = 2240
    """Width of the attention to the condition tokens: its heads times their width, and the hidden
    size.
    """
    caption_channels: Width = 2304
    """Width of the condition tokens, which the connector outputs."""
    mlp_ratio: Annotated[float, Bounds(1e-3, 64)] = 2.5
    """Width of the feed-forward layers over the hidden size."""
    sample_size: Side = 32
    patch_size: Side = 1
    interpolation_scale: Positive | None = None
    """Number that divides the sine-cosine positions added to the patches. `None` adds none: the
    convolutions then learn positions.
    """
    qk_norm: Literal["rms_norm_across_heads"] | None = "rms_norm_across_heads"
    """Norm of the queries and keys over all heads together; `None` has none."""
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "full"
    unroll: bool = False
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
    num_layers: Annotated[int, Bounds(2, 1024)] = 24
    attention_head_dim: Width = 64
    """Width of an attention head; heads times it is the hidden size."""
    num_attention_heads: Heads = 24
    """Heads of the joint attention of latent and condition tokens."""
    joint_attention_dim: Width = 2304
    """Width of the condition tokens, which the connector outputs."""
    caption_projection_dim: Width = 1536
    """Width that the condition tokens are projected to: the hidden size."""
    pooled_projection_dim: Width = 2304
    """Width of the mean of the condition tokens: that of the condition tokens."""
    pos_embed_max_size: Side = 96
    """Tokens along a side of the table of positions; an image takes the middle of the table."""
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    """Norm of the queries and keys of each head; `None` has none."""
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "full"
    unroll: bool = False
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
    """Noise levels that training samples from; a timestep is a noise level times this number."""
    shift: Annotated[float, Bounds(1e-3, 1e3)] = 1.0
    """Shift s of the noise levels, sigma' = s sigma / (1 + (s - 1) sigma): above 1 more of them are
    near the noise.
    """
