"""The autoencoder against `diffusers.AutoencoderDC`: values, gradients, parameter counts; and what
it refuses.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from blip3o_jax import config
from blip3o_jax.vae import blocks
from blip3o_jax.vae.dc_ae import DcAe
from tests import stock_weights
from tests.conftest import relative_error
from tests.vae import torch_weights

# 8x smaller, both kinds of block, both resampling kinds of the published f32c32. Stages of 2
# blocks, so that their order counts; no extra scale and two; channels that stay, double or are
# averaged; heads of 10 in 24 channels, of which the library leaves the last 4 out.
F8 = config.DcAeConfig(
    latent_channels=4,
    attention_head_dim=10,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "ResBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(6, 12, 12, 24),
    decoder_block_out_channels=(6, 12, 12, 24),
    encoder_layers_per_block=(1, 2, 2, 1),
    decoder_layers_per_block=(2, 1, 1, 1),
    encoder_qkv_multiscales=((), (), (3, 5), ()),
    decoder_qkv_multiscales=((), (), (), ()),
    dtype="float32",
)
# The library's default resampling kinds, and outermost stages without blocks.
SHUFFLED = dataclasses.replace(
    F8,
    encoder_block_types=("ResBlock",) * 4,
    decoder_block_types=("ResBlock",) * 4,
    encoder_block_out_channels=(8, 12, 12, 24),
    encoder_layers_per_block=(0, 2, 1, 1),
    decoder_layers_per_block=(0, 1, 1, 1),
    upsample_block_type="pixel_shuffle",
    downsample_block_type="pixel_unshuffle",
)
CONFIGS = {"f8": F8, "shuffled": SHUFFLED}
# Both have several groups of heads and scales, since the norm after a single one would hide how it
# is normalised. The encoder's attention sees 4 x 8 = 32 pixels and the decoder's 2 x 4 = 8, more
# and fewer than the heads' 10: both its forms.
HEIGHT, WIDTH = 16, 32


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Return (configuration, torch model, model here) with the same random weights."""
    cfg = CONFIGS[request.param]
    theirs = torch_weights.torch_model(cfg)
    return cfg, theirs, stock_weights.jax_model(theirs, cfg)


def nchw(x_BHWC) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x_BHWC)).movedim(-1, 1)


def test_values_and_gradients_equal_torch(pair, rng):
    """Compare in float32; the sums over channels and pixels run in another order: 1e-5 for values,
    1e-4 for gradients.
    """
    cfg, theirs, model = pair
    x_BHWC = rng.uniform(-1, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)
    weights_BHWC = rng.normal(size=x_BHWC.shape).astype(np.float32)
    z_torch = theirs.encode(nchw(x_BHWC)).latent
    y_torch = theirs.decode(z_torch).sample
    (y_torch * nchw(weights_BHWC)).sum().backward()

    graphdef, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graphdef, state)
        z_BHWC = model.encode(x_BHWC)
        y_BHWC = model.decode(z_BHWC)
        return (y_BHWC * weights_BHWC).sum(), (z_BHWC, y_BHWC)

    gradients, (z_BHWC, y_BHWC) = jax.jit(jax.grad(loss, has_aux=True))(state)
    assert z_BHWC.shape == (2, HEIGHT // 8, WIDTH // 8, 4)
    assert relative_error(z_BHWC, z_torch.movedim(1, -1).detach()) < 1e-5
    assert relative_error(y_BHWC, y_torch.movedim(1, -1).detach()) < 1e-5
    want = stock_weights.convert(stock_weights.gradients(theirs), cfg)
    got = stock_weights.flat(gradients)
    assert got.keys() == want.keys()
    for path, gradient in want.items():
        assert relative_error(got[path], gradient) < 1e-4, path


def test_published_sizes_count():
    """Check that the default config is the published f32c32 autoencoder of SANA 1.5: as many
    parameters as the library's.
    """
    cfg = config.DcAeConfig()
    with torch.device("meta"):
        want = {name: p.numel() for name, p in torch_weights.torch_class(cfg).named_parameters()}
    model = nnx.eval_shape(lambda: DcAe(cfg, rngs=nnx.Rngs(0)))
    for part in ("encoder", "decoder"):
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(getattr(model, part)))]
        assert sum(sizes) == sum(count for name, count in want.items() if name.startswith(part))


