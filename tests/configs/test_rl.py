"""configs/rl.py takes a checkpoint as it is, and a recipe."""

import dataclasses
import pathlib

import pytest

from blip3o_jax.config import ConfigError, UserError, loader
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.demo import recipe as demo
from blip3o_jax.rl import trainer
from blip3o_jax.train import checkpoint
from tests.rl import runs

# What each policy trains where the configuration names nothing.
TRAINABLE = {"ar": ("ar/.*",), "flow": ("dit/.*",), "both": ("ar/.*", "dit/.*")}

FILE = str(pathlib.Path(__file__).parents[2] / "configs/rl.py")


@pytest.mark.parametrize(
    ("recipe", "policy", "reward"),
    [
        ("ocr", "ar", "ocr"),
        ("geneval", "ar", "geneval"),
        ("flow", "flow", "geneval"),
        ("hybrid", "both", "geneval"),
    ],
)
def test_recipes_start_at_all_parts_of_the_checkpoint(recipe, policy, reward):
    found = loader.load(
        f"{FILE}:{recipe}:{runs.started_from()}", {"rl.prompts_file": "prompts.jsonl"}
    )
    given = checkpoint.read_config(runs.started_from() / "checkpoints")
    assert (found.rl.policy, [r.name for r in found.rl.rewards]) == (policy, [reward])
    assert (
        found.model.tokenizer == given.model.tokenizer
        and found.data.max_length == given.data.max_length
    )
    assert [part for part, _ in found.checkpoint.init_from] == list(PUBLISHED_PARTS)
    resolved = trainer.resolved(found)
    assert resolved.trainable == TRAINABLE[policy] and resolved.data.batch_size == 128
    assert (found.rl.kl_coef, found.rl.clip, found.optimizer.learning_rate) == (
        0.001,
        (0.2, 0.2),
        1e-6,
    )
    assert (found.rl.rollout.temperature, found.rl.rollout.top_k, found.rl.rollout.top_p) == (
        1.0,
        0,
        1.0,
    )


def test_shapes_is_the_demos_last_stage():
    found = loader.load(
        f"{FILE}:shapes:{runs.started_from()}", {"rl.prompts_file": "prompts.jsonl"}
    )
    assert found == demo.reinforcement(runs.started_from(), "prompts.jsonl")
    given = checkpoint.read_config(runs.started_from() / "checkpoints")
    assert [reward.name for reward in found.rl.rewards] == ["shapes"]
    changed = {"temperature": 1.0, "steps": 10, "batch_size": found.rl.rollout.batch_size}
    assert found.rl.rollout == dataclasses.replace(given.sampling, **changed)
    assert [part for part, _ in found.checkpoint.init_from] == list(PUBLISHED_PARTS)


def test_words_are_learned_by_both_policies():
    overrides = {"rl.prompts_file": "prompts.jsonl"}
    shapes, found = (
        loader.load(f"{FILE}:{recipe}:{runs.started_from()}", overrides)
        for recipe in ("shapes", "words")
    )
    assert (found.rl.policy, [reward.name for reward in found.rl.rewards], found.steps) == (
        "both",
        ["ocr"],
        80,
    )
    assert (found.rl.rollout, found.optimizer, found.checkpoint.init_from) == (
        shapes.rl.rollout,
        shapes.optimizer,
        shapes.checkpoint.init_from,
    )
    assert trainer.resolved(found).trainable == TRAINABLE["both"]


def test_no_such_recipe():
    with pytest.raises(ConfigError, match="recipe='ocrr' is not one of ocr, geneval"):
        loader.load(f"{FILE}:ocrr:{runs.started_from()}")


def test_no_checkpoint(tmp_path):
    for argument in ("ocr", "shapes:"):
        with pytest.raises(
            ConfigError, match=r"names no checkpoint to start from: configs/rl.py:\w+:CHECKPOINT"
        ):
            loader.load(f"{FILE}:{argument}")
    with pytest.raises(UserError, match="is not a checkpoint"):
        loader.load(f"{FILE}:ocr:{tmp_path}")
