"""Check what every demonstration reports of its run."""

import json

from blip3o_jax.demo import chain
from blip3o_jax.train.loop import Summary
from tests import tiny


def test_stages_of_any_name_have_the_curves_of_their_kind(tmp_path):
    """Name a single config "" and stages of a recipe freely."""
    config = tiny.run_config()
    for name in ("", "second"):
        directory = chain.stage_directory(tmp_path, name)
        directory.mkdir(parents=True, exist_ok=True)
        row = {"step": 1, "train/ce": 2.0, "eval/ce": 3.0}
        (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    facts = chain.facts_of_run(
        tmp_path, {"": config, "second": config}, config, chain.Clock(tmp_path)
    )
    assert [stage.name for stage in facts["stages"]] == ["joint", "second"]
    assert list(facts["configuration"]) == ["joint", "second"]
    for stage in facts["stages"]:
        curve = stage.curves[0]
        assert (curve.name, curve.values, curve.held_out) == ("ce", [2.0], ([1], [3.0]))


def test_a_later_start_reports_what_each_part_took(tmp_path, monkeypatch):
    """Start a finished demonstration again: the report has the seconds of the first start."""
    now = [0.0]
    monkeypatch.setattr(chain.time, "monotonic", lambda: now[0])

    def start(work: float, metrics: dict[str, float]) -> chain.Clock:
        clock = chain.Clock(tmp_path)
        with clock("data"):
            now[0] += work
        clock.trained("joint", Summary(tmp_path, 9, metrics, 100.0, 150.0))
        with clock("report"):
            now[0] += work
        return clock

    first = start(20.0, {"train/loss": 1.0})
    again = start(3.0, {})
    assert again.seconds == first.seconds == {"data": 20.0, "joint": 100.0, "report": 20.0}
    assert again.cpu_seconds == first.cpu_seconds
    further = start(5.0, {"train/loss": 0.9})  # with more steps; the data are those of before
    assert further.seconds == {"data": 20.0, "joint": 100.0, "report": 5.0}
    monkeypatch.setattr(chain.resource, "getrusage", lambda who: type("", (), {"ru_maxrss": 1}))
    assert chain.Clock(tmp_path).peak_memory() >= further.peak_memory() > 0.01
    fast = chain.Clock(tmp_path, fast=True)  # a smoke run does other work
    with fast("data"):
        now[0] += 1.0
    assert fast.seconds == {"data": 1.0} and fast.peak_memory() < 0.01
