"""Create parameters that carry logical axis names, and their initialisers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def normal(stddev: float) -> Callable:
    """Return the initialiser of a normal distribution with mean 0."""
    return jax.nn.initializers.normal(stddev)


def fan_in() -> Callable:
    """Return the default initialiser of kernels: LeCun's, of variance 1 / fan-in.

    The fan-in is the product of every dimension except the last.
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
    """Return a parameter of `shape`, initialised by `init` from the random stream `stream`.

    `axes` holds one logical axis name (or None) per dimension and is stored as `Param.axes`. Raises
    ValueError when their numbers differ.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"param: shape {tuple(shape)} has {len(shape)} dimensions, "
            f"axes {tuple(axes)} name {len(axes)}"
        )
    return nnx.Param(
        init(_next_key(rngs[stream]), tuple(shape), jnp.dtype(dtype)), axes=tuple(axes)
    )


def _next_key(stream: nnx.RngStream) -> jax.Array:
    """Return the key that calling `stream` would return, and count it.

    `stream()` does `count[...] += 1`, for which Flax reads the sharding of the traced count. JAX
    raises an error there, which Flax discards, and building its message visits everything traced so
    far: the time to trace a model would grow with the square of its number of parameters.
    """
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key
