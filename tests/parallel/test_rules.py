import re

import pytest
from jax.sharding import PartitionSpec

from blip3o_jax.config import ConfigError
from blip3o_jax.parallel import rules
from tests import tiny


def fails(message):
    return pytest.raises(ConfigError, match=re.escape(message))


@pytest.mark.parametrize(
    ("strategy", "part", "axes", "want"),
    [
        ("fsdp", "ar", ("layers", "embed", "mlp"), (None, "fsdp", None)),
        ("fsdp_tp", "ar", ("layers", "embed", "mlp"), (None, "fsdp", "tensor")),
        ("fsdp_tp", "ar", ("vocab", "embed"), ("tensor", "fsdp")),
        ("fsdp_tp", "tokenizer", ("embed", "mlp"), ("fsdp", None)),
        ("fsdp_tp", "vae", ("embed", "mlp"), (None, None)),
        ("dp", "ar", ("embed", "mlp"), (None, None)),
        ("dp", "ar", ("batch", None), (("data", "fsdp"), None)),
    ],
)
def test_places(strategy, part, axes, want):
    got = tiny.strategy(strategy, 2, 2, 2).spec(part, axes, (8,) * len(axes))
    assert got == PartitionSpec(*want)


def test_a_mesh_axis_of_one_device_is_not_named():
    assert tiny.strategy("fsdp_tp", fsdp=8).spec("ar", ("embed", "mlp"), (8, 7)) == PartitionSpec("fsdp", None)


def test_a_dimension_that_does_not_divide_is_named_with_both_sizes():
    message = "strategy fsdp: ar/norm/x has embed=12, which does not divide over mesh axes fsdp = 8; use a multiple of 8"
    with fails(message):
        tiny.strategy("fsdp", fsdp=8).spec("ar", ("embed",), (12,), "ar/norm/x")
    with fails("an activation of ar has batch=6, which does not divide over mesh axes data x fsdp = 4"):
        tiny.strategy("fsdp", data=2, fsdp=2).resolver("ar", ("batch", None), (6, 3))


def test_two_names_on_one_mesh_axis():
    with fails("strategy fsdp_tp: ar/w puts both 'heads' and 'mlp' on mesh axis 'tensor'"):
        tiny.strategy("fsdp_tp", tensor=2).spec("ar", ("heads", "mlp"), (4, 4), "ar/w")
    with fails("puts both 'batch' and 'embed' on mesh axis 'fsdp'"):
        tiny.strategy("fsdp", fsdp=2).spec("ar", ("batch", "embed"), (4, 4))


def test_a_batch_that_does_not_divide():
    strategy = tiny.strategy("fsdp", data=2, fsdp=2)
    strategy.check_batch(16, accumulate=4)
    with fails(
        "data.batch_size=6 does not divide over 4 batch shards (mesh data=2 x fsdp=2) x 1 micro-batches: use a multiple of 4"
    ):
        strategy.check_batch(6)
    with fails("use a multiple of 16"):
        strategy.check_batch(8, accumulate=4)


def test_an_unknown_strategy_names_those_there_are():
    with fails("mesh.strategy='fdsp' is not one of dp, fsdp, fsdp_tp"):
        tiny.strategy("fdsp")


@pytest.mark.parametrize("name", rules.STRATEGIES)
def test_tables_name_mesh_axes_only(name):
    from blip3o_jax.parallel.mesh import AXES

    assert all(set(axes) <= set(AXES) for table in rules.STRATEGIES[name].values() for axes in table.values())
