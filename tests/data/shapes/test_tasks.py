"""Check that edits and questions on disk are records like all others."""

import io

import numpy as np
from PIL import Image

from blip3o_jax import cli
from blip3o_jax.config import SourceConfig
from blip3o_jax.data.shapes import edits, questions, render, tasks
from blip3o_jax.data.sources import open_source


def pixels(data):
    return np.array(Image.open(io.BytesIO(data)))


def test_records_are_those_of_the_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = tasks.prepare(tmp_path, num_edits=9, num_questions=5, image_size=32, seed=2)
    edited, asked = (open_source(SourceConfig(str(paths[name]))) for name in ("edits", "questions"))
    assert (len(edited), len(asked)) == (9, 5)
    for i in range(9):
        record, want = edited[i], edits.sample_edit(2, i, "train")
        assert (record.task, record.caption, record.key) == ("edit", want.instruction, want.key)
        np.testing.assert_array_equal(pixels(record.image), render(want.after, 32))
        np.testing.assert_array_equal(pixels(record.references[0]), render(want.before, 32))
    for i in range(5):
        record, want = asked[i], questions.sample_question(2, i, "train")
        assert (record.task, record.caption, record.answer, record.image) == (
            "understand",
            want.question,
            want.answer,
            b"",
        )
        np.testing.assert_array_equal(pixels(record.references[0]), render(want.scene, 32))
    written = paths["edits"].stat().st_mtime_ns
    assert tasks.prepare(tmp_path, num_edits=9, num_questions=0, image_size=32, seed=2) == {
        "edits": paths["edits"]
    }
    assert paths["edits"].stat().st_mtime_ns == written and not list(tmp_path.glob("*.partial"))


def test_captioned_images_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tasks.prepare(tmp_path, num_edits=3, num_questions=3, image_size=32)
    for name in ("edits", "questions"):
        plain, again = (
            open_source(SourceConfig(str(path[name]), task=task)) for task in ("", "reconstruct")
        )
        shown = plain[1].image or plain[1].references[0]
        assert (again[1].task, again[1].caption, again[1].image, again[1].references) == (
            "reconstruct",
            "",
            shown,
            (shown,),
        )
        assert len(again) == 3 and again.fingerprint != plain.fingerprint


def test_the_command_writes_them(tmp_path, capsys):
    flags = [f"--num_{name}=2" for name in ("train", "validation", "test", "edits", "questions")]
    assert cli.main(["data", "shapes", f"--out={tmp_path}", *flags, "--image_size=32"]) == 0
    assert {p.name for p in tmp_path.rglob("*.tar")} == {
        "edits_train_2.tar",
        "questions_train_2.tar",
    }
