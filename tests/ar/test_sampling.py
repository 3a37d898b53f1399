import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import config
from blip3o_jax.ar import sampling
from blip3o_jax.ar.qwen3 import Qwen3
from tests.conftest import relative_error

CFG = config.Qwen3Config(
    vocab_size=90,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    vocab_multiple=16,
    dtype="float32",
    remat="none",
)
IMAGE_IDS, N = (30, 80), 9
LENGTHS = [6, 2]
SETTINGS = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "full": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "truncated": {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
}


@pytest.fixture(scope="module")
def model() -> Qwen3:
    return Qwen3(CFG, rngs=nnx.Rngs(0))


@functools.partial(
    nnx.jit,
    static_argnames=("temperature", "top_k", "top_p", "guidance", "group", "return_support"),
)
def generate(model, tokens_BL, lengths_B, keys_B, **settings):
    return sampling.generate_image_tokens(
        model, tokens_BL, lengths_B, keys_B, num_tokens=N, image_ids=IMAGE_IDS, **settings
    )


@nnx.jit
def full(model: Qwen3, tokens_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return hidden states and image logits of one unpadded row."""
    L = len(tokens_L)
    hidden = model(model.embed(tokens_L[None]), jnp.arange(L)[None], jnp.ones((1, L), jnp.int32))[0]
    return hidden, model.logits(hidden)[:, slice(*IMAGE_IDS)]


def prompts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for b, n in enumerate(LENGTHS):
        tokens[b, :n] = rng.integers(0, CFG.vocab_size, n)
    return tokens, np.array(LENGTHS)


def keys(count: int = len(LENGTHS)) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(count))


def expected_logprobs(
    logits_V: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """Return the definition, in float64 and class by class: -inf for what cannot be drawn."""
    weights = np.exp(logits_V.astype(np.float64) / temperature)
    order = np.argsort(-weights, kind="stable")[: top_k or len(weights)]
    kept, mass = [], 0.0
    for i in order:
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / weights[order].sum()
    out = np.full(len(weights), -np.inf)
    out[kept] = np.log(weights[kept] / weights[kept].sum())
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_a_mixed_batch_equals_the_prompt_alone_and_the_full_forward(model, name):
    settings = SETTINGS[name]
    tokens, lengths = prompts()
    drawn = generate(model, tokens, lengths, keys(), **settings)
    ids, hidden, logprobs = (
        np.asarray(x) for x in (drawn.ids_BN, drawn.hidden_BTD, drawn.logprobs_BN)
    )
    assert (
        ids.shape == (2, N)
        and hidden.shape == (2, N + 1, CFG.hidden_size)
        and logprobs.shape == (2, N)
    )
    assert ids.min() >= IMAGE_IDS[0] and ids.max() < IMAGE_IDS[1]
    for b, n in enumerate(LENGTHS):
        row_hidden, row_logits = (
            np.asarray(x)[n - 1 :] for x in full(model, np.concatenate([tokens[b, :n], ids[b]]))
        )
        assert relative_error(hidden[b], row_hidden) < 1e-5
        if name == "greedy":
            assert np.array_equal(ids[b], IMAGE_IDS[0] + row_logits[:-1].argmax(-1))
            assert np.all(logprobs[b] == 0)
        else:
            want = [
                expected_logprobs(row_logits[i], **settings)[ids[b, i] - IMAGE_IDS[0]]
                for i in range(N)
            ]
            assert np.allclose(logprobs[b], want, atol=1e-4)
    # The short row alone, without the padding it has in the batch.
    alone = generate(model, tokens[1:, : LENGTHS[1]], lengths[1:], keys()[1:], **settings)
    assert np.array_equal(alone[0][0], ids[1])
    assert relative_error(alone[1][0], hidden[1]) < 1e-5
    assert np.allclose(alone[2][0], logprobs[1], atol=1e-5)


def test_guidance_leans_away_from_the_tokens_without_their_prompt(model):
    """Compare every choice and its log-probability from two full forwards, of the prompt and the
    ids so far, and of the scale token and the ids so far; the hidden states are the former's.
    """
    settings, (tokens, lengths) = SETTINGS["truncated"], prompts()
    guided = generate(model, tokens, lengths, keys(), guidance=3.0, **settings)
    ids, hidden, logprobs = (
        np.asarray(x) for x in (guided.ids_BN, guided.hidden_BTD, guided.logprobs_BN)
    )
    for b, n in enumerate(LENGTHS):
        row_hidden, with_prompt = (
            np.asarray(x)[n - 1 :] for x in full(model, np.concatenate([tokens[b, :n], ids[b]]))
        )
        _, alone = full(model, np.concatenate([tokens[b, n - 1 : n], ids[b]]))
        logits = np.asarray(alone) + 3 * (with_prompt - np.asarray(alone))
        assert relative_error(hidden[b], row_hidden) < 1e-5
        want = [
            expected_logprobs(logits[i], **settings)[ids[b, i] - IMAGE_IDS[0]] for i in range(N)
        ]
        assert np.allclose(logprobs[b], want, atol=1e-4)
    unguided = generate(model, tokens, lengths, keys(), guidance=1.0, **settings)
    assert not np.array_equal(unguided[0], ids)
    assert np.array_equal(unguided[0], generate(model, tokens, lengths, keys(), **settings)[0])


@pytest.mark.parametrize("unroll", [False, True], ids=["scanned", "laid out"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_images_of_a_prompt_share_its_reading(guidance, unroll):
    """Sample three images each of two prompts: the same as with a prefill for every image."""
    model = Qwen3(dataclasses.replace(CFG, unroll=unroll), rngs=nnx.Rngs(0))
    settings, (tokens, lengths) = SETTINGS["truncated"] | {"guidance": guidance}, prompts()
    shared = generate(model, tokens, lengths, keys(6), group=3, **settings)
    alone = generate(
        model, np.repeat(tokens, 3, axis=0), np.repeat(lengths, 3), keys(6), **settings
    )
    assert (
        np.array_equal(shared.ids_BN, alone.ids_BN) and len(np.unique(shared.ids_BN, axis=0)) == 6
    )
    assert relative_error(shared.hidden_BTD, alone.hidden_BTD) < 1e-6
    assert np.allclose(shared.logprobs_BN, alone.logprobs_BN, atol=1e-5)


def test_the_classes_that_could_be_drawn(model):
    """Compare the support of the first image token with the definition; none is returned for the
    full softmax.
    """
    settings, (tokens, lengths) = SETTINGS["truncated"], prompts()
    drawn = generate(model, tokens, lengths, keys(), return_support=True, **settings)
    for b, n in enumerate(LENGTHS):
        _, logits = full(model, tokens[b, :n])
        want = np.isfinite(expected_logprobs(np.asarray(logits)[-1], **settings))
        got = np.unpackbits(np.asarray(drawn.support_BNX[b, 0]), count=len(want)).astype(bool)
        assert np.array_equal(got, want) and want.sum() < 12
    assert (
        generate(
            model, tokens, lengths, keys(), return_support=True, **SETTINGS["full"]
        ).support_BNX
        is None
    )


def test_ids_depend_on_the_key_and_differ_between_rows_of_one_prompt(model):
    tokens, _ = prompts()
    same = np.repeat(tokens[:1], 2, axis=0)
    ids = generate(model, same, np.full(2, LENGTHS[0]), keys(), **SETTINGS["full"]).ids_BN
    assert not np.array_equal(ids[0], ids[1])
    # Fresh noise at every token: no row is one id throughout.
    assert all(len(set(row)) > 2 for row in np.asarray(ids).tolist())


@pytest.mark.parametrize(
    "temperature,top_k,top_p",
    [(1, 0, 1), (0.7, 5, 1), (1, 0, 0.6), (2, 8, 0.9), (1, 3, 1e-6), (1, 99, 1)],
)
def test_truncated_distribution_equals_its_definition(rng, temperature, top_k, top_p):
    logits = rng.normal(size=(4, 20)).astype(np.float32) * 2
    settings = dict(temperature=float(temperature), top_k=top_k, top_p=float(top_p))
    classes, logprobs = sampling.truncate(logits, **settings)
    got = np.full((4, 20), -np.inf)
    np.put_along_axis(got, np.asarray(classes), np.asarray(logprobs), axis=-1)
    want = np.stack([expected_logprobs(row, **settings) for row in logits])
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    assert np.allclose(got[np.isfinite(want)], want[np.isfinite(want)], atol=1e-6)


def test_truncation_of_a_distribution_worked_out_by_hand():
    # p = .4 .3 .2 .1; top-k 3 leaves 4/9 3/9 2/9, of which top-p 0.75 keeps the first two (0.777 >=
    # 0.75): 4/7 3/7.
    classes, logprobs = sampling.truncate(
        jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])), temperature=1.0, top_k=3, top_p=0.75
    )
    assert np.array_equal(classes, [[1, 3, 2]])
    assert np.allclose(np.exp(logprobs), [[4 / 7, 3 / 7, 0]], atol=1e-6)


def test_draws_follow_the_distribution_and_report_its_log_probability():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    draw = functools.partial(sampling.sample_token, temperature=1.0, top_k=3, top_p=0.75)
    choice, logprob, _ = draw(jnp.tile(logits, (4000, 1)), keys(4000))
    shares = np.bincount(choice, minlength=4) / 4000
    assert shares[0] == shares[2] == 0
    assert abs(shares[1] - 4 / 7) < 0.03  # four standard deviations
    assert np.allclose(np.exp(logprob), np.where(np.asarray(choice) == 1, 4 / 7, 3 / 7), atol=1e-6)


def test_a_swap_of_two_almost_equal_candidates_does_not_change_the_draw():
    logits = jax.random.normal(jax.random.key(0), (64, 30))
    draw = functools.partial(sampling.sample_token, temperature=1.0, top_k=20, top_p=0.95)
    choice, _, _ = draw(logits, keys(64))
    # Equal logits in pairs, nudged one way and then the other: ranks swap all over, the draw must
    # not.
    paired = jnp.repeat(logits[:, ::2], 2, axis=1)
    nudge = jnp.tile(jnp.array([1e-6, 0.0]), 15)
    assert np.array_equal(draw(paired + nudge, keys(64))[0], draw(paired - nudge, keys(64))[0])
    assert len(set(np.asarray(choice).tolist())) > 10


def test_bfloat16_decoding_uses_the_numbers_training_uses():
    """Check that parameters are cast once before the loop; that must not change what each use
    computes.
    """
    model = Qwen3(dataclasses.replace(CFG, dtype="bfloat16"), rngs=nnx.Rngs(0))
    cast = sampling._cast_params(model)
    assert cast.embedding.dtype == jnp.bfloat16 and model.embedding.dtype == jnp.float32
    tokens, _ = prompts()
    assert np.array_equal(full(cast, tokens[0])[1], full(model, tokens[0])[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_tokens": 0},
        {"image_ids": (30, 91)},
        {"temperature": -1.0},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(model, wrong):
    tokens, lengths = prompts()
    settings = {"num_tokens": N, "image_ids": IMAGE_IDS} | wrong
    with pytest.raises(ValueError, match=f"sampling: {next(iter(wrong))}="):
        sampling.generate_image_tokens(model, tokens, lengths, keys(), **settings)
