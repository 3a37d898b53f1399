"""One run a working directory: who is refused, who takes over, and what is left behind."""

import json
import os
import subprocess
import threading
import time
import types

import pytest

from blip3o_jax.config import UserError
from blip3o_jax.train import workdir as workdirs
from blip3o_jax.train.workdir import LOCK, Owner, WorkdirLock


def left(directory):
    return sorted(path.name for path in directory.iterdir())


def write(directory, **changes):
    """Write a lock of this process, but for `changes`."""
    owner = vars(Owner.this_process("theirs")) | changes
    del owner["seen"]
    (directory / LOCK).write_text(json.dumps(owner))
    return directory / LOCK


@pytest.fixture
def bound(monkeypatch):
    """Set the clock here an hour ahead of the file server's."""
    clocks = types.SimpleNamespace(
        time=lambda: time.time() + 3600, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr(workdirs, "time", clocks)
    monkeypatch.setattr(workdirs, "STALE_AFTER", 0.6)


def test_a_second_run_is_refused(tmp_path):
    with WorkdirLock(tmp_path / "runs" / "a") as lock:
        with pytest.raises(
            UserError, match=rf"a is in use by another run \(host \S+, pid {os.getpid()}, since 20"
        ) as error:
            WorkdirLock(tmp_path / "runs" / "a").__enter__()
        assert "\n" not in str(error.value)
        lock.check()
        assert left(tmp_path / "runs" / "a") == [LOCK]
    assert left(tmp_path) == [], "what was made for a run that left nothing is gone again"


@pytest.mark.parametrize("begun", [False, True])
def test_a_refused_start_takes_its_tokenizer_with_it(tmp_path, begun):
    for name, had_text in (("new", False), ("old", True)):
        if had_text:
            (tmp_path / name / "text").mkdir(parents=True)
        with WorkdirLock(tmp_path / name) as lock:
            (tmp_path / name / "text").mkdir(exist_ok=True)
            lock.begun = begun
    assert left(tmp_path) == (["new", "old"] if begun else ["old"])
    assert left(tmp_path / "old") == ["text"]


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    # Another process may have its pid now.
    for changes in ({"pid": ended.pid}, {"process_start": 1}):
        write(tmp_path, **changes)
        began = time.monotonic()
        with WorkdirLock(tmp_path) as lock:
            lock.check()
        assert time.monotonic() - began < 5
        assert "took over the lock of host " in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize("there", [{"host": "elsewhere"}, {"machine": "of another boot"}])
def test_a_run_on_another_machine_is_waited_for(tmp_path, bound, capsys, there):
    path = write(tmp_path, **there)
    with WorkdirLock(tmp_path):
        err = capsys.readouterr().err
    assert "waiting up to 1 s for a heartbeat" in err and "took over the lock" in err
    write(tmp_path, **there)
    os.utime(path, (1, 1))
    with WorkdirLock(tmp_path):
        assert "waiting" not in capsys.readouterr().err, "it gave no heartbeat for years"
    write(tmp_path, **there)
    threading.Timer(0.2, os.utime, (path,)).start()
    with pytest.raises(UserError, match="in use by another run"), WorkdirLock(tmp_path):
        pass


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"pid": "1"}', '{"pid": 0}', '{"pids": 1}', "[" * 10**5], ids=len
)
def test_a_lock_that_names_nobody(tmp_path, bound, capsys, text):
    """Take it over: a kill may have come while it was written."""
    (tmp_path / LOCK).write_text(text)
    with WorkdirLock(tmp_path):
        assert "locked by host an unknown host" in capsys.readouterr().err


def test_a_holder_gives_heartbeats_and_notices_when_it_has_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "HEARTBEAT_PERIOD", 0.05)
    with WorkdirLock(tmp_path) as lock:
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        path = write(tmp_path, host="elsewhere")
        with pytest.raises(
            UserError, match=r"lock.json was this run's and now is that of host elsewhere"
        ) as error:
            lock.check()
        assert "\n" not in str(error.value)
    assert json.loads(path.read_text())["host"] == "elsewhere", "it is not this run's to remove"


def test_who_is_too_late_to_take_over_puts_the_lock_back(tmp_path):
    """Let two processes find the same dead owner; the slower one renames the lock of the faster
    one.
    """
    path = write(tmp_path, token="of the faster one")
    WorkdirLock(tmp_path)._remove(Owner(token="of the dead one"))
    assert json.loads(path.read_text())["token"] == "of the faster one" and left(tmp_path) == [LOCK]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--workdir=\S+file/run cannot be written to \(Not a directory\)"
    ):
        WorkdirLock(tmp_path / "file" / "run").__enter__()
    (tmp_path / "runs").symlink_to("gone")
    for path in ("runs", "runs/mine"):
        with pytest.raises(UserError, match=r"/runs is a link to gone, which is not there: make"):
            WorkdirLock(tmp_path / path).__enter__()
    assert left(tmp_path) == ["file", "runs"]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: os.mkfifo(path),
    ],
    ids=["directory", "link to nothing", "pipe"],
)
def test_a_lock_that_is_no_file(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(
        UserError, match=r"^\S+/lock\.json is no regular file, as the lock of a run is: remove it"
    ):
        WorkdirLock(tmp_path).__enter__()
    assert left(tmp_path) == [LOCK]


def test_a_lock_that_comes_and_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(WorkdirLock, "_created", lambda self: False)
    with pytest.raises(UserError, match=r"lock\.json comes and goes"):
        WorkdirLock(tmp_path).__enter__()


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "recipe.json", "checkpoints/config.json", "tensorboard", "checkpoints"],
)
def test_something_else_in_a_files_place(tmp_path, name):
    """Refuse it before anything is written."""
    if directory := "json" not in name:
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir(parents=True)
    kind = "directory" if directory else "regular file"
    with pytest.raises(
        UserError, match=rf"/{name} is no {kind}, but the run \w+ one: move it away"
    ) as error:
        WorkdirLock(tmp_path).__enter__()
    assert "\n" not in str(error.value) and left(tmp_path) == [name.partition("/")[0]]
