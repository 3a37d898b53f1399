"""Import PyTorch files into a checkpoint, copying each tensor into this host's shards.

For every parameter, empty shards are allocated and its tensors are read and copied into them one
after the other; the next tensor is read while one is copied. Memory holds at most the result, one
parameter and two tensors.
"""

import concurrent.futures
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax.ar.logits import resize_embeddings
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, MeshConfig, UserError
from blip3o_jax.convert.directory import atomic_directory, check_space
from blip3o_jax.convert.mapping import flat, groups
from blip3o_jax.convert.memory import PeakMemory
from blip3o_jax.convert.progress import ByteProgress
from blip3o_jax.convert.record import write_record
from blip3o_jax.convert.source import TorchSource
from blip3o_jax.convert.tensor_files import Tensor, cast
from blip3o_jax.convert.transpose import copy
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.checkpoint import write_weights
from blip3o_jax.train.state import WEIGHTS, StatePlan, plan_state

Index = tuple[tuple[int, int], ...]  # start and stop along each dimension


@dataclasses.dataclass(frozen=True)
class ImportSummary:
    """Hold the results of an import.

    `parameters` is the bytes of all parameters, `host_bytes` of those on this host's CPU devices,
    `largest` of the largest tensor, `peak` the peak resident memory in bytes; `read_seconds` and
    `seconds` are the durations of reading and of the whole import.
    """

    parameters: int
    host_bytes: int
    largest: int
    peak: int
    read_seconds: float
    seconds: float

    @property
    def allowed(self) -> int:
        """Return the bound on resident bytes that an import keeps.

        It is the host's parameters, 1.25 times the largest tensor, and 1 GiB.
        """
        return self.host_bytes + self.largest * 5 // 4 + 2**30


def import_weights(
    source: TorchSource,
    out: pathlib.Path,
    mesh: MeshConfig | None = None,
    *,
    overwrite: bool = False,
) -> ImportSummary:
    """Write the checkpoint directory `out` atomically; `mesh` is as in `blip3o_jax.load`.

    Raises UserError in a run of several processes, or when `out` cannot be written.
    """
    began = time.monotonic()
    mesh = mesh or MeshConfig(data=-1, fsdp=1, strategy="dp")
    strategy = Strategy.of(mesh)
    config = dataclasses.replace(source.config, mesh=mesh)
    plan = plan_state(config, strategy)
    size = sum(
        leaf.size * leaf.dtype.itemsize
        for group in WEIGHTS
        for leaf in jax.tree.leaves(plan.abstract[group])
    )
    if jax.process_count() > 1:
        raise UserError(
            "import runs in one process: start it on one host; any mesh can read the checkpoint"
        )
    check_space(out, size)
    read = {
        tensor.file
        for tensors in (*source.tensors.values(), source.unread)
        for tensor in tensors.values()
    }
    with (
        atomic_directory(out, overwrite=overwrite, sources=read) as directory,
        PeakMemory() as memory,
    ):
        weights = read_into(plan, source, config)
        read_seconds = time.monotonic() - began
        write_weights(directory, config, source.tokenizer, weights)
        write_record(directory, source.record, source.unread)
        shards = [
            s
            for leaf in jax.tree.leaves(weights)
            for s in leaf.addressable_shards
            if s.device.platform == "cpu"
        ]
        host_bytes = sum(s.data.nbytes for s in shards)
        del weights, shards
    largest = max(t.nbytes for tensors in source.tensors.values() for t in tensors.values())
    return ImportSummary(
        size, host_bytes, largest, memory.peak, read_seconds, time.monotonic() - began
    )


def read_into(plan: StatePlan, source: TorchSource, config: Config) -> dict[str, Any]:
    """Return the source's parameters in the plan's groups, shardings and dtypes."""
    size = sum(t.nbytes for tensors in source.tensors.values() for t in tensors.values())
    with ByteProgress("read", size) as progress:
        return _read_parts(plan, source, config, progress)


def _read_parts(
    plan: StatePlan, source: TorchSource, config: Config, progress: ByteProgress
) -> dict[str, Any]:
    weights: dict[str, Any] = {group: {} for group in WEIGHTS}
    for part in dict.fromkeys(name for group in WEIGHTS for name in plan.abstract[group]):
        targets: dict[str, Any] = {
            path: leaf
            for group in WEIGHTS
            for path, leaf in flat(plan.abstract[group].get(part, {})).items()
        }
        if tensors := source.tensors.get(part):
            arrays = _read_part(part, config, tensors, targets, progress)
            if part == "ar" and "image_embeddings" in source.initialise:
                arrays = _resize_vocabulary(arrays, targets, source)
        else:
            arrays = _initialize_part(part, config, targets)
        for group in WEIGHTS:
            if part in plan.abstract[group]:
                paths = flat(plan.abstract[group][part])
                weights[group][part] = nnx.traversals.unflatten_mapping(
                    {tuple(p.split("/")): arrays[p] for p in paths}
                )
    return weights


