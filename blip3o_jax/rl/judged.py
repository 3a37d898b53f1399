"""What the rewards say of a rollout's images, gathered from all hosts and turned into advantages
and metrics.

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
class Verdicts:
    """Of B images, the same on all hosts: reward float32 [B], 0 where `failed_B`, and its parts,
    NaN where there is none.
    """

    total_B: np.ndarray
    failed_B: np.ndarray
    parts: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> "Verdicts":
        return Verdicts(
            self.total_B[rows],
            self.failed_B[rows],
            {name: x[rows] for name, x in self.parts.items()},
        )


def joined(verdicts: Sequence[Verdicts]) -> Verdicts:
    """One after the other."""
    names = dict.fromkeys(name for v in verdicts for name in v.parts)
    part = lambda v, name: v.parts.get(name, np.full(len(v.total_B), np.nan, np.float32))
    return Verdicts(
        np.concatenate([v.total_B for v in verdicts]),
        np.concatenate([v.failed_B for v in verdicts]),
        {name: np.concatenate([part(v, name) for v in verdicts]) for name in names},
    )


def gathered(mine: Verdicts, rows: Sequence[int], count: int) -> Verdicts:
    """The verdicts on `count` images, of which this host has judged `rows`; an image that several
    have judged is the first one's.
    """
    if jax.process_count() == 1:
        return mine
    told = {"rows": list(rows), "total": mine.total_B.tolist(), "failed": mine.failed_B.tolist()}
    told["parts"] = {name: part_B.tolist() for name, part_B in mine.parts.items()}
    total_B, failed_B, parts = np.zeros(count, np.float32), np.ones(count, bool), {}
    for host in reversed(_from_all_hosts(told)):
        total_B[host["rows"]], failed_B[host["rows"]] = host["total"], host["failed"]
        for name, values in host["parts"].items():
            parts.setdefault(name, np.full(count, np.nan, np.float32))[host["rows"]] = values
    return Verdicts(total_B, failed_B, dict(sorted(parts.items())))


def _from_all_hosts(value: Any) -> list[Any]:
    """Every host's `value`, which JSON can hold."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [
        json.loads(bytes(text[:length]))
        for text, length in zip(texts, lengths.tolist(), strict=True)
    ]


def advantages(verdicts: Verdicts, cfg: RlConfig) -> Advantages:
    grouped = lambda x: x.reshape(-1, cfg.num_generations)
    return group_advantages(
        grouped(verdicts.total_B),
        ~grouped(verdicts.failed_B),
        scale_rewards=cfg.scale_rewards,
        epsilon=cfg.advantage_epsilon,
    )


def columns(verdicts: Verdicts, cfg: RlConfig) -> dict[str, np.ndarray]:
    """What the loss is told of each image [B]: `advantage`, `kept` (1 with a reward, else 0),
    `kept_share`, that of the whole batch in every row; and for the loop's count `bad_records`.
    """
    kept_B = ~verdicts.failed_B
    return {
        "advantage": advantages(verdicts, cfg).advantage_PG.ravel(),
        "kept": kept_B.astype(np.float32),
        "kept_share": np.full(len(kept_B), kept_B.mean(), np.float32),
        "bad_records": verdicts.failed_B.astype(np.int32),
    }


def reward_metrics(
    verdicts: Verdicts, found: Advantages, prompts: Sequence[Prompt], group: int
) -> dict[str, float]:
    """Mean, deviation and maximum of the rewards, of all and by category of prompt; means of their
    parts; and of the groups the share without a difference and the mean deviation. `prompts`: one a
    group. Images without a reward count in none of them, nor do parts that are not finite.
    """
    kept_B = ~verdicts.failed_B
    values = {
        "reward/failed": float(verdicts.failed_B.mean()),
        "reward/degenerate": float(found.degenerate_P.mean()),
    }
    if not kept_B.any():
        return values
    total_B = verdicts.total_B
    values |= {
        "reward/mean": float(total_B[kept_B].mean()),
        "reward/std": float(total_B[kept_B].std()),
        "reward/max": float(total_B[kept_B].max()),
        "reward/group_std": float(np.nanmean(found.std_P))
        if np.isfinite(found.std_P).any()
        else 0.0,
    }
    for name, part_B in verdicts.parts.items():
        told_B = kept_B & np.isfinite(part_B)
        if told_B.any():
            values[f"reward/part/{name}"] = float(part_B[told_B].mean())
    category_B = np.repeat([prompt.category for prompt in prompts], group)
    for category in sorted(set(category_B) - {""}):
        chosen_B = kept_B & (category_B == category)
        if chosen_B.any():
            values[f"reward/category/{category}"] = float(total_B[chosen_B].mean())
    return values
