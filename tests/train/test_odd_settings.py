"""Values at the edges of what a setting may be: a tiny run with them makes its steps, each with
finite metrics and applied, or ends in one line that names the setting.
"""

import itertools
import json
import math

import pytest

from blip3o_jax import config
from blip3o_jax.config import fields
from blip3o_jax.config.constraints import Bounds
from blip3o_jax.train.supervised import train
from tests import tiny

STAGE = {
    "ce": "joint",
    "flow": "joint",
    "ce_chunk": "joint",
    "flow_samples": "joint",
    "dense": "contrastive",
}
STAGE |= {f"{name}_dropout": "joint" for name in ("condition", "caption", "instruction")}
STAGE |= dict.fromkeys(("commitment", "code_entropy"), "tokenizer")
# Slow by what they say, not odd: steps, the length of rows, micro-batches without rows.
LARGE = (
    "steps",
    "max_length",
    "batch_size",
    "pack",
    "accumulate",
    "workers",
    "flow_samples",
    "prefetch",
)


# Fields that only another one switches on.
WITH = {"muon_beta": {"name": "muon"}}
GROUPS = ("loss", "", "optimizer", "data", "checkpoint")


def edges(group):
    """Return (field, value) of a group: the ends of every interval, and 0 where it lies inside."""
    cls = fields.field_types(config.Config)[group] if group else config.Config
    for name, hint in fields.field_types(cls).items():
        kind, constraints, _ = fields.unwrapped(hint)
        for bounds in (c for c in constraints if isinstance(c, Bounds) and kind in (int, float)):
            values = {kind(bounds.low), kind(0), kind(bounds.high)}
            for value in sorted(v for v in values if not bounds.refusal(v)):
                if value <= 1 or name not in LARGE:
                    yield name, value


def runs():
    """Return {group: (field, value)} of each run: one edge of every group that has one left. A run
    takes seconds, most of them to compile a program that another value of a field would not share.
    """
    for found in itertools.zip_longest(*map(edges, GROUPS)):
        yield {group: edge for group, edge in zip(GROUPS, found, strict=True) if edge}


def settings(odd):
    """Return the changes of `tiny.run_config` of one run."""
    stage = STAGE.get(odd["loss"][0], "autoencoder") if "loss" in odd else "tokenizer"
    changes = {"stage": stage, "steps": 2, "preview": 0}
    for group, (name, value) in odd.items():
        changes |= {group: {name: value} | WITH.get(name, {})} if group else {name: value}
    return changes


def name_of(odd):
    return "-".join(f"{fields.join(group, name)}={value}" for group, (name, value) in odd.items())


@pytest.mark.slow
@pytest.mark.parametrize("odd", [pytest.param(odd, id=name_of(odd)) for odd in runs()])
def test_the_edges_of_settings_train_or_are_refused(odd, tmp_path):
    """Leave out an edge that is refused by its name, and try the others of the run again."""
    while True:
        changes = settings(odd)
        try:
            train(tiny.run_config(tiny.data(), **changes), tmp_path / str(len(odd)))
            break
        except config.UserError as error:
            assert "\n" not in str(error)
            refused = [g for g, (name, _) in odd.items() if fields.join(g, name) in str(error)]
            assert refused, error
            odd = {group: edge for group, edge in odd.items() if group != refused[0]}
    metrics = tmp_path / str(len(odd)) / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows[-1]["step"] == changes["steps"]
    for row in rows:
        unusual = {
            k: v for k, v in row.items() if not isinstance(v, int | float) or not math.isfinite(v)
        }
        assert not unusual and row["train/bad_steps"] == 0, row
