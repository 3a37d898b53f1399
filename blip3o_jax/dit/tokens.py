"""Convert latent maps to the tokens of a diffusion head and back; embed positions and timesteps.

B batch, H W latent height and width, M maps, R reference slots, C channels, P patch side, N tokens,
D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

TIME_CHANNELS = 256


def sinusoid(timestep_B: jax.Array) -> jax.Array:
    """Return the embeddings [B, 256] of timesteps [B]: cosines, then sines, float32.

    bfloat16 rounds timesteps 999 and 1000 to the same value.
    """
    half = TIME_CHANNELS // 2
    # The exponents are rounded to float32 as in diffusers: the timestep multiplies the rounding
    # error of a frequency by up to 1000.
    exponents = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timestep_B.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos(rows: np.ndarray, columns: np.ndarray, channels: int) -> np.ndarray:
    """Return positions [rows * columns, D], float32: sines and cosines of column, then row.

    `rows` and `columns` are float32. Matches `diffusers.PatchEmbed`, "sincos".
    """
    quarter = channels // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    row, column = np.meshgrid(rows, columns, indexing="ij")
    # Positions are float32 and angles float64, as in diffusers.
    angles = [p.reshape(-1, 1) * frequencies for p in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(
        np.float32
    )


def concat_width(z_BMHWC: jax.Array) -> jax.Array:
    """Concatenate maps [B, M, H, W, C] along the width -> [B, H, M W, C]."""
    batch, maps, height, width, channels = z_BMHWC.shape
    return z_BMHWC.transpose(0, 2, 1, 3, 4).reshape(batch, height, maps * width, channels)


def token_mask(mask_BR: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Return the mask [B, N] of the wide map's tokens: True on the noisy part and references."""
    # The noisy map stands in front of the references and is always attended to.
    mask_BM = jnp.pad(mask_BR.astype(bool), ((0, 0), (1, 0)), constant_values=True)
    # Maps are concatenated along the width, so that one row of the wide grid has `columns` tokens
    # of each map, and all rows have the same mask.
    mask_BX = jnp.repeat(mask_BM, grid[1], axis=1)
    return jnp.tile(mask_BX, (1, grid[0]))


def first_map(x_BND: jax.Array, grid: tuple[int, int], columns: int) -> jax.Array:
    """Return the tokens of the first `columns` columns of a map of `grid` (rows, columns)."""
    x_BHWD = x_BND.reshape(len(x_BND), *grid, -1)[:, :, :columns]
    return x_BHWD.reshape(len(x_BND), grid[0] * columns, -1)


def unpatchify(x_BNX: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """Rearrange tokens to a map: [B, N, P P C] -> [B, H, W, C]."""
    batch, (rows, columns) = x_BNX.shape[0], grid
    # Channels vary fastest within a patch: the layout of `proj_out` in the stock class.
    x = x_BNX.reshape(batch, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch, columns * patch, -1)
