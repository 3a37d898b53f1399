import errno
import os
import pathlib
import shutil

import pytest

from blip3o_jax.config import UserError
from blip3o_jax.convert.directory import check_space, whole_directory


def listing(directory):
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def fill(directory, text="{}"):
    (directory / "config.json").write_text(text)
    (directory / "deeper").mkdir()
    (directory / "deeper" / "weights").write_text(text)


def test_it_is_there_when_it_is_whole_and_not_before(tmp_path):
    out = tmp_path / "above" / "out"
    with whole_directory(out, overwrite=False) as directory:
        assert directory.is_dir() and directory.parent == out.parent and not any(directory.iterdir())
        fill(directory)
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert listing(out) == {"config.json": b"{}", "deeper": None, "deeper/weights": b"{}"}


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), UserError("no"), OSError(errno.EIO, "disk")])
def test_whatever_fails_leaves_nothing(tmp_path, error):
    raised = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), whole_directory(tmp_path / "out", overwrite=False) as directory:
        fill(directory)
        raise error
    assert listing(tmp_path) == {}


def test_overwrite(tmp_path):
    out = tmp_path / "out"
    with whole_directory(out, overwrite=True) as directory:
        fill(directory, "first")
    with pytest.raises(UserError, match=r"out exists already: choose another --out, or pass --overwrite"):
        whole_directory(out, overwrite=False).__enter__()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="late"), whole_directory(out, overwrite=True) as directory:
        fill(directory, "second")
        raise ValueError("too late")
    assert listing(tmp_path) == before, "the earlier output stays where the new one fails"
    with whole_directory(out, overwrite=True) as directory:
        (directory / "config.json").write_text("second")
    assert listing(tmp_path) == {"out": None, "out/config.json": b"second"}


def test_an_empty_directory_may_be_filled_with_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out", overwrite=True) as directory:
        fill(directory)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_not_ours_is_not_overwritten(tmp_path, kind):
    out = tmp_path / "thesis"
    if kind == "directory":
        out.mkdir()
    (out / "chapter.tex" if kind == "directory" else out).write_text("years of work")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"thesis holds no config.json, so it is no earlier output; it is not overwritten"):
        whole_directory(out, overwrite=True).__enter__()
    assert listing(tmp_path) == before


def test_leftovers_of_a_killed_run_are_no_obstacle(tmp_path):
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name)
    for _ in range(2):
        with whole_directory(tmp_path / "out", overwrite=True) as directory:
            assert not any(directory.iterdir())
            fill(directory)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_earlier_output_comes_back_where_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    with whole_directory(tmp_path / "out", overwrite=False) as directory:
        fill(directory, "first")
    before, rename = listing(tmp_path), pathlib.Path.rename

    def refuse(self, target):
        if self.name == ".out.partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(UserError, match="Permission denied"), whole_directory(tmp_path / "out", overwrite=True) as directory:
        fill(directory, "second")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/proc/blip3o/out"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        whole_directory(tmp_path / place, overwrite=False).__enter__()
    assert place in str(error.value) and "\n" not in str(error.value)
    assert listing(tmp_path) == {"file": b""}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full(tmp_path, code):
    message = rf"out was not written: {os.strerror(code)}; free some space, or move --out"
    with pytest.raises(UserError, match=message), whole_directory(tmp_path / "out", overwrite=False) as directory:
        fill(directory)
        raise OSError(code, os.strerror(code))
    assert listing(tmp_path) == {}


def test_space_is_checked_where_the_directory_will_lie(tmp_path, monkeypatch):
    asked = []
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(10**12, 0, 3 * 10**9))
    check_space(tmp_path / "not" / "yet", 3 * 10**9)
    with pytest.raises(UserError, match=rf"yet needs 3.2 GB, but {tmp_path} has 3.0 GB left: free some, or move --out"):
        check_space(tmp_path / "not" / "yet", 32 * 10**8)
    assert asked == [tmp_path] * 2
