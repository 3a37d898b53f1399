"""Compare the SDE with closed forms: for z ~ N(M, S^2) in every number, the velocity and all
marginals are known.

x_sigma ~ N((1 - sigma) M, V),  V = (1 - sigma)^2 S^2 + sigma^2
v(x) = E[e - z | x] = (sigma - (1 - sigma) S^2) / V (x - (1 - sigma) M) - M
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from blip3o_jax.config import FlowConfig, FlowPolicyConfig
from blip3o_jax.dit import flow as flow_matching
from blip3o_jax.dit import sampler
from blip3o_jax.dit.guidance import Guidance
from blip3o_jax.dit.protocol import Condition
from blip3o_jax.rl import flow_grpo

FLOW = FlowConfig(shift=1.0)
M, S = 1.5, 0.6
SHAPE = (3, 4, 2)
# A few float32 roundings of numbers near 1.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def variance(sigma):
    return (1 - sigma) ** 2 * S**2 + sigma**2


def velocity(x_BHWC, timestep_B):
    sigma = (timestep_B / FLOW.num_train_timesteps)[:, None, None, None]
    return (sigma - (1 - sigma) * S**2) / variance(sigma) * (x_BHWC - (1 - sigma) * M) - M


def start(rng, B=2, shape=SHAPE):
    return jnp.asarray(rng.normal(size=(B, *shape)), jnp.float32), jax.random.split(
        jax.random.key(5), B
    )


def sample(noise_BHWC, keys_B, trained, **kw):
    kw = {"steps": 6, "noise": 0.7, "flow": FLOW} | kw
    run = jax.jit(lambda *arrays: flow_grpo.sample_sde(velocity, *arrays, **kw))
    return run(noise_BHWC, keys_B, jnp.asarray(trained, jnp.int32))


def full(x, B=1):
    return jnp.full((B, 1, 1, 1), x, jnp.float32)


def test_a_transition_by_hand():
    # eta^2 = 0.25 * 0.5 / 0.5, e is guessed as 1 + 0.5 * 2: 1 - 0.25 (2 + 0.25 * 2), and 0.5 *
    # sqrt(0.25).
    mean, std = flow_grpo.transition(
        full(1), full(2), jnp.asarray([0.5]), jnp.asarray([0.25]), noise=0.5
    )
    assert (mean.item(), std.item()) == (0.375, 0.25)
    # eta^2 = 0.5^2 * 0.75 / 0.25 = 0.75, e = 1 + 0.25 * 2: 1 - 0.25 (2 + 0.5 * 1.5), and sqrt(0.75
    # * 0.25).
    mean, std = flow_grpo.transition(
        full(1), full(2), jnp.asarray([0.75]), jnp.asarray([0.5]), noise=0.5
    )
    np.testing.assert_allclose([mean.item(), std.item()], [0.3125, np.sqrt(0.1875)], **CLOSE)


@pytest.mark.parametrize("first", [1.0, 1 - 2**-24])
def test_the_first_transition_by_hand(first):
    # eta^2 = 0.25 * 1 / (1 - 0.75), e is x itself: 1 - 0.25 (2 + 0.5 * 1), and 1 * sqrt(0.25).
    mean, std = flow_grpo.transition(
        full(1), full(2), jnp.asarray([first]), jnp.asarray([0.75]), noise=0.5
    )
    np.testing.assert_allclose([mean.item(), std.item()], [0.375, 0.5], **CLOSE)


def test_without_noise_a_transition_is_the_euler_step(rng):
    x, v = jnp.asarray(rng.normal(size=(2, 3, *SHAPE)), jnp.float32)
    sigma, after = jnp.asarray([1.0, 0.7, 0.1]), jnp.asarray([0.9, 0.5, 0.0])
    mean, std = flow_grpo.transition(x, v, sigma, after, noise=0.0)
    np.testing.assert_array_equal(mean, x + (after - sigma)[:, None, None, None] * v)
    np.testing.assert_array_equal(std, 0)


@pytest.mark.parametrize("shift", [1.0, 0.5175])
def test_without_noise_the_sampler_is_the_ode_sampler(shift, rng):
    """Include a shift whose first level rounds to less than 1."""
    flow = FlowConfig(shift=shift)
    assert (flow_matching.sampling_sigmas(6, flow)[0] < 1) == (shift != 1)
    noise, keys = start(rng)
    dit = types.SimpleNamespace(
        prepare=lambda *condition: None, velocity=lambda x, t, *_: velocity(x, t)
    )
    alone = Guidance(Condition(jnp.zeros((1, 1, 1))))
    ode = jax.jit(lambda n: sampler.sample(dit, alone, n, steps=6, flow=flow))
    got, _ = sample(noise, keys, [1, 3], noise=0.0, flow=flow)
    np.testing.assert_allclose(got, ode(noise), **CLOSE)
    near, _ = sample(noise, keys, [0, 1, 2, 3, 4], noise=1e-3, flow=flow)
    np.testing.assert_allclose(near, ode(noise), atol=1e-2)
    far, _ = sample(noise, keys, [0, 1, 2, 3, 4], flow=flow)
    assert np.abs(far - ode(noise)).max() > 0.1


def moments(steps: int, noise: float) -> np.ndarray:
    """Return mean and deviation of x after each step when all except the last are noisy: [steps,
    2].

    A transition is linear in x here, x' = a x + b + std n; a and b are read off it.
    """
    sigmas = jnp.asarray(flow_matching.sampling_sigmas(steps, FLOW))
    x = jnp.broadcast_to(jnp.asarray([0.0, 1.0])[:, None, None, None, None], (2, steps, 1, 1, 1))
    v = jax.vmap(velocity, (0, None))(x, sigmas[:-1] * FLOW.num_train_timesteps)
    mean, std = jax.vmap(
        lambda *xv: flow_grpo.transition(*xv, sigmas[:-1], sigmas[1:], noise=noise)
    )(x, v)
    ode = x[:, -1] + (0 - sigmas[-2]) * v[:, -1]
    at_0, at_1 = np.array(mean.at[:, -1].set(ode).reshape(2, steps), np.float64)
    std = np.array(std[0].at[-1].set(0), np.float64)
    m, var, out = 0.0, 1.0, []
    for a, b, s in zip(at_1 - at_0, at_0, std, strict=True):
        m, var = a * m + b, a**2 * var + s**2
        out.append((m, np.sqrt(var)))
    return np.asarray(out)


def test_marginals_are_the_odes_without_sampling_error():
    """Compare exact moments of the chain of Gaussians. The remaining error is that of finite steps:
    k steps after the start, where the length of a step times eta^2 is a^2 / k for any number of
    steps, a^4 / 4 k^2 of the variance, which later steps remove."""
    steps, a = 1000, 0.7
    sigma = flow_matching.sampling_sigmas(steps, FLOW).astype(np.float64)[1:]
    mean, std = moments(steps, a).T
    np.testing.assert_allclose(mean, (1 - sigma) * M, atol=1e-5)
    gap = std / np.sqrt(variance(sigma)) - 1
    assert np.abs(gap).max() < a**4 / 8 * (
        np.pi**2 / 6
    )  # of the deviation half as much, summed over all k
    assert np.abs(gap[sigma < 0.9]).max() < 0.012
    assert np.abs(gap[sigma < 0.5]).max() < 0.005
    assert abs(gap[-1]) < 0.003


def test_marginals_of_samples():
    """Draw 131072 samples: the standard error of the mean is V^0.5 / 362, of the deviation V^0.5 /
    512; five of them are allowed."""
    steps, trained, shape = 100, [9, 29, 49, 69, 98], (64, 64, 16)
    noise, keys = start(np.random.default_rng(1), 2, shape)
    z, trajectory = sample(noise, keys, trained, steps=steps, noise_everywhere=True)
    ode, path = sample(noise, keys, trained, steps=steps, noise=0.0)
    chain = moments(steps, 0.7)[[*trained, -1]]
    sigma = flow_matching.sampling_sigmas(steps, FLOW)[1:][[*trained, -1]].astype(np.float64)
    columns = lambda end, t: [*np.moveaxis(np.asarray(t.next_BKHWC), 1, 0), np.asarray(end)]
    for level, (mean, std), x, of_ode in zip(
        sigma, chain, columns(z, trajectory), columns(ode, path), strict=True
    ):
        true_std = np.sqrt(variance(level))
        for got in (x.mean(), of_ode.mean()):
            assert abs(got - (1 - level) * M) < 5 * true_std / 362
        assert abs(mean - (1 - level) * M) < 1e-5
        assert abs(x.std() - std) < 5 * true_std / 512
        # Of 100 steps the SDE's own error is up to 4 % of the deviation near the start, the Euler
        # sampler's 2 % at the end.
        assert abs(x.std() / true_std - 1) < 0.045 + 5 / 512
        assert abs(of_ode.std() / true_std - 1) < 0.02 + 5 / 512
    # The noise was on: the two have little in common beyond their start.
    assert np.corrcoef(columns(z, trajectory)[-1].ravel(), np.asarray(ode).ravel())[0, 1] < 0.5


def loop(noise_BHWC, keys_B, noisy, steps: int) -> tuple[list, list]:
    """Return x before each step and after the last, and the log-probability of each noisy step; one
    step after the other."""
    sigma = flow_matching.sampling_sigmas(steps, FLOW)
    xs, logprobs = [np.asarray(noise_BHWC, np.float64)], []
    for i in range(steps):
        v = np.asarray(velocity(xs[-1], jnp.full(len(keys_B), sigma[i] * 1000)), np.float64)
        s, d = np.float64(sigma[i]), np.float64(sigma[i + 1]) - sigma[i]
        if i not in noisy:
            xs.append(xs[-1] + d * v)
            continue
        eta = 0.7 * np.sqrt(s / (1 - (sigma[1] if i == 0 else s)))
        mean = xs[-1] * (1 + eta**2 / (2 * s) * d) + v * (1 + eta**2 * (1 - s) / (2 * s)) * d
        n = np.stack(
            [jax.random.normal(jax.random.fold_in(key, i), noise_BHWC.shape[1:]) for key in keys_B]
        )
        xs.append(mean + eta * np.sqrt(-d) * n)
        logprobs.append(
            scipy.stats.norm.logpdf(xs[-1], mean, eta * np.sqrt(-d)).mean(axis=(1, 2, 3))
        )
    return xs, logprobs


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_trajectory_holds_the_trained_steps(everywhere, rng):
    noise, keys = start(rng)
    trained = [0, 2, 3]
    z, got = sample(noise, keys, trained, noise_everywhere=everywhere)
    noisy = range(5) if everywhere else trained
    xs, logprobs = loop(noise, keys, noisy, 6)
    np.testing.assert_array_equal(got.step_K, trained)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # six float32 steps, each a few roundings
    np.testing.assert_allclose(z, xs[-1], **tolerance)
    np.testing.assert_allclose(got.x_BKHWC, np.stack([xs[i] for i in trained], axis=1), **tolerance)
    np.testing.assert_allclose(
        got.next_BKHWC, np.stack([xs[i + 1] for i in trained], axis=1), **tolerance
    )
    want = np.stack([logprobs[list(noisy).index(i)] for i in trained], axis=1)
    np.testing.assert_allclose(got.logprob_BK, want, **tolerance)


def test_a_row_does_not_depend_on_its_batch(rng):
    noise, keys = start(rng, 4)
    together, alone = sample(noise, keys, [1, 4]), sample(noise[2:3], keys[2:3], [1, 4])
    np.testing.assert_allclose(together[0][2:3], alone[0], **CLOSE)
    for name in ("x_BKHWC", "next_BKHWC", "logprob_BK"):
        np.testing.assert_allclose(
            getattr(together[1], name)[2:3], getattr(alone[1], name), **CLOSE
        )
    assert np.abs(together[0][2] - sample(noise, keys[::-1], [1, 4])[0][2]).max() > 0.1


def test_only_the_trained_steps_are_in_memory(rng):
    noise, keys = start(rng)
    run = lambda *arrays: flow_grpo.sample_sde(velocity, *arrays, steps=50, noise=0.7, flow=FLOW)
    program = jax.make_jaxpr(run)(noise, keys, jnp.asarray([1, 7]))
    sizes = [var.aval.size for equation in program.eqns for var in equation.outvars]
    assert max(sizes) == 2 * noise.size


def test_the_velocity_is_traced_as_often_for_many_steps_as_for_few(rng):
    noise, keys = start(rng)
    calls = []
    for steps in (3, 30):
        calls.append(0)

        def counted(x, t):
            calls[-1] += 1
            return velocity(x, t)

        run = lambda *a: flow_grpo.sample_sde(counted, *a, steps=steps, noise=0.7, flow=FLOW)  # noqa: B023
        jax.eval_shape(run, noise, keys, jnp.asarray([0, 1]))
    assert calls[0] == calls[1] > 0


def test_the_same_policy_has_a_ratio_of_one(rng):
    """Allow 1e-6: the replay is another program, and may sum in another order."""
    noise, keys = start(rng)
    trained = jnp.asarray([0, 2, 4])
    _, trajectory = sample(noise, keys, trained, noise_everywhere=True)

    @jax.jit
    def replay(x_BHWC, next_BHWC, sigma_B, next_B):
        v = velocity(x_BHWC, sigma_B * FLOW.num_train_timesteps)
        return flow_grpo.log_prob(
            next_BHWC, *flow_grpo.transition(x_BHWC, v, sigma_B, next_B, noise=0.7)
        )

    sigma_K, next_K = flow_grpo.step_sigmas(trajectory.step_K, steps=6, flow=FLOW)
    for k in range(3):
        rows = [jnp.full(2, s[k]) for s in (sigma_K, next_K)]
        again = replay(trajectory.x_BKHWC[:, k], trajectory.next_BKHWC[:, k], *rows)
        np.testing.assert_allclose(
            np.exp(again - trajectory.logprob_BK[:, k]), 1, rtol=0, atol=1e-6
        )


def test_levels_of_steps():
    sigma, after = flow_grpo.step_sigmas(jnp.asarray([0, 3]), steps=4, flow=FLOW)
    np.testing.assert_array_equal(sigma, [1, 0.25])
    np.testing.assert_array_equal(after, [0.75, 0])


def test_log_prob_is_the_mean_over_a_latent(rng):
    x, mean = rng.normal(size=(2, 3, *SHAPE))
    std = np.asarray([0.05, 0.3, 2.0])
    got = flow_grpo.log_prob(*(jnp.asarray(a, jnp.float32) for a in (x, mean, std)))
    want = scipy.stats.norm.logpdf(x, mean, std[:, None, None, None]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(
        got, want, rtol=1e-5
    )  # inputs rounded to float32, squares over 0.05^2


def test_kl_is_the_integral():
    means, others, std = [0.3, -1.0], [0.5, -1.2 + 0.05], 0.2
    grid = np.linspace(-5, 5, 20001)
    p, q = (scipy.stats.norm(np.asarray(m)[:, None], std) for m in (means, others))
    want = (p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid))).sum(axis=1) * (grid[1] - grid[0])
    shaped = (jnp.asarray(m, jnp.float32).reshape(1, 1, 2, 1) for m in (means, others))
    np.testing.assert_allclose(flow_grpo.kl(*shaped, jnp.asarray([std])), [want.mean()], rtol=1e-5)


def test_chosen_steps():
    choose = jax.jit(jax.vmap(lambda key: flow_grpo.choose_steps(key, 6, 3)))
    chosen = np.asarray(choose(jax.random.split(jax.random.key(0), 4000)))
    assert chosen.shape == (4000, 3) and chosen.dtype == np.int32
    assert (np.diff(chosen, axis=1) > 0).all()
    # Each of the first five in 3 of 5 rollouts; five standard deviations of a share over 4000 are
    # 0.039. The sixth never.
    np.testing.assert_allclose(
        np.bincount(chosen.ravel(), minlength=6) / 4000, [0.6] * 5 + [0], atol=0.039
    )


CFG = FlowPolicyConfig(clip=0.1, kl_coef=0.5)


def loss_and_gradient(ratio_BK, kl_BK, advantage_B, cfg=CFG, valid_B=(True, True)):
    valid_B, old_BK = jnp.asarray(valid_B), jnp.asarray([[-0.5, 0.2], [0.7, -1.0]])
    rest = (jnp.asarray(advantage_B), valid_B, jnp.full(2, jnp.mean(valid_B)))
    loss = lambda l_BK, k_BK: flow_grpo.policy_loss(l_BK, old_BK, k_BK, *rest, cfg=cfg)
    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        old_BK + jnp.log(jnp.asarray(ratio_BK)), jnp.asarray(kl_BK)
    )
    return value, gradients, metrics


def test_policy_loss_by_hand():
    value, (of_logprob, of_kl), metrics = loss_and_gradient(
        [[1.2, 0.8], [1.05, 0.8]], [[1.0, 2.0], [3.0, 4.0]], [2.0, -1.0]
    )
    np.testing.assert_allclose(value, (-2.2 - 1.6 + 1.05 + 0.9 + 0.5 * 10) / 4, **CLOSE)
    np.testing.assert_allclose(of_logprob, [[0, -1.6 / 4], [1.05 / 4, 0]], **CLOSE)
    np.testing.assert_allclose(of_kl, np.full((2, 2), 0.5 / 4), **CLOSE)
    want = {
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.25,
        "importance_sampling_ratio": 3.85 / 4,
        "ratio_gap": 0.65 / 4,
        "ratio_gap_max": 0.2,
        "kl": 2.5,
    }
    want["approx_kl"] = (-0.15 - np.log(1.2 * 0.8 * 1.05 * 0.8)) / 4
    assert metrics.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(metrics[name], x, err_msg=name, **CLOSE)


def test_a_row_that_is_not_valid_contributes_nothing():
    case = loss_and_gradient(
        [[1.05, 1.0], [np.inf, 1.0]],
        [[1.0, 2.0], [np.nan, 4.0]],
        [2.0, np.nan],
        valid_B=(True, False),
    )
    value, (of_logprob, of_kl), metrics = case
    np.testing.assert_allclose(value, (-2.1 - 2 + 0.5 * 3) / 2, **CLOSE)
    np.testing.assert_allclose(of_logprob, [[-2.1 / 2, -2 / 2], [0, 0]], **CLOSE)
    np.testing.assert_allclose(of_kl, [[0.25, 0.25], [0, 0]], **CLOSE)
    np.testing.assert_allclose(metrics["kl"], 1.5, **CLOSE)


def test_mean_of_micro_batches_is_the_batch(rng):
    logprob, old, kl = (rng.normal(scale=0.1, size=(8, 3)).astype(np.float32) for _ in range(3))
    valid = np.asarray(
        [True, True, True, True, False, True, False, False]
    )  # 4 in one half, 1 in the other
    batch = (
        logprob,
        old,
        kl**2,
        rng.normal(size=8).astype(np.float32),
        valid,
        np.full(8, valid.mean(), np.float32),
    )
    whole, *halves = (
        flow_grpo.policy_loss(*(x[part] for x in batch), cfg=CFG)
        for part in (slice(8), slice(4), slice(4, 8))
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    largest = whole[1].pop("ratio_gap_max")
    assert largest / 2 <= mean[1].pop("ratio_gap_max") <= largest
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, **CLOSE), mean, whole)


def test_kl_is_refused_or_left_out():
    x, rest = jnp.zeros((2, 1)), (jnp.ones(2), jnp.ones(2, bool), jnp.ones(2))
    with pytest.raises(ValueError, match=r"rl\.flow\.kl_coef=0\.5 needs"):
        flow_grpo.policy_loss(x, x, None, *rest, cfg=CFG)
    value, metrics = flow_grpo.policy_loss(
        x, x, None, *rest, cfg=dataclasses.replace(CFG, kl_coef=0.0)
    )
    assert value == -1 and "kl" not in metrics
