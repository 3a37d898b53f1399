"""Create parameters that carry logical axis names, and their initialisers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def normal(stddev: float) -> Callable:
    return jax.nn.initializers.normal(stddev)


def fan_in() -> Callable:
    """Return the initialiser of variance 1 / fan-in over every dimension but the last; the default
    for kernels.
    """
    return jax.nn.initializers.lecun_normal()


zeros = jax.nn.initializers.zeros

ones = jax.nn.initializers.ones


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Callable,
    dtype: Any = jnp.float32,
    stream: str = "params",
) -> nnx.Param:
    """Return a parameter with one logical axis name (or None) per dimension, kept as `Param.axes`;
    initialised from `stream` of `rngs`.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"param: shape {tuple(shape)} has {len(shape)} dimensions, axes {tuple(axes)} name {len(axes)}"
        )
    return nnx.Param(
        init(_next_key(rngs[stream]), tuple(shape), jnp.dtype(dtype)), axes=tuple(axes)
    )


def _next_key(stream: nnx.RngStream) -> jax.Array:
    """Return the key that calling `stream` would return, and count it.

    The call itself does `count[...] += 1`, for which Flax asks the traced count for its sharding.
    JAX answers with an error, dropped by Flax, whose message walks through all that has been traced
    so far: tracing a model's parameters would take time that grows with the square of their number.
    """
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key
