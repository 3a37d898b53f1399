"""Decode images and crop them to the two views of the model: the autoencoder's and the vision
tokenizer's.

    bytes -> decode -> image_HWC -> one centre crop -> pixels_PQC, tokenizer_pixels_TTC (uint8, RGB)

`open_image`, and for untrusted files rl/rewards/png.py, are the only places of the package where
Pillow opens an encoded image. They select a few formats by their first bytes, so that no other
decoder ever starts (Pillow's own choice includes EPS, which runs Ghostscript). The number of pixels
is checked from the header. A PNG is opened without its colour profile and text chunks: they change
no pixel, and Pillow refuses them above 1 MiB.

Both views come from one crop, so that image tokens and latents describe the same region; the
tokenizer's view is squashed to a square if the crop is not square. crop="reference" follows the
published code, where the tokenizer's view is the whole image squashed.

Legend: H, W height and width of the image; P, Q those of the autoencoder's view; T side of the
tokenizer's; C = 3.
"""

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from blip3o_jax import files
from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.config.errors import first_line
from blip3o_jax.data.record import BadRecord

MIN_SIDE = 8  # pixels, of an image file that a user names
MAX_PIXELS = DataConfig.max_pixels
# The first bytes of a file and the class of Pillow that reads it. What a phone writes as MPO is a
# JPEG with others after it.
_FORMATS = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)
_KNOWN = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Chunks of a PNG that say nothing of its pixels. Of the texts only those that may hold an
# orientation are kept, and small.
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_PROFILE = b"iCCP"
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_MAX_TEXT_BYTES = 1 << 16  # decompressed
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_EIGHT_BITS = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
)


