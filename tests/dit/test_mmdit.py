"""Compare MMDiT with `diffusers.SD3Transformer2DModel`, and in the joint loss and the sampler."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from blip3o_jax import blip3o, config
from blip3o_jax.convert import conversions, mmdit
from blip3o_jax.dit import sampler
from blip3o_jax.dit.mmdit import MMDiT
from blip3o_jax.dit.protocol import LatentConcat
from blip3o_jax.train.joint_loss import joint_loss
from tests import stock_weights, tiny
from tests.conftest import relative_error

CFG = config.MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=10,
    caption_projection_dim=24,
    pooled_projection_dim=10,
    pos_embed_max_size=6,
    dtype="float32",
    remat="none",
)


def torch_model(cfg: config.MMDiTConfig) -> diffusers.SD3Transformer2DModel:
    """Return the stock model in float32 with every parameter random, so that a forgotten or swapped
    one shows."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel.from_config(
        conversions.stock_config("dit", stock_weights.whole("dit", cfg))
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            random = torch.randn_like(p)
            scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(1 + scale * random if "attn.norm" in name else scale * random)
    return model


@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_velocity_equals_diffusers(qk_norm, rng):
    """Compare on a map higher than wide, in the middle of the table of positions."""
    cfg = dataclasses.replace(CFG, qk_norm=qk_norm)
    reference = torch_model(cfg)
    model = stock_weights.jax_model(reference, cfg)
    z_BHWC, condition_BTC = rng.normal(size=(2, 8, 6, 4)), rng.normal(size=(2, 5, 10))
    z_BHWC, condition_BTC = z_BHWC.astype(np.float32), condition_BTC.astype(np.float32)
    timestep_B = np.array([187.4375, 62.8125], np.float32)
    with torch.no_grad():
        want = mmdit.velocity(
            reference,
            torch.tensor(z_BHWC).movedim(3, 1),
            torch.tensor(condition_BTC),
            torch.tensor(timestep_B),
        )
    got = jax.jit(lambda *x: model(*x))(z_BHWC, timestep_B, condition_BTC)
    assert relative_error(got, want.movedim(1, 3)) < 1e-5
    stored = reference.state_dict()["pos_embed.pos_embed"].numpy()
    assert np.allclose(mmdit.buffers(cfg)["pos_embed.pos_embed"], stored, atol=1e-6)


def test_masked_tokens_and_empty_reference_slots_change_nothing(rng):
    model = MMDiT(CFG, rngs=nnx.Rngs(0))
    # Larger than at the start, so that a difference would show.
    nnx.update(model, jax.tree.map(lambda x: 5 * x, nnx.state(model)))
    z, c = rng.normal(size=(2, 4, 4, 4)), rng.normal(size=(2, 5, 10))
    z, c, t = z.astype(np.float32), c.astype(np.float32), np.array([9.0, 700.0], np.float32)
    mask = np.array([[True] * 3 + [False] * 2] * 2)
    slots = jnp.zeros((2, 1, 4, 4, 4)) + 7
    run = jax.jit(lambda *x: model(*x))
    want = run(z, t, c[:, :3])
    assert relative_error(run(z, t, c, mask), want) < 1e-5
    none, one = (LatentConcat(slots, np.full((2, 1), there)) for there in (False, True))
    assert relative_error(run(z, t, c, mask, none), want) < 1e-5
    assert relative_error(run(z, t, c, mask, one), want) > 1e-3
    with pytest.raises(ValueError, match=r"5 x 4 are not a multiple of dit\.patch_size=2"):
        model(np.zeros((1, 5, 4, 4)), t[:1], c[:1])


def test_it_learns_through_the_joint_loss_and_is_sampled(rng):
    """Run the joint stage with another family of diffusion head: the caption parts, the connector
    and the AR train, and the loss on one batch falls.
    """
    base = tiny.model()
    dit = dataclasses.replace(
        CFG, patch_size=1, joint_attention_dim=16, pooled_projection_dim=16, sample_size=4
    )
    cfg = dataclasses.replace(base, dit=dit, ar=dataclasses.replace(base.ar, vocab_size=100))
    model = blip3o.Blip3o(cfg, ("ar", "connector", "dit"), seed=0)
    batch = {
        "tokens": rng.integers(0, 50, (4, 12)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(12), (4, 12)),
        "segment_ids": np.ones((4, 12), np.int32),
        "loss_mask": (np.arange(12) >= 4).astype(np.float32) * np.ones((4, 1), np.float32),
        "image_span": np.full(4, 4, np.int32),
        "label_count": np.full(4, 8, np.float32),
        "codes": rng.integers(0, 32, (4, 4)).astype(np.int32),
        "latents": rng.normal(size=(4, 4, 4, 4)).astype(np.float32),
    }
    keys_B = jax.random.split(jax.random.key(0), 4)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state):
        def loss(state):
            given = nnx.merge(graphdef, state), batch, keys_B
            settings = config.LossConfig(ce_chunk=8, condition_dropout=0.0)
            return joint_loss(*given, loss=settings, image_token_offset=60)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state)
        return jax.tree.map(lambda x, g: x - 0.1 * g, state, gradients), value, metrics["flow"]

    found = []
    for _ in range(8):
        state, value, flow = step(state)
        found.append((float(value), float(flow)))
    assert np.isfinite(found).all()
    assert found[-1][0] < 0.9 * found[0][0] and found[-1][1] < found[0][1], found

    model = nnx.merge(graphdef, state)
    settings = config.SamplingConfig(guidance=2.0, steps=2)
    guidance = model.guidance(rng.normal(size=(2, 5, 32)).astype(np.float32), settings)
    # Equal tokens share a softmax with the latents here, so that all of them stand.
    assert guidance.uncond.tokens_BTC.shape == guidance.condition.tokens_BTC.shape
    noise_BHWC = rng.normal(size=(2, 4, 4, 4)).astype(np.float32)
    z_BHWC = jax.jit(
        lambda noise: sampler.sample(model.dit, guidance, noise, steps=2, flow=cfg.flow)
    )(noise_BHWC)
    v = model.dit(noise_BHWC, np.full(2, 1000.0, np.float32), guidance.condition.tokens_BTC)
    null = model.dit(noise_BHWC, np.full(2, 1000.0, np.float32), guidance.uncond.tokens_BTC)
    first = noise_BHWC - 0.5 * (null + 2.0 * (v - null))
    v = model.dit(first, np.full(2, 500.0, np.float32), guidance.condition.tokens_BTC)
    null = model.dit(first, np.full(2, 500.0, np.float32), guidance.uncond.tokens_BTC)
    assert relative_error(z_BHWC, first - 0.5 * (null + 2.0 * (v - null))) < 1e-5
