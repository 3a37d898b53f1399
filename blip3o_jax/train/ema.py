"""Average the trained parameters over the steps: an exponential moving average.

    e_0 = p_0
    e_t = d e_{t-1} + (1 - d) p_t       d = `optimizer.ema_decay`, 0 for no average

Checkpoints hold it as `ema`; `convert export` and `convert verify` take it with `--ema`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.config import OptimizerConfig


def initial_average(cfg: OptimizerConfig, params: Any) -> Any:
    """Return the average before the first step, or {} where none is kept.

    It is a copy: parameters and average are both donated to the step, and one buffer cannot be
    donated twice.
    """
    return jax.tree.map(jnp.copy, params) if cfg.ema_decay else {}


def update_average(cfg: OptimizerConfig, average: Any, params: Any) -> Any:
    """Return the average after a step that ends with `params`."""
    decay = cfg.ema_decay
    if not decay:
        return {}
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)
