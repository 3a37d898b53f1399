import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar.qwen3 import Qwen3
from blip3o_jax.config import MeshConfig
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train import flops
from blip3o_jax.train.flops import count_flops
from blip3o_jax.train.joint_loss import joint_totals
from tests import tiny

ROW = {"tokens": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "float32"}


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def conv(groups=1, stride=1):
    return lambda x, w: jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize(
    ("fn", "args", "want"),
    [
        (jnp.matmul, (zeros(3, 5), zeros(5, 7)), 2 * 3 * 5 * 7),
        (jnp.matmul, (zeros(4, 3, 5), zeros(4, 5, 7)), 4 * 2 * 3 * 5 * 7),
        (
            lambda a, b: jnp.einsum("bld,dhk->blhk", a, b),
            (zeros(2, 3, 5), zeros(5, 7, 2)),
            2 * 2 * 3 * 5 * 14,
        ),
        # Each of 2 x 6 x 4 x 8 outputs is a dot product over a 3 x 3 window of 5 channels.
        (conv(), (zeros(2, 6, 4, 5), zeros(3, 3, 5, 8)), 2 * (2 * 6 * 4 * 8) * (9 * 5)),
        (conv(stride=2), (zeros(2, 6, 4, 5), zeros(3, 3, 5, 8)), 2 * (2 * 3 * 2 * 8) * (9 * 5)),
        (conv(groups=8), (zeros(2, 6, 4, 8), zeros(3, 3, 1, 8)), 2 * (2 * 6 * 4 * 8) * 9),
        (conv(groups=2), (zeros(2, 6, 4, 8), zeros(3, 3, 4, 6)), 2 * (2 * 6 * 4 * 6) * (9 * 4)),
        (
            lambda x, w: jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0],
            (zeros(3, 5), zeros(11, 5, 5)),
            11 * 2 * 3 * 25,
        ),
        (
            lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x),
            (zeros(5, 5),),
            2 * 2 * 125,
        ),
        (jax.jit(lambda x: jax.checkpoint(lambda x: x @ x)(x)), (zeros(5, 5),), 2 * 125),
    ],
    ids=[
        "matrices",
        "batched",
        "einsum",
        "conv",
        "strided",
        "depthwise",
        "grouped",
        "scan",
        "cond",
        "nested",
    ],
)
def test_hand_counts(fn, args, want):
    assert count_flops(fn, *args) == want


