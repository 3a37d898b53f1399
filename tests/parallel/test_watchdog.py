"""Find the stuck host from the hosts' heartbeats."""

import time

import pytest

from blip3o_jax.parallel.watchdog import Heartbeat, Watchdog, diagnose

NOW = 1000.0


def heartbeat(phase, step, since=700.0, seen=995.0):
    return Heartbeat(phase, step, since, seen)


@pytest.mark.parametrize(
    ("heartbeats", "expected"),
    [
        (  # one busy by itself, the others wait for it
            [heartbeat("step", 7), heartbeat("data", 7), heartbeat("step", 7)],
            "host 1 is stuck in data at step 7 for 300 s; hosts 0, 2 in step at step 7",
        ),
        (  # all in something collective, one a step behind
            [heartbeat("step", 8), heartbeat("step", 8), heartbeat("step", 7, since=690.0)],
            "host 2 is stuck in step at step 7 for 310 s; hosts 0, 1 in step at step 8",
        ),
        ([heartbeat("step", 7), heartbeat("step", 7)], "hosts 0, 1 in step at step 7"),
        (
            [heartbeat("save", 6), heartbeat("save", 6, seen=900.0)],
            "host 1 is silent since save at step 6; host 0 in save at step 6",
        ),
        ([heartbeat("barrier", 0), None], "host 1 is silent; host 0 in barrier at step 0"),
        (
            [heartbeat("vocabulary", 0), heartbeat("barrier", 0)],
            "host 0 is stuck in vocabulary at step 0 for 300 s; host 1 in barrier at step 0",
        ),
        (
            [heartbeat("compile", 1)] * 64,
            "hosts 0, 1, 2 and 61 more are stuck in compile at step 1 for 300 s",
        ),
        ([heartbeat("compile", 1)], "host 0 is stuck in compile at step 1 for 300 s"),
        (
            [heartbeat("step", 3)] * 6 + [heartbeat("data", 3)],
            "host 6 is stuck in data at step 3 for 300 s; hosts 0, 1, 2 and 3 more in step at step "
            "3",
        ),
    ],
)
def test_who_is_stuck_in_what(heartbeats, expected):
    known = {host: s for host, s in enumerate(heartbeats) if s is not None}
    assert diagnose(known, len(heartbeats), NOW, silent_after=31.0) == expected


def test_it_reports_when_nothing_moves_and_not_before(capsys):
    """Expect a report at 0.4 s; every step of progress restarts the time."""
    with Watchdog(0.4) as watch:
        for step in range(8):
            watch.enter("step", step)
            time.sleep(0.1)
        assert capsys.readouterr().err == ""
        for phase in ("data", "save"):
            watch.enter(phase, 9)
            time.sleep(0.7)
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first.startswith("watchdog: no progress for ")
        and "host 0 is stuck in data at step 9" in first
    )
    assert "host 0 in save at step 9" in second


def test_it_can_be_switched_off(capsys):
    with Watchdog(0.0) as watch:
        watch.enter("data", 1)
    assert capsys.readouterr().err == ""
