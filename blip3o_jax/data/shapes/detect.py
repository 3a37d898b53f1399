"""Detect the objects and the word in an image by classical image processing, for the scorer.

1. The paper is the median colour of the light, greyish pixels; pixels that differ clearly from it
   are foreground.
2. Connected foreground regions above a minimum area are blobs. A blob's colour is the nearest
   palette colour in CIELAB to its core, if near enough and if most of its core agrees.
3. A blob's shape is found by rendering: every shape is drawn with the blob's area and centroid
   (both survive blur), and the drawing with the largest overlap is taken, if it is large enough.
4. A word is read from the box around all blobs: the font is monospaced, so the box's proportions
   give the number of letters, and each letter is the glyph with the highest correlation with its
   cell, averaged to 5 x 7 dots.

The thresholds leave room for soft edges, noise and a small drift in colour; they were set on
rendered scenes with blur, noise and JPEG artefacts, never on a model's output.

Shape suffixes: H height, W width, C colour channels.
"""

import dataclasses
import functools

import cv2
import numpy as np

from blip3o_jax.data.shapes import draw, font
from blip3o_jax.data.shapes.scene import LETTER_CELL, SIZES, Thing, Word
from blip3o_jax.data.shapes.vocabulary import COLOURS, SHAPES

PAPER_LIGHTNESS = 65.0  # of 100
PAPER_CHROMA = 22.0
FOREGROUND = 26.0  # CIELAB distance from the paper
MIN_AREA = 0.006  # of the image; a small star covers 0.028
COLOUR_DISTANCE = 32.0  # CIELAB; two palette colours are at least 42 apart
COLOUR_AGREEMENT = 0.75  # fraction of a blob's core nearest to the blob's colour
# Intersection over union with the drawn shape. Compact shapes overlap with anything compact (a
# diamond with the circle by 0.83), so they must overlap more; the corners of the others are the
# first thing that a soft image loses.
MIN_OVERLAP = {
    "circle": 0.84,
    "square": 0.80,
    "triangle": 0.74,
    "cross": 0.74,
    "star": 0.69,
    "ring": 0.69,
}
MIN_LEAD = 0.015  # over the second best shape
MIN_LIKENESS = 0.6  # correlation of a cell's dots with a glyph's


@dataclasses.dataclass(frozen=True)
class Detection:
    """Hold the detected objects and word. `things` include blobs whose shape or colour is None (not
    recognised)."""

    things: tuple[Thing, ...]
    word: Word | None
    has_paper: bool


@dataclasses.dataclass(frozen=True)
class _Blob:
    colour: str | None
    alpha: np.ndarray  # float32 [H, W]: fraction of each pixel that the blob covers
    box: tuple[int, int, int, int]  # x, y, width, height in pixels


