"""Define the interface of an autoencoder.

B batch, H W image, f `cfg.spatial_compression`, C `cfg.latent_channels`.
"""

from typing import Protocol

import jax

from blip3o_jax.config import AutoencoderConfig


class Autoencoder(Protocol):
    """Encode images to latents and decode them; implementations are `nnx.Module`s.

    The diffusion head's latents are raw latents times `cfg.scaling_factor`.
    """

    cfg: AutoencoderConfig

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Return raw latents [B, H/f, W/f, C] of images [B, H, W, 3] in [-1, 1].

        Raises ValueError unless H and W are multiples of f.
        """
        ...

    def decode(self, z_BHWC: jax.Array) -> jax.Array:
        """Return images [B, f H, f W, 3] of raw latents, about in [-1, 1] and not clipped."""
        ...
