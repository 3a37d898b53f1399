"""Run reinforcement learning on two hosts, as real processes."""

import numpy as np
import pytest

from blip3o_jax.rl import trainer
from blip3o_jax.train.metrics import read_rows
from tests.parallel.test_distributed import Job
from tests.rl import runs
from tests.rl.test_trainer import EIGHT


@pytest.mark.slow
def test_two_hosts_of_four_devices_do_what_one_of_eight_does(tmp_path):
    """Check that each host scores the images of its devices and has all rewards. The numbers differ
    by the order of sums."""
    cfg = runs.run_config("both", mesh=EIGHT)
    pair = Job(tmp_path, tmp_path / "pair", cfg, 2, 4, command="rl")
    try:
        assert pair.wait() == 0, pair.text()
    finally:
        pair.end()
    trainer.run(cfg, tmp_path / "alone")
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("pair", "alone")]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["rl/reward"] == pytest.approx(theirs["rl/reward"], rel=1e-5)
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5, abs=1e-7)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
    scored = [
        read_rows(tmp_path / "pair" / name) for name in ("rollouts.jsonl", "rollouts-1.jsonl")
    ]
    scored_rows = [{(line["rollout"], line["row"]) for line in lines} for lines in scored]
    assert scored_rows[0] | scored_rows[1] == {
        (rollout, row) for rollout in range(4) for row in range(8)
    }
    want = {
        (line["rollout"], line["row"]): line["total"]
        for line in read_rows(tmp_path / "alone" / "rollouts.jsonl")
    }
    got = {(line["rollout"], line["row"]): line["total"] for lines in scored for line in lines}
    np.testing.assert_allclose(
        [got[key] for key in sorted(got)], [want[key] for key in sorted(want)], atol=1e-5
    )
