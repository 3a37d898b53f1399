"""Compute group-relative advantages: GRPO (arXiv 2402.03300), with DAPO's choice of groups
(2503.14476).

    m_p = mean over the valid g of r_pg
    s_p = sqrt(sum over the valid g of (r_pg - m_p)^2 / (n_p - 1))
    A_pg = (r_pg - m_p) / (s_p + epsilon)     scale_rewards="group"
    A_pg = r_pg - m_p                         "none": without the deviation, which weighs prompts by
                                              the agreement of their images (Dr. GRPO, arXiv
                                              2503.20783)

Deviations:
1. An image whose reward failed is not valid: it is outside its group. n_p, m_p and s_p are of the
   others; its advantage is 0.
2. s_p is the unbiased deviation (n_p - 1), as torch.std in TRL; the paper does not specify it.
3. A group whose valid rewards do not differ (or fewer than two valid) is degenerate: its advantages
   are exactly 0 for any epsilon. Rewards within 1e-6 of the largest magnitude are equal: equal sums
   of weighted rewards differ by rounding, and s_p of equal numbers may not be exactly 0.
4. DAPO samples until a batch is full of groups with a difference. Here the caller bounds the number
   of rollouts, and degenerate groups fill the rest: the rollout keeps its shape, and their reward
   gives no gradient.

P prompts, G images of each, C candidate groups of which P are chosen. Computed on the host, where
the rewards arrive, in float64.
"""

import dataclasses

import numpy as np

EQUAL = 1e-6  # relative to the largest reward of the group


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Hold the advantages of one rollout."""

    advantage_PG: np.ndarray  # float32, 0 where not valid
    degenerate_P: np.ndarray  # bool: no difference, so no gradient from the reward
    mean_P: np.ndarray  # float64, of the valid rewards; NaN where there is none
    std_P: np.ndarray  # float64, of the valid rewards; NaN where there are fewer than two


def group_advantages(
    rewards_PG: np.ndarray, valid_PG: np.ndarray, *, scale_rewards: str, epsilon: float
) -> Advantages:
    """Return the advantages, with `scale_rewards` "group" or "none"; values of `rewards_PG` where
    `valid_PG` is False are ignored.

    Raises ValueError where a valid reward is not finite: such a score must have failed before.
    """
    valid_PG = np.asarray(valid_PG, bool)
    r_PG = np.where(valid_PG, np.asarray(rewards_PG, np.float64), 0)
    if not np.isfinite(r_PG).all():
        raise ValueError(
            "rewards that are valid must be finite: row, column "
            f"{np.argwhere(~np.isfinite(r_PG)).tolist()}"
        )
    count_P = valid_PG.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0: the mean of no rewards is NaN
        mean_P = r_PG.sum(axis=1) / count_P
        centred_PG = np.where(valid_PG, r_PG - mean_P[:, None], 0)
        std_P = np.sqrt((centred_PG**2).sum(axis=1) / np.where(count_P > 1, count_P - 1, np.nan))
    # 0 of a single reward, -inf of none: both are degenerate by the same rule.
    range_P = np.where(valid_PG, r_PG, -np.inf).max(axis=1) - np.where(valid_PG, r_PG, np.inf).min(
        axis=1
    )
    degenerate_P = range_P <= EQUAL * np.abs(r_PG).max(axis=1)
    scale_P = std_P + epsilon if scale_rewards == "group" else np.ones_like(std_P)
    advantage_PG = centred_PG / np.where(degenerate_P, 1, scale_P)[:, None]
    return Advantages(
        np.where(degenerate_P[:, None], 0, advantage_PG).astype(np.float32),
        degenerate_P,
        mean_P,
        std_P,
    )


def choose_groups(degenerate_C: np.ndarray, prompts: int) -> np.ndarray:
    """Return the indices of the groups sampled so far that make the rollout, int64 [prompts].

    Those with a difference come first, then degenerate ones to fill, both in the order sampled. So
    with one rollout's worth of candidates every group is chosen, and later ones only ever take the
    place of degenerate ones. Raises ValueError with fewer than `prompts` candidates.
    """
    degenerate_C = np.asarray(degenerate_C, bool)
    if len(degenerate_C) < prompts:
        raise ValueError(f"{len(degenerate_C)} groups cannot fill a rollout of {prompts}")
    # False sorts before True, and a stable sort keeps the order of sampling.
    return np.argsort(degenerate_C, kind="stable")[:prompts]
