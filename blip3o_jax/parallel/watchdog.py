"""Report which host is stuck, and in which phase, after a time without progress.

Each host runs a thread for it. The watchdog never ends a job: that is left to the launcher.
"""

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from blip3o_jax.parallel import distributed

# Phases in which a host may wait for the others; in all others (start, data, compile) it works
# alone.
WAITING = ("step", "save", "barrier")
PERIOD = 10.0  # seconds between a host's heartbeats


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """Hold a host's phase and progress. Times are in seconds since 1970, by clocks synchronized to
    within about a second.
    """

    phase: str
    step: int  # in work, or the last one done
    since: float  # start of the phase
    seen: float

    def where(self) -> str:
        return f"{self.phase} at step {self.step}"


class Watchdog:
    """Watch for progress: `with Watchdog(seconds) as watch: watch.enter("data", step)`. 0 seconds
    turn it off.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # At least four heartbeats within the time to report.
        self._period = min(PERIOD, seconds / 4)
        self._phase = "start"
        self._step = 0
        self._since = time.time()
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
        """Record that this host enters `phase` of `step`, which counts as progress."""
        self._phase = phase
        self._step = step
        self._since = time.time()
        distributed.set_phase(phase, step)

    def _watch(self) -> None:
        report_after = self._seconds
        reported_since = self._since
        while not self._end.wait(self._period):
            now = time.time()
            mine = Heartbeat(self._phase, self._step, self._since, now)
            if mine.since != reported_since:
                report_after = self._seconds
                reported_since = mine.since
            # Exchanged at every period, not only when this host is stuck: the others need its
            # heartbeat.
            heartbeats = _exchange(mine)
            if now - mine.since > report_after:
                report_after = 2 * (now - mine.since)  # again when twice as long has passed
                text = diagnose(heartbeats, distributed.process_count(), now, 3 * self._period + 1)
                if (
                    _reporting_host(heartbeats, now, 3 * self._period + 1)
                    == distributed.process_index()
                ):
                    print(
                        f"watchdog: no progress for {now - mine.since:.0f} s: {text}",
                        file=sys.stderr,
                        flush=True,
                    )


def _exchange(mine: Heartbeat) -> dict[int, Heartbeat]:
    """Publish this host's heartbeat and return those of all; only this host's if the coordinator
    does not answer.
    """
    me = distributed.process_index()
    if distributed.process_count() == 1:
        return {me: mine}
    try:
        distributed.set_key(f"watchdog/{me}", json.dumps(dataclasses.astuple(mine)))
        return {
            int(host): Heartbeat(*json.loads(text))
            for host, text in distributed.read_keys("watchdog").items()
        }
    except (RuntimeError, AttributeError):  # the coordinator is gone, or this host has left
        return {me: mine}


def _reporting_host(heartbeats: dict[int, Heartbeat], now: float, silent_after: float) -> int:
    """Return the first host with a recent heartbeat, which reports for all."""
    return min(
        host for host, heartbeat in heartbeats.items() if now - heartbeat.seen <= silent_after
    )


def diagnose(heartbeats: dict[int, Heartbeat], hosts: int, now: float, silent_after: float) -> str:
    """Return a line that names the stuck hosts with their phases, and where the others wait.

    A silent host is the culprit (killed, or hung with all its threads). Otherwise the culprits are
    hosts in a phase of their own work while others wait in a collective; otherwise those at the
    earliest step, if the steps differ; otherwise no host is named.
    """
    silent = [
        host
        for host in range(hosts)
        if host not in heartbeats or now - heartbeats[host].seen > silent_after
    ]
    heard = {host: heartbeats[host] for host in range(hosts) if host not in silent}
    busy = [host for host, heartbeat in heard.items() if heartbeat.phase not in WAITING]
    first = min((heartbeat.step for heartbeat in heard.values()), default=0)
    behind = [host for host, heartbeat in heard.items() if heartbeat.step == first]
    culprits = [] if silent else busy or (behind if len(behind) < len(heard) else [])
    waiting = [host for host in heard if host not in culprits]
    last = lambda host: (
        f"silent since {heartbeats[host].where()}" if host in heartbeats else "silent"
    )
    stuck = lambda host: (
        f"stuck in {heartbeats[host].where()} for {now - heartbeats[host].since:.0f} s"
    )
    findings = [
        f"{_format_hosts(group)} {_are(group)} {text}" for text, group in _group_hosts(silent, last)
    ]
    findings += [
        f"{_format_hosts(group)} {_are(group)} {text}"
        for text, group in _group_hosts(culprits, stuck)
    ]
    findings += [
        f"{_format_hosts(group)} in {text}"
        for text, group in _group_hosts(waiting, lambda host: heartbeats[host].where())
    ]
    return "; ".join(findings)


def _group_hosts(
    hosts: Iterable[int], text: Callable[[int], str]
) -> Iterable[tuple[str, list[int]]]:
    """Group the hosts by their text."""
    groups: dict[str, list[int]] = {}
    for host in hosts:
        groups.setdefault(text(host), []).append(host)
    return groups.items()


def _format_hosts(group: list[int]) -> str:
    """Return "host 3" or "hosts 0, 1, 2 and 61 more"."""
    shown = ", ".join(map(str, group[:3])) + (
        f" and {len(group) - 3} more" if len(group) > 3 else ""
    )
    return f"host{'s' if len(group) > 1 else ''} {shown}"


def _are(group: list[int]) -> str:
    return "are" if len(group) > 1 else "is"
