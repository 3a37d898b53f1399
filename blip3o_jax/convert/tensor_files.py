"""Read and write files of named tensors, one tensor at a time.

safetensors (https://huggingface.co/docs/safetensors): 8 bytes, the length of a JSON header; the
header, which gives each tensor's dtype, shape and place; the tensors. Read and written by offset
here, and not through the library of that name, which maps or holds whole files: with pread and
pwrite no more than one tensor is in memory. PyTorch's own files are read through
`torch.load(weights_only=True)`. Which files a directory's weights are is told by weight_files.py.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.convert.transpose import contiguous

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_READ = 2**30  # bytes in one system call


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that still lies in its file."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    read: Callable[[], np.ndarray] = dataclasses.field(compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """Return {name: tensor} of one file, of which headers alone are read. UserError, naming file
    and tensor, for a file that is damaged, or stands for one that was not fetched.
    """
    check_not_pointer(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    values = load_torch(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds no state dict but a {type(values).__name__}")
    return torch_tensors(values, path)


def check_not_pointer(path: pathlib.Path) -> None:
    """Refuse a pointer file of Git LFS or git-annex, whose contents were not fetched."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which is not there: fetch what it links to (git annex get, for a clone "
            "that git-annex made), or copy the file itself"
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return  # whoever opens it says so
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer and not the file itself: run git lfs pull where it was cloned"
        )
    if start.startswith(b"/annex/objects/"):
        raise UserError(
            f"{path} is a git-annex pointer and not the file itself: run git annex get where it was cloned"
        )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; UserError for anything else."""
    check_not_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return value


def load_torch(path: pathlib.Path) -> Any:
    """Load a PyTorch file: plain containers and tensors, nothing that runs code. Memory-mapped,
    except for the oldest format.

    The `easydict.EasyDict` that the published TA-Tok file keeps its args in comes as an
    OrderedDict, without that library.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file: install PyTorch to read it (pip install 'blip3o_jax[convert]')"
        ) from error
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_not_pointer(path)
    # The only subclass of dict that torch fills in this mode, and with attributes beside its items.
    stand_ins = [(collections.OrderedDict, "easydict.EasyDict")]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # torch raises whatever its unpickler and zip reader do
        # torch's own message advises loading it with code in it run.
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it holds a {unknown[1]}, which is not of plain weights"
            if unknown
            else type(error).__name__
        )
        raise UserError(
            f"{path} cannot be read as a PyTorch file of weights ({reason}): copy it again"
        ) from error


def torch_tensors(values: Mapping[str, Any], path: pathlib.Path) -> dict[str, Tensor]:
    """Return the tensors of a loaded PyTorch state dict."""
    import torch

    def tensor(key: str, value: Any) -> Tensor:
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {key} is no tensor but a {type(value).__name__}")
        value = value.detach()
        # NumPy has no bfloat16 of its own, so its bits travel as integers.
        half = value.dtype == torch.bfloat16
        try:
            dtype = (
                np.dtype(ml_dtypes.bfloat16)
                if half
                else torch.empty(0, dtype=value.dtype).numpy().dtype
            )
        except TypeError:
            raise UserError(
                f"{path}: {key} has dtype {value.dtype}, which is not one of {', '.join(DTYPES)}"
            ) from None
        bits = (
            (lambda: value.contiguous().view(torch.int16).numpy().view(dtype))
            if half
            else (lambda: value.numpy())
        )
        return Tensor(key, tuple(value.shape), dtype, path, bits)

    return {key: tensor(key, value) for key, value in values.items()}


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(
                f"{path} is no safetensors file, or is cut off in its header ({size} bytes): copy it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                key: _place(v["dtype"], v["shape"], *v["data_offsets"]) for key, v in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} has a damaged safetensors header ({error}): copy it again"
            ) from error
    start, end = 8 + length, 0
    for key, (dtype, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if dtype is None:
            raise UserError(
                f"{path}: {key} has dtype {header[key]['dtype']}, which is not one of {', '.join(DTYPES)}"
            )
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise UserError(
                f"{path}: the place of {key} does not agree with its shape {shape}: copy the file again"
            )
        end = last
        if start + end > size:
            raise UserError(
                f"{path} is cut off: {key} ends at byte {start + end}, the file at {size}: copy it again"
            )
    if start + end != size:
        raise UserError(
            f"{path} has {size - start - end} bytes after its last tensor: copy it again"
        )
    return {
        key: Tensor(key, shape, dtype, path, _reader(path, key, shape, dtype, start + first))
        for key, (dtype, shape, first, _) in entries.items()
    }


def _place(
    dtype: str, shape: list[int], first: int, last: int
) -> tuple[np.dtype | None, tuple[int, ...], int, int]:
    """Parse one entry of a header; ValueError or TypeError for anything else."""
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"shape {shape}, data_offsets {[first, last]}")
    return DTYPES.get(dtype), tuple(shape), first, last


