"""Gather the rewards of a rollout's images from all hosts, as advantages, inputs of the loss and
metrics.

P prompts, G images of each, B = P G.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax.config import RlConfig
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl.advantages import Advantages, group_advantages


@dataclasses.dataclass(frozen=True)
class RewardBatch:
    """Hold the rewards of B images, the same on all hosts: `total_B` float32 [B], 0 where
    `failed_B`; its `parts` by name, NaN where there is none."""

    total_B: np.ndarray
    failed_B: np.ndarray
    parts: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> "RewardBatch":
        return RewardBatch(
            self.total_B[rows],
            self.failed_B[rows],
            {name: x[rows] for name, x in self.parts.items()},
        )


def concatenate(batches: Sequence[RewardBatch]) -> RewardBatch:
    """Return the rewards of all batches, in their order."""
    names = dict.fromkeys(name for batch in batches for name in batch.parts)
    part = lambda batch, name: batch.parts.get(
        name, np.full(len(batch.total_B), np.nan, np.float32)
    )
    return RewardBatch(
        np.concatenate([batch.total_B for batch in batches]),
        np.concatenate([batch.failed_B for batch in batches]),
        {name: np.concatenate([part(batch, name) for batch in batches]) for name in names},
    )


def gather(own: RewardBatch, rows: Sequence[int], count: int) -> RewardBatch:
    """Return the rewards of `count` images, of which this host has scored `rows`.

    If several hosts have scored an image, the first host's reward is returned.
    """
    if jax.process_count() == 1:
        return own
    sent = {
        "rows": list(rows),
        "total": own.total_B.tolist(),
        "failed": own.failed_B.tolist(),
        "parts": {name: part_B.tolist() for name, part_B in own.parts.items()},
    }
    total_B = np.zeros(count, np.float32)
    failed_B = np.ones(count, bool)
    parts: dict[str, np.ndarray] = {}
    # Reversed, so that the values of the first host that scored an image are written last.
    for received in reversed(_allgather_json(sent)):
        at = received["rows"]
        total_B[at] = received["total"]
        failed_B[at] = received["failed"]
        for name, values in received["parts"].items():
            parts.setdefault(name, np.full(count, np.nan, np.float32))[at] = values
    return RewardBatch(total_B, failed_B, dict(sorted(parts.items())))


def _allgather_json(value: Any) -> list[Any]:
    """Return the `value` of every host, which JSON can hold."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    # Collectives exchange arrays of one shape, hence the padding and the lengths before.
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [
        json.loads(bytes(text[:length]))
        for text, length in zip(texts, lengths.tolist(), strict=True)
    ]


def compute_advantages(rewards: RewardBatch, cfg: RlConfig) -> Advantages:
    """Return the advantages of a rollout by the run's settings."""
    grouped = lambda x: x.reshape(-1, cfg.num_generations)
    return group_advantages(
        grouped(rewards.total_B),
        ~grouped(rewards.failed_B),
        scale_rewards=cfg.scale_rewards,
        epsilon=cfg.advantage_epsilon,
    )


def loss_inputs(rewards: RewardBatch, cfg: RlConfig) -> dict[str, np.ndarray]:
    """Return the loss's inputs [B]: `advantage`, `valid` (1 with a reward, else 0), `bad_records`.

    The loop counts the latter.
    """
    valid_B = ~rewards.failed_B
    return {
        "advantage": compute_advantages(rewards, cfg).advantage_PG.ravel(),
        "valid": valid_B.astype(np.float32),
        "bad_records": rewards.failed_B.astype(np.int32),
    }


def reward_metrics(
    rewards: RewardBatch, advantages: Advantages, prompts: Sequence[Prompt], num_generations: int
) -> dict[str, float]:
    """Return the metrics of rewards, by TRL's names: the mean of the rewards (`rl/reward`), of each
    part and by category of prompt; the mean standard deviation of a group (`rl/reward_std`) and the
    fraction of groups without any (`rl/frac_reward_zero_std`). `prompts`: one a group. Images
    without a reward count in none of them, nor do parts that are not finite.
    """
    valid_B = ~rewards.failed_B
    values = {
        "rl/frac_reward_failed": float(rewards.failed_B.mean()),
        "rl/frac_reward_zero_std": float(advantages.degenerate_P.mean()),
    }
    if not valid_B.any():
        return values
    total_B = rewards.total_B
    std_P = advantages.std_P
    values |= {
        "rl/reward": float(total_B[valid_B].mean()),
        "rl/reward_batch_std": float(total_B[valid_B].std()),
        "rl/reward_max": float(total_B[valid_B].max()),
        # `nanmean` of NaN alone warns.
        "rl/reward_std": float(np.nanmean(std_P)) if np.isfinite(std_P).any() else 0.0,
    }
    for name, part_B in rewards.parts.items():
        finite_B = valid_B & np.isfinite(part_B)
        if finite_B.any():
            values[f"rl/rewards/{name}/mean"] = float(part_B[finite_B].mean())
    category_B = np.repeat([prompt.category for prompt in prompts], num_generations)
    for category in sorted(set(category_B) - {""}):
        chosen_B = valid_B & (category_B == category)
        if chosen_B.any():
            values[f"rl/reward_by_category/{category}"] = float(total_B[chosen_B].mean())
    return values
