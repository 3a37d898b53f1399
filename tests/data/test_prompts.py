"""Files of prompts, and what is wrong with them."""

import json
import os

import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data import prompts
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
    line = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [],
        "prompt": "a photo of two clocks",
    }
    assert read_prompts(write(tmp_path, json.dumps(line))) == [
        Prompt("a photo of two clocks", line, "counting")
    ]


def test_plain_text(tmp_path):
    path = write(tmp_path, ' a red circle\r\n\n\nKaffee "caf\u00e9"\n', "prompts.txt")
    assert read_prompts(path) == [Prompt("a red circle"), Prompt('Kaffee "caf\u00e9"')]


def test_a_mark_of_byte_order_does_not_make_json_plain_text(tmp_path):
    for text in ('\ufeff{"prompt": "a"}', "\ufeffa"):
        assert read_prompts(write(tmp_path, text, "prompts.txt"))[0].text == "a"


def test_separators_of_lines_within_a_text_do_not_end_it(tmp_path):
    assert (
        read_prompts(write(tmp_path, '{"prompt": "a\u2028b"}\n{"prompt": "c\x85d"}'))[1].text
        == "c\x85d"
    )


def test_a_prompt_need_not_have_a_category(tmp_path):
    assert (
        read_prompts(
            write(tmp_path, '{"caption": "a"}\n{"prompt": "b", "caption": "a", "tag": null}')
        )[1].text
        == "b"
    )
    assert [prompt.category for prompt in read_prompts(tmp_path / "prompts.jsonl")] == ["", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        (" \n\n", "holds no prompt"),
        ("\ufeff\r\n", "holds no prompt"),
        (b"a\n\xff\xfe", "prompts.jsonl:2 is not UTF-8 text: invalid start byte at byte 2"),
        ("a cat".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b'{"prompt": "a"}\n\0', "prompts.jsonl:2 holds a NUL byte"),
        ('{"prompt": "a"} {"prompt": "b"}', "prompts.jsonl:1 is no JSON: extra data in column 16"),
        (
            '{"prompt": "\\ud83c"}',
            "prompts.jsonl:1 has half a character in its text: '\\ud83c' at 0",
        ),
        (
            '{"prompt": "a", "n": ' + "1" * 5000 + "}",
            "prompts.jsonl:1 is no JSON: Exceeds the limit",
        ),
        ('{"prompt": ' + "[" * 100_000, "prompts.jsonl:1 is no JSON"),
        ("[]", "holds no prompt"),
        ('["a",\n "b"', 'prompts.jsonl:2 is no JSON: expected "," or "]"'),
        ('["a",\n {"prompt":\n }]', "prompts.jsonl:3 is no JSON: Expecting value"),
        ('["a"]\n["b"]', "prompts.jsonl:2 is no JSON: something follows the array"),
        ('[\n"a",\n{"text": "b"}]', 'prompts.jsonl:3 has no text under "prompt" or "caption"'),
        ("a red cat", "prompts.jsonl:1 is no JSON: Expecting value"),
        ('{"prompt": "a"}\n\n{"prompt": ', "prompts.jsonl:3 is no JSON: Expecting value"),
        ('{"prompt": "a"}\na dog', "prompts.jsonl:2 is no JSON"),
        (
            '{"prompt": "a"}\n{"text": "a"}',
            'prompts.jsonl:2 has no text under "prompt" or "caption"',
        ),
        ('{"prompt": "a"}\n["a"]', "prompts.jsonl:2 has no text"),
        ('{"prompt": " "}', "prompts.jsonl:1 has no text"),
        ('{"prompt": 3}', "prompts.jsonl:1 has no text"),
    ],
)
def test_mistakes_are_reported_with_their_line(tmp_path, text, message):
    with pytest.raises(UserError) as e:
        read_prompts(write(tmp_path, text))
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl", "prompts.txt", "prompts"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_strings_or_objects(tmp_path, name, indent):
    path = write(
        tmp_path,
        json.dumps([{"prompt": "a cat", "tag": "one"}, {"caption": "a\nb"}], indent=indent),
        name,
    )
    assert [(p.text, p.category) for p in read_prompts(path)] == [("a cat", "one"), ("a\nb", "")]
    path = write(tmp_path, json.dumps(["a cat", "a dog"], indent=indent), name)
    assert read_prompts(path) == [Prompt("a cat"), Prompt("a dog")]


def test_json_lines_of_strings(tmp_path):
    assert read_prompts(write(tmp_path, '"a cat"\r\n\r\n"say \\"hi\\""\r\n')) == [
        Prompt("a cat"),
        Prompt('say "hi"'),
    ]


