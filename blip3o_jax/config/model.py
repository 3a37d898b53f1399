"""Settings of the whole model: its parts, and what they have in common."""

import dataclasses
import math
from typing import Annotated

from blip3o_jax.config.ar import LanguageModelConfig, Qwen3Config
from blip3o_jax.config.constraints import Bounds, Length, Unique
from blip3o_jax.config.dit import (
    ConnectorConfig,
    DiffusionHeadConfig,
    FlowConfig,
    SanaConfig,
)
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.image_tokens import (
    ImageTokenizerConfig,
    TaTokConfig,
    TextTowerConfig,
)
from blip3o_jax.config.text import TemplateConfig, TextConfig
from blip3o_jax.config.types import Side
from blip3o_jax.config.vae import AutoencoderConfig, DcAeConfig


@dataclasses.dataclass(frozen=True)
class EditingConfig(ConfigGroup, path="model.editing"):
    """Set how reference images condition the model (BLIP3o-NEXT, arXiv 2510.15857, section 4). With
    `reference_slots` 0 connectors of a checkpoint are kept and converted, but not used.
    """

    reference_slots: Annotated[int, Bounds(0, 64)] = 0
    """Slots for reference images in every row; a slot may be empty. 0 makes all rows text to
    image.
    """
    features: bool = False
    """Represent a reference image in the user's turn by its SigLIP2 features, mapped by
    `feature_connector`, in place of its tokens.
    """
    latents: bool = False
    """Condition the diffusion head on the references' latents, mapped by `latent_connector`, as
    further condition tokens.
    """
    latent_concat: bool = False
    """Condition the diffusion head on the references' latents, concatenated to the noisy latents
    along the width.
    """
    uncond_latent_concat: bool = True
    """Concatenate the references' latents in the unconditional branch as well, as published.
    `False` drops them there, for `sampling.reference_guidance`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.latent_concat or self.reference_slots > 0,
            "model.editing.latent_concat=True needs model.editing.reference_slots of 1 or more",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig(ConfigGroup, path="model"):
    """Set the parts of the model, and the sizes of its images."""

    text: TextConfig = TextConfig()
    """Text tokenizer."""
    template: TemplateConfig = TemplateConfig()
    """Chat template."""
    tokenizer: ImageTokenizerConfig = TaTokConfig()
    """Vision tokenizer."""
    text_tower: TextTowerConfig = TextTowerConfig()
    """Caption encoder of stage `contrastive`."""
    ar: LanguageModelConfig = Qwen3Config()
    """Autoregressive language model."""
    connector: ConnectorConfig = ConnectorConfig()
    """Connector between the AR and the diffusion head."""
    editing: EditingConfig = EditingConfig()
    """Conditioning on reference images."""
    dit: DiffusionHeadConfig = SanaConfig()
    """Diffusion head."""
    flow: FlowConfig = FlowConfig()
    """Noise levels of flow matching."""
    vae: AutoencoderConfig = DcAeConfig()
    """Autoencoder."""
    image_size: Side = 1024
    """Side of the square target image in pixels, a multiple of the autoencoder's factor."""
    buckets: Annotated[tuple[tuple[Side, Side], ...], Length(0, 1024), Unique()] = ()
    """Shapes of images, as pairs (height, width) in pixels. An image of the data is cropped to the
    shape of the nearest aspect ratio. `()` has the square of `image_size` alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for bucket in self.buckets:
            self.check_size(bucket, "model.buckets")
        check(
            self.image_size % self.vae.spatial_compression == 0,
            f"model.image_size={self.image_size} must be a multiple of the autoencoder's"
            f" {self.vae.spatial_compression}",
        )
        check(
            self.dit.in_channels == self.vae.latent_channels,
            f"model.dit.in_channels={self.dit.in_channels} must equal"
            f" model.vae.latent_channels={self.vae.latent_channels}",
        )

    @property
    def latent_size(self) -> int:
        """Return the latents along a side of the square image."""
        return self.image_size // self.vae.spatial_compression

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return (height, width) in pixels of every shape of images."""
        return self.buckets or ((self.image_size, self.image_size),)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the one of `sizes` whose aspect ratio is nearest to an image's, in logarithms."""
        return min(self.sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Raise ConfigError that names `name` unless latents and patches divide `size` evenly."""
        unit = self.vae.spatial_compression * self.dit.patch_size
        fits = len(size) == 2 and all(side > 0 and side % unit == 0 for side in size)
        check(
            fits,
            f"{name}={size} must be (height, width), both multiples of {unit}: the autoencoder's"
            " factor times the patch",
        )