def open_image(
    data: bytes,
    max_pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """Return the image with its header read and no pixel decoded; to be closed by the caller.

    Raises:
      BadRecord: zero bytes, no header of a format of `_FORMATS` or not one of `formats`, Pillow's
        names (None: any of them), or more than `max_pixels` pixels (None: any number).
    """
    if not data:
        raise BadRecord("", "", "the image has zero bytes")
    reader = next((reader for start, reader in _FORMATS if data.startswith(start)), None)
    if reader is None or (data.startswith(b"RIFF") and data[8:12] != b"WEBP"):
        raise BadRecord("", "", f"the image cannot be decoded: it is no {_KNOWN} file")
    if formats is not None and reader.format not in formats:
        raise BadRecord(
            "", "", f"the image cannot be decoded: it is no {' or '.join(formats)} file"
        )
    if size := _webp_size(data):  # its decoder allocates the pixels when it is opened
        _check_size(size, max_pixels)
    try:
        png = reader is PngImagePlugin.PngImageFile
        image = reader(io.BytesIO(_strip_metadata(data) if png else data))
    except Exception as error:  # decoders raise every kind of exception on broken bytes
        raise _undecodable(error) from None
    try:
        _check_size(image.size, max_pixels)
    except BadRecord:
        image.close()
        raise
    return image


def _check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        reason = (
            f"the image is too large: {width} x {height} pixels, more than {max_pixels:,}: scale "
            "it down (for training data, data.max_pixels can be raised)"
        )
        raise BadRecord("", "", reason)


def _undecodable(error: Exception) -> BadRecord:
    return BadRecord("", "", f"the image cannot be decoded: {first_line(error)}")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a WebP file's canvas from the header of its first chunk, None for
    any other file.
    """
    chunk = data[12:16] if data.startswith(b"RIFF") and len(data) >= 30 else b""
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return tuple(side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    return None


def _strip_metadata(data: bytes) -> bytes:
    """Return a PNG without its colour profile and the text chunks that hold no orientation."""
    kept = []
    start = position = 8  # after the signature; the bytes between `start` and `position` are copied
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        note = kind in _TEXT_CHUNKS
        useful = (
            note and length <= _MAX_TEXT_BYTES and _may_orient(kind, data[position + 8 : end - 4])
        )
        if kind == _PROFILE or (note and not useful):
            kept.append(data[start:position])
            start = end
        position = end
        if kind == b"IEND":
            break
    return b"".join((data[:8], *kept, data[start:])) if kept else data


def _may_orient(kind: bytes, chunk: bytes) -> bool:
    """Return whether Pillow may take an orientation from a text chunk, one that is complete and
    small when decompressed.
    """
    keyword, _, rest = chunk.partition(b"\0")
    if keyword not in _ORIENTATION_TEXTS:
        return False
    if kind == b"tEXt":
        return True
    if kind == b"iTXt":
        compressed = rest[:1] != b"\0"
        rest = rest[1:]
        packed = rest[1:].split(b"\0", 2)[-1]  # after language and keyword
        if not compressed:
            return True
    else:
        packed = rest[1:]
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(packed, _MAX_TEXT_BYTES)
    except zlib.error:
        return False
    # 0 is the one method of compression that there is.
    return rest[:1] == b"\0" and not inflater.unconsumed_tail


def decode(
    data: bytes,
    at_least: int = 0,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] | None = None,
) -> np.ndarray:
    """Decode an image to uint8 [H, W, 3]: upright by its EXIF orientation, in RGB, transparency
    laid over white.

    Args:
      data: JPEG, PNG, WebP, GIF, BMP or TIFF; the first frame of an animation.
      at_least: if given, a JPEG may come out smaller than it is by 2, 4 or 8, both sides staying at
        or above this many pixels: the inverse DCT then computes only the pixels that are kept.
      max_pixels: the most that are decoded.
      formats: Pillow's names of those that are decoded, all of the above by default.

    Raises:
      BadRecord: zero bytes, broken or truncated data, an unknown format or pixel format, too many
        pixels.
    """
    with open_image(data, max_pixels, formats) as image:
        try:
            if at_least:
                # `None` keeps the mode; the size selects the scale of the inverse DCT.
                image.draft(None, (at_least, at_least))
            image.load()
            return np.array(_to_rgb(_upright(image)))
        except BadRecord:
            raise
        except Exception as error:
            raise _undecodable(error) from None


def load(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image file that a user names, as `decode` does. Raises UserError, one line with the
    path: no file, broken data, an animation, sides below 8 pixels, more than 80 megapixels.
    """
    try:
        files.check_regular(path)
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read: {error.strerror}") from None
    try:
        with open_image(data, MAX_PIXELS) as image:
            width, height = image.size
            frames = _frames(image)
        if frames > 1:
            raise UserError(f"{path}: an animation of {frames} frames: save the one that is meant")
        if min(width, height) < MIN_SIDE:
            raise UserError(
                f"{path}: {width} x {height} pixels are no picture: give one of {MIN_SIDE} x"
                f" {MIN_SIDE} or more"
            )
        return decode(data)
    except BadRecord as error:
        raise UserError(f"{path}: {error.reason}") from None


def _frames(image: Image.Image) -> int:
    """Return the frames of an animation, 1 of a picture; BadRecord where a damaged one has no
    end.
    """
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # the headers of all frames are read: as in `open_image`
        raise _undecodable(error) from None


def _upright(image: Image.Image) -> Image.Image:
    turn = _TRANSPOSITIONS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data: the orientation is unknown, the pixels may be fine
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        # Pillow would clip at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in _EIGHT_BITS:
        raise BadRecord(
            "", "", f"pixel format {image.mode} is not supported; store 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        # Dropping the alpha channel would show the hidden colour of transparent pixels.
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def shape_of(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width) of an encoded image as `decode` gives it, from its header alone;
    BadRecord where it has none, or more than `max_pixels` pixels: WebP's decoder allocates them all
    when it is opened.
    """
    with open_image(data, max_pixels) as image:
        width, height = image.size
        # A TIFF's size is that of the image turned upright already.
        turned = isinstance(image, TiffImagePlugin.TiffImageFile)
        on_its_side = not turned and _orientation(image) in (5, 6, 7, 8)
        return (width, height) if on_its_side else (height, width)


def crop_and_resize(
    image_HWC: np.ndarray,
    size: int | tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Crop the largest centred part of a uint8 image with the aspect ratio of `size`, a side or
    (height, width), and resize it to `size`.

    Pillow's bicubic widens its kernel when it shrinks (antialiasing). It is the published
    tokenizer's filter, and it keeps more detail for the autoencoder to learn than area averaging;
    what it overshoots at edges is clipped.
    """
    return _resize(_centre_crop(image_HWC, size), size, resample)


def _centre_crop(image_HWC: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    rows, columns = (size, size) if isinstance(size, int) else size
    height, width = image_HWC.shape[:2]
    # The whole of one side, and of the other what the ratio leaves.
    high = min(height, max(1, round(width * rows / columns)))
    wide = min(width, max(1, round(height * columns / rows)))
    top = (height - high) // 2
    left = (width - wide) // 2
    return np.ascontiguousarray(image_HWC[top : top + high, left : left + wide])


def _resize(
    image_HWC: np.ndarray, size: int | tuple[int, int], resample: Image.Resampling
) -> np.ndarray:
    rows, columns = (size, size) if isinstance(size, int) else size
    same = image_HWC.shape[:2] == (rows, columns)
    return (
        image_HWC
        if same
        else np.array(Image.fromarray(image_HWC).resize((columns, rows), resample))
    )


def views(
    image_HWC: np.ndarray, size: int | tuple[int, int], tokenizer_size: int, crop: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return (pixels uint8 [P, Q, 3] for the autoencoder, tokenizer pixels uint8 [T, T, 3]) of one
    image; `size` is P = Q or (P, Q).

    crop="shared": both show the same centred part. crop="reference": the published pipelines,
    bilinear centre crop for the autoencoder, and for the tokenizer the whole image, its sides
    squashed to a square (bicubic).
    """
    if crop == "shared":
        part_HWC = _centre_crop(image_HWC, size)
        return (
            _resize(part_HWC, size, Image.Resampling.BICUBIC),
            _resize(part_HWC, tokenizer_size, Image.Resampling.BICUBIC),
        )
    if crop == "reference":
        pixels = crop_and_resize(image_HWC, size, Image.Resampling.BILINEAR)
        return pixels, _resize(image_HWC, tokenizer_size, Image.Resampling.BICUBIC)
    raise ValueError(f"crop={crop!r} is not one of shared, reference")
