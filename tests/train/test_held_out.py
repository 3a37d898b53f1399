"""Losses of held-out records along a run."""

from blip3o_jax.train import supervised
from blip3o_jax.train.metrics import read_rows
from tests import tiny


def test_held_out_losses_have_the_same_batches_at_every_evaluation(tmp_path, monkeypatch):
    """Train at a learning rate of 0, where only the batches could make losses differ, as
    training's do.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    cfg = tiny.run_config(
        tiny.data(),
        stage="tokenizer",
        steps=5,
        log_every=100,
        eval_every=2,
        eval_batches=2,
        data={"held_out": 0.4},
        optimizer={"learning_rate": 0.0, "end_learning_rate": 0.0},
    )
    supervised.train(cfg, tmp_path / "run")
    rows = {row["step"]: row for row in read_rows(tmp_path / "run" / "metrics.jsonl")}
    found = {step: row.get("eval/loss") for step, row in rows.items()}
    assert list(found) == [1, 2, 4, 5] and found[1] is None
    assert found[2] == found[4] == found[5] and found[2] != rows[2]["train/loss"]
    assert "eval/reconstruction" in rows[5] and rows[4]["train/loss"] != rows[5]["train/loss"]
