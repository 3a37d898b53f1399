"""What every diffusion head is to the rest of the package.

B batch, H W latent height and width, R reference slots, T condition tokens, C channels.
"""

from typing import Any, NamedTuple, Protocol

import jax

from blip3o_jax.config import DiffusionHeadConfig


class LatentConcat(NamedTuple):
    """Latents of reference images, of the size of the noisy ones."""

    z_BRHWC: jax.Array
    mask_BR: jax.Array  # True where there is one; those of a row come first


class Condition(NamedTuple):
    """The inputs that a velocity is conditioned on: condition tokens, and reference latents
    concatenated to the noisy ones.
    """

    tokens_BTC: jax.Array
    mask_BT: jax.Array | None = None  # True where there is a token; None: everywhere
    latent_concat: LatentConcat | None = None


class DiffusionHead(Protocol):
    """Noisy latents, timestep and condition -> velocity: an `nnx.Module`.

    The joint stage trains what has "caption" in its path and freezes the rest; `patch_embed` and
    `proj_out` are the other names that recipes select.
    """

    cfg: DiffusionHeadConfig

    def __call__(
        self,
        z_BHWC: jax.Array,
        timestep_B: jax.Array,
        condition_BTC: jax.Array,
        condition_mask_BT: jax.Array | None = None,
        latent_concat: LatentConcat | None = None,
    ) -> jax.Array:
        """Return the velocity [B, H, W, C] in the compute dtype: `velocity` of what `prepare` makes
        of the condition. `timestep_B` is float, 1000 sigma, in [0, 1000].
        """
        ...

    def prepare(self, condition_BTC: jax.Array, mask_BT: jax.Array | None = None) -> Any:
        """Return all that depends on the condition alone, which a sampler computes once: any pytree
        of arrays. A condition of one row serves every row.
        """
        ...

    def velocity(
        self,
        z_BHWC: jax.Array,
        timestep_B: jax.Array,
        context: Any,
        latent_concat: LatentConcat | None = None,
    ) -> jax.Array:
        """Return the velocity [B, H, W, C] for what `prepare` returned. ValueError unless
        `cfg.patch_size` divides H and W.
        """
        ...
