"""Check the strategies and meshes that are chosen."""

import jax
import pytest

from blip3o_jax.config import MeshConfig, loader
from blip3o_jax.parallel import rules
from blip3o_jax.parallel.planner import plan_groups, plan_mesh
from blip3o_jax.train import state
from tests import tiny

AXES = ("data", "fsdp", "sequence", "tensor")


@pytest.fixture(scope="module", params=["1.7b", "0.6b"])
def published(request):
    """Return a published size and the widths that fsdp shards, of the model that is pretrained."""
    cfg, found = loader.load(f"configs/pretrain.py:{request.param}"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules.Strategy, "of", lambda *_, parameters, **__: found.extend(parameters()))
        state.run_strategy(cfg)
    return request.param, rules._sharded_widths("fsdp", {}, found)


@pytest.mark.parametrize(
    ("devices", "slices", "rows", "strategy", "data", "fsdp", "sequence"),
    [
        (4, 1, 512, "fsdp", 1, 4, 1),
        (8, 1, 512, "fsdp", 1, 8, 1),
        (64, 1, 512, "fsdp", 4, 16, 1),
        (256, 1, 512, "fsdp", 16, 16, 1),
        (512, 1, 512, "fsdp", 32, 16, 1),
        (256, 2, 512, "hybrid", 16, 16, 1),
        (96, 1, 960, "fsdp", 6, 16, 1),
        (4096, 1, 512, "fsdp_sp", 32, 16, 8),
    ],
)
def test_the_published_sizes(published, devices, slices, rows, strategy, data, fsdp, sequence):
    """Split 2048 columns into at most 16 pieces of 128 each, 1024 into 8; the other devices hold
    replicas, and share rows where there are more devices than rows."""
    size, widths = published
    if size == "0.6b" and fsdp == 16:
        data, fsdp = 2 * data, 8
    mesh = plan_mesh(MeshConfig(), devices, slices=slices, widths=lambda: widths, rows=rows)
    assert (mesh.strategy, mesh.slices, mesh.tensor) == (strategy, slices, 1)
    assert (mesh.data, mesh.fsdp, mesh.sequence) == (-1, fsdp, sequence)
    assert data * fsdp * sequence == devices
    assert not any(width % fsdp for width in widths)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"strategy": "dp"}, (-1, 1, 1, 1)),
        ({"strategy": "fsdp_tp"}, (-1, 16, 1, 2)),
        ({"strategy": "fsdp_sp"}, (-1, 16, 2, 1)),
        ({"strategy": "fsdp_tp", "tensor": 4}, (-1, 16, 1, 4)),
        ({"tensor": 2}, (-1, 16, 1, 2)),
        ({"fsdp": 64}, (-1, 64, 1, 1)),
        ({"fsdp": -1}, (1, -1, 1, 1)),
        ({"data": -1}, (-1, 1, 1, 1)),
        ({"tensor": -1}, (1, 1, 1, -1)),
        ({"sequence": -1, "data": 2}, (2, 1, -1, 1)),
        ({"fsdp": -1, "slices": 2}, (2, -1, 1, 1)),
        ({"data": 2}, (2, -1, 1, 1)),
        ({"data": 8, "fsdp": 8}, (8, 8, 1, 1)),
    ],
)
def test_what_is_set_stays(given, want):
    mesh = plan_mesh(MeshConfig(**given), 64, widths=lambda: {2048: 1})
    assert tuple(getattr(mesh, axis) for axis in AXES) == want
    assert {name: getattr(mesh, name) for name in given} == given
    assert plan_mesh(mesh, 64) == mesh


@pytest.mark.parametrize(
    ("devices", "widths", "want"),
    [
        (40, {2048: 1}, 8),  # 16 does not divide 40
        (64, {1152: 1}, 8),  # pieces of 144; 16 would leave 72
        (64, {2048: 100, 1152: 1}, 16),  # a small network may have pieces of 72
        (64, {2048: 100, 1000: 1}, 8),  # but they must divide
        (8, {32: 1}, 8),  # narrower than two tiles: memory decides
        (8, {128 * n: 1 for n in range(1, 9)}, 8),  # none is a large one
        (7, {2048: 1}, 1),
    ],
)
def test_shards_divide_and_hold_a_tile(devices, widths, want):
    assert plan_mesh(MeshConfig(), devices, widths=lambda: widths).fsdp == want


def test_widths_are_not_asked_for_where_nothing_depends_on_them():
    def widths():
        raise AssertionError

    for cfg, devices in ((MeshConfig(), 1), (MeshConfig(fsdp=2), 8), (MeshConfig(data=-1), 8)):
        plan_mesh(cfg, devices, widths=widths)


@pytest.mark.parametrize(
    ("given", "rows", "want"),
    [
        ({}, 4, ("fsdp_sp", 2)),
        ({}, 12, ("fsdp", 1)),  # does not divide over 8, which the check of the batch says
        ({}, 1, ("fsdp_sp", 8)),
        ({"sequence": 4}, 0, ("fsdp_sp", 4)),
        ({"strategy": "fsdp"}, 4, ("fsdp", 1)),
        ({"data": 4}, 4, ("fsdp", 1)),
        ({"slices": 4}, 2, ("hybrid", 1)),  # four devices a row, two in a slice
    ],
)
def test_devices_share_rows_where_there_are_too_few(given, rows, want):
    mesh = plan_groups(MeshConfig(**given), 8, rows=rows)
    assert (mesh.strategy, mesh.sequence) == want


def test_no_rows_are_shared_that_do_not_divide():
    assert plan_groups(MeshConfig(), 6, rows=4).strategy == "fsdp"


@pytest.mark.parametrize(("stage", "want"), [("tokenizer", "fsdp"), ("joint", "fsdp_sp")])
def test_stages_that_shard_no_rows_share_none(stage, want):
    """Share none where every device of a group would repeat the same work."""
    cfg = tiny.run_config(stage=stage, data={"batch_size": 4}, mesh=MeshConfig())
    assert state.run_strategy(cfg, jax.devices()).name == want
