"""A thread a host that tells who is stuck, and in what, when nothing has moved for a while. Ending
jobs is for launchers.
"""

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from blip3o_jax.parallel import distributed

# Phases in which a host may just be waiting for the others; in all else (start, data, compile) it
# is busy by itself.
WAITING = ("step", "save", "barrier")
PERIOD = 10.0  # seconds between a host's signs of life


@dataclasses.dataclass(frozen=True)
class Sign:
    """A host's sign of life. Times in seconds since 1970, by clocks that are set to within a second
    or so.
    """

    phase: str
    step: int  # in work, or the last one done
    since: float  # start of the phase
    seen: float

    def told(self) -> str:
        return f"{self.phase} at step {self.step}"


class Watchdog:
    """`with Watchdog(seconds) as watch: watch.enter("data", step)`. 0 seconds: there is none."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._period = min(PERIOD, seconds / 4)
        self._phase, self._step, self._since = "start", 0, time.time()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, phase: str, step: int) -> None:
        """The calling host now is in `phase` of `step`: that is progress."""
        self._phase, self._step, self._since = phase, step, time.time()
        distributed.enter(phase, step)

    def _watch(self) -> None:
        told_at, told_since = self._seconds, self._since
        while not self._end.wait(self._period):
            now = time.time()
            mine = Sign(self._phase, self._step, self._since, now)
            if mine.since != told_since:
                told_at, told_since = self._seconds, mine.since
            signs = _exchanged(mine)
            if now - mine.since > told_at:
                told_at = 2 * (now - mine.since)  # again when twice as long has passed
                text = diagnose(signs, distributed.hosts(), now, 3 * self._period + 1)
                if _speaker(signs, now, 3 * self._period + 1) == distributed.host():
                    print(
                        f"watchdog: no progress for {now - mine.since:.0f} s: {text}",
                        file=sys.stderr,
                        flush=True,
                    )


def _exchanged(mine: Sign) -> dict[int, Sign]:
    """Publishes this host's sign and reads those of all; this host's alone where the coordinator
    does not answer.
    """
    me = distributed.host()
    if distributed.hosts() == 1:
        return {me: mine}
    try:
        distributed.publish(f"watchdog/{me}", json.dumps(dataclasses.astuple(mine)))
        return {
            int(host): Sign(*json.loads(text))
            for host, text in distributed.all_published("watchdog").items()
        }
    except (RuntimeError, AttributeError):  # the coordinator is gone, or this host has left
        return {me: mine}


def _speaker(signs: dict[int, Sign], now: float, silent_after: float) -> int:
    """The first host that is heard of tells for all."""
    return min(host for host, sign in signs.items() if now - sign.seen <= silent_after)


def diagnose(signs: dict[int, Sign], hosts: int, now: float, silent_after: float) -> str:
    """Who is stuck in what, and where the others wait.

    A silent host is the culprit (killed, or hung with all its threads). Else those that are busy by
    themselves while others wait in something collective; else those at the earliest step, where
    that differs; else it cannot be told.
    """
    silent = [
        host for host in range(hosts) if host not in signs or now - signs[host].seen > silent_after
    ]
    heard = {host: signs[host] for host in range(hosts) if host not in silent}
    busy = [host for host, sign in heard.items() if sign.phase not in WAITING]
    first = min((sign.step for sign in heard.values()), default=0)
    behind = [host for host, sign in heard.items() if sign.step == first]
    culprits = [] if silent else busy or (behind if len(behind) < len(heard) else [])
    waiting = [host for host in heard if host not in culprits]
    last = lambda host: f"silent since {signs[host].told()}" if host in signs else "silent"
    stuck = lambda host: f"stuck in {signs[host].told()} for {now - signs[host].since:.0f} s"
    told = [f"{_names(group)} {_are(group)} {text}" for text, group in _grouped(silent, last)]
    told += [f"{_names(group)} {_are(group)} {text}" for text, group in _grouped(culprits, stuck)]
    told += [
        f"{_names(group)} in {text}"
        for text, group in _grouped(waiting, lambda host: signs[host].told())
    ]
    return "; ".join(told)


def _grouped(hosts: Iterable[int], text: Callable[[int], str]) -> Iterable[tuple[str, list[int]]]:
    """Hosts of which the same is to be told."""
    groups: dict[str, list[int]] = {}
    for host in hosts:
        groups.setdefault(text(host), []).append(host)
    return groups.items()


def _names(group: list[int]) -> str:
    """host 3, or hosts 0, 1, 2 and 61 more."""
    shown = ", ".join(map(str, group[:3])) + (
        f" and {len(group) - 3} more" if len(group) > 3 else ""
    )
    return f"host{'s' if len(group) > 1 else ''} {shown}"


def _are(group: list[int]) -> str:
    return "are" if len(group) > 1 else "is"
