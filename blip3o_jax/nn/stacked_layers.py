"""Stack the layers of a network and run them with a scan."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax.nn.logical_axes import current_part
from blip3o_jax.nn.remat import REMAT_POLICIES


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return `count` layers as one module whose parameters have a leading "layers" axis.

    `make` builds one layer. `scan` runs the stack.
    """

    # A separate key for each layer; without, all layers would start equal.
    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    module = build(rngs)
    for leaf in jax.tree.leaves(nnx.state(module), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        # `nnx.vmap` adds the leading axis to the arrays, but not to `axes`, which is metadata of
        # this package.
        leaf.set_metadata(axes=("layers", *leaf.axes))
    variables = nnx.state(module)
    nnx.update(module, variables)
    return module


def unstack(layers: nnx.Module) -> list[nnx.Module]:
    """Return the layers of a stack as separate modules.

    Use it before a loop that runs a stack many times with its layers unrolled: the weights are then
    copied once. XLA's CPU compiler would copy every slice of the stack at each iteration.
    """
    graphdef, state = nnx.split(layers)
    count = len(jax.tree.leaves(state)[0])
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(count)]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["carry"], meta_fields=["part", "name", "index"]
)
@dataclasses.dataclass(frozen=True)
class LayerCarry:
    """Hold the output of one layer of a stack and its origin.

    `part` is the part being traced, `name` the layer's class, `index` its index in the stack and
    `carry` the value.
    """

    part: str
    name: str
    index: int
    carry: Any


_records: contextvars.ContextVar[list[LayerCarry] | None] = contextvars.ContextVar(
    "records", default=None
)


@contextlib.contextmanager
def capture_intermediates() -> Iterator[list[LayerCarry]]:
    """Record every layer's carry in the yielded list: inside the block, `scan` unrolls its loop.

    A jitted function must enter the context inside itself and return the list:

        @jax.jit
        def layers(x):
            with nn.capture_intermediates() as carries:
                model(x)
            return carries

    A `scan` within the body of another loop or transformation cannot be recorded: its carries are
    tracers that are invalid outside.
    """
    records: list[LayerCarry] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def scan(
    layers: nnx.Module,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str,
    unroll: bool,
) -> tuple[Any, Any]:
    """Run stacked `layers` in order: carry, y = step(layer, carry, x), with x sliced from `xs`.

    Returns the last carry and the stacked ys. One layer is traced and compiled for any depth;
    `unroll` unrolls the loop, which makes a small model up to twice as fast on CPUs. `remat` is a
    name of REMAT_POLICIES.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_state, x = inputs
        return step(nnx.merge(graphdef, layer_state), carry, x)

    if remat != "none":
        # Inside a scan's body XLA cannot merge the recomputation with the forward pass, so that the
        # barriers against it (`prevent_cse`) are needed only where the loop is unrolled.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    if (records := _records.get()) is None:
        return jax.lax.scan(body, carry, (state, xs), unroll=unroll)
    ys = []
    # A Python loop: recorded carries outlive it, and tracers of a scan's body are invalid outside.
    for index in range(len(jax.tree.leaves(state)[0])):
        carry, y = body(carry, jax.tree.map(lambda x, i=index: x[i], (state, xs)))
        records.append(LayerCarry(current_part(), type(layers).__name__, index, carry))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)
