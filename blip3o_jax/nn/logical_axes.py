"""Shard activations by logical axis names.

A logical axis ("embed", "heads", "batch", ...) names the meaning of a dimension; a strategy
(parallel/rules.py) maps logical axes to mesh axes. Networks declare logical axes and never name
mesh axes.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax

# A resolver maps (part, logical names, shape) to a sharding; None leaves it to the compiler.
Resolver = Callable[
    [str, tuple[str | None, ...], tuple[int, ...]], jax.sharding.NamedSharding | None
]

_resolver: contextvars.ContextVar[Resolver | None] = contextvars.ContextVar(
    "resolver", default=None
)

# Context variables rather than arguments: every layer of every network would have to pass both on.
_part: contextvars.ContextVar[str] = contextvars.ContextVar("part", default="")


@contextlib.contextmanager
def sharding_resolver(resolver: Resolver | None) -> Iterator[None]:
    """Set the resolver that `constrain` uses inside the block; None removes it."""
    token = _resolver.set(resolver)
    try:
        yield
    finally:
        _resolver.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Set the name of the model's part ("ar", "dit", ...) that is traced inside the block.

    The name selects the part's sharding table and is a `jax.named_scope`.
    """
    token = _part.set(name)
    try:
        with jax.named_scope(name):
            yield
    finally:
        _part.reset(token)


def current_part() -> str:
    """Return the name of the part being traced; "" outside of any."""
    return _part.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of activation `x`: one logical name (or None) per dimension.

    Returns `x` itself when no strategy is active. Raises ValueError when the number of names is not
    the number of dimensions.
    """
    if len(axes) != x.ndim:
        raise ValueError(
            f"constrain: {len(axes)} axis names {axes} for an array of shape {x.shape}"
        )
    at = sharding(*axes, shape=x.shape)
    return x if at is None else jax.lax.with_sharding_constraint(x, at)


def sharding(*axes: str | None, shape: tuple[int, ...]) -> jax.sharding.NamedSharding | None:
    """Return the sharding of an activation of the current part; None without a strategy."""
    resolver = _resolver.get()
    return resolver(_part.get(), axes, shape) if resolver else None


def mesh() -> jax.sharding.Mesh | None:
    """Return the mesh that the computation is traced for; None without a strategy."""
    # A scalar has no dimension to shard, so that every strategy resolves it: its sharding names the
    # mesh.
    scalar = sharding(shape=())
    if scalar is None:
        return None
    assert isinstance(scalar.mesh, jax.sharding.Mesh)  # strategies hold meshes of devices
    return scalar.mesh


def platform() -> str:
    """Return the platform that the computation is traced for: "cpu", "gpu" or "tpu".

    It can differ from the platform of the tracing process (compiling for a described TPU).
    """
    target = mesh()
    return jax.default_backend() if target is None else target.devices.flat[0].platform


def shards(axis: str) -> int:
    """Return the number of shards of a logical axis of the part being traced."""
    at = sharding(axis, shape=(0,))  # a size of 0 is divisible by every number of shards
    if at is None or not at.spec or at.spec[0] is None:
        return 1
    names = at.spec[0]
    return math.prod(
        at.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)
    )
