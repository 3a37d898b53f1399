"""Split sources into aspect-ratio buckets (`model.buckets`), so that all images of a batch have one
shape.

The shape of a record is that of its target image, or of the first reference where the answer is
text, read from the header. All headers are read once, by threads, and the shapes are stored in the
user's cache directory.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.data import images
from blip3o_jax.data.record import Record, Source
from blip3o_jax.data.scan import scan
from blip3o_jax.data.subset import Subset


def by_shape(
    sources: Sequence[tuple[Source, float]],
    model: ModelConfig,
    max_pixels: int = images.MAX_PIXELS,
) -> list[list[tuple[Source, float]]]:
    """Return, for each of `model.sizes` that has images, its sources with their weights, fractions
    of the whole mixture. Images of more than `max_pixels` pixels count as unreadable.
    """
    total = sum(weight for _, weight in sources)
    groups: list[list[tuple[Source, float]]] = [[] for _ in model.sizes]
    for source, weight in sources:
        shapes_N = _shapes(source, model, max_pixels)
        for number, (size, group) in enumerate(zip(model.sizes, groups, strict=True)):
            indices = np.flatnonzero(shapes_N == number)
            if len(indices):
                group.append(
                    (Subset(source, indices, size), weight / total * len(indices) / len(source))
                )
    return [group for group in groups if group]


def _shapes(source: Source, model: ModelConfig, max_pixels: int) -> np.ndarray:
    """Return the index into `model.sizes` of each record, uint8. A record that cannot be read has
    the first, and is reported by the loader. Raises OSError for errors of the machine.
    """
    # The sizes' numbers are stored as uint8.
    if len(model.sizes) > 255:
        raise UserError(f"model.buckets has {len(model.sizes)} sizes: the maximum is 255")

    def number_of(record: Record) -> int:
        shape = images.shape_of(record.first_image, max_pixels)
        return model.sizes.index(model.nearest_size(*shape))

    return scan(
        source,
        "shapes",
        number_of,
        unreadable=0,
        dtype=np.uint8,
        settings=[model.sizes, max_pixels],
    )
