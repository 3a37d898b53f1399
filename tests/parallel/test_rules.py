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
        ("fsdp_sp", "ar", ("layers", "embed", "mlp"), (None, "fsdp", None)),
        ("fsdp_sp", "ar", ("batch", "length", "act_embed"), (("data", "fsdp"), "sequence", None)),
        ("fsdp_sp", "dit", ("batch", "latent_tokens", None), (("data", "fsdp"), "sequence", None)),
        ("fsdp_sp", "tokenizer", ("batch", "length"), (("data", "fsdp"), None)),
        ("fsdp_tp", "ar", ("layers", "embed", "mlp"), (None, "fsdp", "tensor")),
        ("fsdp_tp", "ar", ("vocab", "embed"), ("tensor", "fsdp")),
        ("fsdp_tp", "tokenizer", ("embed", "mlp"), ("fsdp", None)),
        ("fsdp_tp", "vae", ("embed", "mlp"), (None, None)),
        ("fsdp", "ar", ("layers", "embed", "mlp"), (None, "fsdp", None)),
        ("dp", "ar", ("embed", "mlp"), (None, None)),
        ("dp", "ar", ("batch", None), (("data", "fsdp"), None)),
        ("hybrid", "ar", ("embed", "mlp"), ("fsdp", None)),
    ],
)
def test_places(strategy, part, axes, want):
    more = {"fsdp_tp": {"tensor": 2}, "fsdp_sp": {"sequence": 2}, "hybrid": {"slices": 2}}.get(
        strategy, {}
    )
    got = tiny.strategy(strategy, 2, 2, **more).spec(part, axes, (8,) * len(axes))
    assert got == PartitionSpec(*want)


def test_a_mesh_axis_of_one_device_is_not_named():
    assert tiny.strategy("fsdp_tp", fsdp=8).spec("ar", ("embed", "mlp"), (8, 7)) == PartitionSpec(
        "fsdp", None
    )


def test_a_dimension_that_does_not_divide_is_named_with_both_sizes():
    message = (
        "strategy fsdp: ar/norm/x has embed=12, which does not divide over mesh axes fsdp = 8; "
        "use a multiple of 8"
    )
    with fails(message):
        tiny.strategy("fsdp", fsdp=8).spec("ar", ("embed",), (12,), "ar/norm/x")
    with fails(
        "an activation of ar has batch=6, which does not divide over mesh axes data x fsdp = 4"
    ):
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
        "data.batch_size=6 does not divide over 4 batch shards (mesh data=2 x fsdp=2) x 1 "
        "micro-batches: use a multiple of 4"
    ):
        strategy.check_batch(6)
    with fails("use a multiple of 16"):
        strategy.check_batch(8, accumulate=4)


def test_an_unknown_strategy_names_those_there_are():
    with fails("mesh.strategy='fdsp' is not one of auto, dp, fsdp, fsdp_tp, fsdp_sp"):
        tiny.strategy("fdsp")
    with fails("mesh.parts[0][1]='tp' is not one of dp, fsdp, fsdp_tp, fsdp_sp"):
        tiny.strategy("fsdp", parts=(("dit", "tp"),))


def test_parts_have_tables_of_their_own():
    strategy = tiny.strategy("fsdp_tp", fsdp=2, tensor=2, parts=(("dit", "dp"), ("vae", "fsdp")))
    axes, shape = ("embed", "mlp"), (8, 8)
    for part, want in {
        "ar": ("fsdp", "tensor"),
        "dit": (None, None),
        "vae": (None, None),
        "tokenizer": ("fsdp", None),
    }.items():
        assert strategy.spec(part, axes, shape) == PartitionSpec(*want), part


def test_axes_that_nothing_would_lie_over():
    with fails(
        "mesh.tensor=2: strategy fsdp shards nothing over that axis, so its devices would repeat "
        "the same work; use fsdp_tp"
    ):
        tiny.strategy("fsdp", fsdp=2, tensor=2)
    with fails("mesh.sequence=2: strategy fsdp_tp shards nothing over that axis"):
        tiny.strategy("fsdp_tp", fsdp=2, tensor=2, sequence=2)
    tiny.strategy("fsdp", fsdp=2, sequence=2, parts=(("dit", "fsdp_sp"),))
    with fails(
        "mesh.strategy='hybrid' is for several slices: set mesh.slices and mesh.data to their "
        "number"
    ):
        tiny.strategy("hybrid", fsdp=8)


def test_one_token_is_not_cut_up():
    strategy = tiny.strategy("fsdp_sp", fsdp=2, sequence=2)
    assert strategy.spec("ar", ("batch", "length"), (2, 1)) == PartitionSpec("fsdp", None)
    with fails(
        "an activation of ar has length=3, which does not divide over mesh axes sequence = 2"
    ):
        strategy.resolver("ar", ("batch", "length"), (2, 3))


@pytest.mark.parametrize("name", rules.STRATEGIES)
def test_tables_name_mesh_axes_only(name):
    from blip3o_jax.parallel.mesh import AXES

    assert all(
        set(axes) <= set(AXES)
        for table in rules.STRATEGIES[name].values()
        for axes in table.values()
    )
