"""The window of steps that is traced."""

import logging

import jax
import jax.numpy as jnp
import pytest

from blip3o_jax.train.profile_window import ProfileWindow


def traced(directory, window, steps):
    """Run steps, as the loop does; return after which of them a trace was on disk."""
    profile = ProfileWindow(directory, window)
    written = []
    for step in steps:
        profile.before_step(step)
        profile.after_step(step, jax.device_put(jnp.float32(step)) + 1)
        if list(directory.rglob("*.xplane.pb")):
            written.append(step)
    profile.close()
    return written


@pytest.mark.parametrize(
    ("window", "steps", "written"),
    [
        (None, (1, 2), []),
        ((2, 3), (1, 2, 3, 4), [3, 4]),
        ((2, 4), (3, 4), [4]),  # resumed within the window
        ((2, 3), (4, 5), []),  # resumed after it
    ],
)
def test_the_window_is_traced_once(tmp_path, window, steps, written):
    assert traced(tmp_path, window, steps) == written


def test_a_window_that_the_runs_end_cuts_short_is_written(tmp_path):
    assert not traced(tmp_path, (1, 9), (1, 2)) and list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_made_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(directory):
        raise RuntimeError("Only one profile may be run at a time.\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    with caplog.at_level(logging.WARNING):
        traced(tmp_path, (1, 2), (1, 2))
    (line,) = caplog.messages
    assert line.endswith("Only one profile may be run at a time.") and str(tmp_path) in line
