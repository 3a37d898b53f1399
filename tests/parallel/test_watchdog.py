"""Who is stuck, told from the hosts' signs of life."""

import time

import pytest

from blip3o_jax.parallel.watchdog import Sign, Watchdog, diagnose

NOW = 1000.0


def sign(phase, step, since=700.0, seen=995.0):
    return Sign(phase, step, since, seen)


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        (  # one busy by itself, the others wait for it
            [sign("step", 7), sign("data", 7), sign("step", 7)],
            "host 1 is stuck in data at step 7 for 300 s; hosts 0, 2 in step at step 7",
        ),
        (  # all in something collective, one a step behind
            [sign("step", 8), sign("step", 8), sign("step", 7, since=690.0)],
            "host 2 is stuck in step at step 7 for 310 s; hosts 0, 1 in step at step 8",
        ),
        ([sign("step", 7), sign("step", 7)], "hosts 0, 1 in step at step 7"),
        (
            [sign("save", 6), sign("save", 6, seen=900.0)],
            "host 1 is silent since save at step 6; host 0 in save at step 6",
        ),
        ([sign("barrier", 0), None], "host 1 is silent; host 0 in barrier at step 0"),
        (
            [sign("vocabulary", 0), sign("barrier", 0)],
            "host 0 is stuck in vocabulary at step 0 for 300 s; host 1 in barrier at step 0",
        ),
        (
            [sign("compile", 1)] * 64,
            "hosts 0, 1, 2 and 61 more are stuck in compile at step 1 for 300 s",
        ),
        ([sign("compile", 1)], "host 0 is stuck in compile at step 1 for 300 s"),
        (
            [sign("step", 3)] * 6 + [sign("data", 3)],
            "host 6 is stuck in data at step 3 for 300 s; hosts 0, 1, 2 and 3 more in step at step 3",
        ),
    ],
)
def test_who_is_stuck_in_what(signs, said):
    known = {host: s for host, s in enumerate(signs) if s is not None}
    assert diagnose(known, len(signs), NOW, silent_after=31.0) == said


def test_it_tells_when_nothing_moves_and_not_before(capsys):
    """Told at 0.4 s; every step of progress starts anew."""
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