@pytest.mark.parametrize(("wanted", "products"), [((0, 1), 3), ((0,), 2), ((1,), 2)])
def test_a_linear_layer_costs_a_product_for_each_gradient_that_is_asked_for(wanted, products):
    graphdef, state = nnx.split(nn.Linear(5, 7, (None, None), rngs=nnx.Rngs(0)))
    loss = lambda x, state: jnp.sum(nnx.merge(graphdef, state)(x) ** 2)
    assert count_flops(jax.grad(loss, wanted), zeros(3, 5), state) == products * 2 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gradients_of_a_convolution_cost_twice_the_convolution(groups):
    """Count one product for the input's gradient and one for the kernel's, of the same size
    each.
    """
    args = (zeros(2, 6, 4, 8), zeros(1, 1, 8 // groups, 8))
    forward = count_flops(conv(groups), *args)
    gradient = jax.vjp(conv(groups), *args)[1]
    assert count_flops(gradient, zeros(2, 6, 4, 8)) == 2 * forward


def test_the_decoder_costs_what_its_matrices_say():
    """Count two FLOPs for each weight and token, and for attention's two products over all pairs
    of positions.
    """
    cfg, (B, L) = tiny.model().ar, (2, 32)
    model = nnx.eval_shape(lambda: Qwen3(cfg, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    ints = jax.ShapeDtypeStruct((B, L), jnp.int32)

    def forward(state, tokens_BL, positions_BL, segments_BL):
        model = nnx.merge(graphdef, state)
        return model.logits(model(model.embed(tokens_BL), positions_BL, segments_BL))

    d, heads, kv = (
        cfg.hidden_size,
        cfg.num_attention_heads * cfg.head_dim,
        cfg.num_key_value_heads * cfg.head_dim,
    )
    weights = (
        cfg.num_hidden_layers * (d * (2 * heads + 2 * kv) + 3 * d * cfg.intermediate_size)
        + d * cfg.padded_vocab_size
    )
    want = 2 * B * L * weights + cfg.num_hidden_layers * 4 * B * L * L * heads
    assert count_flops(forward, state, ints, ints, ints) == pytest.approx(want, rel=0.02)


def test_useful_flops_are_those_of_real_tokens_and_images():
    """Count a step by hand: for each weight six FLOPs a token, for each channel of the heads twelve
    a pair of tokens that see each other, and for each logit six times the width a label.
    """
    cfg = tiny.run_config(data={"batch_size": 4, "pack": 2, "max_length": 24})
    ar = cfg.model.ar
    rows = {name: ((2, 24), dtype) for name, dtype in ROW.items()}
    side, seen = cfg.model.image_size, cfg.model.tokenizer.image_size
    shapes = rows | {
        "image_span": ((2, 2), "int32"),
        "target": ((2, 2), "float32"),
        "bad_records": ((2, 2), "int32"),
        "pixels": ((2, 2, side, side, 3), "uint8"),
        "tokenizer_pixels": ((2, 2, seen, seen, 3), "uint8"),
    }
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    strategy = Strategy.of(MeshConfig(data=1, fsdp=1, strategy="dp"), jax.devices()[:1])
    counted = flops.step_flops(cfg, strategy, batch)

    d, width = ar.hidden_size, ar.num_attention_heads * ar.head_dim
    kv = ar.num_key_value_heads * ar.head_dim
    weights = ar.num_hidden_layers * (d * (2 * width + 2 * kv) + 3 * d * ar.intermediate_size)
    by_token = 6 * weights
    by_pair = 12 * ar.num_hidden_layers * width
    by_label = 6 * d * ar.padded_vocab_size
    assert counted.counted["tokens"] == by_token * 2 * 24
    assert counted.counted["pairs"] == by_pair * 2 * (24 * 25 / 2)
    # Both rows have room for so many labels: those of two images, each with its end of turn.
    room = 2 * min(2 * (cfg.model.tokenizer.num_tokens + 8), 23)
    assert counted.counted["labels"] == by_label * room
    images = counted.counted["targets"]
    assert counted.model == sum(counted.counted.values()) and images > 0

    # Examples of 5 and 7 tokens with two labels each; one of 6 with three, a question; no fourth.
    lengths = [[5, 7], [6]]
    arrays = {name: np.zeros((2, 24), dtype) for name, dtype in ROW.items()}
    for row, own in enumerate(lengths):
        for number, (start, length) in enumerate(zip(np.cumsum([0, *own]), own, strict=False)):
            arrays["segment_ids"][row, start : start + length] = number + 1
            arrays["positions"][row, start : start + length] = np.arange(length)
            arrays["loss_mask"][row, start + length - 2 - row : start + length] = 1
    arrays |= {"image_span": np.zeros((2, 2)), "target": np.array([[1, 1], [0, 0]])}
    totals = {name: float(value) for name, value in joint_totals(arrays).items()}
    assert (totals["examples"], totals["slots"], totals["row_tokens"]) == (3, 4, 48)
    want = (
        by_token * (5 + 7 + 6) + by_pair * (15 + 28 + 21) + by_label * (2 + 2 + 3) + images * 2 / 4
    )
    assert set(counted.counted) == {"tokens", "pairs", "labels", "targets"}
    assert counted.useful(totals, 1) == pytest.approx(want, rel=1e-6)
    twice = {name: 2 * value for name, value in totals.items()}
    assert counted.useful(twice, 2) == pytest.approx(2 * want, rel=1e-6)


def test_a_cpu_has_no_published_peak():
    assert flops.peak_flops(jax.devices()[0]) is None
