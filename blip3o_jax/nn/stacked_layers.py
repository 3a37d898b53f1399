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
    """Return `count` layers as one module whose parameters lead with a "layers" axis; run it with
    `scan`.
    """

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    module = build(rngs)
    for leaf in jax.tree.leaves(nnx.state(module), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        leaf.set_metadata(axes=("layers", *leaf.axes))
    variables = nnx.state(module)
    nnx.update(module, variables)
    return module


def unstack(layers: nnx.Module) -> list[nnx.Module]:
    """Return the layers of a stack as separate modules.

    For loops that run a stack many times over, with its own loop laid out: taken apart before such
    a loop the weights are copied once. XLA's CPU compiler would copy every slice of a stack anew at
    each turn.
    """
    graphdef, state = nnx.split(layers)
    count = len(jax.tree.leaves(state)[0])
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(count)]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["carry"], meta_fields=["part", "name", "index"]
)
@dataclasses.dataclass(frozen=True)
class LayerCarry:
    """The carry that one layer of a stack hands to the next: the part being traced, the layer's
    class, its index in the stack, the value.
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
    """While active, `scan` lays its loop out and appends every layer's carry to the list that this
    yields, stack after stack.

    Inside a function that is jitted, the context must be entered there too, and the list be among
    what it returns:

        @jax.jit
        def layers(x):
            with nn.capture_intermediates() as carries:
                model(x)
            return carries

    A `scan` within the body of another loop or transformation cannot be recorded: its carries mean
    nothing outside.
    """
    token = _records.set([])
    try:
        yield _records.get()
    finally:
        _records.reset(token)


def scan(
    layers: nnx.Module,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str,
    unroll: bool,
) -> tuple[Any, Any]:
    """Run stacked `layers` in order: carry, y = step(layer, carry, x) for each, with `xs` sliced
    and `ys` stacked.

    One layer is traced and compiled whatever the depth, unless `unroll` lays the loop out: XLA's
    CPU compiler makes a small model up to twice as fast that way. `remat` names what the backward
    pass keeps (REMAT_POLICIES).
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_state, x = inputs
        return step(nnx.merge(graphdef, layer_state), carry, x)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    if (records := _records.get()) is None:
        return jax.lax.scan(body, carry, (state, xs), unroll=unroll)
    ys = []
    for index in range(len(jax.tree.leaves(state)[0])):
        carry, y = body(carry, jax.tree.map(lambda x, i=index: x[i], (state, xs)))
        records.append(LayerCarry(current_part(), type(layers).__name__, index, carry))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)
