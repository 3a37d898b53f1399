"""Check what every demonstration reports of its run."""

import json

from blip3o_jax.demo import chain
from tests import tiny


def test_stages_of_any_name_have_the_curves_of_their_kind(tmp_path):
    """A single config is named "", and the names of a recipe's stages are free."""
    config = tiny.run_config()
    for name in ("", "second"):
        directory = chain.stage_directory(tmp_path, name)
        directory.mkdir(parents=True, exist_ok=True)
        row = {"step": 1, "train/ce": 2.0, "eval/ce": 3.0}
        (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    facts = chain.facts_of_run(tmp_path, {"": config, "second": config}, config, chain.Clock())
    assert [stage.name for stage in facts["stages"]] == ["joint", "second"]
    assert list(facts["configuration"]) == ["joint", "second"]
    for stage in facts["stages"]:
        curve = stage.curves[0]
        assert (curve.name, curve.values, curve.held_out) == ("ce", [2.0], ([1], [3.0]))
