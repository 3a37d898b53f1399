"""Place activations by the names of their dimensions."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import nn
from tests import tiny


@pytest.fixture
def x_BD():
    return jnp.ones((2, 8))


def test_constrain_counts_names_and_is_nothing_without_a_strategy(x_BD):
    with pytest.raises(
        ValueError, match=r"constrain: 1 axis names \('batch',\) for an array of shape \(2, 8\)"
    ):
        nn.constrain(x_BD, "batch")
    assert nn.constrain(x_BD, "batch", None) is x_BD


def test_constrain_places_activations_by_the_part_being_traced(x_BD):
    """Map the same names to other axes in the autoencoder, which strategy fsdp_tp does not cut
    by width.
    """
    strategy = tiny.strategy("fsdp_tp", fsdp=2, tensor=2)

    def place(part):
        def fn(x):
            with nn.sharding_resolver(strategy.resolver), nn.part(part):
                return nn.constrain(x, "batch", "act_mlp")

        return jax.jit(fn)(x_BD).sharding

    assert place("ar").is_equivalent_to(
        NamedSharding(strategy.mesh, PartitionSpec("fsdp", "tensor")), 2
    )
    assert place("vae").is_equivalent_to(
        NamedSharding(strategy.mesh, PartitionSpec("fsdp", None)), 2
    )
