"""Shard activations by logical axis names.

A logical axis ("embed", "heads", "batch", ...) says what a dimension means; a strategy
(parallel/rules.py) says on which mesh axes it lies. Networks declare the former and never name the
latter.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax

# A resolver answers, for (part, logical names, shape), with a sharding or None for "leave it to the
# compiler".
Resolver = Callable[
    [str, tuple[str | None, ...], tuple[int, ...]], jax.sharding.NamedSharding | None
]

_resolver: contextvars.ContextVar[Resolver | None] = contextvars.ContextVar(
    "resolver", default=None
)

_part: contextvars.ContextVar[str] = contextvars.ContextVar("part", default="")


@contextlib.contextmanager
def sharding_resolver(resolver: Resolver | None) -> Iterator[None]:
    """Let `constrain` ask `resolver` where activations lie, during the block."""
    token = _resolver.set(resolver)
    try:
        yield
    finally:
        _resolver.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Name the part of the model being traced ("ar", "dit", ...): each part has its own sharding
    table and scope.
    """
    token = _part.set(name)
    try:
        with jax.named_scope(name):
            yield
    finally:
        _part.reset(token)


def current_part() -> str:
    """Return the name of the part being traced, "" outside any."""
    return _part.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin activation `x` to its place: one logical name (or None) per dimension. A no-op when no
    strategy is active.
    """
    if len(axes) != x.ndim:
        raise ValueError(
            f"constrain: {len(axes)} axis names {axes} for an array of shape {x.shape}"
        )
    at = sharding(*axes, shape=x.shape)
    return x if at is None else jax.lax.with_sharding_constraint(x, at)


def sharding(*axes: str | None, shape: tuple[int, ...]) -> jax.sharding.NamedSharding | None:
    """Return where an activation of the part being traced lies; None when no strategy is active."""
    resolver = _resolver.get()
    return resolver(_part.get(), axes, shape) if resolver else None


def mesh() -> jax.sharding.Mesh | None:
    """Return the mesh that this is traced for."""
    anywhere = sharding(shape=())
    return None if anywhere is None else anywhere.mesh


def platform() -> str:
    """Return the platform this is traced for, "cpu", "gpu" or "tpu", which need not be the one it
    is traced on.
    """
    return jax.default_backend() if mesh() is None else mesh().devices.flat[0].platform


def shards(axis: str) -> int:
    """Return the number of shards of a logical axis of the part being traced."""
    at = sharding(axis, shape=(0,))  # 0 divides over anything
    names = () if at is None or not at.spec or at.spec[0] is None else at.spec[0]
    return math.prod(
        at.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)
    )
