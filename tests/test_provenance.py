"""Check what a measured result states of its making."""

import datetime
import json
import platform
from importlib import metadata

from blip3o_jax import provenance


def test_a_result_names_its_command_date_and_versions(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("jax", "not-installed-here"))
    made = json.loads(json.dumps(provenance.provenance("blip3o bench rl")))
    assert made["command"] == "blip3o bench rl"
    assert datetime.datetime.fromisoformat(made["date"]).tzinfo is not None
    assert made["versions"] == {"python": platform.python_version(), "jax": metadata.version("jax")}