def detect(image_HWC: np.ndarray) -> Detection:
    """Detect the objects and the word in a square uint8 RGB image [S, S, 3] with S >= 32."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(
            f"the scorer takes uint8 [H, W, 3], not {image_HWC.dtype} {list(image_HWC.shape)}"
        )
    size = image_HWC.shape[0]
    if image_HWC.shape[1] != size or size < 32:
        raise ValueError(
            f"the scorer takes square images of 32 pixels or more, not {list(image_HWC.shape[:2])}"
        )
    # Floats, since OpenCV scales the CIELAB values of uint8 images to bytes.
    pixels_HWC = image_HWC.astype(np.float32) / 255
    # A light blur takes the noise off the threshold; area and centroid of a blob do not change.
    lab_HWC = cv2.cvtColor(cv2.GaussianBlur(pixels_HWC, (0, 0), size / 128), cv2.COLOR_RGB2LAB)
    light_HW = (lab_HWC[..., 0] > PAPER_LIGHTNESS) & (
        np.hypot(lab_HWC[..., 1], lab_HWC[..., 2]) < PAPER_CHROMA
    )
    if light_HW.mean() < 0.2:
        return Detection((), None, has_paper=False)
    paper = np.median(lab_HWC[light_HW], axis=0)
    blobs = _blobs(pixels_HWC, lab_HWC, np.linalg.norm(lab_HWC - paper, axis=-1))
    if not blobs:
        return Detection((), None, has_paper=True)
    *objects, everything = blobs
    return Detection(tuple(_thing(blob) for blob in objects), _read(everything), has_paper=True)


def _blobs(pixels_HWC: np.ndarray, lab_HWC: np.ndarray, distance_HW: np.ndarray) -> list[_Blob]:
    """Return a blob for each object and, last, one for their union, from which a word is read."""
    foreground_HW = distance_HW > FOREGROUND
    count, labels_HW, stats, _ = cv2.connectedComponentsWithStats(
        foreground_HW.astype(np.uint8), connectivity=8
    )
    paper = np.median(pixels_HWC[~foreground_HW], axis=0)
    labels = [
        k for k in range(1, count) if stats[k, cv2.CC_STAT_AREA] >= MIN_AREA * foreground_HW.size
    ]
    masks = [labels_HW == label for label in labels] + (
        [np.isin(labels_HW, labels)] if labels else []
    )
    return [_blob(mask_HW, pixels_HWC, lab_HWC, distance_HW, paper) for mask_HW in masks]


def _blob(
    mask_HW: np.ndarray,
    pixels_HWC: np.ndarray,
    lab_HWC: np.ndarray,
    distance_HW: np.ndarray,
    paper: np.ndarray,
) -> _Blob:
    mask_HW = mask_HW.astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask_HW)
    # The pixels next to it hold the rest of its soft edge.
    here = slice(max(y - 1, 0), y + height + 1), slice(max(x - 1, 0), x + width + 1)
    mask_hw, distance_hw, pixels_hwC = mask_HW[here], distance_HW[here], pixels_HWC[here]
    # The half that differs most from the paper: pixels of a soft edge are mixtures.
    core_hw = (mask_hw > 0) & (distance_hw >= np.median(distance_hw[mask_hw > 0]))
    towards = np.median(pixels_hwC[core_hw], axis=0) - paper
    alpha_HW = np.zeros(mask_HW.shape, np.float32)
    # The position of a pixel on the line from the colour of the paper to that of the core.
    alpha_HW[here] = np.clip((pixels_hwC - paper) @ towards / (towards @ towards), 0, 1)
    # Zero further away: other blobs may be in this one's box.
    alpha_HW[here] *= cv2.dilate(mask_hw, np.ones((3, 3), np.uint8))
    return _Blob(_colour(lab_HWC[here][core_hw]), alpha_HW, (x, y, width, height))


@functools.cache
def _palette() -> np.ndarray:
    """Return the palette in CIELAB: float [colours, 3]."""
    return cv2.cvtColor(np.array([list(COLOURS.values())], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]


def _colour(core: np.ndarray) -> str | None:
    """Return the name of the palette colour of pixels [n, 3] in CIELAB; None if unclear."""
    distance = np.linalg.norm(_palette() - np.median(core, axis=0), axis=-1)
    best = int(distance.argmin())
    agreeing = (np.linalg.norm(core[:, None] - _palette(), axis=-1).argmin(axis=-1) == best).mean()
    return (
        list(COLOURS)[best]
        if distance[best] < COLOUR_DISTANCE and agreeing >= COLOUR_AGREEMENT
        else None
    )


@functools.cache
def _proportions(shape: str) -> tuple[float, np.ndarray]:
    """Return the area and centroid of a shape of side 1 around (0, 0)."""
    covered, rows, columns = draw.coverage(shape, 0.5, 0.5, 1.0, 128)
    y, x = np.mgrid[rows, columns]
    centroid = np.array(
        [(covered * (grid + 0.5)).sum() / covered.sum() / 128 - 0.5 for grid in (x, y)]
    )
    return float(covered.sum()) / 128**2, centroid


def _thing(blob: _Blob) -> Thing:
    image_size = blob.alpha.shape[0]
    mass = float(blob.alpha.sum())
    y, x = np.nonzero(blob.alpha)
    weights = blob.alpha[y, x] / mass
    centroid = np.array([(x + 0.5) @ weights, (y + 0.5) @ weights]) / image_size
    scored = sorted(
        ((_overlap(blob.alpha, shape, mass, centroid), shape) for shape in SHAPES), reverse=True
    )
    (best, shape), (second, _) = scored[:2]
    area, offset = _proportions(shape)
    side = (mass / area) ** 0.5 / image_size
    plausible = 0.6 * SIZES["small"][0] < side < 1.5 * SIZES["large"][1]
    recognised = plausible and best >= MIN_OVERLAP[shape] and best - second >= MIN_LEAD
    if not recognised:
        x0, y0, width, height = (v / image_size for v in blob.box)
        return Thing(None, blob.colour, x0 + width / 2, y0 + height / 2, max(width, height))
    centre_x, centre_y = (float(c) for c in centroid - side * offset)
    return Thing(shape, blob.colour, centre_x, centre_y, side)


def _overlap(alpha_HW: np.ndarray, shape: str, mass: float, centroid: np.ndarray) -> float:
    """Return the soft intersection over union with the drawing of `shape` that has the same area
    and centroid."""
    area, offset = _proportions(shape)
    side = (mass / area) ** 0.5 / alpha_HW.shape[0]
    x, y = centroid - side * offset
    covered, rows, columns = draw.coverage(shape, x, y, side, alpha_HW.shape[0])
    shared = float(np.minimum(alpha_HW[rows, columns], covered).sum())
    return shared / (mass + float(covered.sum()) - shared)


def _read(everything: _Blob) -> Word | None:
    """Return the word that all blobs together spell, or None."""
    alpha_HW = everything.alpha
    size = alpha_HW.shape[0]
    x0, x1 = _extent(alpha_HW.max(axis=0))
    y0, y1 = _extent(alpha_HW.max(axis=1))
    if not 0.7 < (y1 - y0) / (7 * LETTER_CELL * size) < 1.4:
        return None
    pitch = font.WIDTH + font.SPACING
    letters = round(((x1 - x0) / (y1 - y0) * font.HEIGHT + font.SPACING) / pitch)
    if letters < 1:
        return None
    columns = pitch * letters - font.SPACING
    dots = _average(alpha_HW, (x0, x1, columns), (y0, y1, font.HEIGHT))
    cells = [dots[:, start : start + font.WIDTH] for start in range(0, columns, pitch)]
    likeness = np.stack([_standardised(cell) for cell in cells]) @ _glyphs().T
    if likeness.max(axis=1).min() < MIN_LIKENESS:
        return None
    text = "".join(list(font.GLYPHS)[k] for k in likeness.argmax(axis=1))
    return Word(text, (x0 + x1) / 2 / size, (y0 + y1) / 2 / size)


def _standardised(dots: np.ndarray) -> np.ndarray:
    """Return the dots of one letter as a vector of mean 0 and norm 1, so that the dot product of
    two is their correlation."""
    centred = dots.ravel() - dots.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-6)


@functools.cache
def _glyphs() -> np.ndarray:
    """Return the standardised glyphs of all letters: float64 [letters, dots of one letter]."""
    return np.stack([_standardised(glyph.astype(np.float64)) for glyph in font.GLYPHS.values()])


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Return the positions where a profile along one axis rises above and falls below one half, to
    a fraction of a pixel: the value of an edge pixel is the fraction of it that is covered."""
    inside = np.flatnonzero(profile > 0.5 * profile.max())
    first, last = int(inside[0]), int(inside[-1])
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first + 1 - profile[first] - before, last + profile[last] + after


def _average(
    alpha_HW: np.ndarray, x: tuple[float, float, int], y: tuple[float, float, int]
) -> np.ndarray:
    """Return the mean of `alpha_HW` in each cell of a grid; `x` and `y` are (start, end, number of
    cells), with start and end in pixels."""
    weights = []
    for (start, end, cells), size in ((y, alpha_HW.shape[0]), (x, alpha_HW.shape[1])):
        edges = np.linspace(start, end, cells + 1)
        pixels = np.arange(size)[:, None]
        overlap = np.clip(np.minimum(pixels + 1, edges[1:]) - np.maximum(pixels, edges[:-1]), 0, 1)
        weights.append(overlap / overlap.sum(axis=0))
    return weights[0].T @ alpha_HW @ weights[1]
