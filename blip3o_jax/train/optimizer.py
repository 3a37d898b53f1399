"""AdamW with global-norm clipping, linear warm-up and a cosine to a floor."""

import optax

from blip3o_jax.config import OptimizerConfig


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: up from 0 over `warmup_share` of `steps`, then a cosine to `end_learning_rate` at the last."""
    warmup = max(1, round(cfg.warmup_share * steps))
    return optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, warmup, max(steps, warmup + 1), cfg.end_learning_rate)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(learning_rate(cfg, steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay),
    )
