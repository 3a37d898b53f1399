import jax
import pytest

from blip3o_jax.config import ConfigError, MeshConfig
from blip3o_jax.parallel.mesh import AXES, make_mesh


@pytest.mark.parametrize(
    ("sizes", "want"),
    [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((8, 1, 1), (8, 1, 1)), ((2, 2, -1), (2, 2, 2))],
)
def test_sizes(sizes, want):
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape[a] for a in AXES) == want
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert tuple(mesh.shape.values()) == (1, 1, 1) and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "mesh data=3 x fsdp=1 x tensor=1 does not cover 8 devices"),
        ((3, -1, 1), "mesh data=3 x fsdp=-1 x tensor=1 does not cover 8 devices"),
        ((16, -1, 1), "does not cover 8 devices"),
        ((-1, -1, 1), "-1 at most once"),
        ((0, -1, 1), "mesh sizes data=0, fsdp=-1, tensor=1: positive"),
        ((-2, 1, 1), "mesh sizes data=-2"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_mesh(MeshConfig(*sizes))
    assert "\n" not in str(error.value)
