"""Decode untrusted PNG files: a strict parse bounds the memory of the decoded image, and decoding
stays within that bound.

A decoder uses the last header of a file, inflates text and colour profiles, and follows animations.
So the file is parsed here first, without decoding (PNG specification, third edition, sections 5 and
11): exactly one IHDR in front, every CRC right, IDAT chunks in one run, IEND at the very end. The
decoder is given a file rebuilt of IHDR, PLTE and IDAT alone.

Shape suffixes: H height, W width, C colour channels.
"""

import dataclasses
import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from blip3o_jax.config.errors import first_line

if TYPE_CHECKING:  # Pillow is imported where an image is decoded, so that processes start fast
    from PIL import Image

MAX_SIDE = 1 << 14  # a decoder buffers whole rows
# encoders write IDAT chunks of 8 KiB or more; parsing costs about 1 us a chunk
MAX_CHUNKS = 1 << 14
# of a pixel at the most while it is decoded: 4 in Pillow's image and 3 in the result
DECODED_BYTES = 7
STRIP = 64  # rows that are converted at once
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colour type -> (channels, bit depths); section 11.2.1.
_COLOURS = {
    0: (1, (1, 2, 4, 8, 16)),
    2: (3, (8, 16)),
    3: (1, (1, 2, 4, 8)),
    4: (2, (8, 16)),
    6: (4, (8, 16)),
}
_PALETTE = 3


class BadPng(ValueError):
    """Report an invalid file in one line."""


@dataclasses.dataclass(frozen=True)
class Png:
    """Hold a file with nothing but an image. `file`: uint8 [bytes], IHDR, PLTE, IDAT and IEND."""

    height: int
    width: int
    file: np.ndarray

    @property
    def pixels(self) -> int:
        return self.height * self.width


def parse(file: bytes) -> Png:
    """Return the image of a PNG file without its metadata. Raises BadPng; decodes nothing."""
    if not file.startswith(_SIGNATURE):
        raise BadPng("is not a PNG")
    header: _Header | None = None
    palette = b""
    data: list[memoryview] = []
    position, previous = len(_SIGNATURE), b""
    view = memoryview(file)
    for _ in range(MAX_CHUNKS):
        kind, content, position = _chunk(view, position)
        if (kind == b"IHDR") != (header is None):
            raise BadPng("must have exactly one IHDR chunk, in front")
        if kind == b"IHDR":
            header = _header(content)
        elif kind == b"PLTE":
            if palette or data or len(content) % 3 or not 3 <= len(content) <= 768:
                raise BadPng("has a wrong PLTE chunk")
            palette = bytes(content)
        elif kind == b"IDAT":
            if data and previous != b"IDAT":
                raise BadPng("has IDAT chunks that do not follow each other")
            data.append(content)
        elif kind == b"IEND":
            break
        elif not kind[0] & 0x20:  # an unknown critical chunk
            raise BadPng(f"has an unknown chunk {kind.decode('ascii')}")
        previous = kind
    else:
        raise BadPng(f"has more than {MAX_CHUNKS} chunks")
    if position != len(file):
        raise BadPng("goes on after its end")
    if header is None or not data:
        raise BadPng("has no IDAT chunk")
    return _rebuilt(header, palette, data)


def _chunk(file: memoryview, position: int) -> tuple[bytes, memoryview, int]:
    """Return type, content and end of the chunk at `position`."""
    if position + 12 > len(file):
        raise BadPng("is cut off")
    length = int.from_bytes(file[position : position + 4], "big")
    start = position + 8
    end = start + length
    kind = bytes(file[position + 4 : start])
    if end + 4 > len(file):
        raise BadPng("is cut off")
    if not (kind.isascii() and kind.isalpha()):
        raise BadPng("has a chunk without a name")
    if zlib.crc32(file[position + 4 : end]) != int.from_bytes(file[end : end + 4], "big"):
        raise BadPng(f"has a wrong checksum in its chunk {kind.decode('ascii')}")
    return kind, file[start:end], end + 4


@dataclasses.dataclass(frozen=True)
class _Header:
    """Hold the fields of IHDR. `rows`: bytes of all rows before compression, without
    interlacing."""

    height: int
    width: int
    palette: bool
    rows: int
    content: bytes


def _header(content: memoryview) -> _Header:
    if len(content) != 13:
        raise BadPng("has a wrong IHDR chunk")
    fields = struct.unpack(">IIBBBBB", content)
    width, height, depth, colour, compression, filtering, interlace = fields
    channels, depths = _COLOURS.get(colour, (0, ()))
    if depth not in depths or compression or filtering or interlace > 1:
        raise BadPng("has a wrong IHDR chunk")
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BadPng(f"has {width} x {height} pixels: a side must have 1 to {MAX_SIDE}")
    rows = height * (1 + (width * channels * depth + 7) // 8)
    return _Header(height, width, colour == _PALETTE, rows, bytes(content))


def _rebuilt(header: _Header, palette: bytes, data: list[memoryview]) -> Png:
    if header.palette and not palette:
        raise BadPng("has no PLTE chunk")
    # Interlacing at most doubles small images; what no encoder writes only costs time on its way.
    if sum(map(len, data)) > 2 * header.rows + 1024:
        raise BadPng("has more data than its pixels take")
    pieces = [_SIGNATURE, *_written(b"IHDR", [header.content])]
    if header.palette:
        pieces += _written(b"PLTE", [palette])
    pieces += [*_written(b"IDAT", data), *_written(b"IEND", [])]
    return Png(header.height, header.width, np.frombuffer(b"".join(pieces), np.uint8))


def _written(kind: bytes, contents: list) -> list:
    checksum = zlib.crc32(kind)
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    length = sum(map(len, contents))
    return [struct.pack(">I", length), kind, *contents, struct.pack(">I", checksum)]


def decode_into(file: np.ndarray, out_HWC: np.ndarray) -> None:
    """Decode a file of `parse` into uint8 RGB [H, W, 3] of its size.

    Transparency is dropped, and the upper 8 of 16 bits are taken. Allocates 4 bytes a pixel in
    addition to `out_HWC`. Raises BadPng.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file.data), formats=["PNG"]) as image:
            image.load()
            for top in range(0, image.height, STRIP):
                bottom = min(top + STRIP, image.height)
                out_HWC[top:bottom] = _rgb(image.crop((0, top, image.width, bottom)))
    except Exception as error:  # Pillow raises many kinds on a broken file
        raise BadPng(f"is a broken PNG: {first_line(error)[:200]}") from None


def _rgb(image: "Image.Image") -> np.ndarray:
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip at 255
        return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
    return np.asarray(image.convert("RGB"))
