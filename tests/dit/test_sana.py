import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from blip3o_jax import config
from blip3o_jax.dit.protocol import LatentConcat
from blip3o_jax.dit.sana import SanaTransformer, positions
from tests import stock_weights
from tests.conftest import relative_error
from tests.dit import torch_weights

# Sizes all differ where they may, so that swapped axes cannot go unseen; cross-attention heads cut
# the width otherwise.
CFG = config.SanaConfig(
    in_channels=5,
    out_channels=5,
    num_layers=3,
    num_attention_heads=6,
    attention_head_dim=8,
    num_cross_attention_heads=4,
    cross_attention_head_dim=12,
    cross_attention_dim=48,
    caption_channels=20,
    mlp_ratio=2.5,
    dtype="float32",
    remat="none",
)
VARIANTS = {
    "qk_norm": CFG,
    "plain": dataclasses.replace(CFG, qk_norm=None),
    "patch2": dataclasses.replace(CFG, patch_size=2, out_channels=3, remat="dots"),
    "positions": dataclasses.replace(CFG, sample_size=8, interpolation_scale=0.5),
}
B, H, W, T = 2, 10, 6, 7


def inputs(rng: np.random.Generator, cfg: config.SanaConfig) -> dict[str, np.ndarray]:
    return {
        "z_BHWC": rng.normal(size=(B, H, W, cfg.in_channels)).astype(np.float32),
        "timestep_B": np.asarray([731.5, 4.0], np.float32),
        "condition_BTC": rng.normal(size=(B, T, cfg.caption_channels)).astype(np.float32),
    }


def run_torch(model, x: dict[str, np.ndarray], mask: np.ndarray | None = None):
    """Return output as [B, H, W, C], and the leaves for gradients."""
    z = torch.tensor(x["z_BHWC"], requires_grad=True)
    condition = torch.tensor(x["condition_BTC"], requires_grad=True)
    out = model(
        z.permute(0, 3, 1, 2),
        encoder_hidden_states=condition,
        timestep=torch.tensor(x["timestep_B"]),
        encoder_attention_mask=None if mask is None else torch.tensor(mask.astype(np.float32)),
        return_dict=False,
    )[0]
    return out.permute(0, 2, 3, 1), z, condition


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    cfg = VARIANTS[request.param]
    torch_model = torch_weights.torch_model(cfg)
    return cfg, torch_model, stock_weights.jax_model(torch_model, cfg)


def gradients(model: SanaTransformer, x: dict[str, np.ndarray], weights: np.ndarray):
    """Return (output, gradients of sum(output * weights) by state, z and condition)."""
    graphdef, state = nnx.split(model)

    # All arrays are arguments: the tests that differ in nothing but values then share one entry of
    # the compile cache.
    def loss(state, z_BHWC, condition_BTC, timestep_B, weights):
        v_BHWC = nnx.merge(graphdef, state)(z_BHWC, timestep_B, condition_BTC)
        return jnp.sum(v_BHWC * weights), v_BHWC

    fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, v_BHWC), grads = fn(state, x["z_BHWC"], x["condition_BTC"], x["timestep_B"], weights)
    return v_BHWC, grads


def test_output_and_gradients_match_diffusers(pair, rng):
    cfg, torch_model, model = pair
    x = inputs(rng, cfg)
    weights = rng.normal(size=(B, H, W, cfg.out_channels)).astype(np.float32)
    want, z, condition = run_torch(torch_model, x)
    torch_model.zero_grad()
    (want * torch.tensor(weights)).sum().backward()

    got, (by_state, by_z, by_condition) = gradients(model, x, weights)

    # float32 through three blocks: a few 1e-7 for the output, some times that for the gradients.
    assert relative_error(got, want.detach()) < 1e-5
    assert relative_error(by_z, z.grad) < 1e-4
    assert relative_error(by_condition, condition.grad) < 1e-4
    want_by = stock_weights.convert(stock_weights.gradients(torch_model), cfg)
    got_by = stock_weights.flat(by_state)
    assert got_by.keys() == want_by.keys()
    # The key bias of cross-attention without a norm shifts every score of a query alike: its true
    # gradient is 0.
    silent = {"blocks/cross_attention/k/bias"} if cfg.qk_norm is None else set()
    for path in want_by.keys() - silent:
        assert relative_error(got_by[path], want_by[path]) < 1e-4, path
    for path in silent:
        assert (
            np.abs(got_by[path]).max()
            < 1e-4 * np.abs(got_by["blocks/cross_attention/v/bias"]).max()
        )


