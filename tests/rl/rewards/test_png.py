"""Check that the memory of a PNG file is bounded before it is decoded, for any contents."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.rl.rewards import png
from blip3o_jax.rl.rewards.png import BadPng


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def header(width=2, height=3, depth=8, colour=2, compression=0, filtering=0, interlace=0) -> bytes:
    return chunk(
        b"IHDR",
        struct.pack(">IIBBBBB", width, height, depth, colour, compression, filtering, interlace),
    )


SIGNATURE = b"\x89PNG\r\n\x1a\n"
DATA = zlib.compress((b"\0" + bytes(range(6))) * 3)
END = chunk(b"IEND")
SOUND = SIGNATURE + header() + chunk(b"IDAT", DATA) + END


def decoded(file: bytes) -> np.ndarray:
    image = png.parse(file)
    out_HWC = np.full((image.height, image.width, 3), 99, np.uint8)
    png.decode_into(image.file, out_HWC)
    return out_HWC


def saved(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_images_are_what_pillow_makes_of_them(rng, mode):
    noise = Image.fromarray(
        rng.integers(0, 256, (130, 5, 3), dtype=np.uint8)
    )  # more rows than are converted at once
    image = noise.convert(mode)
    np.testing.assert_array_equal(decoded(saved(image)), np.asarray(image.convert("RGB")))


def test_of_sixteen_bits_the_upper_ones_are_taken(rng):
    grey_HW = rng.integers(0, 1 << 16, (9, 7), dtype=np.uint16)
    np.testing.assert_array_equal(
        decoded(saved(Image.fromarray(grey_HW))), np.repeat(grey_HW[..., None] >> 8, 3, 2)
    )
    rows = b"".join(b"\0" + (row.astype(">u2")).tobytes() for row in grey_HW.repeat(3, 1))
    file = SIGNATURE + header(7, 9, 16) + chunk(b"IDAT", zlib.compress(rows)) + END
    np.testing.assert_array_equal(decoded(file), np.repeat(grey_HW[..., None] >> 8, 3, 2))


def test_metadata_and_animations_never_reach_the_decoder():
    bomb = zlib.compress(bytes(1 << 20))
    extras = [
        (b"zTXt", b"k\0\0" + bomb),
        (b"iCCP", b"p\0\0" + bomb),
        (b"tEXt", bytes(1 << 16)),
        (b"acTL", bytes(8)),
    ]
    extras += [(b"fcTL", bytes(26)), (b"eXIf", bytes(100)), (b"tRNS", bytes(6))]
    file = SIGNATURE + header() + b"".join(chunk(*extra) for extra in extras) + chunk(b"IDAT", DATA)
    file += chunk(b"fdAT", bytes(4) + DATA) + END
    assert png.parse(file).file.tobytes() == SOUND
    np.testing.assert_array_equal(
        decoded(file), np.arange(6, dtype=np.uint8).reshape(1, 2, 3).repeat(3, 0)
    )


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (b"GIF89a" + bytes(50), "is not a PNG"),
        (SOUND[:-1], "is cut off"),
        (SOUND[:40], "is cut off"),
        (SOUND + b"\0", "goes on after its end"),
        (SOUND[:45] + b"\1" + SOUND[46:], "wrong checksum in its chunk IDAT"),
        (SIGNATURE + header() + header(1, 1) + chunk(b"IDAT", DATA) + END, "exactly one IHDR"),
        (
            SIGNATURE + header() + chunk(b"IDAT", DATA) + header(60000, 60000) + END,
            "exactly one IHDR",
        ),
        (SIGNATURE + chunk(b"tEXt") + header() + chunk(b"IDAT", DATA) + END, "exactly one IHDR"),
        (SIGNATURE + header(60000, 1) + chunk(b"IDAT", DATA) + END, "has 60000 x 1 pixels"),
        (SIGNATURE + header(0, 1) + chunk(b"IDAT", DATA) + END, "has 0 x 1 pixels"),
        (SIGNATURE + header(depth=32) + chunk(b"IDAT", DATA) + END, "wrong IHDR"),
        (SIGNATURE + header(colour=5) + chunk(b"IDAT", DATA) + END, "wrong IHDR"),
        (SIGNATURE + header(interlace=2) + chunk(b"IDAT", DATA) + END, "wrong IHDR"),
        (SIGNATURE + chunk(b"IHDR", bytes(12)) + END, "wrong IHDR"),
        (SIGNATURE + header(colour=3) + chunk(b"IDAT", DATA) + END, "no PLTE"),
        (
            SIGNATURE + header(colour=3) + chunk(b"PLTE", bytes(4)) + chunk(b"IDAT", DATA) + END,
            "wrong PLTE",
        ),
        (SIGNATURE + header() + END, "no IDAT"),
        (
            SIGNATURE + header() + chunk(b"IDAT", DATA + bytes(1100)) + END,
            "more data than its pixels",
        ),
        (
            SIGNATURE + header() + chunk(b"IDAT") + chunk(b"tEXt") + chunk(b"IDAT", DATA) + END,
            "do not follow",
        ),
        (SIGNATURE + header() + chunk(b"ABCD") + chunk(b"IDAT", DATA) + END, "unknown chunk ABCD"),
        (SIGNATURE + header() + chunk(b"12\n4") + END, "without a name"),
        (SIGNATURE + header() + chunk(b"IDAT") * png.MAX_CHUNKS + END, "more than 16384 chunks"),
        (SIGNATURE + header() + struct.pack(">I", 1 << 31) + b"IDAT" + DATA, "is cut off"),
    ],
)
def test_what_is_no_sound_file(file, line):
    with pytest.raises(BadPng, match=line):
        png.parse(file)


@pytest.mark.parametrize("data", [b"", b"no zlib", DATA[:12], zlib.compress(b"\7" * 21)])
def test_data_that_are_no_image(data):
    image = png.parse(SIGNATURE + header() + chunk(b"IDAT", data) + END)
    with pytest.raises(BadPng, match="is a broken PNG"):
        png.decode_into(image.file, np.zeros((3, 2, 3), np.uint8))
