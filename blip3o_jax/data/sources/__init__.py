"""Open captioned images on disk behind one random-access interface.

    TFDS/ArrayRecord | webdataset .tar | parquet | folder + captions.jsonl
        -> Source: len(source), source[index] -> Record

A source stores paths and indexes only and opens files when a record is read, so that it can be
pickled to worker processes and shared by threads. A fault of a whole data set (a missing path, a
tar cut in half) is a UserError when it is opened; a fault of one record (no caption, text that is
not UTF-8) is a `BadRecord` when that record is read.
"""

from blip3o_jax.data.sources.registry import (
    ReconstructionSource,
    open_held_out,
    open_mixture,
    open_source,
)

__all__ = ["ReconstructionSource", "open_held_out", "open_mixture", "open_source"]
