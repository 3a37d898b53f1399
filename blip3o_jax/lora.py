"""Low-rank adapters (LoRA, arXiv 2106.09685) taken off a model again: nn.Linear has them,
config.LoraConfig says where.

y = x W + scale (x A) B  =  x (W + scale A B),    scale = alpha / rank
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import ModelConfig

LORA_PARTS = ("ar", "dit")  # that can have them
FACTORS = ("lora_a", "lora_b")  # beside a layer's `kernel`


def base_config(cfg: ModelConfig) -> ModelConfig:
    """The model without low-rank factors, which it also is once they are merged."""
    off = lambda part: dataclasses.replace(part, lora=dataclasses.replace(part.lora, rank=0))
    return dataclasses.replace(cfg, **{name: off(getattr(cfg, name)) for name in LORA_PARTS})


def without_factors(params: Any) -> Any:
    """A nested dict of parameters less A and B, kernels as they are."""
    if not isinstance(params, dict):
        return params
    return {name: without_factors(child) for name, child in params.items() if name not in FACTORS}


def without_lora(params: Any) -> Any:
    """Parameters in a nested dict with every B zero, so that the network computes what it would
    without A and B. This is the policy that a run started from if it started without factors; not
    if they came from a checkpoint.
    """
    off = lambda keys, x: jnp.zeros_like(x) if keys[-1].key == FACTORS[1] else x
    return jax.tree_util.tree_map_with_path(off, params)


def without_idle_lora(params: Any) -> Any:
    """Parameters in a nested dict with A zero wherever B is, so that those of equal networks are
    equal: while B is zero, it makes no difference what was drawn for A and what training has made
    of it.
    """
    if not isinstance(params, dict):
        return params
    params = {name: without_idle_lora(child) for name, child in params.items()}
    if FACTORS[0] in params:
        a, b = (params[name] for name in FACTORS)
        params[FACTORS[0]] = jnp.where(jnp.any(b != 0), a, 0)
    return params


def merged(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """{part: nested dict of parameters} of the model `cfg` as those of `base_config(cfg)`, kernels
    in the dtype they had.
    """
    with jax.default_matmul_precision("highest"):
        return {
            name: _merged(tree, getattr(cfg, name).lora.scale) if name in LORA_PARTS else tree
            for name, tree in params.items()
        }


def _merged(tree: Any, scale: float) -> Any:
    if not isinstance(tree, dict):
        return tree
    tree = {name: _merged(child, scale) for name, child in tree.items()}
    if FACTORS[0] in tree:
        a, b = (tree.pop(name) for name in FACTORS)
        tree["kernel"] = merged_kernel(tree["kernel"], a, b, scale).astype(tree["kernel"].dtype)
    return tree


def merged_kernel(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """W + scale A B [..., in, out] in float32, of NumPy's or of JAX's arrays."""
    kernel, a, b = (x.astype(np.float32) for x in (kernel, a, b))
    return kernel + scale * (a @ b)
