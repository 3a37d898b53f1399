import errno
import json
import os
import pathlib
import re
import shutil

import pytest

from blip3o_jax import files
from blip3o_jax.config import UserError
from blip3o_jax.convert.directory import MANIFEST, atomic_directory, check_space


def listing(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in directory.rglob("*")
    }


def contents(out):
    """Return what was written, and that the manifest names it."""
    found = listing(out)
    names = json.loads(found.pop(MANIFEST))["written"]
    assert names == sorted(name for name in found if "/" not in name)
    return found


def fill(directory, text="{}"):
    (directory / "config.json").write_text(text)
    (directory / "deeper").mkdir()
    (directory / "deeper" / "weights").write_text(text)


def test_it_is_there_when_it_is_whole_and_not_before(tmp_path):
    out = tmp_path / "above" / "out"
    with atomic_directory(out, overwrite=False) as directory:
        assert (
            directory.is_dir() and directory.parent == out.parent and not any(directory.iterdir())
        )
        fill(directory)
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert contents(out) == {"config.json": b"{}", "deeper": None, "deeper/weights": b"{}"}
    assert out.stat().st_mode & 0o777 == 0o755, "for others to read, as any directory"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyboardInterrupt(), UserError("no"), OSError(errno.EIO, "disk")]
)
def test_whatever_fails_leaves_nothing(tmp_path, error):
    raised = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), atomic_directory(tmp_path / "out", overwrite=False) as directory:
        fill(directory)
        raise error
    assert listing(tmp_path) == {}


def test_overwrite(tmp_path):
    out = tmp_path / "out"
    with atomic_directory(out, overwrite=True) as directory:
        fill(directory, "first")
    with pytest.raises(
        UserError, match=r"out exists already: choose another --out, or pass --overwrite"
    ):
        atomic_directory(out, overwrite=False).__enter__()
    before = listing(tmp_path)
    with (
        pytest.raises(ValueError, match="late"),
        atomic_directory(out, overwrite=True) as directory,
    ):
        fill(directory, "second")
        raise ValueError("too late")
    assert listing(tmp_path) == before, "the earlier output stays where the new one fails"
    with atomic_directory(out, overwrite=True) as directory:
        (directory / "config.json").write_text("second")
    assert contents(out) == {"config.json": b"second"} and [p.name for p in tmp_path.iterdir()] == [
        "out"
    ]


def test_an_empty_directory_may_be_filled_with_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out", overwrite=True) as directory:
        fill(directory)
    assert (tmp_path / "out" / "config.json").is_file()


NOT_WRITTEN = "thesis was not written by blip3o convert and is not overwritten"
FOREIGN = {
    "file": ({"": "years of work"}, NOT_WRITTEN),
    "directory": ({"chapter.tex": "years of work"}, NOT_WRITTEN),
    "a model of another program": ({"config.json": "{}", "model.safetensors": ""}, NOT_WRITTEN),
    "manifest of no kind": ({MANIFEST: "[]", "config.json": "{}"}, NOT_WRITTEN),
    "manifest cut off": ({MANIFEST: '{"written": ["config', "config.json": "{}"}, NOT_WRITTEN),
    "output with more": (
        {MANIFEST: '{"written": ["config.json"]}', "config.json": "{}", "notes.md": "months"},
        "thesis holds notes.md, which blip3o convert did not write: move it elsewhere",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_not_overwritten(tmp_path, kind):
    out = tmp_path / "thesis"
    files, message = FOREIGN[kind]
    if "" not in files:
        out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=message):
        atomic_directory(out, overwrite=True).__enter__()
    assert listing(tmp_path) == before


def test_what_came_meanwhile_is_not_overwritten(tmp_path):
    """Write other files in the hours that a conversion takes: into an earlier output, or to where
    there was none.
    """
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match="out exists already"),
        atomic_directory(out, overwrite=False) as directory,
    ):
        fill(directory)
        out.mkdir()
        (out / "notes.md").write_text("months")
    assert listing(tmp_path) == {"out": None, "out/notes.md": b"months"}
    shutil.rmtree(out)
    with atomic_directory(out, overwrite=False) as directory:
        fill(directory, "first")
    with (
        pytest.raises(UserError, match=r"out holds notes\.md"),
        atomic_directory(out, overwrite=True) as directory,
    ):
        fill(directory, "second")
        (out / "notes.md").write_text("months")
    assert (out / "config.json").read_text() == "first" and (
        out / "notes.md"
    ).read_text() == "months"


