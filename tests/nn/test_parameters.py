"""Name every dimension of a parameter."""

import pytest
from flax import nnx

from blip3o_jax import nn


def test_param_needs_a_name_for_every_dimension():
    with pytest.raises(
        ValueError, match=r"param: shape \(2, 3\) has 2 dimensions, axes \('embed',\) name 1"
    ):
        nn.param(nnx.Rngs(0), (2, 3), ("embed",), nn.zeros)
