"""Find the records of a source that no run can use, before a run does: read each, and decode its
images.
"""

import numpy as np

from blip3o_jax import files
from blip3o_jax.data import images
from blip3o_jax.data.record import BadRecord, Record, Source, read_record
from blip3o_jax.data.scan import scan


def find_unusable(source: Source, limit: int) -> tuple[int, list[str]]:
    """Return the number of records that cannot be used, and where the first `limit` of them are and
    why. Which they are is stored under the source's digest, so that a second call reads only these.
    Raises OSError for errors of the machine.
    """
    usable_N = scan(
        source,
        "decoded",
        _decode,
        unreadable=0,
        dtype=np.uint8,
        settings=images.MAX_PIXELS,
    )
    unusable = np.flatnonzero(usable_N == 0)
    reasons = []
    for index in unusable[:limit].tolist():
        try:
            read_record(source, index, _decode)
        except BadRecord as error:
            files.raise_trouble(error)
            reasons.append(str(error))
    return len(unusable), reasons


def _decode(record: Record) -> int:
    """Decode the images of a record, of a JPEG as few pixels as its decoder can: it reads all of
    its bytes.
    """
    for data in (*([record.image] if record.task != "understand" else []), *record.references):
        images.decode(data, at_least=1)
    return 1
