"""Kill a run in any phase: resumed, it continues as if it had not been killed. Every phase is a
process that is killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from blip3o_jax import config
from blip3o_jax.rl import trainer
from blip3o_jax.train.metrics import read_rows
from tests.rl import runs
from tests.rl.test_trainer import numbers, one_device, saved  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow

KILLED = """
import json, os, signal, sys
import tests.conftest
import jax
from blip3o_jax import config
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.rl import trainer
from blip3o_jax.rl.rollouts import RolloutIterator
from blip3o_jax.train import checkpoint, loop
from blip3o_jax.train.metrics import read_rows

jax.config.update("jax_disable_most_optimizations", True)
whole_strategy = Strategy.of
Strategy.of = lambda mesh, devices, **more: whole_strategy(mesh, jax.devices()[:1], **more)
config_file, workdir, phase = sys.argv[1:]
where, name = {
    "rollout": (RolloutIterator, "_sample_micro_batch"),
    "reward": (RolloutIterator, "_await_rewards"),
    "update": (loop._Run, "record"),
    "save": (checkpoint.Checkpoints, "save"),
}[phase]
calls, whole = [], getattr(where, name)

def call(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)

setattr(where, name, call)
trainer.run(config.from_dict(json.load(open(config_file))), workdir)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return the configuration's file, and the workdir of an uninterrupted run of it."""
    directory = tmp_path_factory.mktemp("whole")
    cfg = runs.run_config("ar", checkpoint=saved(1))
    (directory / "config.json").write_text(json.dumps(config.to_dict(cfg)))
    trainer.run(cfg, directory / "run")
    return directory / "config.json", directory / "run"


@pytest.mark.parametrize("phase", ["rollout", "reward", "update", "save"])
def test_kill_9(given, tmp_path, phase):
    file, whole = given
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(file), str(tmp_path), phase]
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert len(read_rows(tmp_path / "metrics.jsonl")) < 4
    trainer.run(config.from_dict(json.loads(file.read_text())), tmp_path)
    assert numbers(tmp_path) == numbers(whole)
    assert read_rows(tmp_path / "rollouts.jsonl") == read_rows(whole / "rollouts.jsonl")
