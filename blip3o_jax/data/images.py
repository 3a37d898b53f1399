"""Encoded bytes -> pixels -> the two square views a model sees: the autoencoder's and the vision tokenizer's.

    bytes -> decode -> image_HWC -> one centre crop -> pixels_SSC, tokenizer_pixels_TTC      (uint8, RGB)

Both views come from one crop, so that image tokens and latents describe the same region; crop="reference" keeps the
published way, where the tokenizer sees the whole image squashed to a square.

Legend: H, W height and width of the image; S, T sides of the two views; C = 3.
"""

import io

import numpy as np
from PIL import Image, ImageOps

from blip3o_jax.data.record import BadRecord

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


def crop_and_resize(image_HWC: np.ndarray, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The largest centred square of a uint8 image, resized to [size, size, 3].

    Pillow's bicubic widens its kernel when it shrinks (antialiasing). It is the published tokenizer's filter, and it keeps
    more detail for the autoencoder to learn than area averaging; what it overshoots at edges is clipped.
    """
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = np.ascontiguousarray(image_HWC[top : top + side, left : left + side])
    return square if side == size else np.array(Image.fromarray(square).resize((size, size), resample))


def views(image_HWC: np.ndarray, image_size: int, tokenizer_size: int, crop: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [S, S, 3] for the autoencoder, tokenizer pixels uint8 [T, T, 3]) of one image.

    crop="shared": both show the same centred square. crop="reference": the published pipelines, bilinear centre crop for the
    autoencoder, and for the tokenizer the whole image, its sides squashed to a square (bicubic).
    """
    if crop == "shared":
        return crop_and_resize(image_HWC, image_size), crop_and_resize(image_HWC, tokenizer_size)
    if crop == "reference":
        pixels = crop_and_resize(image_HWC, image_size, Image.Resampling.BILINEAR)
        squashed = Image.fromarray(image_HWC).resize((tokenizer_size, tokenizer_size), Image.Resampling.BICUBIC)
        return pixels, np.array(squashed)
    raise ValueError(f"crop={crop!r} is not one of shared, reference")
