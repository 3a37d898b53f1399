"""Compare the joint loss with one computed from the parts, row by row, and check the other stages'
losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import blip3o
from blip3o_jax.train.joint_loss import joint_loss, sample_training_noise
from blip3o_jax.train.stages import STAGES, make_loss
from blip3o_jax.train.state import create_state, plan_state
from blip3o_jax.train.train_step import example_keys, make_step
from tests import tiny
from tests.conftest import relative_error


@functools.cache
def setup():
    """Return (model configuration, image_token_offset, graphdef, weights, batch, a key for each
    row)."""
    cfg, image_token_offset, batch = tiny.prepared("joint", supervise_prompt=True)
    batch = tiny.cached_batch(cfg, batch)
    batch["label_count"] = np.full(8, batch["loss_mask"][:, 1:].sum() / 8, np.float32)
    plan = plan_state(cfg, tiny.strategy())
    state = create_state(cfg, plan)
    return (
        cfg,
        image_token_offset,
        plan,
        (state["params"], state["frozen"]),
        batch,
        example_keys(0, jnp.int32(0), 8),
    )


@functools.cache
def joint(span, draws=1):
    """Return the function (weights, dropout, weight of the cross entropy) -> loss, metrics,
    gradients."""
    cfg, image_token_offset, plan, _, batch, keys_B = setup()

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def fn(weights, dropout, ce):
        def loss(params):
            settings = dataclasses.replace(
                cfg.loss, condition_span=span, condition_dropout=dropout, ce=ce, flow_samples=draws
            )
            return joint_loss(
                plan.model(params, weights[1]),
                batch,
                keys_B,
                loss=settings,
                image_token_offset=image_token_offset,
            )

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(weights[0])
        return value, metrics, gradients

    return fn


@functools.cache
def row_parts():
    """Compute one row from its parts: its logits, its velocity given a condition's hidden states,
    and that of the null condition."""
    _, _, plan, _, batch, _ = setup()
    length = batch["tokens"].shape[1]

    @jax.jit
    def hidden(weights, tokens_L, segment_ids_L):
        model = plan.model(*weights)
        hidden_BLD = model.ar(
            model.ar.embed(tokens_L[None]), jnp.arange(length)[None], segment_ids_L[None]
        )
        return hidden_BLD[0], model.ar.logits(hidden_BLD)[0]

    @jax.jit
    def velocity(weights, x_HWC, sigma, span_TD):
        model = plan.model(*weights)
        return model.dit(x_HWC[None], 1000 * sigma[None], model.connector(span_TD[None]))[0]

    return hidden, velocity


def expected(span, keep, draws=1):
    """Return (cross entropy, flow loss) in numpy, one row at a time; `keep`: which rows keep their
    condition."""
    cfg, image_token_offset, _, weights, batch, keys_B = setup()
    hidden, velocity = row_parts()
    nll, labels, flow = 0.0, 0, []
    for b in range(8):
        start = batch["image_span"][b] + 1
        tokens_L = batch["tokens"][b].copy()
        tokens_L[start : start + 4] = batch["codes"][b] + image_token_offset
        # The exact span as if all of the row were real: what comes after a token cannot matter to
        # it.
        segment_ids_L = batch["segment_ids"][b] if span == "last" else np.ones_like(tokens_L)
        hidden_LD, logits_LV = (
            np.asarray(x, np.float64) for x in hidden(weights, tokens_L, segment_ids_L)
        )
        for at in np.flatnonzero(batch["loss_mask"][b]):
            logits_V = logits_LV[at - 1][: cfg.model.ar.vocab_size]
            nll += (
                np.log(np.exp(logits_V - logits_V.max()).sum())
                + logits_V.max()
                - logits_V[tokens_L[at]]
            )
            labels += 1
        span_TD = hidden_LD[start - 1 : start + 4] if span == "exact" else hidden_LD[-5:]
        noise_key, sigma_key, _ = jax.random.split(keys_B[b], 3)
        z_HWC = batch["latents"][b]
        noises = np.asarray(jax.random.normal(noise_key, (draws, *z_HWC.shape)))
        span_TD = span_TD if keep[b] else 0 * span_TD
        for noise_HWC, uniform in zip(noises, jax.random.uniform(sigma_key, (draws,)), strict=True):
            sigma = 1 - np.floor(1000 * float(uniform)) / 1000
            x_HWC = (1 - sigma) * z_HWC + sigma * noise_HWC
            got_HWC = velocity(
                weights, jnp.float32(x_HWC), jnp.float32(sigma), jnp.float32(span_TD)
            )
            flow.append(np.mean((np.asarray(got_HWC) - (noise_HWC - z_HWC)) ** 2))
    return nll / labels, np.mean(flow)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_joint_loss_is_that_of_its_parts_row_by_row(dropout):
    """Compare float32 with float32 in other shapes: 1e-5."""
    _, _, _, weights, _, keys_B = setup()
    keep = [float(jax.random.uniform(jax.random.split(key, 3)[2])) >= dropout for key in keys_B]
    assert sum(keep) == {0.0: 8, 1.0: 0}.get(dropout, sum(keep)) and (
        dropout != 0.5 or 0 < sum(keep) < 8
    )
    ce, flow = expected("exact", keep)
    loss, metrics, _ = joint("exact")(weights, dropout, 0.25)
    assert relative_error(metrics["ce"], ce) < 1e-5
    assert relative_error(metrics["flow"], flow) < 1e-5
    assert relative_error(loss, 0.25 * ce + flow) < 1e-5


def test_draws_of_noise_are_averaged():
    _, _, _, weights, _, _ = setup()
    _, metrics, _ = joint("exact", draws=3)(weights, 0.0, 1.0)
    _, one, _ = joint("exact")(weights, 0.0, 1.0)
    assert relative_error(metrics["flow"], expected("exact", [True] * 8, draws=3)[1]) < 1e-5
    assert relative_error(metrics["flow"], one["flow"]) > 1e-4
    assert relative_error(metrics["ce"], one["ce"]) < 1e-6


def test_rows_without_their_caption_are_rows_that_open_with_the_scale_token():
    """Compare cross entropy and flow loss of eight rows whose captions are dropped with those of
    rows cut before the scale token, which start at position 0: rotary positions are relative."""
    cfg, image_token_offset, plan, weights, batch, keys_B = setup()

    @functools.partial(jax.jit, static_argnums=1)
    def loss(batch, dropout):
        settings = dataclasses.replace(cfg.loss, condition_dropout=0.0, caption_dropout=dropout)
        model = plan.model(*weights)
        return joint_loss(
            model, batch, keys_B, loss=settings, image_token_offset=image_token_offset
        )[1]

    index_L = np.arange(batch["tokens"].shape[1])
    answers = batch | {"loss_mask": batch["loss_mask"] * (index_L > batch["image_span"][:, None])}
    bare = dict(answers)
    for name in ("tokens", "loss_mask", "segment_ids"):
        bare[name] = np.zeros_like(answers[name])
        for row, of, start in zip(bare[name], answers[name], batch["image_span"], strict=True):
            row[: len(of) - start] = of[start:]
    bare["image_span"] = np.zeros_like(batch["image_span"])
    got, want, captioned = loss(answers, 1.0), loss(bare, 0.0), loss(answers, 0.0)
    for name, seen in (
        ("ce", 1e-4),
        ("flow", 2e-5),
    ):  # a DiT that was never trained hardly looks at its condition
        assert relative_error(got[name], want[name]) < seen / 4
        assert relative_error(got[name], captioned[name]) > seen


def test_rows_lose_caption_and_condition_together():
    """Check each by its own rate, and that the rows are the same where the rates are equal."""
    cfg, _, _, _, _, _ = setup()
    keys_B = example_keys(0, jnp.int32(1), 400)
    loss = dataclasses.replace(cfg.loss, caption_dropout=0.25, condition_dropout=0.25)
    drawn = sample_training_noise(keys_B, (2, 2, 1), cfg.model, loss)
    np.testing.assert_array_equal(drawn.captioned_B, drawn.keep_B)
    np.testing.assert_array_equal(drawn.keep_references_B, drawn.keep_B)
    assert 0.7 < np.mean(drawn.keep_B) < 0.8  # 0.75 with a deviation of 0.022
    drawn = sample_training_noise(
        keys_B, (2, 2, 1), cfg.model, dataclasses.replace(loss, caption_dropout=0.0)
    )
    assert np.all(drawn.captioned_B) and not np.all(drawn.keep_B)


def test_references_stay_where_the_instruction_alone_is_dropped():
    cfg, _, _, _, _, _ = setup()
    keys_B = example_keys(0, jnp.int32(1), 400)
    loss = dataclasses.replace(cfg.loss, condition_dropout=0.25, instruction_dropout=0.5)
    drawn = sample_training_noise(keys_B, (2, 2, 1), cfg.model, loss)
    assert not np.any(drawn.keep_B & ~drawn.keep_references_B)
    assert 0.2 < np.mean(drawn.keep_B) < 0.3 and 0.7 < np.mean(drawn.keep_references_B) < 0.8


def test_the_reference_takes_the_last_positions_of_the_row():
    """Check the window of the published weights, which holds end tags and padding; the cross
    entropy ignores it."""
    _, _, _, weights, batch, _ = setup()
    assert not batch["segment_ids"][
        :, -1
    ].any()  # every row ends in padding, so the two windows differ
    _, exact, _ = joint("exact")(weights, 0.0, 1.0)
    _, last, _ = joint("last")(weights, 0.0, 1.0)
    assert relative_error(last["flow"], expected("last", [True] * 8)[1]) < 1e-5
    assert relative_error(last["flow"], exact["flow"]) > 1e-4
    assert relative_error(last["ce"], exact["ce"]) < 1e-6


def test_the_flow_loss_reaches_the_decoder_through_the_frozen_dit():
    """Check that with the cross entropy's weight at 0 every layer of the decoder still has a
    gradient; with all conditions dropped before the connector none has, while the connector learns
    its null condition."""
    _, _, _, weights, _, _ = setup()
    _, _, with_condition = joint("exact")(weights, 0.0, 0.0)
    _, _, without = joint("exact")(weights, 1.0, 0.0)
    for path, gradient in jax.tree.leaves_with_path(with_condition["ar"]["layers"]):
        assert all(np.any(layer) for layer in gradient), jax.tree_util.keystr(path)
    assert not any(np.any(g) for g in jax.tree.leaves(without["ar"]))
    assert np.any(without["connector"]["linear2"]["bias"]) and not np.any(
        without["connector"]["linear1"]["kernel"]
    )


def test_parts_do_not_depend_on_which_others_there_are():
    cfg = tiny.model()
    alone = nnx.to_pure_dict(nnx.state(blip3o.Blip3o(cfg, ("connector",), seed=3)))
    both = nnx.to_pure_dict(nnx.state(blip3o.Blip3o(cfg, ("text_tower", "connector"), seed=3)))
    other = nnx.to_pure_dict(nnx.state(blip3o.Blip3o(cfg, ("connector",), seed=4)))
    kernel = lambda parts: np.asarray(parts["connector"]["linear1"]["kernel"])
    np.testing.assert_array_equal(kernel(alone), kernel(both))
    assert np.any(kernel(alone) != kernel(other))


def test_image_embeddings_start_at_projections_of_their_codes():
    cfg = tiny.model()
    ar = dataclasses.replace(
        cfg.ar, hidden_size=1024, embedding_range=0.5, vocab_size=360, tie_word_embeddings=False
    )
    cfg = dataclasses.replace(cfg, ar=ar)
    model = blip3o.Blip3o(cfg, ("tokenizer", "ar"), seed=0)
    before = [np.array(x) for x in (model.ar.embedding[...], model.ar.head().T)]
    model.init_image_embeddings_from_codes(320, seed=0)
    codes = np.array(model.tokenizer.bottleneck.codebook.table())
    codes /= np.sqrt(np.mean(np.sum(codes**2, axis=-1)))
    distances = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)
    tables = [np.array(x) for x in (model.ar.embedding[...], model.ar.head().T)]
    for table, old, deviation in zip(tables, before, (0.5, cfg.ar.initializer_range), strict=True):
        rows = slice(320, 352)
        np.testing.assert_array_equal(np.delete(table, rows, 0), np.delete(old, rows, 0))
        assert np.std(table[rows]) == pytest.approx(deviation, rel=0.1)
        # Distances among 32 rows survive a projection onto 1024 dimensions to within a few times
        # sqrt(1 / 1024).
        want = distances(codes)
        np.testing.assert_allclose(
            distances(table[rows] / deviation) / np.sqrt(1024), want, atol=0.15 * want.max()
        )
    assert abs(np.corrcoef(tables[0][320:352].ravel(), tables[1][320:352].ravel())[0, 1]) < 0.1


def test_pixels_are_scaled_to_minus_one_and_one():
    scaled = blip3o.scale_pixels(np.array([0, 51, 255], np.uint8))
    assert np.asarray(scaled).tolist() == pytest.approx([-1, -0.6, 1])


@pytest.mark.parametrize("stage", ["autoencoder", "contrastive", "dense contrastive", "tokenizer"])
def test_other_stages_learn_one_batch(stage):
    """Train a few steps on one batch: the loss falls by more than its jitter."""
    kind, _, stage = stage.rpartition(" ")
    cfg, image_token_offset, batch = tiny.prepared(stage)
    optimizer = dataclasses.replace(cfg.optimizer, learning_rate=3e-3, warmup_fraction=0.01)
    loss = dataclasses.replace(cfg.loss, dense=3.0 if kind else 0.0)
    cfg = dataclasses.replace(cfg, steps=100, optimizer=optimizer, loss=loss)
    strategy = tiny.strategy()
    plan = plan_state(cfg, strategy)
    state, step = (
        create_state(cfg, plan),
        make_step(cfg, plan, strategy, make_loss(cfg, image_token_offset)),
    )
    assert {str(path[0].key) for path, _ in jax.tree.leaves_with_path(state["params"])} == {
        pattern.split("/")[0] for pattern in STAGES[stage].trainable
    }
    losses = []
    for _ in range(12):
        state, metrics = step(state, jax.device_put(batch, strategy.batch_sharding()))
        losses.append(float(metrics["dense" if kind else "loss"]))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.97 * losses[1], losses
