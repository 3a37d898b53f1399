"""Values at the edges of what a setting may be: a tiny run with them makes its steps, each with
finite metrics and applied, or ends in one line.
"""

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


def edges():
    """(stage, group, field, value): the ends of every interval, and 0 where it lies inside."""
    for group in ("", "optimizer", "loss", "data", "checkpoint"):
        cls = fields.field_types(config.Config)[group] if group else config.Config
        for name, hint in fields.field_types(cls).items():
            kind, constraints, _ = fields.unwrapped(hint)
            for bounds in (
                c for c in constraints if isinstance(c, Bounds) and kind in (int, float)
            ):
                values = {kind(bounds.low), kind(0), kind(bounds.high)}
                for value in sorted(v for v in values if not bounds.refusal(v)):
                    if value <= 1 or name not in LARGE:
                        stage = STAGE.get(
                            name, "autoencoder" if group != "optimizer" else "tokenizer"
                        )
                        yield stage, group, name, value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "group", "name", "value"),
    [pytest.param(*e, id=".".join(map(str, e[1:]))) for e in edges()],
)
def test_the_edge_of_a_setting_trains_or_is_refused(stage, group, name, value, tmp_path):
    odd = {group: {name: value}} if group else {name: value}
    base = {"stage": stage, "steps": 2, "preview": 0}
    try:
        train(tiny.run_config(tiny.data(), **base | odd), tmp_path)
    except config.UserError as error:
        assert "\n" not in str(error)
        return
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == (value if name == "steps" else 2)
    for row in rows:
        odd = {
            k: v for k, v in row.items() if not isinstance(v, int | float) or not math.isfinite(v)
        }
        assert not odd and row["bad_steps"] == 0, row
