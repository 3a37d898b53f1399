"""Compute one number for each record of a source, once: every record is read, by threads, and the
numbers are stored in the user's cache directory under the source's digest.
"""

import concurrent.futures
import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax.data.checked_file import DamagedArrays, pack, unpack
from blip3o_jax.data.record import CHANGED, BadRecord, Record, Source, read_record
from blip3o_jax.progress import Progress

PROGRESS_RECORDS = 1024  # records between two updates of the progress


def scan(
    source: Source,
    name: str,
    number_of: Callable[[Record], int],
    *,
    unreadable: int,
    dtype: type[np.unsignedinteger[Any]],
    settings: Any = None,
) -> np.ndarray:
    """Return `number_of` each record, `dtype` (uint8 or uint32) [N]. A record that cannot be read
    has the number `unreadable`; the loader reports it. `name` says what is computed, `settings`
    all that it depends on in addition to the records. Raises OSError for errors of the machine.
    """
    asked = [source.fingerprint, settings]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    file = files.cache_directory() / f"{name}-{key}"
    with contextlib.suppress(OSError, DamagedArrays):  # it is then computed again
        numbers_N = unpack(file)[1]["numbers"]
        if len(numbers_N) == len(source):
            return numbers_N

    changed: list[int] = []

    def number(index: int) -> int:
        try:
            return read_record(source, index, number_of)
        except BadRecord as error:
            files.raise_trouble(error)
            if error.kind == CHANGED:
                changed.append(index)
            return unreadable

    found: list[int] = []
    progress = Progress(f"{name} of {source.name}", len(source), after="records")
    with progress, concurrent.futures.ThreadPoolExecutor(16) as pool:
        for start in range(0, len(source), PROGRESS_RECORDS):
            found += pool.map(number, range(start, min(len(source), start + PROGRESS_RECORDS)))
            progress.update(len(found))
    numbers_N = np.array(found, dtype)
    if not changed:  # the records read match the digest in the file's name
        files.replace_bytes(file, pack({}, {"numbers": numbers_N}), shared=True)
    return numbers_N
