"""Compile splash attention and its gradient for one TPU, `python -m tests.bench.cost.splash_program
v6e 128`: a separate program, since the directory of the compiler's schedules is set when it starts.
"""

import sys

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.ar.splash import splash
from blip3o_jax.bench.sharding import topology
from blip3o_jax.config import MeshConfig
from blip3o_jax.parallel.chips import CHIPS
from blip3o_jax.parallel.rules import Strategy


def main(chip: str, head: int) -> None:
    where = topology.parse(f"{chip}:{'x'.join(['2', '2', '1'][: CHIPS[chip].axes])}")
    strategy = Strategy.of(MeshConfig(), topology.make_devices(where)[:1])
    at = strategy.replicated()

    def loss(q, k, v, segments):
        with (
            nn.sharding_resolver(strategy.resolver),
            nn.part("ar"),
        ):  # what says that it is for a TPU
            return jnp.sum(splash(q, k, v, segments, segments, 0).astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((4, 2048, 4, head), jnp.bfloat16, sharding=at)
    segments = jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=at)
    jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=at).lower(x, x, x, segments).compile()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
