import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip3o_jax import config, nn
from blip3o_jax.ar import logits, qwen3
from blip3o_jax.bench.cost import hlo
from blip3o_jax.bench.sharding.buffers import unsharded
from tests import stock_weights, tiny
from tests.ar import torch_weights
from tests.conftest import relative_error

# heads * head_dim = 64 differs from the width; 203 rows pad to 208.
CFG = config.Qwen3Config(
    vocab_size=203,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_multiple=16,
    dtype="float32",
    remat="none",
)
B, L = 2, 12
POSITIONS = np.broadcast_to(np.arange(L), (B, L))
ONES = np.ones((B, L), np.int32)


@pytest.fixture(scope="module")
def model() -> qwen3.Qwen3:
    return stock_weights.jax_model(torch_weights.torch_model(CFG), CFG)


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CFG.vocab_size, (B, L))


def forward(model, tokens_BL, positions_BL=POSITIONS, segment_ids_BL=ONES):
    return model(model.embed(tokens_BL), positions_BL, segment_ids_BL)


@nnx.jit
def loss_and_gradients(model: qwen3.Qwen3, tokens_BL: jax.Array):
    """Return next-token cross entropy, its gradients, and what it was computed from."""

    def loss(model):
        hidden_BLD = forward(model, tokens_BL)
        logits_BLV = model.logits(hidden_BLD)
        logprobs_BLV = jax.nn.log_softmax(logits_BLV[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs_BLV, tokens_BL[:, 1:, None], axis=-1)), (
            hidden_BLD,
            logits_BLV,
        )

    return nnx.value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_logits_and_gradients_equal_transformers(tied):
    cfg = dataclasses.replace(CFG, tie_word_embeddings=tied)
    reference, ids = torch_weights.torch_model(cfg), torch.tensor(tokens())
    out = reference(ids, labels=ids, output_hidden_states=True)
    out.loss.backward()
    (loss, (hidden, logits)), gradients = loss_and_gradients(
        stock_weights.jax_model(reference, cfg), tokens()
    )
    # float32 rounding through three layers is some 1e-6.
    assert relative_error(hidden, out.hidden_states[-1].detach()) < 1e-5
    assert relative_error(logits[..., : cfg.vocab_size], out.logits.detach()) < 1e-5
    assert np.all(np.asarray(logits[..., cfg.vocab_size :]) == -np.inf)
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    want = stock_weights.convert(stock_weights.gradients(reference), cfg)
    got = stock_weights.flat(gradients)
    assert got.keys() == want.keys()
    errors = {path: relative_error(got[path], want[path]) for path in want}
    assert max(errors.values()) < 1e-4, errors


def test_logits_of_a_slice_of_the_head(model):
    hidden = jax.random.normal(jax.random.key(0), (3, CFG.hidden_size))
    whole = model.logits(hidden)
    assert whole.shape == (3, 208) and whole.dtype == jnp.float32
    assert relative_error(model.logits(hidden, rows=(50, 120)), whole[:, 50:120]) < 1e-6


def test_hidden_states_depend_on_no_later_token(model):
    x_LD = model.embed(tokens()[:1])[0]

    def dependence(x_LD, t):
        hidden = lambda x: model(x[None], POSITIONS[:1], ONES[:1])[0, t].sum()
        return jnp.abs(jax.grad(hidden)(x_LD)).sum(axis=-1)

    depends_TS = np.asarray(jax.jit(jax.vmap(dependence, (None, 0)))(x_LD, jnp.arange(L))) > 0
    assert np.array_equal(depends_TS, np.tri(L, dtype=bool))


def test_packed_rows_equal_separate_rows(model):
    ids = tokens()[0]
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = np.array([[*range(5), *range(4), 0, 0, 0]])
    packed = forward(model, ids[None], positions, segments)[0]
    first = forward(model, ids[None, :5], POSITIONS[:1, :5], ONES[:1, :5])[0]
    second = forward(model, ids[None, 5:9], POSITIONS[:1, :4], ONES[:1, :4])[0]
    assert relative_error(packed[:9], jnp.concatenate([first, second])) < 1e-6
    assert np.all(np.isfinite(packed))


