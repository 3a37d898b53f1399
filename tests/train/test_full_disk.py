"""A disk that fills up during a run: one line within seconds, and then the run goes on as if
nothing had been.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from blip3o_jax.convert.stored_weights import StoredWeights
from blip3o_jax.train import checkpoint
from blip3o_jax.train.metrics import read_rows
from tests import conftest, tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZE = 4096  # KiB of the file system; a run takes 1100 to 1200 while it saves its third checkpoint
POINTS = (
    0,
    4,
    8,
    16,
    32,
    64,
    120,
    200,
    280,
    340,
    380,
    420,
    480,
    560,
    640,
    700,
    760,
    840,
    920,
    1000,
)  # KiB left to a run
CONFIG = """
from tests import tiny

def get_config():
    groups = {"checkpoint": {"every": 2, "keep": 2}, "watchdog": 0.0, "data": {"shuffle": True}}
    return tiny.run_config(IMAGES, stage="tokenizer", steps=6, preview=2, **groups)
"""
AGAIN = "the same command resumes from the last checkpoint in its --workdir"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a directory with config.py, and `disk`, a file system of its own."""
    path = tmp_path_factory.mktemp("full_disk")
    images = tiny.write_data(path / "images")
    (path / "config.py").write_text(CONFIG.replace("IMAGES", repr(str(images))))
    (path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "none", str(path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield path
    subprocess.run(["umount", "-l", str(path / "disk")], check=True)


def train(place, workdir):
    """Return (status, stderr, seconds)"""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(place / "cache"),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(conftest.CACHE),
    }
    command = [
        sys.executable,
        "-m",
        "blip3o_jax",
        "train",
        f"--config={place / 'config.py'}",
        f"--workdir={workdir}",
    ]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr, time.monotonic() - began


def outcome(workdir):
    """Return metrics but for times, and the bytes of all weights."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith("perf/")}
        for row in read_rows(workdir / "metrics.jsonl", "step")
    ]
    root, step = checkpoint.find(workdir)
    weights = StoredWeights(root, step)
    found = {part: weights.read(part, weights.shapes(part)) for part in weights.parts}
    return step, rows, found


@pytest.fixture(scope="module")
def whole(place):
    """Return an undisturbed run, and how long it takes."""
    train(place, place / "first")  # compiles
    status, err, seconds = train(place, place / "whole")
    assert status == 0, err
    return outcome(place / "whole"), seconds


def same(got, want):
    assert got[:2] == want[:2]
    for part, arrays in want[2].items():
        assert got[2][part].keys() == arrays.keys()
        for path, array in arrays.items():
            np.testing.assert_array_equal(got[2][part][path], array, err_msg=f"{part}/{path}")


@pytest.mark.slow
@pytest.mark.parametrize("left", POINTS)
def test_a_full_disk_ends_the_run_in_one_line_and_it_resumes_bit_for_bit(place, whole, left):
    want, undisturbed = whole
    disk = place / "disk"
    ballast, workdir = disk / "ballast", disk / "run"
    subprocess.run(["rm", "-rf", str(workdir)], check=True)
    ballast.write_bytes(bytes(1024 * (SIZE - left - 4)))
    status, err, seconds = train(place, workdir)
    lines = [
        line for line in err.splitlines() if not line.startswith(("tokenizer  step", "skipped"))
    ]
    assert status == 2 and len(lines) == 1, err
    assert lines[0].startswith(f"blip3o: error: {workdir}"), err
    assert lines[0].endswith(f"No space left on device: free some; {AGAIN}")
    assert seconds < undisturbed + 30
    print(
        json.dumps(
            {
                "left": left,
                "seconds": round(seconds, 1),
                "steps": err.count("  step "),
                "line": lines[0][15:110],
            }
        )
    )
    ballast.unlink()
    status, err, _ = train(place, workdir)
    assert status == 0, err
    same(outcome(workdir), want)


def test_a_save_that_fails_is_reported_at_the_next_step(tmp_path):
    """Limit files of this process to 20 kB, which makes writing fail as a full disk does."""
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoints.save(
                1, {"w": np.random.default_rng(0).normal(size=10**5)}, {"next_example": 1}, 0.5
            )
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value.filename).startswith(str(tmp_path / "checkpoints"))
    checkpoints.close()
    assert checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2).newest_intact() is None
