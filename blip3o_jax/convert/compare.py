"""Compare the outputs of parts in PyTorch and JAX and find the first layer where they differ.

Both compute in float32 from the same seeded inputs (computations.py). Needs the extra [convert].
PyTorch's modules are the stock classes, filled by PyTorch's own loaders (torch_files.py). They run
first and are freed before this package's are read, so that only one side is in memory at a time.

Inputs and outputs are numpy arrays, images and latents as [B, H, W, C]. Legend: B batch, L row
length, N image tokens, T condition tokens, D width, C channels, H W image or latent.
"""

import contextlib
import dataclasses
import functools
import gc
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, MeshConfig, replace_everywhere
from blip3o_jax.convert import torch_model
from blip3o_jax.convert.computations import Arrays, PartComputation
from blip3o_jax.convert.conversions import prefix_of, stacked_layers
from blip3o_jax.convert.report import TOLERANCE, Output, relative_error
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.checkpoint import restore_parts


class TorchResult(NamedTuple):
    """Hold the outputs of a PyTorch run and its layers' outputs."""

    outputs: Arrays
    layers: list[tuple[str, np.ndarray]]  # full names, in the order they ran


def compare(
    path: pathlib.Path,
    config: Config,
    ema: bool,
    parts: Sequence[str],
    computations: Sequence[PartComputation],
    expected: Sequence[TorchResult],
) -> tuple[Output, ...]:
    """Run `computations` on the checkpoint at `path` and compare with PyTorch's results.

    `expected` holds the results of PyTorch's model of `parts`, one for each computation.
    """
    gc.collect()  # free PyTorch's model, which the caller no longer references
    graphdef, params = load_jax(path, config, parts, ema=ema)
    # TPUs and GPUs round float32 factors otherwise, by more than the tolerance.
    with jax.default_matmul_precision("highest"):
        return tuple(
            output
            for computation, expected_run in zip(computations, expected, strict=True)
            for output in _compare(
                computation, expected_run, functools.partial(nnx.merge, graphdef), params
            )
        )


def load_jax(
    path: pathlib.Path, config: Config, parts: Sequence[str], *, ema: bool
) -> tuple[Any, Any]:
    """Return (graphdef, parameters) of a model of `parts`, in float32 on one device."""
    strategy = Strategy.of(MeshConfig(fsdp=1, strategy="dp"), jax.devices()[:1])
    params = restore_parts(path, strategy, tuple(parts), ema=ema)
    leaves, tree = jax.tree.flatten(params)
    del params
    for i in range(len(leaves)):  # one by one, so that at most one is in memory twice
        leaves[i] = leaves[i].astype(jnp.float32)
    cfg = replace_everywhere(config.model, dtype="float32", param_dtype="float32")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Blip3o(cfg, parts, seed=0)))
    return graphdef, jax.tree.unflatten(tree, leaves)


def run_torch(computation: PartComputation, model: torch_model.Blip3o) -> TorchResult:
    """Run a computation on PyTorch's model, recording its layers."""
    inputs = {name: _channels(torch.tensor(x), 3) for name, x in computation.inputs.items()}
    # torch indexes with int64.
    inputs = {name: x.long() if x.dtype == torch.int32 else x for name, x in inputs.items()}
    with torch.no_grad(), _capture_torch_layers(model) as layers:
        outputs = computation.torch(model, inputs)
    return TorchResult({name: _channels(x, -1).numpy() for name, x in outputs.items()}, layers)


def _channels(x: torch.Tensor, channel_axis: int) -> torch.Tensor:
    """Move the channels of a 4-D tensor from dimension 3 to 1 (`channel_axis` 3) or back (-1)."""
    if x.ndim != 4:
        return x
    return x.movedim(3, 1) if channel_axis == 3 else x.movedim(1, 3)


@contextlib.contextmanager
def _capture_torch_layers(model: torch_model.Blip3o) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Yield a list that receives (name, output) of each module that is stacked here."""
    seen: list[tuple[str, np.ndarray]] = []
    stacked = stacked_layers()

    def record(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        # A copy: later layers may write in place.
        seen.append((name, _channels(output, -1).clone().numpy()))

    handles = [
        module.register_forward_hook(functools.partial(record, prefix_of(part, model.cfg) + name))
        for part, whole in model.named_children()
        for name, module in whole.named_modules()
        if type(module).__name__ in stacked
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    computation: PartComputation,
    expected_run: TorchResult,
    merge: Callable[[Any], Any],
    params: Any,
) -> list[Output]:
    outputs = jax.jit(lambda params, inputs: computation.jax(merge(params), inputs))(
        params, computation.inputs
    )
    found = []
    for name, padded in expected_run.outputs.items():
        got = computation.without_padding(np.asarray(outputs[name]))
        expected = computation.without_padding(padded)
        if np.issubdtype(expected.dtype, np.integer):
            agreement = float(np.mean(got == expected)) if got.shape == expected.shape else 0.0
            found.append(Output(name, None, agreement))
        else:
            found.append(Output(name, relative_error(got, expected)))
    if all(output.ok for output in found):
        return found
    layer, error = _first_differing_layer(computation, expected_run.layers, merge, params)
    return [
        o if o.ok else dataclasses.replace(o, first_layer=layer, first_layer_error=error)
        for o in found
    ]


def _first_differing_layer(
    computation: PartComputation,
    layers: list[tuple[str, np.ndarray]],
    merge: Callable[[Any], Any],
    params: Any,
) -> tuple[str, float | None]:
    """Return (full name in PyTorch's model, error) of the first layer whose outputs differ.

    Returns ("", None) if no stacked layer differs.
    """

    @jax.jit
    def carries(params: Any, inputs: Any) -> list[nn.LayerCarry]:
        with nn.capture_intermediates() as records:
            computation.jax(merge(params), inputs)
        return [record for record in records if record.carry is not None]

    records = carries(params, computation.inputs)
    for ours, theirs in zip(
        _stacks(records, [("", r.index) for r in records]), _torch_stacks(layers), strict=True
    ):
        # `strict=False`: PyTorch does not run the encoder's layers past the selected one, which
        # this package's scan skips but records.
        for record, (name, expected) in zip(ours, theirs, strict=False):
            error = relative_error(
                computation.without_padding(np.asarray(record.carry)),
                computation.without_padding(expected),
            )
            if not error <= TOLERANCE:  # also true for NaN
                return name, error
    return "", None


def _torch_stacks(layers: list[tuple[str, np.ndarray]]) -> list[list[tuple[str, np.ndarray]]]:
    names = [name.rpartition(".") for name, _ in layers]
    return _stacks(layers, [(stack, int(index)) for stack, _, index in names])


def _stacks(layers: Sequence[Any], layer_ids: Sequence[tuple[str, int]]) -> list[list[Any]]:
    """Split layers, in the order they ran, by stack.

    `layer_ids` holds (name of the stack, index in it) of each. A new stack starts when the name
    changes or the index does not increase.
    """
    found: list[list[Any]] = []
    last = ("", sys.maxsize)
    for layer, layer_id in zip(layers, layer_ids, strict=True):
        if layer_id[0] != last[0] or layer_id[1] <= last[1]:
            found.append([])
        found[-1].append(layer)
        last = layer_id
    return found
