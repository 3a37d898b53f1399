"""Write safetensors files (tensor_files.py has the format), one tensor, or some of its rows, at a
time.

Tensors are written with pwrite at their offsets, so that at most one is in memory.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.convert import tensor_files
from blip3o_jax.convert.transpose import contiguous


class ShardedWriter:
    """Write tensors, in any order, to safetensors files under `directory`.

    The file is STEM.safetensors; more than `max_shard_bytes` become
    STEM-00001-of-0000N.safetensors and STEM.safetensors.index.json. All files are allocated at full
    size first, so that a full disk is an error before anything is computed.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        stem: str,
        tensors: Mapping[str, tuple[Sequence[int], np.dtype]],
        max_shard_bytes: int,
    ):
        self._missing = set(tensors)
        self._handles: list[int] = []
        self._offsets: dict[str, tuple[int, int, tuple[int, ...], np.dtype]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        sizes = {
            key: math.prod(shape) * np.dtype(dtype).itemsize
            for key, (shape, dtype) in tensors.items()
        }
        shards = _cut(sizes, max_shard_bytes)
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else [f"{stem}.safetensors"]
        self.files = [directory / name for name in names]
        try:
            for file, keys in zip(self.files, shards, strict=True):
                self._create(file, {key: tensors[key] for key in keys})
        except BaseException:
            self.abort()
            raise
        if len(shards) > 1:
            weight_map = {
                key: name for name, keys in zip(names, shards, strict=True) for key in keys
            }
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (directory / f"{stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )

    def _create(
        self, file: pathlib.Path, tensors: dict[str, tuple[Sequence[int], np.dtype]]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first, so that every tensor is aligned to its item size.
        ordered = sorted(tensors.items(), key=lambda item: -np.dtype(item[1][1]).itemsize)
        for key, (shape, dtype) in ordered:
            first, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            header[key] = {
                "dtype": tensor_files.NAMES[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [first, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        # The format pads the header with spaces, so that the tensors are aligned.
        text += b" " * (-len(text) % 8)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._handles.append(handle)
        # Reserves the blocks: a full disk raises here, not after an hour of conversion.
        os.posix_fallocate(handle, 0, 8 + len(text) + end)
        _write(handle, len(text).to_bytes(8, "little") + text, 0)
        for key, (shape, dtype) in ordered:
            offset = 8 + len(text) + header[key]["data_offsets"][0]
            self._offsets[key] = (handle, offset, tuple(shape), np.dtype(dtype))

    def write(self, key: str, array: np.ndarray) -> None:
        """Write a whole tensor; ValueError unless its shape and dtype are those announced."""
        handle, offset, shape, dtype = self._offsets[key]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{key}: {array.dtype} {array.shape} given, {dtype} {shape} announced")
        _write(handle, contiguous(array).reshape(-1).view(np.uint8).data, offset)
        self._missing.discard(key)

    def write_rows(self, key: str, rows: np.ndarray, first: int) -> None:
        """Write rows of a tensor, from row `first`, in order: the last row completes it.

        Raises ValueError unless shape and dtype are those announced.
        """
        handle, offset, shape, dtype = self._offsets[key]
        end = first + len(rows)
        if rows.shape[1:] != shape[1:] or rows.dtype != dtype or end > shape[0]:
            raise ValueError(
                f"{key}: {rows.dtype} {rows.shape} given from row {first}, "
                f"{dtype} {shape} announced"
            )
        offset += first * math.prod(shape[1:]) * dtype.itemsize
        _write(handle, contiguous(rows).reshape(-1).view(np.uint8).data, offset)
        if end == shape[0]:
            self._missing.discard(key)

    def close(self) -> None:
        """Close the files; ValueError if an announced tensor was not written."""
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()
        if self._missing:
            raise ValueError(f"never written: {sorted(self._missing)[:3]}")

    def abort(self) -> None:
        """Close the incomplete files; the caller removes them with their directory."""
        self._missing.clear()
        self.close()


def _write(handle: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + tensor_files.MAX_CALL_BYTES], offset + done)


def _cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names in order into shards of at most `limit` bytes, or of a single tensor."""
    shards: list[list[str]] = [[]]
    room = limit
    for key, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    return shards