def test_remat_changes_nothing(rng):
    """Compare gradients: the same when the backward pass computes each block again: the same
    operations in float32, which XLA may fuse otherwise, hence 1e-6.
    """
    x_BHWC = jnp.asarray(rng.normal(size=(1, 3, 4, 6)), jnp.float32)
    stacked = blocks.stage_blocks(
        "ResBlock", 2, 6, 8, (), rngs=nnx.Rngs(0), dtype="float32", param_dtype="float32"
    )
    graphdef, state = nnx.split(stacked)

    def gradients(remat):
        loss = lambda state: (
            blocks.run_blocks(nnx.merge(graphdef, state), x_BHWC, remat=remat, unroll=False) ** 2
        ).sum()
        return stock_weights.flat(jax.jit(jax.grad(loss))(state))

    want, got = gradients("none"), gradients("full")
    for path, gradient in want.items():
        assert relative_error(got[path], gradient) < 1e-6, path


@pytest.mark.parametrize("remat", config.REMAT)
def test_remat_is_per_block(remat):
    """Check that each stage with blocks is one scan over checkpointed blocks, except with policy
    "none".
    """
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: DcAe(dataclasses.replace(F8, remat=remat), rngs=nnx.Rngs(0)))
    )
    x_BHWC = jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.float32)
    run = lambda state, x_BHWC: nnx.merge(graphdef, state).decode(
        nnx.merge(graphdef, state).encode(x_BHWC)
    )
    scans = [e for e in jax.make_jaxpr(run)(state, x_BHWC).jaxpr.eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans] == [1, 2, 2, 1, 1, 1, 1, 2]
    for scanned in scans:
        inside = [e.primitive.name for e in scanned.params["jaxpr"].jaxpr.eqns]
        assert inside.count("remat2") + inside.count("checkpoint") == (remat != "none")


def test_compile_does_not_grow_with_depth():
    """Check that a stage of 2 blocks and one of 6 trace to programs of the same length."""

    def length(layers):
        cfg = dataclasses.replace(F8, encoder_layers_per_block=(layers,) * 4)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: DcAe(cfg, rngs=nnx.Rngs(0))))
        x_BHWC = jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.float32)
        return len(
            str(
                jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state).encode(x))(state, x_BHWC)
            ).splitlines()
        )

    assert length(2) == length(6)


def test_bfloat16_stays_close(rng):
    """Compute in bfloat16: bfloat16 out, and within its precision (2^-8 a step) through a block
    with attention.
    """
    x_BHWC = jnp.asarray(rng.normal(size=(1, 3, 4, 16)), jnp.float32)

    def run(dtype):
        block = blocks.EfficientVitBlock(
            16, 8, (), rngs=nnx.Rngs(0), dtype=dtype, param_dtype="float32"
        )
        graphdef, state = nnx.split(block)
        return jax.jit(lambda state, x_BHWC: nnx.merge(graphdef, state)(x_BHWC))(
            state, x_BHWC.astype(dtype)
        )

    assert run("bfloat16").dtype == jnp.bfloat16
    assert relative_error(run("bfloat16").astype(jnp.float32), run("float32")) < 0.02


def test_refuses_a_size_that_does_not_divide():
    model = nnx.eval_shape(lambda: DcAe(F8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"20 x 33 pixels.*multiples of 8; resize it to 16 x 32"):
        model.encode(jnp.zeros((1, 20, 33, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"upsample_block_type": "bilinear"},
            "vae.upsample_block_type='bilinear' is not one of interpolate, pixel_shuffle",
        ),
        ({"downsample_block_type": "max"}, "vae.downsample_block_type='max'"),
        ({"decoder_norm_types": "batch_norm"}, "vae.decoder_norm_types='batch_norm'"),
        ({"decoder_act_fns": "relu6"}, "vae.decoder_act_fns='relu6'"),
        ({"encoder_layers_per_block": (1, 2, 3)}, "vae.encoder_layers_per_block has 3 entries"),
        (
            {"decoder_layers_per_block": (1, 0, 1, 1)},
            "only the first and the last stage may have 0 layers",
        ),
        (
            {"encoder_block_types": ("ResBlock",) * 3 + ("Block",)},
            r"vae.encoder_block_types\[3\]='Block'",
        ),
        ({"encoder_qkv_multiscales": ((), (), (), (4,))}, "must be odd"),
        (
            {"attention_head_dim": 32},
            r"vae.encoder_block_out_channels\[2\]=12 must be at least "
            r"model.vae.attention_head_dim=32",
        ),
        (
            {"encoder_block_out_channels": (6, 12, 12, 20)},
            "4 x 12 must be a multiple of the next stage's 20",
        ),
        ({"latent_channels": 5}, "the last must be a multiple of model.vae.latent_channels=5"),
        (
            {
                "downsample_block_type": "pixel_unshuffle",
                "encoder_block_out_channels": (6, 6, 12, 24),
            },
            "multiples of 4",
        ),
    ],
)
def test_refuses_settings_that_cannot_work(change, message):
    with pytest.raises(config.ConfigError, match=message):
        DcAe(dataclasses.replace(F8, **change), rngs=nnx.Rngs(0))
