"""Merge, drop and disable low-rank adapters (LoRA, arXiv 2106.09685).

`nn.Linear` holds the factors A and B; `config.LoraConfig` selects the layers.

y = x W + scale (x A) B  =  x (W + scale A B),    scale = alpha / rank
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import ModelConfig

LORA_PARTS = ("ar", "dit")  # the parts that can have factors
FACTORS = ("lora_a", "lora_b")  # next to a layer's `kernel`


def base_config(cfg: ModelConfig) -> ModelConfig:
    """Return the configuration without low-rank factors, which merged models have."""
    off = lambda part: dataclasses.replace(part, lora=dataclasses.replace(part.lora, rank=0))
    return dataclasses.replace(cfg, **{name: off(getattr(cfg, name)) for name in LORA_PARTS})


def drop_factors(params: Any) -> Any:
    """Return a nested dict of parameters without A and B, the kernels unchanged."""
    if not isinstance(params, dict):
        return params
    return {name: drop_factors(child) for name, child in params.items() if name not in FACTORS}


def disable_lora(params: Any) -> Any:
    """Return a nested dict of parameters with every B zero, as PEFT's `disable_adapter`.

    The network then computes the same as without A and B. That is the initial policy of a run that
    created the factors, but not of one that read them from a checkpoint.
    """
    off = lambda keys, x: jnp.zeros_like(x) if keys[-1].key == FACTORS[1] else x
    return jax.tree_util.tree_map_with_path(off, params)


def zero_idle_factors(params: Any) -> Any:
    """Return a nested dict of parameters with A zero wherever all of B is zero.

    A has no effect while B is zero; zeroing it gives equal networks equal parameters.
    """
    if not isinstance(params, dict):
        return params
    params = {name: zero_idle_factors(child) for name, child in params.items()}
    if FACTORS[0] in params:
        a, b = (params[name] for name in FACTORS)
        params[FACTORS[0]] = jnp.where(jnp.any(b != 0), a, 0)
    return params


def merge(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Return {part: nested dict of parameters} with the factors merged into the kernels.

    `cfg` is the configuration with factors; the result is of `base_config(cfg)`. The sum is in
    float32 and rounded to the kernel's dtype.
    """
    # TPUs multiply float32 factors in bfloat16 by default, which would round the merged kernel.
    with jax.default_matmul_precision("highest"):
        return {
            name: _merge(tree, getattr(cfg, name).lora.scale) if name in LORA_PARTS else tree
            for name, tree in params.items()
        }


def _merge(tree: Any, scale: float) -> Any:
    if not isinstance(tree, dict):
        return tree
    tree = {name: _merge(child, scale) for name, child in tree.items()}
    if FACTORS[0] in tree:
        a, b = (tree.pop(name) for name in FACTORS)
        tree["kernel"] = merge_kernel(tree["kernel"], a, b, scale).astype(tree["kernel"].dtype)
    return tree


def merge_kernel(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """Return W + scale A B [..., in, out] in float32, of NumPy or JAX arrays."""
    kernel, a, b = (x.astype(np.float32) for x in (kernel, a, b))
    return kernel + scale * (a @ b)
