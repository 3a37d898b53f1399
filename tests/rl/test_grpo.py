"""Compare with values by hand; ratios are given, and the log-probabilities follow from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blip3o_jax.config import RlConfig
from blip3o_jax.rl import grpo

CFG = RlConfig(clip=(0.2, 0.3), kl_coef=0.0)
KL = dataclasses.replace(CFG, kl_coef=0.5)
# A few float32 roundings of numbers near 1.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def run(
    ratio_BN, advantage_B, cfg=CFG, reference_ratio_BN=None, valid_B=(True, True), fraction_B=None
):
    """Return loss, gradient by the log-probabilities [B, N], and metrics, of policies whose ratios
    to the present one are given."""
    old_BN = jnp.log(jnp.asarray([[0.1, 0.2], [0.3, 0.4]]))
    logprobs_BN = old_BN + jnp.log(jnp.asarray(ratio_BN))
    reference_BN = (
        None
        if reference_ratio_BN is None
        else logprobs_BN + jnp.log(jnp.asarray(reference_ratio_BN))
    )
    valid_B = jnp.asarray(valid_B)
    fraction_B = jnp.full(2, jnp.mean(valid_B)) if fraction_B is None else fraction_B

    def loss(l_BN):
        return grpo.policy_loss(
            l_BN, old_BN, reference_BN, jnp.asarray(advantage_B), valid_B, fraction_B, cfg=cfg
        )

    (value, metrics), gradient_BN = jax.value_and_grad(loss, has_aux=True)(logprobs_BN)
    assert value.dtype == gradient_BN.dtype == jnp.float32
    return value, gradient_BN, metrics


def test_clipped_tokens_have_no_gradient():
    # -min(1.5 * 2, 1.3 * 2), -min(1 * 2, 1 * 2), -min(0.5 * -1, 0.8 * -1), -min(1.1 * -1, 1.1 * -1)
    value, gradient, metrics = run([[1.5, 1.0], [0.5, 1.1]], [2.0, -1.0])
    np.testing.assert_allclose(value, (-2.6 - 2 + 0.8 + 1.1) / 4, **CLOSE)
    np.testing.assert_allclose(gradient, [[0, -2 / 4], [0, 1.1 / 4]], **CLOSE)
    assert gradient[0, 0] == gradient[1, 0] == 0
    want = {
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.25,
        "importance_sampling_ratio": 4.1 / 4,
        "ratio_gap": 1.1 / 4,
        "ratio_gap_max": 0.5,
    }
    want["approx_kl"] = (4.1 - 4 - np.log(1.5 * 0.5 * 1.1)) / 4
    assert metrics.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(metrics[name], x, err_msg=name, **CLOSE)


def test_the_clip_leaves_what_undoes_the_move():
    """Check that a ratio that has moved against its advantage keeps its gradient at any
    distance."""
    value, gradient, metrics = run([[0.5, 1.25], [1.5, 0.85]], [2.0, -1.0])
    np.testing.assert_allclose(value, (-1 - 2.5 + 1.5 + 0.85) / 4, **CLOSE)
    np.testing.assert_allclose(gradient, np.asarray([[-1, -2.5], [1.5, 0.85]]) / 4, **CLOSE)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0


def test_the_two_sides_have_their_own_clip():
    ratios, advantages = [[1.25, 1.0], [0.75, 1.0]], [1.0, -1.0]
    for clip, want in {(0.2, 0.2): (0, 0), (0.2, 0.3): (-1.25, 0), (0.3, 0.2): (0, 0.75)}.items():
        gradient = run(ratios, advantages, dataclasses.replace(CFG, clip=clip))[1]
        np.testing.assert_allclose(gradient[:, 0] * 4, want, **CLOSE)


def test_on_policy_gradient_is_the_advantage():
    value, gradient, metrics = run([[1.0, 1.0], [1.0, 1.0]], [3.0, -1.0])
    np.testing.assert_allclose(value, -1, **CLOSE)
    np.testing.assert_allclose(gradient, [[-3 / 4, -3 / 4], [1 / 4, 1 / 4]], **CLOSE)
    assert (
        metrics["importance_sampling_ratio"] == 1
        and metrics["ratio_gap_max"] == metrics["approx_kl"] == 0
    )


def test_kl_to_the_reference():
    # k = x - log x - 1 and dk/dl = 1 - x for a reference x times as likely. The advantage of 0 is a
    # degenerate group's.
    value, gradient, metrics = run(
        [[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], KL, [[2.0, 1.0], [0.5, 4.0]]
    )
    k = np.asarray([1 - np.log(2), 0, np.log(2) - 0.5, 3 - np.log(4)])
    np.testing.assert_allclose(metrics["kl"], k.mean(), **CLOSE)
    np.testing.assert_allclose(value, 0.5 * k.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, 0.5 * np.asarray([[-1, 0], [0.5, -3]]) / 4, **CLOSE)


def test_no_kl_without_its_weight():
    cfg = dataclasses.replace(KL, kl_coef=0.0)
    value, gradient, metrics = run(
        [[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], cfg, [[2.0, 1.0], [0.5, 4.0]]
    )
    assert value == 0 and not gradient.any() and metrics["kl"] > 0


def test_kl_without_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"rl\.kl_coef=0\.5 needs the reference"):
        run([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], KL)


def test_a_row_that_is_not_valid_contributes_nothing():
    valid = run(
        [[1.1, 1.0], [np.inf, 3.0]],
        [2.0, np.nan],
        KL,
        [[2.0, 1.0], [np.inf, 9.0]],
        valid_B=(True, False),
    )
    value, gradient, metrics = valid
    np.testing.assert_allclose(value, (-2.2 - 2 + 0.5 * (1 - np.log(2))) / 2, **CLOSE)
    np.testing.assert_allclose(gradient[0], [(-2.2 - 0.5) / 2, -2 / 2], **CLOSE)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_allclose(metrics["importance_sampling_ratio"], 1.05, **CLOSE)
    np.testing.assert_allclose(metrics["ratio_gap_max"], 0.1, rtol=1e-5)


def test_nothing_valid_is_a_loss_of_zero():
    value, gradient, _ = run([[1.1, 1.0], [2.0, 3.0]], [2.0, 1.0], valid_B=(False, False))
    assert value == 0 and not gradient.any()


def test_sequence_ratio():
    # sqrt(1.44) = 1.2 and sqrt(0.49) = 0.7, of which the second is clipped at 0.8.
    cfg = dataclasses.replace(CFG, importance_sampling_level="sequence")
    value, gradient, metrics = run([[1.44, 1.0], [0.7, 0.7]], [2.0, -1.0], cfg)
    np.testing.assert_allclose(value, (-2.4 + 0.8) / 2, **CLOSE)
    np.testing.assert_allclose(gradient, [[-2.4 / 4, -2.4 / 4], [0, 0]], **CLOSE)
    np.testing.assert_allclose(
        [
            metrics["clip_ratio/low_mean"],
            metrics["clip_ratio/high_mean"],
            metrics["importance_sampling_ratio"],
        ],
        [0.5, 0, 0.95],
        **CLOSE,
    )
    # Of single tokens: 0.44, 0, 0.3, 0.3.
    np.testing.assert_allclose(
        [metrics["ratio_gap"], metrics["ratio_gap_max"]], [1.04 / 4, 0.44], **CLOSE
    )


def test_normalisations_differ_by_rows_that_are_not_valid():
    losses = {}
    for loss_aggregation in ("bnpo", "grpo", "dr_grpo"):
        cfg = dataclasses.replace(CFG, loss_aggregation=loss_aggregation)
        losses[loss_aggregation] = [
            run([[1.1, 1.0], [1.0, 0.9]], [2.0, 1.0], cfg, valid_B=(True, last))[0]
            for last in (True, False)
        ]
    np.testing.assert_allclose(losses["bnpo"], [(-4.2 - 1.9) / 4, -4.2 / 2], **CLOSE)
    np.testing.assert_array_equal(losses["grpo"], losses["bnpo"])
    np.testing.assert_allclose(losses["dr_grpo"], [(-4.2 - 1.9) / 4, -4.2 / 4], **CLOSE)


def sample(rng, B=8, N=5):
    old = -rng.exponential(size=(B, N)).astype(np.float32)
    logprobs = old + rng.normal(scale=0.4, size=(B, N)).astype(np.float32)
    reference = logprobs + rng.normal(scale=0.4, size=(B, N)).astype(np.float32)
    return logprobs, old, reference, rng.normal(size=B).astype(np.float32)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_aggregation", ["bnpo", "grpo", "dr_grpo"])
def test_mean_of_micro_batches_is_the_batch(loss_aggregation, ratio, rng):
    *arrays, advantage = sample(rng)
    valid = np.asarray(
        [True, True, True, True, False, True, False, False]
    )  # 4 in one half, 1 in the other
    batch = (*arrays, advantage, valid, np.full(8, valid.mean(), np.float32))
    cfg = dataclasses.replace(
        KL, loss_aggregation=loss_aggregation, importance_sampling_level=ratio
    )
    loss = lambda *b: grpo.policy_loss(*b, cfg=cfg)
    whole, halves = (
        loss(*batch),
        [loss(*(x[half] for x in batch)) for half in (slice(4), slice(4, 8))],
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    largest = whole[1].pop("ratio_gap_max")
    assert largest / 2 <= mean[1].pop("ratio_gap_max") <= largest
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, **CLOSE), mean, whole)


def torch_loss(logprobs, old, reference, advantage, cfg: RlConfig) -> torch.Tensor:
    """Return the loss as in TRL, with a completion mask of ones."""
    mask, advantage = torch.ones_like(logprobs), advantage[:, None]
    weight = logprobs - old
    if cfg.importance_sampling_level == "sequence":
        weight = ((weight * mask).sum(-1) / mask.sum(-1))[:, None]
    ratio = weight.exp()
    token_loss = -torch.min(
        ratio * advantage, ratio.clamp(1 - cfg.clip[0], 1 + cfg.clip[1]) * advantage
    )
    gap = reference - logprobs
    token_loss = token_loss + cfg.kl_coef * (gap.exp() - gap - 1)
    if cfg.loss_aggregation == "grpo":
        return ((token_loss * mask).sum(-1) / mask.sum(-1)).mean()
    return (token_loss * mask).sum() / mask.sum()  # for "dr_grpo" the constant is the same number


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_aggregation", ["bnpo", "grpo", "dr_grpo"])
def test_equals_a_torch_form_of_the_loss(loss_aggregation, ratio, rng):
    arrays = sample(rng)
    cfg = dataclasses.replace(
        KL, loss_aggregation=loss_aggregation, importance_sampling_level=ratio
    )
    logprobs = torch.tensor(arrays[0], dtype=torch.float64, requires_grad=True)
    want = torch_loss(logprobs, *(torch.tensor(x, dtype=torch.float64) for x in arrays[1:]), cfg)
    want.backward()
    loss = lambda l_BN: grpo.policy_loss(
        l_BN, *arrays[1:], jnp.ones(8, bool), jnp.ones(8), cfg=cfg
    )[0]
    got, gradient = jax.value_and_grad(loss)(jnp.asarray(arrays[0]))
    np.testing.assert_allclose(got, want.item(), rtol=2e-6)
    np.testing.assert_allclose(gradient, logprobs.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_only_the_policy_has_a_gradient(rng):
    *arrays, advantage = sample(rng)
    rest = (advantage, jnp.ones(8, bool), jnp.ones(8))
    loss = lambda *three: grpo.policy_loss(*three, *rest, cfg=KL)[0]
    policy, old, reference = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, arrays))
    assert policy.any() and not old.any() and not reference.any()
