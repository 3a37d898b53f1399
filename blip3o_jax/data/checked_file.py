"""Read and write files of arrays with a checksum over all their bytes, and find the directory for
them.

Little-endian:

    MAGIC, CRC32C of all that follows (u4), length of the header (u4), the header (JSON), arrays
"""

import json
import os
from typing import Any

import numpy as np

from blip3o_jax.checksums import crc32c

MAGIC = b"blip3o arrays 1\n"  # with the version of the layout
_DTYPES = ("<i8", "<u4", "|u1")  # a file may come from anywhere: no objects
_PREFIX = len(MAGIC) + 8


class DamagedArrays(ValueError):
    """Report a file that `pack` did not make, or that has changed since."""


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of a file with a header that JSON can hold, and arrays of int64, uint32 or
    uint8."""
    layout = {}
    start = 0
    pieces = []
    for name, array in arrays.items():
        kind = {"i": "<i8", "u": "|u1" if array.dtype.itemsize == 1 else "<u4"}[array.dtype.kind]
        raw = np.ascontiguousarray(array, kind).tobytes()
        layout[name] = (kind, array.shape, start)
        # Every array starts at a multiple of 8 bytes, so that a mapped view is aligned.
        pieces.append(raw + bytes(-len(raw) % 8))
        start += len(pieces[-1])
    text = json.dumps(header | {"arrays": layout}).encode()
    text += b" " * (-(_PREFIX + len(text)) % 8)  # so that the arrays are aligned
    body = b"".join((len(text).to_bytes(4, "little"), text, *pieces))
    return MAGIC + crc32c([body]).to_bytes(4, "little") + body


def unpack(
    path: str | os.PathLike[str],
    *,
    check: bool = True,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Map a file that `pack` made; return its header and arrays. With `check=False` its checksum is
    not compared.

    Raises:
      DamagedArrays: the file is of another kind, or a part of it has changed.
      OSError: the file does not exist or cannot be read.
    """
    if os.path.getsize(path) < _PREFIX:
        raise DamagedArrays("it is cut short")
    raw = np.memmap(path, np.uint8, mode="r")
    if raw[: len(MAGIC)].tobytes() != MAGIC:
        raise DamagedArrays("it is of another version")
    stored, length = (int(n) for n in raw[len(MAGIC) : _PREFIX].view("<u4"))
    # The checksum covers everything after itself, the header's length included.
    if check and crc32c([raw[len(MAGIC) + 4 :]]) != stored:
        raise DamagedArrays("its checksum does not match")
    try:
        header = json.loads(raw[_PREFIX : _PREFIX + length].tobytes())
        body = raw[_PREFIX + length :]
        arrays = {}
        for name, (kind, shape, start) in header.pop("arrays").items():
            if kind not in _DTYPES:
                raise DamagedArrays(f"an array of {kind}")
            size = np.dtype(kind).itemsize * int(np.prod(shape))
            arrays[name] = body[start : start + size].view(kind).reshape(shape)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedArrays(f"its layout makes no sense ({error})") from None
    return header, arrays
