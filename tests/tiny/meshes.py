"""Lay eight CPU devices out for every strategy."""

from typing import Any

import jax

from blip3o_jax import config
from blip3o_jax.parallel.rules import Strategy


def strategy(
    name: str = "dp", data: int = 1, fsdp: int = 1, tensor: int = 1, **mesh: Any
) -> Strategy:
    """Return a strategy on as many devices as the product of the sizes."""
    mesh = {"sequence": 1} | mesh
    cfg = config.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, strategy=name, **mesh)
    return Strategy.of(cfg, jax.devices()[: data * fsdp * tensor * cfg.sequence])


# Each strategy on eight devices.
MESHES: dict[str, dict[str, Any]] = {
    "dp": {"name": "dp", "data": 8},
    "fsdp": {"name": "fsdp", "fsdp": 8},
    "fsdp_tp": {"name": "fsdp_tp", "data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_sp": {"name": "fsdp_sp", "data": 2, "fsdp": 2, "sequence": 2},
    "hybrid": {"name": "hybrid", "data": 2, "fsdp": 4, "slices": 2},
    "hybrid_fsdp_tp": {"name": "hybrid_fsdp_tp", "data": 2, "fsdp": 2, "tensor": 2, "slices": 2},
    "hybrid_fsdp_sp": {"name": "hybrid_fsdp_sp", "data": 2, "fsdp": 2, "sequence": 2, "slices": 2},
    "a mixture": {
        "name": "fsdp_tp",
        "fsdp": 4,
        "tensor": 2,
        "parts": (("dit", "fsdp"), ("tokenizer", "dp"), ("vae", "fsdp")),
    },
}
