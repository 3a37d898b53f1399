"""Run whole, tiny runs: updates are the same on any mesh, and after any interruption."""

import dataclasses
import json
import re

import jax
import numpy as np
import optax
import pytest

from blip3o_jax import config
from blip3o_jax.config import ConfigError, UserError
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.rl import rollout_programs, trainer
from blip3o_jax.rl.rollouts import RolloutIterator
from blip3o_jax.train import checkpoint, loop
from blip3o_jax.train.metrics import read_rows
from blip3o_jax.train.state import plan_state
from blip3o_jax.train.workdir import WorkdirLock
from tests import tiny
from tests.conftest import relative_error
from tests.rl import runs

# What depends on the clock or on how much has been compiled.
CLOCKS = ("time", "perf/")
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2, "strategy": "fsdp_tp"}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Give runs that ask for one device one of the eight."""
    whole = Strategy.of

    def of(mesh, devices=None, **more):
        count = mesh.data * mesh.fsdp * max(1, mesh.tensor)
        return whole(mesh, devices or jax.devices()[:count], **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Strategy, "of", of)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return policy -> the workdir of its run of four updates."""
    found = {}
    for policy in ("ar", "both"):
        found[policy] = tmp_path_factory.mktemp(policy)
        trainer.run(runs.run_config(policy, checkpoint=saved(1)), found[policy])
    return found


def saved(every):
    return dataclasses.replace(runs.run_config().checkpoint, every=every, keep=9)


