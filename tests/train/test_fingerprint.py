"""The fingerprint of weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from blip3o_jax.train.fingerprint import weights_fingerprint
from tests import tiny

WEIGHTS = {
    "vae": {"a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.zeros(2, np.float32)}
}


def changed(name, value):
    return {"vae": WEIGHTS["vae"] | {name: np.asarray(value)}}


@pytest.mark.parametrize(
    "other",
    [
        changed("b", np.float32([0, 1e-30])),
        changed("a", WEIGHTS["vae"]["a"][::-1]),  # the same values in another order
        changed("a", WEIGHTS["vae"]["a"].reshape(4, 4)),
        changed("b", np.zeros(2, ml_dtypes.bfloat16)),
        {"dit": WEIGHTS["vae"]},
    ],
    ids=["value", "order", "shape", "dtype", "name"],
)
def test_other_weights_have_another_fingerprint(other):
    assert weights_fingerprint(other) != weights_fingerprint(WEIGHTS)


def test_it_is_the_same_on_every_mesh_and_in_any_order_of_the_names():
    sharded = jax.device_put(
        jnp.asarray(WEIGHTS["vae"]["a"]), tiny.strategy("fsdp", fsdp=8).batch_sharding()
    )
    again = {"vae": {"b": jnp.zeros(2), "a": sharded}}
    assert weights_fingerprint(again) == weights_fingerprint(WEIGHTS)
