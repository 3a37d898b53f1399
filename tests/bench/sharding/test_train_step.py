"""Check the shapes of a train step's arguments, and that it runs on arrays of those shapes."""

import dataclasses

import numpy as np
import pytest

from blip3o_jax.bench.sharding import train_step
from blip3o_jax.config import ConfigError
from tests import tiny


@pytest.mark.parametrize(
    ("stage", "references"),
    [("joint", 0), ("joint", 2), ("autoencoder", 0), ("contrastive", 0), ("tokenizer", 0)],
)
def test_shapes_are_those_of_a_real_batch(stage, references):
    cfg, _, batch = tiny.prepared(stage, references=references)
    want = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    assert train_step.batch_shapes(cfg) == want
    made = train_step.synthetic_batch(cfg)
    assert {name: (x.shape, str(x.dtype)) for name, x in made.items()} == want


def test_a_cached_run_has_codes_and_latents_in_place_of_pixels():
    cfg, _, batch = tiny.prepared("joint")
    cached = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir="somewhere"))
    want = {name: (x.shape, str(x.dtype)) for name, x in tiny.cached_batch(cfg, batch).items()}
    assert train_step.batch_shapes(cached) == want


def test_a_synthetic_row_ends_in_an_image_that_is_learned():
    cfg, _, _ = tiny.prepared("joint")
    batch = train_step.synthetic_batch(cfg)
    n, length = cfg.model.tokenizer.num_tokens, cfg.data.max_length
    assert (batch["image_span"] == length - n - 1).all() and (
        batch["loss_mask"].sum(axis=1) == n
    ).all()
    assert batch["loss_mask"][0, -n:].all() and batch["tokens"].max() < cfg.model.ar.vocab_size
    assert batch["pixels"].max() > 200 and (batch["positions"][1] == np.arange(length)).all()


def test_rows_that_no_image_fits_into_are_refused():
    cfg = tiny.run_config(stage="joint")
    tokens = cfg.model.tokenizer.num_tokens
    short = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_length=tokens))
    with pytest.raises(ConfigError, match=rf"max_length={tokens} must be above {tokens}"):
        train_step.TrainStep(short, tiny.strategy())


@pytest.mark.usefixtures("quick_compile")
def test_a_step_runs_on_its_own_result():
    work = train_step.TrainStep(tiny.run_config(stage="tokenizer"), tiny.strategy())
    program, arguments = work.lower().compile(), work.first_arguments()
    for _ in range(2):
        arguments = work.next_arguments(arguments, program(*arguments))
    assert int(arguments[0]["step"]) == 2 and int(arguments[0]["skipped_steps"]) == 0
    held = work.argument_bytes()
    assert held["batch"] == sum(x.nbytes for x in arguments[1].values())
    cut = train_step.TrainStep(
        tiny.run_config(stage="tokenizer"), tiny.strategy("fsdp", fsdp=4)
    ).argument_bytes()
    assert (
        cut["batch"] == held["batch"] // 4
        and held["optimizer"] / 4 < cut["optimizer"] < held["optimizer"] / 2
    )
