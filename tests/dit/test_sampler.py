import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch

from blip3o_jax.config import FlowConfig
from blip3o_jax.dit import sampler
from blip3o_jax.dit.guidance import Guidance, guided_velocity
from blip3o_jax.dit.protocol import Condition
from tests import stock_weights
from tests.conftest import relative_error
from tests.dit import test_sana, torch_weights

CFG = dataclasses.replace(test_sana.CFG, num_layers=2)
B, H, W, T, STEPS = 2, 3, 5, 4, 5


@pytest.fixture(scope="module")
def pair():
    torch_model = torch_weights.torch_model(CFG)
    return torch_model, stock_weights.jax_model(torch_model, CFG)


def torch_sample(model, condition, uncond, noise, guidance: float, cfg: FlowConfig) -> np.ndarray:
    """Sample with the stock model and scheduler, both branches in one batch, [null,
    condition]."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=cfg.shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    z = torch.tensor(noise).permute(0, 3, 1, 2)
    both = torch.cat([torch.tensor(uncond), torch.tensor(condition)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = model(
                torch.cat([z, z]),
                encoder_hidden_states=both,
                timestep=t.expand(2 * B),
                return_dict=False,
            )[0]
            v_uncond, v_condition = v.chunk(2)
            z = scheduler.step(v_uncond + guidance * (v_condition - v_uncond), t, z).prev_sample
    return z.permute(0, 2, 3, 1).numpy()


def run(dit, condition, uncond, noise, guidance: float, cfg: FlowConfig) -> jax.Array:
    @jax.jit
    def sample(condition, uncond, noise):
        branches = Guidance(Condition(condition), Condition(uncond), guidance)
        return sampler.sample(dit, branches, noise, steps=STEPS, flow=cfg)

    return sample(condition, uncond, noise)


def draw(rng):
    condition = rng.normal(size=(B, T, CFG.caption_channels)).astype(np.float32)
    uncond = np.broadcast_to(
        rng.normal(size=(1, 1, CFG.caption_channels)).astype(np.float32), condition.shape
    )
    return condition, uncond, rng.normal(size=(B, H, W, CFG.in_channels)).astype(np.float32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_a_loop_of_stock_model_and_scheduler(pair, shift, rng):
    torch_model, dit = pair
    condition, uncond, noise = draw(rng)
    cfg = FlowConfig(shift=shift)
    want = torch_sample(torch_model, condition, uncond, noise, 2.5, cfg)
    # The stock loop gets the null condition at all T tokens, the sampler as one token for all rows.
    assert relative_error(run(dit, condition, uncond[:1, :1], noise, 2.5, cfg), want) < 1e-5
    assert np.linalg.norm(
        want - torch_sample(torch_model, condition, uncond, noise, 1.0, cfg)
    ) > 0.1 * np.linalg.norm(want)


def test_null_condition_of_as_many_rows_and_tokens(pair, rng):
    torch_model, dit = pair
    condition, _, noise = draw(rng)
    uncond = rng.normal(size=condition.shape).astype(np.float32)
    want = torch_sample(torch_model, condition, uncond, noise, 2.5, FlowConfig())
    assert relative_error(run(dit, condition, uncond, noise, 2.5, FlowConfig()), want) < 1e-5


def test_without_a_null_condition_there_is_no_guidance(pair, rng):
    torch_model, dit = pair
    condition, uncond, noise = draw(rng)
    want = torch_sample(torch_model, condition, uncond, noise, 1.0, FlowConfig())
    alone = jax.jit(
        lambda c, n: sampler.sample(dit, Guidance(Condition(c)), n, steps=STEPS, flow=FlowConfig())
    )
    assert relative_error(alone(condition, noise), want) < 1e-5


def test_two_guidances_are_a_sum_of_three_velocities(pair, rng):
    """Compare with InstructPix2Pix (arXiv 2211.09800), equation 3, by the stock model; equal scales
    are one guidance.
    """
    torch_model, dit = pair
    condition, uncond, noise = draw(rng)
    middle = rng.normal(size=condition.shape).astype(np.float32)
    timestep = np.asarray([800.0, 300.0], np.float32)

    def stock(tokens):
        z = torch.tensor(noise).permute(0, 3, 1, 2)
        with torch.no_grad():
            v = torch_model(
                z,
                encoder_hidden_states=torch.tensor(tokens),
                timestep=torch.tensor(timestep),
                return_dict=False,
            )
        return v[0].permute(0, 2, 3, 1).numpy()

    def ours(scale, reference_scale):
        branches = Guidance(
            *map(Condition, (condition, uncond)), scale, Condition(middle), reference_scale
        )
        return jax.jit(lambda z, t: guided_velocity(dit, branches)(z, t))(noise, timestep)

    full, nothing, shown = stock(condition), stock(uncond), stock(middle)
    assert (
        relative_error(ours(3.0, 1.5), nothing + 1.5 * (shown - nothing) + 3.0 * (full - shown))
        < 1e-5
    )
    assert relative_error(ours(3.0, 3.0), nothing + 3.0 * (full - nothing)) < 1e-5
