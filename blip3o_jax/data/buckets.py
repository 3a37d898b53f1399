"""Split sources into aspect-ratio buckets (`model.buckets`), so that all images of a batch have one
shape.

The shape of a record is that of its target image, or of the first reference where the answer is
text, read from the header. All headers are read once, by threads, and the shapes are stored in the
user's cache directory.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from blip3o_jax import files
from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.data import images
from blip3o_jax.data.checked_file import DamagedArrays, cache_directory, pack, unpack
from blip3o_jax.data.record import CHANGED, BadRecord, Record, Source, read_record

PROGRESS_RECORDS = 1024  # records between two lines of progress


class Bucket(Source):
    """Read the records of `source` at `indices`, whose images are cut to `shape`."""

    def __init__(self, source: Source, indices: np.ndarray, shape: tuple[int, int]) -> None:
        super().__init__(source.name, source.files)
        self._source = source
        self._indices = indices
        self.shape = shape

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    @functools.cached_property
    def fingerprint(self) -> str:
        # The records of a bucket depend on the other sizes, so they are part of the identity.
        which = hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()[:16]
        return f"{self._source.fingerprint}-{'x'.join(map(str, self.shape or ()))}-{which}"


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
                    (Bucket(source, indices, size), weight / total * len(indices) / len(source))
                )
    return [group for group in groups if group]


def _shapes(source: Source, model: ModelConfig, max_pixels: int) -> np.ndarray:
    """Return the index into `model.sizes` of each record, uint8. A record that cannot be read has
    the first, and is reported by the loader. Raises OSError for errors of the machine.
    """
    if len(model.sizes) > 255:
        raise UserError(f"model.buckets has {len(model.sizes)} sizes: the maximum is 255")
    asked = [source.fingerprint, model.sizes, max_pixels]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    file = cache_directory() / f"shapes-{name}"
    with contextlib.suppress(OSError, DamagedArrays):  # it is then computed again
        shapes_N = unpack(file)[1]["shapes"]
        if len(shapes_N) == len(source):
            return shapes_N

    changed: list[int] = []

    def shape_of(record: Record) -> tuple[int, int]:
        return images.shape_of(record.first_image, max_pixels)

    def shape(number: int) -> int:
        try:
            return model.sizes.index(model.nearest_size(*read_record(source, number, shape_of)))
        except BadRecord as error:
            files.raise_trouble(error)
            if error.kind == CHANGED:
                changed.append(number)
            return 0

    found: list[int] = []
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for start in range(0, len(source), PROGRESS_RECORDS):
            found += pool.map(shape, range(start, min(len(source), start + PROGRESS_RECORDS)))
            if len(found) < len(source):
                left = (time.monotonic() - began) / len(found) * (len(source) - len(found))
                print(
                    f"shapes of {source.name}: {len(found)}/{len(source)}, ETA {left:.0f} s",
                    file=sys.stderr,
                )
    shapes_N = np.array(found, np.uint8)
    if not changed:  # the shapes read match the digest in the file's name
        files.replace_bytes(file, pack({}, {"shapes": shapes_N}), shared=True)
    return shapes_N