TSV = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "a red cat\tAnimals\tBasic\t\n"
    '"G O" in paint\tSigns\tBasic\tof "x"\n'
)


@pytest.mark.parametrize("name", ["PartiPrompts.tsv", "prompts.txt", "prompts"])
def test_a_table_with_tabs_as_partiprompts(tmp_path, name):
    """Read its quotes as text."""
    cat, paint = read_prompts(write(tmp_path, "\ufeff" + TSV.replace("\n", "\r\n"), name))
    assert cat == Prompt(
        "a red cat",
        {"Prompt": "a red cat", "Category": "Animals", "Challenge": "Basic", "Note": ""},
        "Animals",
    )
    assert (paint.text, paint.metadata["Note"]) == ('"G O" in paint', 'of "x"')


def test_a_table_with_commas(tmp_path):
    text = 'id,caption,tag\n1,"a red, big cat",animals\n\n2,"two\nlines of ""text""",\n'
    one, two = read_prompts(write(tmp_path, text, "prompts.csv"))
    assert (one.text, one.category, one.metadata["id"]) == ("a red, big cat", "animals", "1")
    assert (two.text, two.category) == ('two\nlines of "text"', "")
    assert read_prompts(write(tmp_path, "prompt\na cat\n", "one_column.csv"))[0].text == "a cat"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.csv",
            "a red cat\na dog\n",
            "p.csv:1 names no column prompt or caption; it has 'a red cat'",
        ),
        ("p.csv", "prompt,Prompt\na,b\n", "p.csv:1 names a column twice"),
        ("p.csv", "prompt,tag\na\n", "p.csv:2 has 1 columns, the first line 2"),
        ("p.csv", "prompt,tag\na,b,c\n", "p.csv:2 has 3 columns, the first line 2"),
        ("p.csv", "prompt,tag\n,b\n", "p.csv:2 has no text"),
        ("p.csv", 'prompt,tag\n"a" b,c\n', "p.csv:2 is no CSV: "),
        (
            "p.csv",
            'prompt,tag\n"a\nb",c\n\nd,"e\nf\n',
            "p.csv:5 is no CSV: unexpected end of data;",
        ),
        ("p.csv", 'prompt,tag\n"a\nb"\n', "p.csv:2 has 1 columns, the first line 2"),
        ("p.csv", "prompt\n" + "a" * 200_000, "p.csv:2 is no CSV: field larger than field limit"),
        ("p.csv", "prompt,tag\n", "holds no prompt"),
        ("p.tsv", "Prompt\tNote\na cat\n", "p.tsv:2 has 1 columns, the first line 2"),
        (
            "p.txt",
            "prompt, a red cat\na dog\n",
            "the first line 2; the first line was read as names",
        ),
        ("p.txt", "prompt, a red cat\n", "holds no prompt below its names of columns; the first"),
        ("p.txt", '{"prompt": "a"}\na dog\n', "p.txt:2 is no JSON: Expecting value"),
        ("p.txt", '{"prompt": \n', "p.txt:1 is no JSON"),
        ("p.txt", '[\n "a"\n "b"]', "p.txt:3 is no JSON"),
        ("p.txt", '["a", b]', "p.txt:1 is no JSON"),
    ],
)
def test_what_is_broken_is_never_taken_for_text(tmp_path, name, text, message):
    with pytest.raises(UserError) as e:
        read_prompts(write(tmp_path, text, name))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_text_may_begin_as_json_does(tmp_path):
    lines = [
        "{curly} braces on a sign",
        "[1girl], a portrait",
        "{",
        '"OPEN" on a door',
        "a, b",
        "prompt",
    ]
    for first in range(len(lines)):
        if lines[first] != "{":  # which opens an object
            text = "\n".join(lines[first:] + lines[:first])
            assert [
                prompt.text for prompt in read_prompts(write(tmp_path, text, "prompts.txt"))
            ] == text.split("\n")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: No such file"):
        read_prompts(tmp_path / "nothing.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or a device"):
        read_prompts(tmp_path / "pipe")


def test_a_long_array_is_read_in_linear_time(tmp_path, monkeypatch):
    counted = []

    class Text(str):
        def count(self, what, start, end):
            counted.append(end - start)
            return super().count(what, start, end)

    text = json.dumps(["a"] * 1000, indent=1)
    monkeypatch.setattr(prompts, "_read_text", lambda path: Text(text))
    assert len(read_prompts(tmp_path / "p.json")) == 1000
    assert sum(counted) <= len(text)