def _read_part(
    part: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    progress: ByteProgress,
) -> dict[str, jax.Array]:
    arrays: dict[str, jax.Array] = {}
    for group in groups(part, config.model):
        shards = {path: _Shards(targets[path]) for path in group.shapes}
        keys = list(group.tensors)
        for layer, (key, tensor) in enumerate(
            zip(keys, _prefetch([tensors[key] for key in keys]), strict=True)
        ):
            tensor = cast(tensors[key].key, tensor, shards[group.rule.paths[0]].target.dtype)
            for path, piece in group.to_jax(tensor):
                shards[path].fill(layer if group.rule.stacked else None, piece)
            progress.add(part, tensor.nbytes)
        arrays |= {path: shard.array() for path, shard in shards.items()}
    return arrays


def _prefetch(tensors: list[Tensor]) -> Iterator[np.ndarray]:
    """Yield each tensor's values while a thread reads the next one."""
    # One thread: a single tensor is held ahead of the one being copied.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tensors[0].read)
        for following in [*tensors[1:], None]:
            values = waiting.result()
            if following is not None:
                waiting = pool.submit(following.read)
            yield values


class _Shards:
    """Hold this host's distinct shards of one parameter; replicas share a buffer."""

    def __init__(self, target: jax.ShapeDtypeStruct):
        self.target = target
        # Keyed by the slice, so that devices that replicate it share one buffer on the host.
        self.devices: dict[Index, list[jax.Device]] = {}
        for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
            spans = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
            self.devices.setdefault(spans, []).append(device)
        self.buffers = {
            spans: _empty_aligned(tuple(b - a for a, b in spans), target.dtype)
            for spans in self.devices
        }

    def fill(self, layer: int | None, piece: np.ndarray) -> None:
        """Copy one layer's piece (None: the whole parameter) into this host's shards."""
        for index, buffer in self.buffers.items():
            spans = index
            if layer is not None:
                (first, last), *rest = index
                spans = tuple(rest)
                if not first <= layer < last:
                    continue
                buffer = buffer[layer - first]
            part = piece[
                tuple(slice(a, min(b, n)) for (a, b), n in zip(spans, piece.shape, strict=True))
            ]
            if part.shape != buffer.shape:  # the vocabulary table has padding rows
                buffer[...] = 0
            copy(buffer[tuple(slice(n) for n in part.shape)], part)

    def array(self) -> jax.Array:
        """Return the parameter as a global array."""
        pieces = [
            jax.device_put(self.buffers[spans], d)
            for spans, devices in self.devices.items()
            for d in devices
        ]
        return jax.make_array_from_single_device_arrays(
            self.target.shape, self.target.sharding, pieces
        )


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array aligned to 64 bytes, which CPU devices do not copy."""
    size = math.prod(shape) * dtype.itemsize
    # Uninitialised: every byte is written by `fill`, except padding rows, which it clears.
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _resize_vocabulary(
    arrays: dict[str, jax.Array], targets: Mapping[str, jax.ShapeDtypeStruct], source: TorchSource
) -> dict[str, jax.Array]:
    """Resize the vocabulary tables to the model's.

    Rows of new tokens, and rows without a token in the files, become the mean of the text
    tokenizer's rows, as in the published model.
    """
    ar = source.config.model.ar
    for path, transposed in (("embedding", False), ("lm_head/kernel", True)):
        if path not in arrays:
            continue

        def grow(table: jax.Array, transposed: bool = transposed) -> jax.Array:
            table = table.T if transposed else table
            grown = resize_embeddings(table, source.text_rows, ar.vocab_size)
            grown = jnp.pad(grown, ((0, ar.padded_vocab_size - ar.vocab_size), (0, 0)))
            return grown.T if transposed else grown

        # Donated, so that the old table is freed as soon as the new one exists.
        arrays[path] = jax.jit(grow, out_shardings=targets[path].sharding, donate_argnums=0)(
            arrays[path]
        )
    return arrays


def _initialize_part(
    part: str, config: Config, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return {path: array} of a part with initial weights."""

    def make() -> dict[str, jax.Array]:
        state = nnx.to_pure_dict(nnx.state(Blip3o(config.model, (part,), seed=config.seed)))
        return flat(state[part])

    return jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in targets.items()})()
