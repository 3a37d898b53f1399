"""The train step on a tiny joint model: the same in any number of micro-batches, and what it moves.
The same on any mesh: test_strategies.py.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip3o_jax import config as config_lib
from blip3o_jax.train.freezing import trainable_filter
from blip3o_jax.train.optimizer import learning_rate
from blip3o_jax.train.stages import STAGES, Loss, make_loss
from blip3o_jax.train.state import COUNTERS, create_state, plan_state
from blip3o_jax.train.train_step import make_step
from tests import tiny
from tests.train.states import check_close, leaves, moments

DECAY = 0.75
MESH = tiny.MESHES["fsdp_tp"]


@functools.cache
def setup(supervise_prompt=False):
    """Return (configuration, image_token_offset, batch): the learning rate is at its height from
    the second step on.
    """
    cfg, image_token_offset, batch = tiny.prepared("joint", supervise_prompt)
    optimizer = dataclasses.replace(cfg.optimizer, ema_decay=DECAY, warmup_fraction=0.1)
    return (
        dataclasses.replace(cfg, optimizer=optimizer),
        image_token_offset,
        tiny.cached_batch(cfg, batch),
    )


@functools.cache
def initial():
    """Return the initial state on one device, as numpy arrays."""
    cfg, _, _ = setup()
    return jax.device_get(create_state(cfg, plan_state(cfg, tiny.strategy())))


@functools.cache
def compiled(accumulate=1):
    cfg, image_token_offset, _ = setup()
    cfg = dataclasses.replace(
        cfg, optimizer=dataclasses.replace(cfg.optimizer, accumulate=accumulate)
    )
    plan = plan_state(cfg, tiny.strategy())
    return make_step(cfg, plan, tiny.strategy(), make_loss(cfg, image_token_offset)), plan


def run(batches, accumulate=1):
    """Return (states after each step, metrics of each step) from the initial state."""
    step, plan = compiled(accumulate)
    state = jax.device_put(initial(), plan.shardings)
    states, metrics = [], []
    for batch in batches:
        state, values = step(jax.tree.map(jnp.copy, state), batch)
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics


@functools.cache
def two_steps():
    return run([setup()[2]] * 2)


OVERFLOWS = {  # of parameters 1.5e38 with a gradient of -2, one update further
    "a learning rate that is no number": optax.sgd(math.nan),
    "a sum that overflows": optax.sgd(1e38),
    "an update that overflows": optax.sgd(3e38),
    "an average that overflows": optax.sgd(3e37),  # where it is computed as half of a sum
    "fits": optax.sgd(1e37),
}


@pytest.mark.parametrize("case", OVERFLOWS)
def test_an_update_that_is_not_finite_is_not_applied(case):
    """Skip it although loss and gradient are finite. A learning rate that is no number is refused
    elsewhere, so a plan is made with it.
    """
    cfg, strategy = tiny.run_config(optimizer={"ema_decay": 0.5}), tiny.strategy()
    optimizer = optax.chain(optax.trace(0.9), OVERFLOWS[case])
    model = lambda params, frozen: params["part"]["a"]
    plan = types.SimpleNamespace(optimizer=optimizer, shardings=strategy.replicated(), model=model)
    loss = Loss(lambda a, batch, keys_B: (-2.0 * jnp.sum(a - jax.lax.stop_gradient(a)), {}))
    step = make_step(cfg, plan, strategy, loss)
    params = {"part": {"a": jnp.full(3, 1.5e38)}}
    counters = {name: jnp.zeros((), jnp.int32) for name in COUNTERS}
    state = {
        "params": params,
        "frozen": {},
        "opt": optimizer.init(params),
        "ema": params,
    } | counters
    after, metrics = step(state, {"bad_records": jnp.zeros(2, jnp.int32)})
    fits = case == "fits"
    assert int(metrics["skipped_steps"]) == int(metrics["bad_steps"]) == (not fits)
    for group in ("params", "opt", "ema"):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after[group]))
        same = all(
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (after[group], state[group])), strict=True)
        )
        assert same != fits, group


def test_sharded_muon_is_single_device():
    """Apply two updates from the same gradients. Orthogonalising lifts their smallest singular
    values, and with them rounding, by up to 3.4^5 = 450.
    """
    cfg, _, _ = setup()
    cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, name="muon"))
    rng = np.random.default_rng(0)
    weights = initial()["params"]
    grads = [
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), weights) for _ in range(2)
    ]
    results = []
    for strategy in (tiny.strategy(), tiny.strategy(**MESH)):
        plan = plan_state(cfg, strategy)
        params_at, opt_at = plan.shardings["params"], plan.shardings["opt"]
        update = jax.jit(plan.optimizer.update, out_shardings=(params_at, opt_at))
        opt, updates = jax.device_put(plan.optimizer.init(weights), opt_at), []
        for g in grads:
            moved, opt = update(
                jax.device_put(g, params_at), opt, jax.device_put(weights, params_at)
            )
            updates.append(moved)
        results.append(updates)
    kernel = results[1][1]["ar"]["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 32)}
    assert np.any(np.asarray(kernel))
    check_close(results[1], results[0], 1e-4)


def test_state_is_created_in_its_shards_with_the_values_of_one_device():
    """Create that of the smallest stage that shards: the random numbers of every parameter are
    compiled for each mesh.
    """
    cfg = tiny.run_config(stage="tokenizer")
    want, got = (
        create_state(cfg, plan_state(cfg, strategy))
        for strategy in (tiny.strategy(), tiny.strategy("fsdp", fsdp=8))
    )
    shardings = plan_state(cfg, tiny.strategy("fsdp", 1, 8, 1)).shardings
    for (path, a), (_, b), (_, s) in zip(leaves(got), leaves(want), leaves(shardings), strict=True):
        assert a.sharding.is_equivalent_to(s, a.ndim), path
        np.testing.assert_array_equal(a, b, err_msg=path)
    kernel = got["params"]["tokenizer"]["encode_task_layer"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16 // 8, 16)}


def test_given_parts_are_taken_as_they_are_and_the_others_drawn_as_without():
    cfg = tiny.run_config(stage="contrastive", optimizer={"ema_decay": DECAY})
    plan = plan_state(cfg, tiny.strategy())
    drawn = create_state(cfg, plan)
    part = {
        group: jax.tree.map(lambda x: x + 1, drawn[group]["tokenizer"])
        for group in ("params", "frozen")
    }
    got = create_state(cfg, plan, {"tokenizer": part})
    want = drawn | {group: drawn[group] | {"tokenizer": part[group]} for group in part}
    want["ema"] = want["params"]
    for (path, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_image_embeddings_start_at_the_codes_where_asked():
    """Check on a mesh as on one device: those rows of the table and nothing else, also in an AR
    that is given; the average too.
    """
    cfg, image_token_offset, _ = setup()
    cfg = dataclasses.replace(
        cfg, checkpoint=dataclasses.replace(cfg.checkpoint, image_embedding_init="codes")
    )
    drawn = initial()
    given = {
        part: {g: drawn[g][part] for g in ("params", "frozen") if part in drawn[g]}
        for part in STAGES["joint"].parts
    }
    states = []
    for strategy in (tiny.strategy(), tiny.strategy(**MESH)):
        plan = plan_state(cfg, strategy)
        with pytest.raises(ValueError, match="needs image_token_offset"):
            create_state(cfg, plan, {})
        here = {
            part: {g: jax.device_put(x, plan.shardings[g][part]) for g, x in groups.items()}
            for part, groups in given.items()
        }
        states.append(create_state(cfg, plan, here, image_token_offset))
    check_close(states[1]["params"], states[0]["params"], 1e-6)
    got = jax.device_get(states[1])
    rows = slice(image_token_offset, image_token_offset + cfg.model.tokenizer.codebook_size)
    table, before = got["params"]["ar"].pop("embedding"), drawn["params"]["ar"]["embedding"]
    assert np.all(np.any(table[rows] != before[rows], axis=1))
    np.testing.assert_array_equal(np.delete(table, rows, 0), np.delete(before, rows, 0))
    np.testing.assert_array_equal(got["ema"]["ar"].pop("embedding"), table)
    for group in ("params", "frozen"):
        for path, leaf in leaves(got[group]):
            np.testing.assert_array_equal(leaf, dict(leaves(drawn[group]))[path], err_msg=path)


def test_the_published_freezing():
    """Check that AR, connector and the DiT's caption layers move, each of their arrays; nothing
    else does, nor has it moments.
    """
    (_, state), _ = two_steps()
    trained = {path for path, _ in leaves(state["params"])}
    assert {path.split("'")[1] for path in trained} == {"ar", "connector", "dit"}
    dit = {path.split("'")[3] for path in trained if path.startswith("['dit']")}
    assert dit and all(name.startswith("caption") for name in dit)
    assert set(state["frozen"]) == {"tokenizer", "dit", "vae"}
    for moment in moments(state):
        assert {path for path, _ in leaves(moment)} == trained
    for (path, a), (_, b) in zip(leaves(state["params"]), leaves(initial()["params"]), strict=True):
        assert np.any(np.asarray(a) != b), path
    for (path, a), (_, b) in zip(leaves(state["frozen"]), leaves(initial()["frozen"]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_a_part_that_is_none_has_no_strategy():
    with pytest.raises(config_lib.ConfigError, match=r"mesh\.parts\[0\]\[0\]='dti' is not one of"):
        plan_state(setup()[0], tiny.strategy("fsdp", fsdp=2, parts=(("dti", "dp"),)))


def test_all_can_be_trained_by_one_field():
    cfg = dataclasses.replace(setup()[0], trainable=("(ar|connector|dit)/.*",))
    assert trainable_filter(cfg)("dit/layers/attention/q/kernel") and not trainable_filter(cfg)(
        "vae/decoder/x"
    )
    assert set(plan_state(cfg, tiny.strategy()).abstract["frozen"]) == {"tokenizer", "vae"}
    with pytest.raises(
        config_lib.ConfigError,
        match=r"trainable=\('art/\.\*',\) matches no parameter of stage 'joint'",
    ):
        plan_state(dataclasses.replace(cfg, trainable=("art/.*",)), tiny.strategy())
    with pytest.raises(
        config_lib.ConfigError, match=r"trainable\[0\]='ar/\(' must be a regular expression"
    ):
        trainable_filter(dataclasses.replace(cfg, trainable=("ar/(",)))


@pytest.mark.parametrize("supervise_prompt", [False, True])
def test_micro_batches_are_the_whole_batch(supervise_prompt):
    """Supervise the prompt, so that rows have different numbers of labels: every label counts the
    same. Noise, time and dropped conditions are the rows' own: the flow loss is the same too.
    """
    batch = setup(supervise_prompt)[2]
    labels_B = batch["loss_mask"][:, 1:].sum(axis=1)
    assert (len(set(labels_B)) > 1) == supervise_prompt
    (want,), (want_metrics,) = run([batch])
    (got,), (metrics,) = run([batch], accumulate=2)
    assert metrics == pytest.approx(want_metrics, rel=1e-5)
    assert metrics["totals/tokens"] == np.count_nonzero(batch["segment_ids"]) < batch["tokens"].size
    check_close(list(moments(got)), list(moments(want)), 1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    cfg, _, batch = setup()
    latents = batch["latents"].copy()
    latents[3, 0, 0, 0] = np.inf
    poisoned = batch | {"latents": latents}
    bad = batch | {"bad_records": np.array([0, 2, 0, 0, 1, 0, 0, 0], np.int32)}
    (first, second, third, fourth), metrics = run([batch, poisoned, poisoned, bad])
    for name in ("params", "opt", "ema"):
        for (path, a), (_, b) in zip(leaves(first[name]), leaves(third[name]), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path)
    assert not np.isfinite(metrics[1]["loss"]) and not np.isfinite(metrics[1]["grad_norm"])
    column = lambda name: [m[name] for m in metrics]
    assert column("bad_steps") == [0, 1, 2, 0]
    assert column("skipped_steps") == [0, 1, 2, 2]
    assert column("bad_records") == [0, 0, 0, 3]
    assert [int(s["step"]) for s in (first, second, third, fourth)] == [1, 2, 3, 4]
    # The rate that is reported is the one the optimizer applies: its clock stood still.
    schedule = learning_rate(cfg.optimizer, cfg.steps)
    assert column("learning_rate") == pytest.approx([float(schedule(n)) for n in (0, 1, 1, 1)])
    # As if the two had not been there, but for the random keys, which go by the step.
    assert int(optax.tree.get_all_with_path(fourth["opt"], "count")[0][1]) == 2


def test_the_average_follows_the_parameters():
    (first, second), _ = two_steps()
    for name, p0, p1, p2, got in zip(
        *zip(*leaves(initial()["params"]), strict=True),
        jax.tree.leaves(first["params"]),
        jax.tree.leaves(second["params"]),
        jax.tree.leaves(second["ema"]),
        strict=True,
    ):
        want = DECAY * (DECAY * p0 + (1 - DECAY) * np.asarray(p1)) + (1 - DECAY) * np.asarray(p2)
        assert np.linalg.norm(np.asarray(got) - want) <= 1e-6 * max(np.linalg.norm(want), 1e-6), (
            name
        )


def test_norms_are_reported_for_each_part_and_in_all():
    (first, _), (metrics, _) = two_steps()
    parts = [metrics[f"grad_norm/{part}"] for part in ("ar", "connector", "dit")]
    assert all(norm > 0 for norm in parts)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(np.sum(np.square(parts))), rel=1e-6)
    # The gradient is longer than 1, so it was clipped to that; the first moment is a share of it.
    assert metrics["grad_norm"] > 1
    mu, _ = moments(first)
    assert float(optax.tree.norm(mu)) == pytest.approx(1 - setup()[0].optimizer.b1, rel=1e-5)


def test_every_stage_names_parts_and_fields_that_exist():
    from blip3o_jax.blip3o import MODEL_PARTS
    from blip3o_jax.data.examples import FIELDS

    assert set(STAGES) == set(config_lib.STAGE_NAMES)
    for stage in STAGES.values():
        assert set(stage.parts) <= set(MODEL_PARTS) and set(stage.fields) <= set(FIELDS)


def test_what_a_family_holds_constant_is_trained_only_where_the_configuration_names_it():
    embedding, projection = (
        f"tokenizer/bottleneck/codebook/{name}" for name in ("embedding", "embedding_proj/kernel")
    )
    for trainable, wanted in (((), (False, True)), (("tokenizer/.*",), (True, True))):
        found = trainable_filter(config_lib.Config(stage="tokenizer", trainable=trainable))
        assert (found(embedding), found(projection)) == wanted
