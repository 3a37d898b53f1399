"""Read files of named tensors, one tensor at a time; tensor_writer.py writes them.

A safetensors file (https://huggingface.co/docs/safetensors) is the 8-byte length of a JSON header,
the header with each tensor's dtype, shape and offsets, and the tensors. It is read with pread, so
that at most one tensor is in memory; the library of that name maps or holds whole files. PyTorch
files are read by `torch.load(weights_only=True)`. weight_files.py finds the files of a directory's
weights.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.config.errors import install_command

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
MAX_CALL_BYTES = 2**30  # in one system call: Linux transfers at most 2 GiB in one


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
                count = os.preadv(handle, [view[done : done + MAX_CALL_BYTES]], offset + done)
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
