"""Check the rollout as a program: its counts and its memory, by hand; its parts, where the TPU
compiler is installed."""

import dataclasses
import importlib.util

import pytest

from blip3o_jax import sampling_programs
from blip3o_jax.bench.sharding import compiled_step, grid, rollout, topology
from blip3o_jax.config import ConfigError
from blip3o_jax.train.vocabulary import expected_vocabulary
from tests import tiny

CONFIG = expected_vocabulary(tiny.run_config(sampling={"batch_size": 8, "steps": 2}))[0]


def work(strategy="dp", model=None, config=CONFIG, **mesh):
    config = dataclasses.replace(config, model=model or config.model)
    return rollout.Rollout(config, tiny.strategy(strategy, **(mesh or {"data": 2})))


def test_model_flops_of_a_layer():
    """Count a layer of the AR: products with 9216 weights for 36 tokens, prompt and image, and
    attention over each pair of a token and one that it sees, 4 heads of 8 wide; four FLOPs a pair
    and channel."""
    ar = CONFIG.model.ar
    one = work(
        model=dataclasses.replace(CONFIG.model, ar=dataclasses.replace(ar, num_hidden_layers=1))
    )
    two = work(
        model=dataclasses.replace(CONFIG.model, ar=dataclasses.replace(ar, num_hidden_layers=2))
    )
    assert two.length == 32 and two.slots == 36
    assert two.model_flops() - one.model_flops() == 8 * (36 * 2 * 9216 + 4 * 4 * 8 * 36 * 37 // 2)


def test_every_denoising_step_counts():
    counts = [
        work(config=dataclasses.replace(CONFIG, sampling=s)).model_flops()
        for s in map(_steps, (1, 2, 4))
    ]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0


def _steps(steps):
    return dataclasses.replace(CONFIG.sampling, steps=steps)


def test_bytes_of_weights_and_cache():
    whole, cut = work("dp", data=4), work("fsdp_tp", fsdp=2, tensor=2)
    weights = sum(x.size for x in _leaves(whole.weights))
    assert whole.argument_bytes() == {"weights": 4 * weights}, "float32, as the tiny model computes"
    assert cut.argument_bytes()["weights"] < 0.5 * whole.argument_bytes()["weights"]
    # Keys and values of 2 layers, 36 slots, 2 heads of 8, 4 bytes; 2 rows of 8 a device, or 4 rows
    # and one head.
    assert whole.within == {"cache": 2 * 2 * 36 * 2 * 8 * 4 * 2} and cut.within == {
        "cache": 2 * 2 * 36 * 1 * 8 * 4 * 4
    }


def _leaves(tree):
    return [
        x
        for value in tree.values()
        for x in (_leaves(value) if isinstance(value, dict) else [value])
    ]


def test_weights_are_kept_in_what_is_computed_in():
    model = dataclasses.replace(
        CONFIG.model, ar=dataclasses.replace(CONFIG.model.ar, dtype="bfloat16")
    )
    weights = work(model=model).weights
    assert {str(x.dtype) for x in _leaves(weights["ar"])} == {"bfloat16"}
    assert {str(x.dtype) for x in _leaves(weights["dit"])} == {"float32"}


def test_the_program_is_that_of_the_pipeline(monkeypatch):
    """Compare the arrays with those that the pipeline passes, lengths, seed and all, in the same
    order."""
    seen = []
    monkeypatch.setattr(
        rollout,
        "make_image_sampler",
        lambda *args: seen.append(args) or sampling_programs.make_image_sampler(*args),
    )
    made = work()
    text = made.lower().as_text()
    _, strategy, image_ids = seen[0]
    assert made.model == rollout.in_compute_dtype(CONFIG.model) and strategy.name == "dp"
    assert image_ids == (CONFIG.model.ar.vocab_size - 32, CONFIG.model.ar.vocab_size)
    assert "tensor<8x16x16x3xui8>" in text and "tensor<8x4xi32>" in text, "images and codes"


def test_prompts_that_do_not_divide_are_refused():
    with pytest.raises(
        ConfigError, match=r"sampling.batch_size=8 does not divide over 3 batch shards"
    ):
        work(data=3)


@pytest.mark.parametrize(("max_length", "want"), [(32, 32), (60, 64), (2048, 128)])
def test_prompt_length(max_length, want):
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, max_length=max_length)
    )
    assert rollout.prompt_length(config) == want


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_rollout_for_tpus():
    options = grid.Options(("v5e:2x2",), step="rollout", batch_per_chip=2)
    row = compiled_step.compile_isolated(
        grid.make_task(CONFIG, topology.parse("v5e:2x2"), "dp", options)
    )
    assert row["status"] == compiled_step.FITS and row["unknown"] == {}
    # Two prompts a device: products with 18432 weights for 36 tokens, the head for 4, attention
    # over all slots of the cache.
    ar = sum(sum(row["flops"][part].values()) for part in ("prefill", "decode"))
    assert ar == 2 * (36 * 2 * 18432 + 4 * 2 * 32 * 32 + 4 * 36 * 36 * 32 * 2)
    assert {"prefill", "decode", "dit", "vae"} <= set(row["part_seconds"])
