"""Encoded bytes -> pixels -> the two views a model sees: the autoencoder's and the vision tokenizer's.

    bytes -> decode -> image_HWC -> one centre crop -> pixels_PQC, tokenizer_pixels_TTC      (uint8, RGB)

Both views come from one crop, so that image tokens and latents describe the same region; the tokenizer's is squashed to a
square where the crop is none. crop="reference" keeps the published way, where the tokenizer sees the whole image squashed.

Legend: H, W height and width of the image; P, Q those of the autoencoder's view; T side of the tokenizer's; C = 3.
"""

import io
import os
import pathlib
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from blip3o_jax.config import UserError
from blip3o_jax.data.record import BadRecord

SMALLEST, MOST_PIXELS = 8, 80_000_000  # of an image that a user names
_TOO_MANY = f"the image is too large: scale it down to {MOST_PIXELS // 10**6} megapixels or less"
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def decode(data: bytes, at_least: int = 0) -> np.ndarray:
    """Encoded image -> uint8 [H, W, 3]: upright by its EXIF orientation, in RGB, transparency laid over white.

    Args:
      data: JPEG, PNG, WebP or whatever else Pillow reads; the first frame of an animation.
      at_least: if given, a JPEG may come out smaller than it is by 2, 4 or 8, both sides staying at or above this many
        pixels: the inverse DCT then computes only the pixels that are kept.

    Raises:
      BadRecord: zero bytes, broken or truncated data, an unknown pixel format.
    """
    if not data:
        raise BadRecord("", "", "the image has zero bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            return np.array(_to_rgb(_upright(image)))
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # decoders raise every kind of exception on broken bytes
        raise BadRecord("", "", f"the image cannot be decoded: {str(error) or type(error).__name__}") from None


def load(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file that a user names -> uint8 [H, W, 3], as `decode`; UserError, one line with the path, for what no picture
    can be taken from: no file, broken data, an animation, sides below 8 pixels, more than 80 megapixels."""
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            opened = Image.open(io.BytesIO(data))
        with opened as image:  # the header alone is read
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
            if image.format == "MPO":  # a phone's JPEG, with a preview or a depth map after it
                frames = 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path}: {_TOO_MANY}") from None
    except Exception as error:
        reason = "it has no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path}: the image cannot be read: {reason}") from None
    if frames > 1:
        raise UserError(f"{path}: an animation of {frames} frames: save the one that is meant")
    if min(width, height) < SMALLEST:
        raise UserError(f"{path}: {width} x {height} pixels are no picture: give one of {SMALLEST} x {SMALLEST} or more")
    if width * height > MOST_PIXELS:
        raise UserError(f"{path}: {_TOO_MANY}")
    try:
        return decode(data)
    except BadRecord as error:
        raise UserError(f"{path}: {error.reason}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data says nothing about the pixels: the image stands as it is stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        # Pillow would clip at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in _EIGHT_BITS:
        raise BadRecord("", "", f"pixel format {image.mode} is not supported; store 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def shape_of(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image as `decode` would have it, from its header alone; BadRecord where it has none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size[::-1] if _lies_on_its_side(image) else image.size
            return height, width
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BadRecord("", "", f"the image cannot be decoded: {reason}" if data else "the image has zero bytes") from None


def _lies_on_its_side(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as in `_upright`
        return False


def crop_and_resize(
    image_HWC: np.ndarray, size: int | tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """The largest centred part of a uint8 image that has the shape of `size`, a side or (height, width), resized to it.

    Pillow's bicubic widens its kernel when it shrinks (antialiasing). It is the published tokenizer's filter, and it keeps
    more detail for the autoencoder to learn than area averaging; what it overshoots at edges is clipped.
    """
    return _resized(_cut(image_HWC, size), size, resample)


def _cut(image_HWC: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    rows, columns = (size, size) if isinstance(size, int) else size
    height, width = image_HWC.shape[:2]
    # The whole of one side, and of the other what the ratio leaves.
    high = min(height, max(1, round(width * rows / columns)))
    wide = min(width, max(1, round(height * columns / rows)))
    top, left = (height - high) // 2, (width - wide) // 2
    return np.ascontiguousarray(image_HWC[top : top + high, left : left + wide])


def _resized(image_HWC: np.ndarray, size: int | tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    rows, columns = (size, size) if isinstance(size, int) else size
    same = image_HWC.shape[:2] == (rows, columns)
    return image_HWC if same else np.array(Image.fromarray(image_HWC).resize((columns, rows), resample))


def views(image_HWC: np.ndarray, size: int | tuple[int, int], tokenizer_size: int, crop: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [P, Q, 3] for the autoencoder, tokenizer pixels uint8 [T, T, 3]) of one image; `size` is P = Q or (P, Q).

    crop="shared": both show the same centred part. crop="reference": the published pipelines, bilinear centre crop for the
    autoencoder, and for the tokenizer the whole image, its sides squashed to a square (bicubic).
    """
    if crop == "shared":
        part_HWC = _cut(image_HWC, size)
        return tuple(_resized(part_HWC, s, Image.Resampling.BICUBIC) for s in (size, tokenizer_size))
    if crop == "reference":
        pixels = crop_and_resize(image_HWC, size, Image.Resampling.BILINEAR)
        return pixels, _resized(image_HWC, tokenizer_size, Image.Resampling.BICUBIC)
    raise ValueError(f"crop={crop!r} is not one of shared, reference")