def test_mask_matches_diffusers_and_hides_tokens(rng):
    torch_model = torch_weights.torch_model(CFG)
    model = stock_weights.jax_model(torch_model, CFG)
    x = inputs(rng, CFG)
    mask_BT = np.arange(T)[None] < np.asarray([[T - 3], [T]])
    run = jax.jit(lambda condition_BTC: model(x["z_BHWC"], x["timestep_B"], condition_BTC, mask_BT))
    got = run(x["condition_BTC"])
    assert relative_error(got, run_torch(torch_model, x, mask_BT)[0].detach()) < 1e-5

    hidden = np.where(mask_BT[..., None], x["condition_BTC"], 9.0)
    np.testing.assert_array_equal(run(hidden), got)


def test_one_null_token_stands_for_many(rng):
    model = stock_weights.jax_model(torch_weights.torch_model(CFG), CFG)
    x = inputs(rng, CFG)
    one_11C = x["condition_BTC"][:1, :1]

    @jax.jit
    def run(condition_BTC):
        return model.velocity(x["z_BHWC"], x["timestep_B"], model.prepare(condition_BTC))

    # A sum of T equal terms divided by T instead of the term itself: rounding only.
    assert (
        relative_error(run(one_11C), run(np.broadcast_to(one_11C, (B, T, CFG.caption_channels))))
        < 1e-6
    )
    assert (
        relative_error(
            run(x["condition_BTC"][:1]), run(np.repeat(x["condition_BTC"][:1], B, axis=0))
        )
        < 1e-6
    )


def test_remat_changes_no_gradient(rng):
    torch_model = torch_weights.torch_model(CFG)
    x = inputs(rng, CFG)
    weights = rng.normal(size=x["z_BHWC"].shape).astype(np.float32)
    cfg = dataclasses.replace(CFG, remat="full")
    plain = gradients(stock_weights.jax_model(torch_model, CFG), x, weights)
    recomputed = gradients(stock_weights.jax_model(torch_model, cfg), x, weights)
    # The same operations, though fused otherwise: the last bits may differ, nothing else.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain[1], recomputed[1]
    )
    # Were nothing recomputed, the equality above would say nothing: both scans (of `prepare` and of
    # `velocity`) must be.
    assert (program(cfg).count("= remat"), program(CFG).count("= remat")) == (2, 0)


