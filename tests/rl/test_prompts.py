"""Check the order of a run's prompts."""

import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl.prompts import prompt_indices
from blip3o_jax.rl.trainer import with_prompts


def test_every_epoch_has_every_prompt_once_in_another_order():
    taken = np.concatenate([prompt_indices(10, rollout, 4, seed=3) for rollout in range(10)])
    assert taken.shape == (40,) and taken.dtype == np.int64
    epochs = [taken[start : start + 10].tolist() for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_a_rollouts_prompts_depend_on_seed_and_position_alone():
    whole = prompt_indices(10, 0, 24, seed=3)
    for size in (1, 3, 8):
        pieces = [prompt_indices(10, rollout, size, seed=3) for rollout in range(24 // size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert prompt_indices(10, 0, 24, seed=4).tolist() != whole.tolist()


def test_a_rollout_may_be_larger_than_the_file():
    assert np.bincount(prompt_indices(3, 1, 7, seed=0)).sum() == 7
    assert sorted(prompt_indices(3, 0, 6, seed=0).tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_run_goes_on_with_the_prompts_it_began_with():
    prompts = [Prompt("red", {"category": "colours"}), Prompt("blue")]
    begun = with_prompts({"rollout": 0}, prompts, "file") | {"rollout": 3}
    assert with_prompts(begun, list(prompts), "a copy") == begun
    other = Prompt("red", {"category": "counts"})  # as a reward reads it
    for changed in (prompts[::-1], prompts[:1], [other, prompts[1]]):
        with pytest.raises(UserError, match=r"rl.prompts_file=other.jsonl holds other prompts"):
            with_prompts(begun, changed, "other.jsonl")
