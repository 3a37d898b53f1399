"""What every autoencoder is to the rest of the package.

B batch, H W image, f `cfg.spatial_compression`, C `cfg.latent_channels`.
"""

from typing import Protocol

import jax

from blip3o_jax.config import AutoencoderConfig


class Autoencoder(Protocol):
    """Images to latents and back: an `nnx.Module`. Raw latents times `cfg.scaling_factor` are what
    the diffusion head works on.
    """

    cfg: AutoencoderConfig

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Return raw latents [B, H/f, W/f, C] of images [B, H, W, 3] in [-1, 1]. ValueError where f
        does not divide H and W.
        """
        ...

    def decode(self, z_BHWC: jax.Array) -> jax.Array:
        """Return images [B, f H, f W, 3], about in [-1, 1] and not clipped, of raw latents."""
        ...
