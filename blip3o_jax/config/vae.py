"""Settings of the autoencoder."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from blip3o_jax.config.constraints import Bounds, Length, Odd
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import PartConfig
from blip3o_jax.config.types import Dtype, Positive, Remat, Width

PerStage = Length(2, 12)  # resolutions of an autoencoder, one entry of a tuple each
VaeBlock = Literal["ResBlock", "EfficientViTBlock"]
VaeLayers = Annotated[int, Bounds(0, 64)]
KernelSize = Annotated[int, Bounds(1, 63), Odd()]
VaeScales = Annotated[tuple[KernelSize, ...], Length(0, 8)]


@dataclasses.dataclass(frozen=True)
class _InnerStagesHaveLayers:
    """Require layers in each stage except the first and the last."""

    rule: ClassVar[str] = "0 in the first and the last alone"

    def refusal(self, value: tuple[int, ...]) -> str:
        if all(value[1:-1]):
            return ""
        return "leaves a stage empty: only the first and the last stage may have 0 layers"


class AutoencoderConfig(PartConfig, path="model.vae"):
    """Declare the settings that all autoencoders have (networks: `vae.protocol.Autoencoder`)."""

    latent_channels: int
    """Channels of the latents."""
    scaling_factor: float
    """Factor of the latents: latents times it have about unit variance."""
    dtype: str
    """Dtype of the computation."""
    param_dtype: str
    """Dtype of the parameters."""
    remat: str
    """Activations that a layer stores for its backward pass: `none` all, `full` its input alone,
    `dots` the results of its linear layers and of attention, `offload` the results of its linear
    layers, in the host's memory. All others are computed again.
    """

    @property
    def spatial_compression(self) -> int:
        """Return the pixels per latent along a side."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DcAeConfig(AutoencoderConfig, path="model.vae", model_type="dc_ae"):
    """Hold the fields of `diffusers.AutoencoderDC` (f32c32 by default)."""

    in_channels: Width = 3
    """Channels of the images."""
    latent_channels: Width = 32
    attention_head_dim: Width = 32
    """Width of a head of the linear attention."""
    encoder_block_types: Annotated[tuple[VaeBlock, ...], PerStage] = ("ResBlock",) * 3 + (
        "EfficientViTBlock",
    ) * 3
    """Block of each stage of the encoder, the finest first; each further stage halves the sides."""
    decoder_block_types: Annotated[tuple[VaeBlock, ...], PerStage] = ("ResBlock",) * 3 + (
        "EfficientViTBlock",
    ) * 3
    """Block of each stage of the decoder, the finest first."""
    encoder_block_out_channels: Annotated[tuple[Width, ...], PerStage] = (
        128,
        256,
        512,
        512,
        1024,
        1024,
    )
    """Channels of each stage of the encoder."""
    decoder_block_out_channels: Annotated[tuple[Width, ...], PerStage] = (
        128,
        256,
        512,
        512,
        1024,
        1024,
    )
    """Channels of each stage of the decoder."""
    encoder_layers_per_block: Annotated[
        tuple[VaeLayers, ...], PerStage, _InnerStagesHaveLayers()
    ] = (2, 2, 2, 3, 3, 3)
    """Blocks of each stage of the encoder."""
    decoder_layers_per_block: Annotated[
        tuple[VaeLayers, ...], PerStage, _InnerStagesHaveLayers()
    ] = (3, 3, 3, 3, 3, 3)
    """Blocks of each stage of the decoder."""
    encoder_qkv_multiscales: Annotated[tuple[VaeScales, ...], PerStage] = (
        (),
        (),
        (),
        (5,),
        (5,),
        (5,),
    )
    """Kernel sizes of the depthwise convolutions that give each stage of the encoder further
    queries, keys and values; `()` adds none.
    """
    decoder_qkv_multiscales: Annotated[tuple[VaeScales, ...], PerStage] = (
        (),
        (),
        (),
        (5,),
        (5,),
        (5,),
    )
    """Kernel sizes of the depthwise convolutions of each stage of the decoder."""
    upsample_block_type: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    """How the decoder doubles the sides of its maps."""
    downsample_block_type: Literal["Conv", "pixel_unshuffle"] = "Conv"
    """How the encoder halves the sides of its maps: by a convolution of stride 2, or by moving
    pixels to channels.
    """
    decoder_norm_types: Literal["rms_norm"] = "rms_norm"
    """Norm of the decoder's blocks."""
    decoder_act_fns: Literal["silu"] = "silu"
    """Activation of the decoder's blocks."""
    scaling_factor: Positive = 0.41407
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    unroll: bool = False
    """Unroll the loop over the layers: faster on CPUs, slower to compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.encoder_block_out_channels)
        names = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
        for side in ("encoder", "decoder"):
            for name in names:
                values = getattr(self, f"{side}_{name}")
                check(
                    len(values) == stages,
                    f"model.vae.{side}_{name} has {len(values)} entries, one for each of {stages} "
                    "stages needed",
                )
            self._check_blocks(side)
            self._check_channels(side)

    def _check_blocks(self, side: str) -> None:
        channels = getattr(self, f"{side}_block_out_channels")
        for i, kind in enumerate(getattr(self, f"{side}_block_types")):
            check(
                kind != "EfficientViTBlock" or channels[i] >= self.attention_head_dim,
                f"model.vae.{side}_block_out_channels[{i}]={channels[i]} must be at least "
                f"model.vae.attention_head_dim={self.attention_head_dim}",
            )

    def _check_channels(self, side: str) -> None:
        """Check that the shortcuts, which average or repeat whole runs of channels, fit the channel
        counts.
        """
        channels = getattr(self, f"{side}_block_out_channels")
        field = f"model.vae.{side}_block_out_channels={channels}"
        first = 0 if getattr(self, f"{side}_layers_per_block")[0] else 1
        for fine, coarse in zip(channels[first:], channels[first + 1 :], strict=False):
            check(
                4 * fine % coarse == 0,
                f"{field}: 4 x {fine} must be a multiple of the next stage's {coarse}",
            )
        check(
            channels[-1] % self.latent_channels == 0,
            f"{field}: the last must be a multiple of "
            f"model.vae.latent_channels={self.latent_channels}",
        )
        if side == "encoder" and self.downsample_block_type == "pixel_unshuffle":
            check(
                all(c % 4 == 0 for c in channels[1:]),
                f"{field}: with pixel_unshuffle every stage after the first needs multiples of 4",
            )

    @property
    def spatial_compression(self) -> int:
        """Return the pixels per latent along a side."""
        return 1 << (len(self.encoder_block_out_channels) - 1)
