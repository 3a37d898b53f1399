"""Files of prompts, and what is wrong with them."""

import json

import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data.prompts import Prompt, read_prompts
from blip3o_jax.data.shapes import prompts as shapes_prompts


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


def test_a_mark_of_byte_order_does_not_make_json_plain_text(tmp_path):
    for text in ('\ufeff{"prompt": "a"}', "\ufeffa"):
        assert [prompt.text for prompt in read_prompts(write(tmp_path, text))] == ["a"]


def test_separators_of_lines_within_a_text_do_not_end_it(tmp_path):
    assert read_prompts(write(tmp_path, '{"prompt": "a\u2028b"}\n{"prompt": "c\x85d"}'))[1].text == "c\x85d"


def test_a_prompt_need_not_have_a_category(tmp_path):
    assert read_prompts(write(tmp_path, '{"caption": "a"}\n{"prompt": "b", "caption": "a", "tag": null}'))[1].text == "b"
    assert [prompt.category for prompt in read_prompts(tmp_path / "prompts.jsonl")] == ["", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        (" \n\n", "holds no prompt"),
        (b"a\n\xff\xfe", "is not UTF-8 text: invalid start byte at byte 2"),
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
    with pytest.raises(UserError, match=r"nothing\.jsonl: No such file"):
        read_prompts(tmp_path / "nothing.jsonl")
