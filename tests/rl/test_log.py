"""Check lines of rollouts, and the picture of the best and worst."""

import os
import pathlib

import numpy as np
import pytest

from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl.log import RolloutLog, best_and_worst
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.rl.rollouts import RolloutIterator
from blip3o_jax.train.metrics import read_rows


def write(log, rollout):
    images = np.full((2, 4, 4, 3), rollout, np.uint8)
    rewards = RewardBatch(
        np.array([0.5, 0.0], np.float32),
        np.array([False, True]),
        {"ocr": np.array([0.5, np.nan], np.float32)},
    )
    log.write(rollout, [3, 5], 100 * rollout, [Prompt("a", {"k": 1}), Prompt("b")], images, rewards)


def test_lines_and_where_a_run_goes_on(tmp_path):
    log = RolloutLog(tmp_path, 0, 0, seed=7)
    for rollout in range(3):
        write(log, rollout)
    log.close()
    lines = read_rows(tmp_path / "rollouts.jsonl")
    assert [line["rollout"] for line in lines] == [0, 0, 1, 1, 2, 2]
    first, second = lines[2:4]
    assert (first["row"], first["index"], first["seed"], first["prompt"]) == (3, 103, 7, "a")
    assert (
        first["metadata"] == {"k": 1} and first["total"] == 0.5 and first["parts"] == {"ocr": 0.5}
    )
    assert second["total"] is None and second["parts"] == {} and second["index"] == 105
    assert first["image"] == second["image"] != lines[0]["image"]

    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"rollout": 3, "cut sh')
    again = RolloutLog(tmp_path, 0, 2, seed=7)
    write(again, 2)
    again.close()
    assert read_rows(tmp_path / "rollouts.jsonl") == lines


def test_a_kill_while_the_log_is_opened_loses_no_line(tmp_path, monkeypatch):
    log = RolloutLog(tmp_path, 0, 0, seed=7)
    write(log, 0)
    log.close()
    before = read_rows(log.path)

    def killed(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RolloutLog(tmp_path, 0, 0, seed=7)
    assert read_rows(log.path) == before


def test_each_host_has_a_file_of_its_own(tmp_path):
    RolloutLog(tmp_path, 1, 0, seed=0).close()
    assert (tmp_path / "rollouts-1.jsonl").exists() and not (tmp_path / "rollouts.jsonl").exists()


def test_the_best_come_first():
    """Log twenty images, each as bright as its reward: the first six are the brightest, the last
    six the darkest."""
    rewards = np.arange(20.0)[::-1]
    images = np.repeat((rewards * 10).astype(np.uint8), 3 * 16).reshape(20, 4, 4, 3)
    (grid,) = best_and_worst(images, [str(i) for i in range(20)], rewards)
    assert grid.dtype == np.uint8 and grid.shape[2] == 3
    cells = [
        int(grid[8 + 96 + row * 245, 8 + 96 + column * 200, 0])
        for row in range(3)
        for column in range(4)
    ]
    assert cells == [190, 180, 170, 160, 150, 140, 50, 40, 30, 20, 10, 0]


def test_sync_brings_the_lines_to_disk(tmp_path, monkeypatch):
    synced = []
    log = RolloutLog(tmp_path, 0, 0, seed=7)
    monkeypatch.setattr(os, "fsync", synced.append)
    write(log, 0)
    assert not synced
    batches = RolloutIterator.__new__(RolloutIterator)  # the loop calls it, before it saves a step
    batches._log = log
    batches.sync()
    log.close()
    assert len(synced) == 1
