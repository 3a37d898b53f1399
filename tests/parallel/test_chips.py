import pytest

from blip3o_jax.config import UserError
from blip3o_jax.parallel import chips


def test_every_kind_names_one_chip():
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert chips.chip_of("TPU v5p") is chips.CHIPS["v5p"]
    assert chips.chip_of("TPU v5 lite").name == "v5e", "the name JAX has for it"
    assert chips.chip_of("cpu") is None


@pytest.mark.parametrize("name", list(chips.CHIPS))
def test_figures_are_of_a_device_and_in_units_of_one(name):
    """Bound the figures: a factor of 1000, or a chip in place of a device, is outside the range of
    current chips."""
    chip = chips.CHIPS[name]
    assert 1e14 < chip.flops < 2e15
    assert 100 < chip.flops / chip.hbm_rate < 600, "FLOPs a byte"
    assert 15e9 < chip.hbm_bytes < 200e9
    assert (
        chip.hbm_rate
        > 10 * chip.link_rate / (1 if chip.axes else 10)
        > 50 * chip.dcn_rate / (1 if chip.axes else 10)
    )
    assert chip.source


def test_the_clock_gives_the_peak():
    """Check that FLOPs a cycle are twice a whole number of multipliers: squares of 128 or 256."""
    for chip in chips.CHIPS.values():
        if chip.clock:
            squares = chip.flops / chip.clock / 2 / 128**2
            assert squares == pytest.approx(round(squares), rel=0.005), chip.name


@pytest.mark.parametrize(
    ("name", "size", "ring"),
    [("v5p", 4, True), ("v5p", 2, False), ("v5e", 8, False), ("v5p", 6, False), ("v6e", 16, True)],
)
def test_rings(name, size, ring):
    assert chips.CHIPS[name].wraps(size) is ring


def test_a_gpu_has_no_torus():
    assert not chips.CHIPS["H200"].wraps(8) and chips.CHIPS["H200"].axes == 0


def test_an_unknown_chip_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"v9.*v4, v5e, v5p"):
        chips.chip_named("v9")
