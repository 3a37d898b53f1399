"""Optimizers with global-norm clipping, linear warm-up and a cosine to a floor.

"muon" orthogonalises the momentum of every matrix of the layer stacks (`optax.contrib.muon`) and
leaves the rest to AdamW: linear layers outside of stacks, embeddings, heads, convolutions, norms
and biases. Its updates have the root mean square of AdamW's (arXiv 2502.16982, sec. 2.2), so that
one learning rate serves both.
"""

from typing import Any

import jax
import optax

from blip3o_jax.config import OptimizerConfig

# Kernels [layers, in, out], each layer for itself.
_STACKED_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: linear warm-up from 0 over `warmup_fraction` of `steps`, then a cosine to
    `end_learning_rate` at the last.
    """
    warmup = max(1, round(cfg.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup, max(steps, warmup + 1), cfg.end_learning_rate
    )


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    rate = learning_rate(cfg, steps)
    adamw = optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        adamw
        if cfg.name == "adamw"
        else optax.partition({"muon": _muon(cfg, rate), "adamw": adamw}, _labels),
    )


def _muon(cfg: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate,
        beta=cfg.muon_beta,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: _STACKED_MATRIX, params
        ),
        consistent_rms=0.2,
    )


def _labels(params: Any) -> Any:
    """Return the optimizer's label for each parameter: "muon" or "adamw"."""

    def label(path: tuple[Any, ...], x: jax.Array) -> str:
        return "muon" if path[-1].key == "kernel" and x.ndim == 3 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)
