import dataclasses
import os
import re

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from blip3o_jax.config import ConfigError, MeshConfig
from blip3o_jax.parallel import mesh as meshes
from blip3o_jax.parallel.mesh import AXES
from blip3o_jax.parallel.mesh import make_mesh as make_planned_mesh
from blip3o_jax.parallel.planner import plan_mesh


def make_mesh(cfg, devices=None):
    """Return the mesh of sizes that leave open only what has one choice."""
    devices = jax.devices() if devices is None else devices
    return make_planned_mesh(plan_mesh(cfg, len(devices)), devices)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((1, -1, 1), (1, 8, 1, 1)),
        ((-1, 2, 2), (2, 2, 1, 2)),
        ((8, 1, 1), (8, 1, 1, 1)),
        ((2, 2, -1), (2, 2, 1, 2)),
    ],
)
def test_sizes(sizes, want):
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape[a] for a in AXES) == want
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert tuple(mesh.shape.values()) == (1, 1, 1, 1) and set(mesh.axis_types) == {
        jax.sharding.AxisType.Auto
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "mesh data=3 x fsdp=1 x tensor=1 does not cover 8 devices"),
        ((3, -1, 1), "mesh data=3 x fsdp=-1 x tensor=1 does not cover 8 devices"),
        ((16, -1, 1), "does not cover 8 devices"),
        ((-1, -1, 1), "mesh sizes data=-1, fsdp=-1, sequence=0, tensor=1: only one can be -1"),
        ((-2, 1, 1), "mesh.data=-2 must lie between -1 and"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_mesh(MeshConfig(*sizes))
    assert "\n" not in str(error.value)


def test_sequence_and_slices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, sequence=2, slices=2))
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == (2, 2, 2, 1)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert sorted(ids[0].reshape(-1)) == [0, 1, 2, 3], "a slice is one block of neighbours"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 1, "slices": 2},
            "mesh.slices=2: data=1 spans the slices, so it must be a multiple of their number",
        ),
        ({"data": 2, "slices": -1}, "mesh.slices=-1 must lie between 0 and"),
        ({"sequence": 3}, "mesh data=1 x fsdp=-1 x sequence=3 x tensor=1 does not cover 8 devices"),
    ],
)
def test_slices_that_cannot_be(sizes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_mesh(MeshConfig(**sizes))


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describe a TPU chip as JAX does."""

    coords: tuple[int, ...]
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def test_real_slices_are_asked_how_many_they_are():
    chips = [Chip((x, 0, 0), number) for number in range(2) for x in range(4)]
    with pytest.raises(
        ConfigError, match=r"devices span 2 slices, but mesh\.slices=4: set mesh\.slices=2"
    ):
        make_mesh(MeshConfig(data=4, slices=4), chips)
    with pytest.raises(
        ConfigError,
        match=r"devices span 2 slices, but mesh\.slices=1: set mesh\.slices=2 and mesh\.data",
    ):
        make_mesh(MeshConfig(), chips)


@pytest.mark.parametrize(
    ("slices", "function", "error"),
    [
        (1, "create_device_mesh", ValueError("cannot reshape\nan array")),
        (2, "create_hybrid_device_mesh", AssertionError("no assignment")),
    ],
)
def test_a_mesh_that_does_not_go_onto_the_torus(monkeypatch, slices, function, error):
    """Check the error where JAX finds no assignment, in one slice or in each of two, and raises an
    error of its own. (No mesh is known for which JAX 0.11 and 0.12 find none.)"""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(mesh_utils, function, fail)
    chips = [Chip(at, number) for number in range(slices) for at in np.ndindex(4, 4, 5)]
    message = "mesh fsdp=8 x tensor=10 cannot be laid onto the torus of a slice, choose other sizes"
    with pytest.raises(ConfigError, match=message) as raised:
        make_mesh(MeshConfig(data=slices, fsdp=8, tensor=10, slices=slices), chips)
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("cores", "want"), [(2, "32"), (4, None)])
def test_more_cpu_devices_than_cores_have_threads_to_wait_in(monkeypatch, cores, want):
    """Check the number of threads: with one thread a device the programs of eight devices on two
    cores sometimes waited for each other for ever."""
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    meshes.split_cpu(4)
    assert os.environ.get("NPROC") == want