def numbers(workdir):
    return [
        {name: value for name, value in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def weights(workdir):
    root, step = checkpoint.find(workdir)
    plan = plan_state(checkpoint.read_config(root), tiny.strategy())
    checkpoints = checkpoint.Checkpoints(root, 9)
    state, _ = checkpoints.restore(step, plan)
    checkpoints.close()
    return state["params"]


def test_the_policy_that_drew_is_the_one_that_is_scored(whole):
    """Check that before an update all ratios are 1, up to the float32 rounding of log-probabilities
    of 3 nats: a few units of 2.4e-7."""
    for row in numbers(whole["ar"]) + numbers(whole["both"]):
        assert row["rl/ratio_gap"] < 1e-6 and row["rl/ratio_gap_max"] < 1e-5
    assert all(row["rl/flow/ratio_gap_max"] < 1e-6 for row in numbers(whole["both"]))
    assert all(
        row["train/grad_norm/dit"] > 0 and row["train/grad_norm/ar"] > 0
        for row in numbers(whole["both"])
    )


def test_the_first_kl_is_zero_and_then_grows(whole):
    first, *_, last = numbers(whole["both"])
    assert abs(first["rl/kl"]) < 1e-10 and abs(first["rl/flow/kl"]) < 1e-10
    assert last["rl/kl"] > 1e-4 and last["rl/flow/kl"] > 1e-6


def test_eight_devices_do_the_same(whole, tmp_path):
    """Compare rewards, which are equal (redness.py), and parameters after four updates to 1e-5.
    Gradients differ by 3e-6, and Adam turns that into 5e-6 of the biases, which start from 0."""
    trainer.run(runs.run_config("both", mesh=EIGHT), tmp_path)
    got, want = weights(tmp_path), weights(whole["both"])
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5, jax.tree_util.keystr(path)
    for mine, theirs in zip(numbers(tmp_path), numbers(whole["both"]), strict=True):
        assert mine["rl/reward"] == theirs["rl/reward"]
    hashes = [
        [line["image"] for line in read_rows(d / "rollouts.jsonl")]
        for d in (tmp_path, whole["both"])
    ]
    assert np.mean([a == b for a, b in zip(*hashes, strict=True)]) > 0.5, (
        "images differ by more than a rounding here and there"
    )


@pytest.mark.parametrize("phase", ["rollout", "reward", "update", "save"])
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(whole, tmp_path, monkeypatch, phase):
    """Raise an exception in place of a kill: the loop runs no code of its own after it."""
    where = {
        "rollout": (RolloutIterator, "_sample_micro_batch"),
        "reward": (RolloutIterator, "_await_rewards"),
        "update": (loop._Run, "record"),
        "save": (checkpoint.Checkpoints, "save"),
    }[phase]
    with monkeypatch.context() as patch:
        calls, whole_call = [], getattr(*where)

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return whole_call(*args, **kwargs)

        patch.setattr(*where, call)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(runs.run_config("ar", checkpoint=saved(1)), tmp_path)
    trainer.run(runs.run_config("ar", checkpoint=saved(1)), tmp_path)
    assert numbers(tmp_path) == numbers(whole["ar"])
    assert read_rows(tmp_path / "rollouts.jsonl") == read_rows(whole["ar"] / "rollouts.jsonl")


def test_several_updates_on_a_rollout(tmp_path):
    """Check that the third update is off the policy that sampled (the first has learning rate 0); a
    run is saved between rollouts alone."""
    trainer.run(runs.run_config("ar", steps=6, num_iterations=3, checkpoint=saved(3)), tmp_path)
    rows = numbers(tmp_path)
    assert (
        rows[0]["rl/ratio_gap_max"] < 1e-5 < rows[2]["rl/ratio_gap"]
        and rows[3]["rl/ratio_gap_max"] < 1e-5 < rows[5]["rl/ratio_gap"]
    )
    assert rows[0]["rl/reward"] == rows[2]["rl/reward"] != rows[3]["rl/reward"]
    assert [line["rollout"] for line in read_rows(tmp_path / "rollouts.jsonl")] == [0] * 8 + [1] * 8


def test_stale_rewards_are_of_the_rollout_before(whole, tmp_path):
    """Check that its first rollout is the same; then it trains on samples from before the last
    update."""
    trainer.run(runs.run_config("ar", off_policy_steps=1), tmp_path)
    got, want = numbers(tmp_path), numbers(whole["ar"])
    assert (
        got[0]["rl/rewards/redness/mean"] == want[0]["rl/rewards/redness/mean"]
        and got[0]["rl/ratio_gap_max"] < 1e-5
    )
    assert got[2]["rl/ratio_gap"] > 1e-5


def test_truncated_sampling_is_replayed(tmp_path, capsys):
    truncated = dataclasses.replace(
        runs.run_config().rl.rollout, top_k=9, top_p=0.8, temperature=0.7, token_guidance=1.5
    )
    trainer.run(runs.run_config("ar", rollout=truncated, num_generations=2, steps=2), tmp_path)
    for row in numbers(tmp_path):
        assert (
            row["rl/ratio_gap_max"] < 1e-5
            and np.isfinite(row["rl/kl"])
            and row["train/grad_norm"] > 0
        )
    cfg = runs.run_config()
    for row in read_rows(tmp_path / "metrics.jsonl"):
        # An image has its tokens and those of its prompt, without the padding of the row.
        tokens = row["perf/tokens_per_s"] / row["perf/examples_per_s"]
        assert cfg.model.tokenizer.num_tokens < tokens < cfg.data.max_length
    assert re.search(r"rl  step 2/2  took \S+  reward ", capsys.readouterr().err), (
        "what a run is watched by comes first"
    )


@pytest.mark.parametrize("mesh", [None, {"data": 8, "fsdp": 1, "strategy": "dp"}])
def test_flow_compares_images_of_the_same_tokens(tmp_path, monkeypatch, mesh):
    """Check different initial noise too. On eight devices each image has its own prefill."""
    rollouts, make = [], rollout_programs.make_rollout

    def recorded(*args):
        program = make(*args)

        def call(*inputs):
            images, arrays = program(*inputs)
            rollouts.append(jax.tree.map(np.asarray, arrays))
            return images, arrays

        return call

    monkeypatch.setattr(rollout_programs, "make_rollout", recorded)
    trainer.run(runs.run_config("flow", mesh=mesh, steps=2), tmp_path)
    assert len(rollouts) == 2 and "image_ids" not in rollouts[0]
    for arrays in rollouts:
        hidden_PGTD = arrays["hidden"].reshape(2, 4, *arrays["hidden"].shape[1:])
        assert (hidden_PGTD == hidden_PGTD[:, :1]).all() and (
            hidden_PGTD[0, 0] != hidden_PGTD[1, 0]
        ).any()
        assert len(np.unique(arrays["latents"], axis=0)) == 8
    assert all(
        row["rl/flow/ratio_gap_max"] < 1e-6 and row["train/grad_norm/dit"] > 0
        for row in numbers(tmp_path)
    )


def test_the_log_says_what_each_image_was_drawn_from(whole):
    lines = read_rows(whole["ar"] / "rollouts.jsonl")
    assert [line["row"] for line in lines] == list(range(8)) * 4
    assert [line["index"] for line in lines] == list(range(32))
    for line in lines:
        assert line["prompt"] in runs.PROMPTS and line["metadata"]["prompt"] == line["prompt"]
        assert (
            line["parts"] == {"redness": pytest.approx(line["total"])} and len(line["image"]) == 64
        )
    first = [line["prompt"] for line in lines[:8]]
    assert first[:4] == [first[0]] * 4 and first[4:] == [first[4]] * 4 and first[0] != first[4]


@pytest.mark.parametrize(
    ("policy", "parts"), [("ar", {"ar"}), ("flow", {"dit"}), ("both", {"ar", "dit"})]
)
def test_the_optimizer_has_no_state_of_anything_frozen(policy, parts):
    """Check that both moments have the leaves of the trained parameters, and that there is no
    other array."""
    plan = plan_state(trainer.resolved(runs.run_config(policy)), tiny.strategy())
    shapes = lambda tree: [
        (jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)
    ]
    trained, opt = plan.abstract["params"], plan.abstract["opt"]
    assert set(trained) == parts
    assert all(shapes(optax.tree.get(opt, name)) == shapes(trained) for name in ("mu", "nu"))
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(opt)) == 2 * sum(
        leaf.ndim > 0 for leaf in jax.tree.leaves(trained)
    )


def test_the_reference_is_a_copy_of_what_is_trained_alone(tmp_path, monkeypatch):
    """Check the AR, with the diffusion head and all other parts left out."""
    held = {}

    def begin(self, context, prompts, pool, reference, *unused):
        held.update(reference=reference, frozen=context.plan.abstract["frozen"])
        raise KeyboardInterrupt

    monkeypatch.setattr(RolloutIterator, "__init__", begin)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(runs.run_config("ar"), tmp_path)
    assert set(held["reference"]) == {"ar"} and {"dit", "vae", "tokenizer"} <= set(held["frozen"])


def test_low_rank_factors_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    """Compare with the policy without factors, for any trained values. Stopped at the save of step
    4: B has moved by step 2, so A by step 3."""
    cfg = runs.run_config("ar", trainable=("ar/.*/lora_.*",), checkpoint=saved(1))
    ar = dataclasses.replace(cfg.model.ar, lora=dataclasses.replace(cfg.model.ar.lora, rank=2))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ar=ar))
    whole_save = checkpoint.Checkpoints.save

    def save(self, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        whole_save(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoints, "save", save)
        trainer.run(cfg, tmp_path)
    before = numbers(tmp_path)
    trainer.run(cfg, tmp_path)
    assert len(before) == 4 and numbers(tmp_path) == before and before[-1]["rl/kl"] > 0


def test_settings_that_change_between_two_starts(tmp_path):
    """Check that a reference may be added later, and that rollouts may not end between two
    checkpoints."""
    trainer.run(runs.run_config("ar", steps=1, kl_coef=0.0, checkpoint=saved(1)), tmp_path)
    trainer.run(runs.run_config("ar", steps=2, kl_coef=0.1, checkpoint=saved(1)), tmp_path)
    assert ["rl/kl" in row for row in numbers(tmp_path)] == [False, True]
    with pytest.raises(
        ConfigError, match=r"rl\.num_iterations=3 does not divide the 2 steps that .* has done"
    ):
        trainer.run(runs.run_config("ar", steps=6, num_iterations=3, checkpoint=saved(3)), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ()}, "rl.rewards is empty"),
        ({"prompts_file": ""}, "rl.prompts_file is empty"),
        ({"num_iterations": 3}, "steps=4 must be a multiple of rl.num_iterations=3"),
        ({"stage": "tokenizer"}, "reinforcement learning is for a model of stage 'joint'"),
        ({"checkpoint": config.CheckpointConfig()}, "checkpoint.init_from is empty"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer.resolved(runs.run_config(**changes))


def test_nothing_is_trained_that_has_no_gradient(tmp_path):
    with pytest.raises(ConfigError, match=r"names dit, which rl\.policy='ar' does not train"):
        trainer.run(runs.run_config("ar", trainable=("ar/.*", "dit/.*")), tmp_path)


def test_a_run_in_a_directory_in_use_starts_no_rewards(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(trainer, "RewardPool", lambda *args, **kwargs: started.append(args))
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="in use by another run"):
        trainer.run(runs.run_config("ar"), tmp_path)
    assert not started


def test_a_prompt_that_does_not_fit(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a red cat " * 40}) + "\n")
    with pytest.raises(UserError, match=r"data.max_length=72 leaves 68 next to the image"):
        trainer.run(runs.run_config("ar", prompts_file=str(prompts)), tmp_path / "run")


def test_a_gap_between_drawing_and_scoring_can_stop_the_run(tmp_path):
    with pytest.raises(
        UserError,
        match=r"step 1: sampling and scoring disagree by .* more than rl.max_ratio_gap=1e-12",
    ):
        trainer.run(runs.run_config("ar", max_ratio_gap=1e-12), tmp_path)


def test_images_without_a_reward_are_left_out_or_stop_the_run(tmp_path):
    """Use each prompt in one of two rollouts: in one of them half of the images have no score."""
    failing = (config.RewardConfig(name="python:tests.rl.redness.redness_but_of_pink"),)
    trainer.run(
        runs.run_config("ar", rewards=failing, retries=0, max_failed_fraction=0.5), tmp_path / "run"
    )
    rows = numbers(tmp_path / "run")
    assert sorted(row["rl/frac_reward_failed"] for row in rows) == [0, 0, 0.5, 0.5]
    assert rows[-1]["data/bad_records"] == 8 and rows[-1]["train/skipped_steps"] == 0
    assert [line["total"] is None for line in read_rows(tmp_path / "run" / "rollouts.jsonl")].count(
        True
    ) == 8
    with pytest.raises(
        UserError,
        match=r"4 of 8 images have no reward, .* rl\.max_failed_fraction=0\.4: "
        r"4 x .*its score is nan",
    ):
        trainer.run(
            runs.run_config("ar", rewards=failing, retries=0, max_failed_fraction=0.4),
            tmp_path / "strict",
        )


def test_groups_without_a_difference_are_refilled(tmp_path):
    """Use prompts of which half make such groups: of an epoch of two rollouts two groups are left,
    which is a batch. Metrics are of all samples."""
    reward = (config.RewardConfig(name="python:tests.rl.redness.redness_of_two"),)
    trainer.run(runs.run_config("ar", rewards=reward, dynamic_sampling=2, steps=3), tmp_path)
    rows, lines = numbers(tmp_path), read_rows(tmp_path / "rollouts.jsonl")
    assert max(row["rl/num_gen_batches"] for row in rows) > 1 and rows[-1]["train/grad_norm"] > 0
    first = 0
    for row in rows:
        after = first + int(row["rl/num_gen_batches"])
        mine = [line for line in lines if first <= line["rollout"] < after]
        flat = [line["prompt"] not in runs.PROMPTS[:2] for line in mine]
        assert row["rl/reward"] == pytest.approx(
            np.mean([line["total"] for line in mine]), rel=1e-5
        )
        assert row["rl/frac_reward_zero_std"] == np.mean(flat) and flat.count(False) >= 8, (
            "two groups of four that differ"
        )
        first = after
    assert len(lines) == 8 * first


def test_another_start_is_refused(whole, tmp_path):
    """Check that the reference of a resumed run is the one it began with."""
    cfg = runs.run_config("ar", steps=1, checkpoint=saved(1))
    trainer.run(cfg, tmp_path)
    other = tuple(
        (part, str(whole["ar"] if part == "ar" else path))
        for part, path in cfg.checkpoint.init_from
    )
    cfg = dataclasses.replace(
        cfg, steps=2, checkpoint=dataclasses.replace(cfg.checkpoint, init_from=other)
    )
    with pytest.raises(UserError, match="holds other weights than when this run started"):
        trainer.run(cfg, tmp_path)
