"""Divide a source into records to train on and records held out from training, by their captions.

A record is held out where a hash of its caption falls below the fraction: equal captions never
stand on both sides, a record stays on its side when others are added, and copies of a data set are
divided alike. Captions are compared without regard to case and to the amount of space.
"""

import hashlib

import numpy as np

from blip3o_jax.data.record import Record, Source
from blip3o_jax.data.scan import scan
from blip3o_jax.data.subset import Subset

_HASHES = 2**32


def caption_hash(caption: str) -> int:
    """Return a hash of a caption in [0, 2**32), the same for captions that differ in case or
    space alone.
    """
    text = " ".join(caption.casefold().split())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def is_held_out(caption: str, fraction: float) -> bool:
    """Return whether a record of this caption is held out."""
    return caption_hash(caption) < fraction * _HASHES


def threshold(below: int, above: int) -> float:
    """Return the fraction that holds out captions of hashes up to `below`, and none from `above`
    on.
    """
    return (below + above) / 2 / _HASHES


def divide(source: Source, fraction: float) -> tuple[Source, Source]:
    """Return the records of `source` to train on, and those held out: about `fraction` of its
    captions. Records that cannot be read are on the training side, where the loader reports them.
    """
    hashes_N = scan(source, "captions", _hash_of, unreadable=_HASHES - 1, dtype=np.uint32)
    held_out_N = hashes_N < fraction * _HASHES
    return (
        Subset(source, np.flatnonzero(~held_out_N)),
        Subset(source, np.flatnonzero(held_out_N)),
    )


def _hash_of(record: Record) -> int:
    return caption_hash(record.caption)
