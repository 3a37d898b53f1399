"""Compile a loop over layers for four TPUs and print its cost by the cost model, as JSON; a
separate program, since the TPU compiler takes over the signals of the process that loads it."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax.bench.cost import walk
from blip3o_jax.bench.cost.network import Network
from blip3o_jax.bench.sharding import topology
from blip3o_jax.config import MeshConfig
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.flops import count_flops

LAYERS = 5


def main() -> None:
    where = topology.parse("v5e:2x2")
    mesh = Strategy.of(MeshConfig(fsdp=4), topology.make_devices(where)).mesh
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

    def loss(w, x):
        def layer(x, w):
            with jax.named_scope("ar"):
                w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), at())
                return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), at("fsdp")), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32) ** 2)

    w = jax.ShapeDtypeStruct((LAYERS, 512, 512), jnp.float32, sharding=at(None, "fsdp"))
    x = jax.ShapeDtypeStruct((32, 256, 512), jnp.bfloat16, sharding=at("fsdp"))
    program = jax.jit(jax.grad(loss), out_shardings=at(None, "fsdp")).lower(w, x).compile()
    found = walk.program_cost(
        program.as_text(), Network.of(where.chip, dict(mesh.shape), list(mesh.devices.flat))
    )
    row = {
        "flops": {" ".join(key): value * where.devices for key, value in found.flops.items()},
        "counted": count_flops(jax.grad(loss), w, x),
        "collectives": {
            " ".join((kind, *axes, network)): t.count
            for (kind, axes, network), t in found.collectives.items()
        },
        "unknown": found.unknown_fraction,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
