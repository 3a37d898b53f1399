import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blip3o_jax.config import FlowConfig
from blip3o_jax.dit import flow

SHIFTS = (1.0, 3.0)


def scheduler(cfg: FlowConfig) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=cfg.num_train_timesteps, shift=cfg.shift
    )


@pytest.mark.parametrize("shift", SHIFTS)
def test_training_sigmas(shift):
    cfg = FlowConfig(shift=shift)
    got = flow.sigmas(cfg)
    assert got.shape == (1000,) and got[0] == 1
    np.testing.assert_array_equal(got, scheduler(cfg).sigmas.numpy())


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_sampling_sigmas_and_euler_steps(shift, steps, rng):
    cfg = FlowConfig(shift=shift)
    stock = scheduler(cfg)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    got = flow.sampling_sigmas(steps, cfg)
    # One unit in the last place: the order of float32 operations is not part of the scheduler's
    # contract.
    np.testing.assert_allclose(got, stock.sigmas.numpy(), rtol=2e-7)
    np.testing.assert_allclose(
        got[:-1] * cfg.num_train_timesteps, stock.timesteps.numpy(), rtol=2e-7
    )

    x, v = rng.normal(size=(2, 5)).astype(np.float32)
    want = stock.step(torch.tensor(v), stock.timesteps[0], torch.tensor(x)).prev_sample.numpy()
    np.testing.assert_allclose(x + (got[1] - got[0]) * v, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_noisy_and_velocity(shift, rng):
    cfg = FlowConfig(shift=shift)
    stock = scheduler(cfg)
    z, noise = rng.normal(size=(2, 3, 2, 4, 5)).astype(np.float32)
    index = np.asarray([0, 400, 999])
    want = stock.scale_noise(torch.tensor(z), stock.timesteps[index], torch.tensor(noise))
    got = flow.add_noise(z, noise, jnp.asarray(flow.sigmas(cfg)[index]))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_training_draws_cover_all_levels_evenly():
    cfg = FlowConfig(shift=3.0)
    draws = np.asarray(flow.sample_train_sigma(jax.random.key(0), 200_000, cfg))
    levels, counts = np.unique(draws, return_counts=True)
    np.testing.assert_array_equal(levels, np.sort(flow.sigmas(cfg)))
    assert abs(counts / 200 - 1).max() < 0.4  # 200 draws a level: five standard deviations are 0.35


def test_draw_is_the_floor_of_u(monkeypatch):
    u = np.asarray(
        [0.0, 0.0009999, 0.001, 0.5, np.nextafter(np.float32(1), np.float32(0))], np.float32
    )
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.asarray(u))
    got = flow.sample_train_sigma(jax.random.key(0), 5, FlowConfig())
    np.testing.assert_allclose(got, [1, 1, 0.999, 0.5, 0.001], rtol=1e-6)


def test_loss_of_each_row(rng):
    z, noise, v = rng.normal(size=(3, 4, 2, 3, 5)).astype(np.float32)
    want = ((v.astype(np.float64) - (noise.astype(np.float64) - z)) ** 2).reshape(4, -1).mean(1)
    np.testing.assert_allclose(flow.flow_loss(v, z, noise), want, rtol=1e-6)
    weight = np.asarray([0, 1, 2, 0.5], np.float32)
    np.testing.assert_allclose(flow.flow_loss(v, z, noise, weight), want * weight, rtol=1e-6)
    assert flow.flow_loss(v.astype(jnp.bfloat16), z, noise).dtype == jnp.float32


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="steps=0"):
        flow.sampling_sigmas(0, FlowConfig())