def _reader(
    path: pathlib.Path, key: str, shape: tuple[int, ...], dtype: np.dtype, offset: int
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.empty(math.prod(shape), dtype)
        view = memoryview(array.view(np.uint8))
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(handle, [view[done : done + _MAX_READ]], offset + done)
                if count == 0:
                    raise UserError(f"{path} is cut off within {key}: copy it again")
                done += count
        finally:
            os.close(handle)
        return array.reshape(shape)

    return read


def cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast `values`, rounding to nearest where `dtype` is narrower. UserError for a number that is
    too large for it.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if ml_dtypes.finfo(values.dtype).max > ml_dtypes.finfo(dtype).max and np.any(
        np.isinf(rounded) & np.isfinite(values)
    ):
        largest = np.abs(values[np.isfinite(values)]).max()
        raise UserError(
            f"{name} holds {largest:.6g}, too large for {dtype}: choose a wider --dtype"
        )
    return rounded


class ShardedWriter:
    """Writes tensors, in any order, into safetensors files under `directory`: STEM.safetensors, or
    with more than `max_shard_bytes` STEM-00001-of-0000N.safetensors and
    STEM.safetensors.index.json. All files have their full size from the start, so that a disk too
    small is found before anything is computed.
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
        # Wide dtypes first: every tensor is then aligned to its items.
        ordered = sorted(tensors.items(), key=lambda item: -np.dtype(item[1][1]).itemsize)
        for key, (shape, dtype) in ordered:
            first, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            header[key] = {
                "dtype": NAMES[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [first, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._handles.append(handle)
        os.posix_fallocate(handle, 0, 8 + len(text) + end)
        _write(handle, len(text).to_bytes(8, "little") + text, 0)
        for key, (shape, dtype) in ordered:
            offset = 8 + len(text) + header[key]["data_offsets"][0]
            self._offsets[key] = (handle, offset, tuple(shape), np.dtype(dtype))

    def write(self, key: str, array: np.ndarray) -> None:
        handle, offset, shape, dtype = self._offsets[key]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{key}: {array.dtype} {array.shape} given, {dtype} {shape} announced")
        _write(handle, memoryview(contiguous(array).reshape(-1).view(np.uint8)), offset)
        self._missing.discard(key)

    def write_rows(self, key: str, rows: np.ndarray, first: int) -> None:
        """Write rows of a tensor from number `first` on. They come in order: the last completes the
        tensor.
        """
        handle, offset, shape, dtype = self._offsets[key]
        end = first + len(rows)
        if rows.shape[1:] != shape[1:] or rows.dtype != dtype or end > shape[0]:
            raise ValueError(
                f"{key}: {rows.dtype} {rows.shape} given from row {first} on, {dtype} {shape} announced"
            )
        offset += first * math.prod(shape[1:]) * dtype.itemsize
        _write(handle, memoryview(contiguous(rows).reshape(-1).view(np.uint8)), offset)
        if end == shape[0]:
            self._missing.discard(key)

    def close(self) -> None:
        """Close the files. Raises ValueError where an announced tensor was never written."""
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()
        if self._missing:
            raise ValueError(f"never written: {sorted(self._missing)[:3]}")

    def abort(self) -> None:
        """Close the files, which whoever made the directory removes."""
        self._missing.clear()
        self.close()


def _write(handle: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + _MAX_READ], offset + done)


def _cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names in order into shards, none larger than `limit` unless it is a single tensor."""
    shards: list[list[str]] = [[]]
    room = limit
    for key, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    return shards
