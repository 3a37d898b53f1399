import json

import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes import prompts as shapes_prompts
from blip3o_jax.rl.prompts import Prompt, prompt_indices, read_prompts


def write(tmp_path, text, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_prompts_of_the_shapes_data_set(tmp_path):
    lines = shapes_prompts("train", 7)
    read = read_prompts(write(tmp_path, "".join(json.dumps(line) + "\n" for line in lines)))
    assert read == [Prompt(line["caption"], line, line["category"]) for line in lines]


def test_prompts_of_geneval(tmp_path):
    line = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [], "prompt": "a photo of two clocks"}
    assert read_prompts(write(tmp_path, json.dumps(line))) == [Prompt("a photo of two clocks", line, "counting")]


def test_plain_text(tmp_path):
    path = write(tmp_path, ' a red circle\r\n\n\nKaffee "caf\u00e9"\n', "prompts.txt")
    assert read_prompts(path) == [Prompt("a red circle"), Prompt('Kaffee "caf\u00e9"')]


def test_a_prompt_need_not_have_a_category(tmp_path):
    assert read_prompts(write(tmp_path, '{"caption": "a"}\n{"prompt": "b", "caption": "a", "tag": null}'))[1].text == "b"
    assert [prompt.category for prompt in read_prompts(tmp_path / "prompts.jsonl")] == ["", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        (" \n\n", "holds no prompt"),
        (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        ('{"prompt": "a"}\n\n{"prompt": ', "prompts.jsonl:3 is no JSON: Expecting value"),
        ('{"prompt": "a"}\na dog', "prompts.jsonl:2 is no JSON"),
        ('{"prompt": "a"}\n{"text": "a"}', 'prompts.jsonl:2 has no text under "prompt" or "caption"'),
        ('{"prompt": "a"}\n["a"]', "prompts.jsonl:2 has no text"),
        ('{"prompt": " "}', "prompts.jsonl:1 has no text"),
        ('{"prompt": 3}', "prompts.jsonl:1 has no text"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, text, message):
    with pytest.raises(UserError) as e:
        read_prompts(write(tmp_path, text))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl cannot be read"):
        read_prompts(tmp_path / "nothing.jsonl")


def test_every_epoch_has_every_prompt_once_in_another_order():
    drawn = np.concatenate([prompt_indices(10, rollout, 4, seed=3) for rollout in range(10)])
    assert drawn.shape == (40,) and drawn.dtype == np.int64
    epochs = [drawn[start : start + 10].tolist() for start in range(0, 40, 10)]
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
