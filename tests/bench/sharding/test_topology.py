"""Parse topologies by name. The compiler's own answers are checked in test_grid.py, where it is
installed."""

import importlib.util

import pytest

from blip3o_jax.bench.sharding import topology
from blip3o_jax.config import UserError


def test_sizes_and_devices():
    v5p = topology.parse("v5p:4x4x8")
    assert (v5p.chip.name, v5p.sizes, v5p.chips, v5p.devices, str(v5p)) == (
        "v5p",
        (4, 4, 8),
        128,
        128,
        "v5p:4x4x8",
    )
    both = topology.parse("v6e:4x4", slices=2)
    assert (both.chips, both.devices, str(both)) == (32, 32, "v6e:4x4 x 2 slices")
    assert topology.parse("tpu7x:2x2x1").devices == 8, "two devices a chip"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("V6E:4x4", "chip='V6E' is not one of v4, v5e, v5p, v6e, tpu7x; did you mean v6e"),
        ("H200:8", "chip='H200' is not one of v4"),
        ("v5p", "must be a chip"),
        ("v5p:4x4", "v5p has 3 axes, as in v5p:4x4x4"),
        ("v5e:4x4x4", "v5e has 2 axes, as in v5e:4x4"),
        ("v5e:0x4", "2 axes"),
    ],
)
def test_what_is_no_topology_is_refused_with_what_would_be(text, says):
    with pytest.raises(UserError, match=says) as error:
        topology.parse(text)
    assert "\n" not in str(error.value) and text in str(error.value)


def test_slices_must_be_positive():
    with pytest.raises(UserError, match="--slices=0"):
        topology.parse("v5p:4x4x4", slices=0)


def test_a_missing_compiler_is_reported_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\[tpu\]' \(x86-64"):
        topology.check_compiler()
