"""Define a source of some records of another one."""

import functools
import hashlib

import numpy as np

from blip3o_jax.data.record import Record, Source


class Subset(Source):
    """Read the records of `source` at `indices`. With a `shape`, (height, width) in pixels, they
    are a bucket, whose images are all cut to it.
    """

    def __init__(
        self, source: Source, indices: np.ndarray, shape: tuple[int, int] | None = None
    ) -> None:
        super().__init__(source.name, source.files)
        self.unused = source.unused
        self.incomplete = source.incomplete
        self.notes = source.notes
        self._source = source
        self._indices = indices
        self.shape = shape or source.shape

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    @functools.cached_property
    def fingerprint(self) -> str:
        # The records depend on how the source is divided, so they are part of the identity.
        which = hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()[:16]
        shape = f"-{'x'.join(map(str, self.shape))}" if self.shape else ""
        return f"{self._source.fingerprint}{shape}-{which}"
