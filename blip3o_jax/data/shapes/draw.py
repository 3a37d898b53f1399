"""Render scenes to antialiased pixels.

Shapes are polygons filled at several times the resolution and averaged down; letters are grids of
squares, whose coverage of each pixel is computed exactly.

Shape suffixes: H height, W width, C colour channels.
"""

import functools
import math

import cv2
import numpy as np

from blip3o_jax.data.shapes import font
from blip3o_jax.data.shapes.scene import LETTER_CELL, Background, Scene, Word, look, word_size
from blip3o_jax.data.shapes.vocabulary import COLOURS, INK

OVERSAMPLE = 8
CROSS_ARM = 0.36  # width of a bar of the cross
STAR_INNER = 0.45  # radius of the star's notches, of its tips
RING_INNER = 0.5  # radius of the ring's hole, of the ring


def render(scene: Scene, image_size: int = 64) -> np.ndarray:
    """Render the scene as an RGB image, uint8 [image_size, image_size, 3]."""
    image_HWC = _background(scene.background, image_size)
    for thing in scene.things:
        shape, colour = look(thing)
        covered, rows, columns = coverage(shape, thing.x, thing.y, thing.side, image_size)
        _paint(image_HWC, covered, rows, columns, COLOURS[colour])
    if scene.word is not None:
        _paint(image_HWC, *word_coverage(scene.word, image_size), INK)
    return np.rint(image_HWC).astype(np.uint8)


def coverage(
    shape: str, x: float, y: float, side: float, image_size: int
) -> tuple[np.ndarray, slice, slice]:
    """Return the fraction of each pixel that a shape covers: (float32 [h, w] in 0..1, its rows, its
    columns). Centre and side are fractions of the image's side; parts outside the image are cut
    off."""
    x0, x1, y0, y1 = (
        min(max(bound, 0), image_size)
        for centre in (x, y)
        for bound in (
            math.floor((centre - side / 2) * image_size),
            math.ceil((centre + side / 2) * image_size),
        )
    )
    if x1 <= x0 or y1 <= y0:
        return np.zeros((0, 0), np.float32), slice(0), slice(0)
    scale = image_size * OVERSAMPLE
    offset = np.array([x * scale - x0 * OVERSAMPLE, y * scale - y0 * OVERSAMPLE]) - 0.5
    # fillPoly takes fixed-point coordinates with 4 fractional bits; two contours leave the inner
    # one unfilled.
    contours = [
        np.rint((polygon * (side * scale) + offset) * 16).astype(np.int32)
        for polygon in polygons(shape)
    ]
    mask = np.zeros(((y1 - y0) * OVERSAMPLE, (x1 - x0) * OVERSAMPLE), np.uint8)
    cv2.fillPoly(mask, contours, 255, shift=4)
    covered = cv2.resize(mask, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return covered.astype(np.float32) / 255, slice(y0, y1), slice(x0, x1)


@functools.cache
def polygons(shape: str) -> tuple[np.ndarray, ...]:
    """Return the shape's contours [n, 2] in a square of side 1 around (0, 0), y down."""
    match shape:
        case "circle":
            return (_circle(0.49),)
        case "ring":
            return (_circle(0.5), _circle(0.5 * RING_INNER))
        case "square":
            return (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.49,)
        case "triangle":
            return (np.array([(0, -0.46), (0.5, 0.42), (-0.5, 0.42)]),)
        case "cross":
            a, b = CROSS_ARM / 2, 0.5
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            return (np.array(corners + [(-x, -y) for x, y in corners]),)
        case "star":
            angles = np.arange(10) * (math.pi / 5)
            radii = np.where(np.arange(10) % 2, STAR_INNER, 1.0)
            points = np.stack([np.sin(angles), -np.cos(angles)], 1) * radii[:, None]
            return ((points - (points.max(0) + points.min(0)) / 2) / np.ptp(points, 0).max(),)
    raise ValueError(f"unknown shape {shape!r}")


def _circle(radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius


def word_coverage(word: Word, image_size: int) -> tuple[np.ndarray, slice, slice]:
    """Return the fraction of each pixel that the word covers, over the whole image."""
    bitmap = font.bitmap(word.text).astype(np.float32)
    width, height = word_size(word.text)
    down = _overlap(word.y - height / 2, bitmap.shape[0], image_size)
    across = _overlap(word.x - width / 2, bitmap.shape[1], image_size)
    return down @ bitmap @ across.T, slice(image_size), slice(image_size)


def _overlap(start: float, cells: int, image_size: int) -> np.ndarray:
    """Return the fraction of each pixel that each cell covers, along one axis: [image_size,
    cells]."""
    pixels = np.arange(image_size, dtype=np.float32)[:, None]
    edges = (start + np.arange(cells + 1, dtype=np.float32) * LETTER_CELL) * image_size
    return np.clip(np.minimum(pixels + 1, edges[1:]) - np.maximum(pixels, edges[:-1]), 0, 1)


def _paint(
    image_HWC: np.ndarray,
    covered: np.ndarray,
    rows: slice,
    columns: slice,
    rgb: tuple[int, int, int],
) -> None:
    patch = image_HWC[rows, columns]
    patch += covered[..., None] * (np.array(rgb, np.float32) - patch)


def _background(background: Background, image_size: int) -> np.ndarray:
    paper, second = (np.array(rgb, np.float32) for rgb in (background.paper, background.second))
    if background.kind == "plain":
        return np.broadcast_to(paper, (image_size, image_size, 3)).copy()
    middle = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    dx, dy = background.direction
    along = middle[None, :] * dx + middle[:, None] * dy
    if background.kind == "gradient":
        weight = (along - along.min()) / np.ptp(along)
    elif background.kind == "stripes":
        weight = 0.5 + 0.5 * np.sign(np.sin(along * (2 * math.pi / background.period)))
    else:
        wave = np.cos(middle * (2 * math.pi / background.period))
        weight = np.clip((wave[None, :] + wave[:, None] - 0.8) * 2, 0, 1)
    return paper + weight[..., None] * (second - paper)
