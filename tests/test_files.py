"""Check errors of the file system in one line, atomic replacement of files, and where output may
go."""

import errno
import os
import pathlib

import pytest

from blip3o_jax import files
from blip3o_jax.config import UserError

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing local file "/run/2.tmp/state/_sharding": '
    'Failed writing: "/run/2.tmp/state/_sharding.__lock": '
    "Failed to write 70498 bytes to file 9: No space left on device [os_error_code='28'] [source "
    "locations='x.cc:1']"
)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(
        UserError, match=r"a.tar is a pipe or a device: write what it gives to a reg"
    ):
        files.check_regular(tmp_path / "a.tar")
    with pytest.raises(IsADirectoryError):
        files.check_regular(tmp_path)


def full(path=None):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def raised(error, *, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (full("/a/b"), "/a/b: No space left on device: free some"),
        (full(), "No space left on device: free some"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
        (
            OSError(errno.ELOOP, os.strerror(errno.ELOOP), b"x"),
            "x: Too many levels of symbolic links",
        ),
        (
            OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x"),
            "x: File name too long: choose a shorter one",
        ),
        (ValueError(TENSORSTORE), "/run/2.tmp/state/_sharding: No space left on device: free some"),
        (
            RuntimeError("could not write to './x': No space left on device"),
            "No space left on device: free some",
        ),
        (
            raised(RuntimeError("save failed"), cause=raised(ValueError("x"), context=full("/a"))),
            "/a: No space left on device: free some",
        ),
        (
            ExceptionGroup("several", [ValueError("x"), ValueError(TENSORSTORE)]),
            "/run/2.tmp/state/_sharding: No space left on device: free some",
        ),
    ],
)
def test_errors_of_the_operating_system_are_reported(error, line):
    assert files.describe(files.system_error(error)) == line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        raised(
            RuntimeError("a bug"), context=FileNotFoundError(2, "No such file", "cache")
        ),  # that was expected
        OSError("cannot identify image file"),
        ConnectionResetError(104, "Connection reset by peer"),
        ValueError("NOT_FOUND: Error reading local file [os_error_code='2']"),
    ],
)
def test_a_bug_is_none_of_them(error):
    assert files.system_error(error) is None


def test_trouble_is_raised_from_behind_and_never_from_quoted_text():
    with pytest.raises(OSError, match="No space"):
        files.raise_trouble(raised(UserError("x"), context=full("/a")))
    quoted = UserError(f"{os.strerror(errno.EIO)}.png")
    long = OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x")
    missing = FileNotFoundError(2, "No such file", f"{os.strerror(errno.EIO)}.png")
    for error in (quoted, long, missing):
        files.raise_trouble(error)


def test_an_open_files_errors_get_its_name():
    with (
        pytest.raises(OSError, match="No space left") as error,
        files.writing(pathlib.Path("rows")),
        open("/dev/full", "w") as out,
    ):
        out.write("x")
    assert error.value.filename == "rows"


def test_an_error_that_is_not_of_a_file_gets_no_name():
    with pytest.raises(ConnectionRefusedError) as error, files.writing(pathlib.Path("rows")):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert error.value.filename is None


def test_an_error_that_has_a_line_keeps_it():
    with pytest.raises(UserError, match=r"^copy it again$"), files.writing(pathlib.Path("rows")):
        raise UserError("copy it again") from full()


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    files.replace_text(path, "one")
    files.replace_text(path, "two")
    assert path.read_text() == "two"

    def fail(*unused):
        raise full()

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as error:
        files.replace_text(path, "three")
    assert (
        error.value.filename == str(path)
        and path.read_text() == "two"
        and list(path.parent.iterdir()) == [path]
    )


def test_two_that_write_one_file_at_once(tmp_path):
    with files.replacing(tmp_path / "file", shared=True) as one:
        one.write("a")
        with files.replacing(tmp_path / "file", shared=True) as other:
            other.write("b")
        one.write("a")
    assert (tmp_path / "file").read_text() == "aa" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("check", "out", "words"),
    [
        (files.check_out_directory, "file", "is there already and is no directory"),
        (files.check_out_directory, "file/deeper/x", "/file is no directory"),
        (files.check_out_directory, "n" * 300, "File name too long"),
        (files.check_out_directory, "a\0b", "holds a NUL"),
        (files.check_out_directory, "loop", "loop is a link to loop, which is not there: make"),
        (files.check_out_directory, "loop/deeper", "loop is a link to loop, which is not there"),
        (files.check_out_directory, "/proc/x", r"no file can be made in /proc \(|is not writable"),
        (files.check_out_file, "/proc/x", r"=/proc/x: (no file can be made in )?/proc "),
        (files.check_out_file, "directory", "must be a file in a directory that is there"),
        (files.check_out_file, "none/file", "must be a file in a directory that is there"),
    ],
)
def test_where_output_cannot_go(tmp_path, check, out, words):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=words) as error:
        check(tmp_path / out)
    assert str(error.value).startswith("--out=") and "\n" not in str(error.value)


def test_a_directory_that_may_not_be_written_to(tmp_path, monkeypatch):
    """Replace the system's answer, since root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        UserError,
        match=f"^--out={tmp_path}/a/b: {tmp_path} is not writable for this user: choose another$",
    ):
        files.check_out_directory(tmp_path / "a" / "b")


def test_looking_changes_nothing(tmp_path):
    files.check_out_directory(tmp_path / "a" / "b")
    files.check_out_file(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_directories_made_for_nothing_are_gone_again(tmp_path):
    """Leave the directory above where a missing directory is followed by ".."."""
    made = files.make_directories(tmp_path / "gone" / ".." / "runs" / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "runs"]
    files.remove_empty(made)
    assert list(tmp_path.iterdir()) == []
