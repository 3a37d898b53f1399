"""Read what a recipe has to know of a captioned data set: captions, and the sizes of its images."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

import numpy as np

from blip3o_jax import files
from blip3o_jax.config import SourceConfig, UserError
from blip3o_jax.data import images
from blip3o_jax.data.record import OUTSIDE, BadRecord, Record, read_record
from blip3o_jax.data.sources import open_source

MAX_RECORDS = 20_000  # records read; of a larger set they are spread over all of it


@dataclasses.dataclass(frozen=True)
class Survey:
    """Hold the number of records of a data set; and of the text-to-image records that were read,
    the captions and the shorter sides of the images, pixels. `left_out` says how many of those read
    were left out and why, "" where none was.
    """

    records: int
    captions: tuple[str, ...]
    sides: tuple[int, ...]
    left_out: str = ""


def survey(path: str) -> Survey:
    """Return the survey of the data set at `path`. Records that cannot be read, and records of
    other tasks, are left out. Raises UserError where none is left.
    """
    source = open_source(SourceConfig(path))
    count = min(len(source), MAX_RECORDS)

    def look(index: int) -> tuple[str, int] | BadRecord | None:
        try:
            return read_record(source, index, _facts)
        except BadRecord as error:
            files.raise_trouble(error)
            return error

    # Threads: waiting for a file releases the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        chosen = np.linspace(0, len(source) - 1, count).astype(int)
        looked = list(pool.map(look, chosen.tolist()))
    found = [facts for facts in looked if isinstance(facts, tuple)]
    bad = [error for error in looked if isinstance(error, BadRecord)]
    if not found:
        reason = f", the first: {_described(bad[0])}" if bad else ": all are of other tasks"
        raise UserError(
            f"{path}: none of {count} records is a captioned image{reason}; give"
            " a data set of captioned images (docs/data.md)"
        )
    captions, sides = zip(*found, strict=True)
    return Survey(len(source), captions, sides, _left_out(bad, looked.count(None)))


def _left_out(bad: Sequence[BadRecord], others: int) -> str:
    reasons = [f"{others} records are of other tasks"] if others else []
    if bad:
        reasons.append(f"{len(bad)} records cannot be read (first {_described(bad[0])})")
    return " and ".join(reasons)


def _described(error: BadRecord) -> str:
    """Return the fault of a record. The pictures are read before settings of the command line
    apply, so that data.images is no remedy here.
    """
    if error.kind != OUTSIDE:
        return str(error)
    return (
        f"{error.shard}: {error.key}: {error.reason.partition(': set ')[0]}: put the captions.jsonl"
        " into a directory above the pictures, or copies of the pictures next to it"
    )


def _facts(record: Record) -> tuple[str, int] | None:
    if record.task != "t2i":
        return None
    return record.caption, min(images.shape_of(record.image))