@pytest.mark.parametrize("second", [False, True], ids=["new", "overwrite"])
def test_two_runs_to_one_place_do_not_mix(tmp_path, second):
    """Let each write its own directory; the last to end replaces the other, or ends with an
    error.
    """
    out = tmp_path / "out"
    slow = atomic_directory(out, overwrite=second)
    theirs = slow.__enter__()
    fill(theirs, "slow")
    with atomic_directory(out, overwrite=False) as directory:
        assert directory != theirs and not any(directory.iterdir())
        (directory / "config.json").write_text("fast")
    assert contents(out) == {"config.json": b"fast"}
    if second:
        slow.__exit__(None, None, None)
        assert contents(out) == {"config.json": b"slow", "deeper": None, "deeper/weights": b"slow"}
    else:
        with pytest.raises(UserError, match="out exists already"):
            slow.__exit__(None, None, None)
        assert contents(out) == {"config.json": b"fast"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_another_run_is_writing_is_left_alone(tmp_path):
    """Leave the directory of a running process, or the one that a killed one has left behind."""
    for name in (".out.partial", ".out.abcd1234.partial", ".out.abcd1234.old"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name)
    before = listing(tmp_path)
    for _ in range(2):
        with atomic_directory(tmp_path / "out", overwrite=True) as directory:
            assert not any(directory.iterdir())
            fill(directory)
    contents(tmp_path / "out")
    assert {
        name: data for name, data in listing(tmp_path).items() if name.startswith(".")
    } == before


@pytest.mark.parametrize("place", ["", "above", "within", "link", "link within", "file of it"])
def test_out_overlaps_a_source(tmp_path, place):
    source = tmp_path / "all" / "source"
    with atomic_directory(source, overwrite=False) as directory:
        fill(directory)
    (tmp_path / "link").symlink_to(source)
    out, read = {
        "": (source, source),
        "above": (source.parent, source),
        "within": (source / "new", source),
        "link": (tmp_path / "link", source),
        "link within": (source / "new", tmp_path / "link"),
        "file of it": (source, source / "config.json"),
    }[place]
    before = listing(tmp_path)
    with pytest.raises(
        UserError, match=r"overlaps \S+source\S*, which is read: choose an --out outside of it"
    ):
        atomic_directory(
            out, overwrite=True, sources=(None, tmp_path / "elsewhere", read)
        ).__enter__()
    assert listing(tmp_path) == before


def test_a_sibling_of_the_source_is_no_overlap(tmp_path):
    (tmp_path / "source").mkdir()
    with atomic_directory(
        tmp_path / "source-2", overwrite=False, sources=(tmp_path / "source",)
    ) as directory:
        fill(directory)
    contents(tmp_path / "source-2")


def test_out_may_be_a_link(tmp_path):
    """Write the directory that it points at; it stays a link."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "out")
    for overwrite, text in ((False, "first"), (True, "second")):
        with atomic_directory(link, overwrite=overwrite) as directory:
            assert directory.parent == tmp_path / "disk"
            fill(directory, text)
        assert (
            link.is_symlink()
            and contents(tmp_path / "disk" / "out")["config.json"] == text.encode()
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]


def test_the_earlier_output_comes_back_where_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "out", overwrite=False) as directory:
        fill(directory, "first")
    before, rename = listing(tmp_path), pathlib.Path.rename

    def refuse(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with (
        pytest.raises(UserError, match="Permission denied"),
        atomic_directory(tmp_path / "out", overwrite=True) as directory,
    ):
        fill(directory, "second")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/proc/blip3o/out"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        atomic_directory(tmp_path / place, overwrite=False).__enter__()
    assert place in str(error.value) and "\n" not in str(error.value)
    assert listing(tmp_path) == {"file": b""}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full(tmp_path, code):
    message = f"out was not written: {os.strerror(code)}: {files.TROUBLE[code]}"
    with (
        pytest.raises(UserError, match=re.escape(message)),
        atomic_directory(tmp_path / "out", overwrite=False) as directory,
    ):
        fill(directory)
        raise OSError(code, os.strerror(code))
    assert listing(tmp_path) == {}


def test_space_is_checked_where_the_directory_will_lie(tmp_path, monkeypatch):
    asked = []
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: asked.append(path) or usage(10**12, 0, 3 * 10**9)
    )
    check_space(tmp_path / "not" / "yet", 3 * 10**9)
    with pytest.raises(
        UserError,
        match=rf"yet needs 3,200.0 MB, but {tmp_path} has 3,000.0 MB free: delete files there",
    ):
        check_space(tmp_path / "not" / "yet", 32 * 10**8)
    assert asked == [tmp_path] * 2