def program(cfg: config.SanaConfig) -> str:
    """Return the traced forward pass."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SanaTransformer(cfg, rngs=nnx.Rngs(0))))
    arguments = (
        jnp.zeros((1, 2, 2, cfg.in_channels)),
        jnp.zeros(1),
        jnp.zeros((1, 2, cfg.caption_channels)),
    )
    return str(jax.make_jaxpr(lambda s: nnx.merge(graphdef, s)(*arguments))(nnx.as_pure(state)))


def test_program_does_not_grow_with_depth():
    short, long = (program(dataclasses.replace(CFG, num_layers=n)).count("\n") for n in (2, 9))
    assert short == long


def test_starts_near_zero_velocity_with_gradient_everywhere(rng):
    model = SanaTransformer(CFG, rngs=nnx.Rngs(0))
    x = inputs(rng, CFG)
    v_BHWC, (by_state, by_z, by_condition) = gradients(
        model, x, rng.normal(size=x["z_BHWC"].shape).astype(np.float32)
    )
    assert 0 < np.abs(v_BHWC).max() < 0.05
    for path, gradient in stock_weights.flat(by_state).items():
        assert np.abs(gradient).max() > 0, path
    assert np.abs(by_z).max() > 0 and np.abs(by_condition).max() > 0


def test_names_that_partial_training_selects_by():
    paths = stock_weights.flat(
        nnx.state(nnx.eval_shape(lambda: SanaTransformer(CFG, rngs=nnx.Rngs(0))))
    )
    caption = {path for path in paths if "caption" in path}
    layers = {
        f"caption_projection/linear_{i}/{name}" for i in (1, 2) for name in ("kernel", "bias")
    }
    assert caption == layers | {"caption_norm/scale"}
    assert {path for path in paths if "patch_embed" in path or "proj_out" in path} == {
        f"{part}/{name}" for part in ("patch_embed", "proj_out") for name in ("kernel", "bias")
    }


def test_bfloat16_compute_keeps_close(rng):
    torch_model = torch_weights.torch_model(CFG)
    x = inputs(rng, CFG)
    model = stock_weights.jax_model(torch_model, dataclasses.replace(CFG, dtype="bfloat16"))
    got = jax.jit(model)(**x)
    assert got.dtype == jnp.bfloat16
    # 8 bits of mantissa through three blocks; a statistic taken in bfloat16 would cost far more.
    assert relative_error(got.astype(jnp.float32), run_torch(torch_model, x)[0].detach()) < 0.05


def test_patches_that_do_not_fit_are_an_error():
    def run(z_BHWC):
        model = SanaTransformer(VARIANTS["patch2"], rngs=nnx.Rngs(0))
        return model(z_BHWC, jnp.zeros(1), jnp.zeros((1, 2, 20)))

    with pytest.raises(ValueError, match=r"latents of 6 x 5: both .*dit\.patch_size=2"):
        jax.eval_shape(run, jnp.zeros((1, 6, 5, 5)))


@pytest.mark.parametrize("name", VARIANTS)
def test_references_concatenated_to_the_noise_match_diffusers_on_the_wide_map(name, rng):
    """Compare with the stock class on maps concatenated and cut by hand."""
    cfg = VARIANTS[name]
    if cfg.interpolation_scale is not None:
        pytest.skip("the stock class counts positions over the whole wide map")
    torch_model = torch_weights.torch_model(cfg)
    model = stock_weights.jax_model(torch_model, cfg)
    x, references_BRHWC = (
        inputs(rng, cfg),
        rng.normal(size=(B, 2, H, W, cfg.in_channels)).astype(np.float32),
    )
    wide = x | {"z_BHWC": np.concatenate([x["z_BHWC"], *references_BRHWC.swapaxes(0, 1)], axis=2)}
    want = run_torch(torch_model, wide)[0].detach()[:, :, :W]
    latent_concat = LatentConcat(references_BRHWC, np.ones((B, 2), bool))
    got = jax.jit(lambda latent_concat: model(**x, latent_concat=latent_concat))(latent_concat)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("name", ["qk_norm", "patch2", "positions"])
def test_a_place_without_a_reference_is_not_there(name, rng):
    """Compare rows with one, none and two references in one batch: each as it is alone on a map of
    its own width.
    """
    cfg = VARIANTS[name]
    model = stock_weights.jax_model(torch_weights.torch_model(cfg), cfg)
    x = {
        "z_BHWC": rng.normal(size=(3, H, W, cfg.in_channels)).astype(np.float32),
        "timestep_B": np.asarray([731.5, 4.0, 300.0], np.float32),
        "condition_BTC": rng.normal(size=(3, T, cfg.caption_channels)).astype(np.float32),
    }
    references_BRHWC = rng.normal(size=(3, 2, H, W, cfg.in_channels)).astype(np.float32)
    run = jax.jit(lambda x, latent_concat: model(**x, latent_concat=latent_concat))
    together = run(
        x, LatentConcat(references_BRHWC, np.array([[True, False], [False, False], [True, True]]))
    )
    for row, count in enumerate((1, 0, 2)):
        one = {name: value[row : row + 1] for name, value in x.items()}
        latent_concat = (
            LatentConcat(references_BRHWC[row : row + 1, :count], np.ones((1, count), bool))
            if count
            else None
        )
        # Sums over more terms, all of the added ones zero: rounding only.
        assert relative_error(together[row], run(one, latent_concat)[0]) < 2e-6, count


def test_references_with_positions_do_not_move_those_of_the_noise():
    cfg = VARIANTS["positions"]
    wide = positions(cfg, (H, W), 3).reshape(H, 3, W, -1)
    np.testing.assert_array_equal(wide[:, 0].reshape(H * W, -1), positions(cfg, (H, W)))
    assert len(np.unique(wide.reshape(H * 3 * W, -1), axis=0)) == H * 3 * W