def residual_bytes(model: qwen3.Qwen3) -> int:
    """Return what the backward pass keeps from the forward pass, parameters aside."""
    pull = jax.eval_shape(
        lambda x: jax.vjp(lambda x: model(x, POSITIONS, ONES), x)[1], model.embed(tokens())
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def test_remat_keeps_less_and_changes_no_number(model):
    (loss, _), gradients = loss_and_gradients(model, tokens())
    kept = [residual_bytes(model)]
    for remat in ("dots", "full"):
        other = nnx.clone(model)
        other.cfg = dataclasses.replace(CFG, remat=remat)
        kept.append(residual_bytes(other))
        (other_loss, _), other_gradients = loss_and_gradients(other, tokens())
        assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
        for path, gradient in stock_weights.flat(gradients).items():
            assert relative_error(stock_weights.flat(other_gradients)[path], gradient) < 1e-5, path
    assert kept[0] > kept[1] > kept[2], kept


@pytest.mark.parametrize("vocab_size", [151936, 217210])
@pytest.mark.parametrize("sizes", [(1024, 3072), (2048, 6144)], ids=["0.6B", "1.7B"])
def test_parameter_count_of_the_published_sizes(sizes, vocab_size):
    cfg = config.Qwen3Config(
        vocab_size=vocab_size, hidden_size=sizes[0], intermediate_size=sizes[1]
    )
    with torch.device("meta"):
        reference = transformers.Qwen3ForCausalLM(torch_weights.torch_config(cfg))
    state = nnx.state(nnx.eval_shape(lambda: qwen3.Qwen3(cfg, rngs=nnx.Rngs(0))))
    count = sum(p.size for p in jax.tree.leaves(state))
    padding = (cfg.padded_vocab_size - vocab_size) * cfg.hidden_size
    assert count - padding == sum(p.numel() for p in reference.parameters())


def test_every_parameter_names_its_axes():
    cfg = dataclasses.replace(CFG, tie_word_embeddings=False)
    model = nnx.eval_shape(lambda: qwen3.Qwen3(cfg, rngs=nnx.Rngs(0)))
    axes = {
        "/".join(map(str, path)): variable.axes
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    assert axes == {
        "embedding": ("vocab", "embed"),
        "layers/attention/q/kernel": ("layers", "embed", "heads"),
        "layers/attention/k/kernel": ("layers", "embed", "kv_heads"),
        "layers/attention/v/kernel": ("layers", "embed", "kv_heads"),
        "layers/attention/o/kernel": ("layers", "heads", "embed"),
        "layers/attention/q_norm/scale": ("layers", "norm"),
        "layers/attention/k_norm/scale": ("layers", "norm"),
        "layers/attention_norm/scale": ("layers", "norm"),
        "layers/mlp/gate/kernel": ("layers", "embed", "mlp"),
        "layers/mlp/up/kernel": ("layers", "embed", "mlp"),
        "layers/mlp/down/kernel": ("layers", "mlp", "embed"),
        "layers/mlp_norm/scale": ("layers", "norm"),
        "norm/scale": ("norm",),
        "lm_head/kernel": ("embed", "vocab"),
    }


@pytest.mark.usefixtures("optimizations")
@pytest.mark.parametrize("mesh", [("fsdp", 2, 4), ("fsdp_tp", 2, 2, 2), ("fsdp_sp", 2, 2)])
def test_no_device_holds_the_whole_table_or_its_gradient(mesh):
    """Look up many more tokens than the table has rows, where gathering it would be the shorter
    way. The gradient is the sum over all.
    """
    strategy = tiny.strategy(*mesh, sequence=2 if mesh[0] == "fsdp_sp" else 1)
    cfg = dataclasses.replace(CFG, hidden_size=48)
    rng = np.random.default_rng(0)
    table_VD = rng.normal(size=(cfg.padded_vocab_size, 48)).astype(np.float32)
    ids_BL = rng.integers(0, cfg.vocab_size, (64, 64)).astype(np.int32)
    weights_BLD = rng.normal(size=(64, 64, 48)).astype(np.float32)

    def loss(table_VD, ids_BL):
        model = qwen3.Qwen3(cfg, rngs=nnx.Rngs(0))
        model.embedding[...] = table_VD
        with nn.sharding_resolver(strategy.resolver), nn.part("ar"):
            return jnp.sum(model.embed(ids_BL) * weights_BLD)

    at = strategy.sharding("ar", ("vocab", "embed"), table_VD.shape)
    shardings = at, strategy.batch_sharding()
    compiled = (
        jax.jit(jax.grad(loss), in_shardings=shardings, out_shardings=at)
        .lower(table_VD, ids_BL)
        .compile()
    )
    table = jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype, sharding=at)
    assert unsharded(hlo.parse(compiled.as_text()), {"ar": {"embedding": table}}) == []
    want_VD = np.zeros_like(table_VD)
    np.add.at(want_VD, ids_BL, weights_BLD)
    placed = [
        jax.device_put(x, sharding)
        for x, sharding in zip((table_VD, ids_BL), shardings, strict=True)
    ]
    assert relative_error(compiled(*placed), want_VD) < 1e-6


def test_initial_values():
    model = qwen3.Qwen3(CFG, rngs=nnx.Rngs(0))
    for path, value in stock_weights.flat(nnx.state(model)).items():
        if "norm" in path:
            assert np.all(value == 1), path
        else:
            assert float(value.std()) == pytest.approx(CFG.initializer_range, rel=0.05), path


def test_embeddings_may_start_at_a_scale_of_their_own():
    model = qwen3.Qwen3(
        dataclasses.replace(CFG, embedding_range=0.7, tie_word_embeddings=False), rngs=nnx.Rngs(0)
    )
    assert float(model.embedding[...].std()) == pytest.approx(0.7, rel=0.05)
    assert float(model.lm_head.kernel.std()) == pytest.approx(CFG.initializer_range, rel=0.05)


def test_resize_embeddings_keeps_old_rows_and_starts_new_ones_at_their_mean(rng):
    table = rng.normal(size=(6, 3)).astype(np.float32)
    grown = np.asarray(logits.resize_embeddings(table, used=4, rows=9))
    assert np.array_equal(grown[:4], table[:4])
    assert np.allclose(grown[4:], table[:4].mean(axis=0), atol=1e-7)
    with pytest.raises(ValueError, match="used=7"):
        logits.resize_embeddings(table, used=7, rows=9)
