"""Read and write files of named tensors, one tensor at a time.

A safetensors file (https://huggingface.co/docs/safetensors) is the 8-byte length of a JSON header,
the header with each tensor's dtype, shape and offsets, and the tensors. It is read and written with
pread and pwrite, so that at most one tensor is in memory; the library of that name maps or holds
whole files. PyTorch files are read by `torch.load(weights_only=True)`. weight_files.py finds the
files of a directory's weights.
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
from blip3o_jax.config.errors import install_command
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
    """Hold a tensor's name, shape and dtype; `read` returns its values from the file."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    read: Callable[[], np.ndarray] = dataclasses.field(compare=False)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """Return {name: tensor} of one file, reading headers only.

    Raises UserError, naming file and tensor, for a damaged file or a pointer of Git LFS or
    git-annex.
    """
    check_not_pointer(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    values = load_torch(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds a {type(values).__name__}, not a state dict")
    return torch_tensors(values, path)


def check_not_pointer(path: pathlib.Path) -> None:
    """Raise UserError for a pointer file of Git LFS or git-annex, or a dangling link."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: fetch its target (git "
            "annex get, for a clone that git-annex made), or copy the file itself"
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return  # the caller's own access raises the error
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer and not the file itself: run git lfs pull in its clone"
        )
    if start.startswith(b"/annex/objects/"):
        raise UserError(
            f"{path} is a git-annex pointer and not the file itself: run git annex get in its clone"
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
        raise UserError(f"{path} is not a JSON object: copy it again")
    return value


def load_torch(path: pathlib.Path) -> Any:
    """Load a PyTorch file of plain containers and tensors, without running code from it.

    Files are memory-mapped, except in the oldest format. The published TA-Tok file stores its args
    as an `easydict.EasyDict`, which is loaded as an OrderedDict, without that library. Raises
    UserError for other files.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file: install PyTorch to read it ({install_command('convert')})"
        ) from error
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_not_pointer(path)
    # OrderedDict is the only subclass of dict that torch can create with weights_only.
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (collections.OrderedDict, "easydict.EasyDict")
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # torch raises any error of its unpickler and zip reader
        # torch's message is replaced, since it advises loading the file with its code run.
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it holds a {unknown[1]}, which is not a tensor or plain container"
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
            raise UserError(f"{path}: {key} is of type {type(value).__name__}, not a tensor")
        value = value.detach()
        # torch cannot convert bfloat16 to NumPy, so its bits are viewed as integers.
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
                f"{path} is not a safetensors file, or ends within its header ({size} bytes): copy "
                "it again"
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
    start = 8 + length
    end = 0
    tensors: dict[str, Tensor] = {}
    for key, (dtype, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if dtype is None:
            raise UserError(
                f"{path}: {key} has dtype {header[key]['dtype']}, which is not one of "
                f"{', '.join(DTYPES)}"
            )
        read = _reader(path, key, shape, dtype, start + first)
        tensors[key] = Tensor(key, shape, dtype, path, read)
        # Tensors must follow each other without gaps or overlaps, as the format requires: an
        # altered header cannot point at other bytes.
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise UserError(
                f"{path}: the offsets of {key} do not match its shape {shape}: copy the file again"
            )
        end = last
        if start + end > size:
            raise UserError(
                f"{path} is cut off: {key} ends at byte {start + end}, the file at {size}: copy it "
                "again"
            )
    if start + end != size:
        raise UserError(
            f"{path} has {size - start - end} bytes after its last tensor: copy it again"
        )
    return {key: tensors[key] for key in entries}  # in the header's order


def _place(
    dtype: str, shape: list[int], first: int, last: int
) -> tuple[np.dtype | None, tuple[int, ...], int, int]:
    """Parse one entry of a header; ValueError or TypeError for an invalid one."""
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"shape {shape}, data_offsets {[first, last]}")
    return DTYPES.get(dtype), tuple(shape), first, last


def _reader(
    path: pathlib.Path, key: str, shape: tuple[int, ...], dtype: np.dtype, offset: int
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.empty(math.prod(shape), dtype)
        view = array.view(np.uint8).data
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                # Linux reads at most 2 GiB in one call.
                count = os.preadv(handle, [view[done : done + _MAX_READ]], offset + done)
                if count == 0:
                    raise UserError(f"{path} is cut off within {key}: copy it again")
                done += count
        finally:
            os.close(handle)
        return array.reshape(shape)

    return read


def cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast `values` to `dtype`, rounding to nearest.

    Raises UserError, naming `name`, for a finite value that becomes infinite.
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
                "dtype": NAMES[np.dtype(dtype)],
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
        # Linux writes at most 2 GiB in one call.
        done += os.pwrite(handle, data[done : done + _MAX_READ], offset + done)


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
