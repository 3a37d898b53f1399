"""Log and count the records that a loader skips, and end the run when they are too many."""

import json
import logging
import math
import zlib
from collections import Counter

import numpy as np

from blip3o_jax.data.reader import BadRecordLimit
from blip3o_jax.data.record import TOO_LONG

# A shard whose first so many records are all skipped for the same kind of reason is warned of.
SUSPECT_SHARD_RECORDS = 8
# Too long records that are logged by name; captions of some data sets are long by the thousand.
MAX_LOGGED_TOO_LONG = 10
_log = logging.getLogger(__name__)


class SkippedRecordLog:
    """Count and log the skipped records of one host's rows.

    Each skipped record is logged once with shard, key and reason; of the too long ones only the
    first few are. `counts` has all of them by the kind of reason.

    Args:
      records: number of records in all sources together.
      max_bad_fraction: as in `DataConfig`.
    """

    def __init__(self, records: int, max_bad_fraction: float) -> None:
        self._records = records
        self._max_bad_fraction = max_bad_fraction
        self.counts: Counter[str] = Counter()
        self._seen = self._bad = self._too_long = 0
        self._logged: set[tuple[str, str]] = set()
        self._logged_too_long = 0
        self._warned = False  # whether the fraction of too long records was warned of
        # CRC-32 of the names of the shards of which a record was used.
        self._readable_shards: set[int] = set()
        self._suspect_shards: dict[str, dict[str, str]] = {}  # other shards: key -> kind of reason
        self._last_skipped = ""

    def add(
        self,
        seen_B: np.ndarray,
        unreadable_B: np.ndarray,
        shards_B: np.ndarray,
        reports_B: np.ndarray,
    ) -> None:
        """Count and log skipped records, of the report of each row (`reader.Reader`). Raises
        BadRecordLimit where more than `max_bad_fraction` of the records cannot be read.

        The fraction counts the rows' own records. Records that are skipped in the search for a
        replacement are not counted, since they overstate the damage: four damaged records in a row
        are skipped ten times in an epoch.
        """
        self._seen += int(seen_B.sum())
        self._bad += int(unreadable_B.sum())
        self._readable_shards.update(shards_B.ravel().tolist())
        reports_B = reports_B.ravel()
        for report in reports_B[reports_B != b""]:
            counts, records = json.loads(report)
            self.counts.update(counts)
            self._too_long += counts.get(TOO_LONG, 0)
            for shard, key, reason, kind in records:
                self._log_skipped(shard, key, reason, kind)
        self._warn_of_too_long()
        allowed = self._max_bad_fraction
        if self._enough_seen(allowed) and self._bad > allowed * self._seen:
            raise BadRecordLimit(
                f"{self._bad} of {self._seen} records ({self._bad / self._seen:.1%}) cannot be"
                f" read, more than data.max_bad_fraction={allowed:.1%}, the last"
                f" {self._last_skipped}; repair the data set or raise that fraction"
            )

    def _enough_seen(self, fraction: float) -> bool:
        """Return whether enough records were seen to distinguish `fraction` of them from chance:
        ten times its inverse, or the whole data set.
        """
        enough = min(self._records, max(100, math.ceil(10 / fraction))) if fraction > 0 else 0
        return self._seen >= enough

    def _log_skipped(self, shard: str, key: str, reason: str, kind: str) -> None:
        if kind != TOO_LONG:
            self._last_skipped = f"{shard}: {key}: {reason}"
        elif self._logged_too_long == MAX_LOGGED_TOO_LONG:
            return
        if (shard, key) not in self._logged:
            self._logged.add((shard, key))
            self._logged_too_long += kind == TOO_LONG
            _log.warning("skipped %s: %s: %s", shard, key, reason)
        if zlib.crc32(shard.encode()) in self._readable_shards:
            self._suspect_shards.pop(shard, None)
            return
        found = self._suspect_shards.setdefault(shard, {})
        if key in found or len(found) == SUSPECT_SHARD_RECORDS:
            return
        found[key] = kind
        if len(found) == SUSPECT_SHARD_RECORDS and len(set(found.values())) == 1:
            _log.warning(
                "each of the first %d records read of %s was skipped: %s: look at that file",
                len(found),
                shard,
                reason,
            )

    def _warn_of_too_long(self) -> None:
        """Warn once if the fraction of too long records exceeds data.max_bad_fraction. The run goes
        on."""
        fraction = self._max_bad_fraction
        seen = self._seen + self._too_long
        if not self._warned and self._enough_seen(fraction) and self._too_long > fraction * seen:
            self._warned = True
            _log.warning(
                "%d of %d records (%.1f%%) are longer than a row and were skipped, as data.too_long"
                " says: raise data.max_length, or set data.too_long=truncate; further ones are"
                " counted only",
                self._too_long,
                seen,
                100 * self._too_long / seen,
            )
