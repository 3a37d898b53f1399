"""Run bad command lines over all commands (bad_commands.py): each ends in one line and status 2,
soon, and nothing is written."""

import contextlib
import faulthandler
import io
import os
import random
import signal
import subprocess
import sys

import pytest

from blip3o_jax import cli
from blip3o_jax.config import UserError, loader
from tests import bad_commands, tiny

SECONDS = 60  # that one refusal may take; some import PyTorch or read weights first


@pytest.fixture
def place(tmp_path, monkeypatch):
    bad_commands.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_of(case):
    """Return the error's line where a command line is refused before its command runs, else
    None."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            args = cli.parse(case.argv)
            if args.config is None:  # optional; such a line is refused as its command starts
                args.run(args)
            loader.load_recipe(args.config, args.overrides)
    except SystemExit as exit:
        assert exit.code == 2, case
        return err.getvalue()
    except UserError as error:
        return f"blip3o: error: {error}\n"
    return None


def assert_names_it(case, line):
    assert line is not None, f"accepted: {case}"
    assert line.startswith("blip3o: error: ") and line.count("\n") == 1 and len(line) < 700, (
        case,
        line,
    )
    assert any(word in line for word in case.words), (case, line)


def test_a_sample_of_them_is_refused_before_anything_runs(place):
    """Check some lines of every command, without running any."""
    cases = [case for case in bad_commands.all_of(seed=1) if case.kind != "files"]
    assert len(cases) > 3000
    for case in cases[:120]:
        assert_names_it(case, line_of(case))


@pytest.mark.slow
def test_all_of_them_are_refused_before_anything_runs(place):
    for case in bad_commands.all_of():
        if case.kind != "files":
            assert_names_it(case, line_of(case))


class _TooLong(BaseException):
    pass


def _stop(signum, frame):
    raise _TooLong


def listing(directory):
    """Return every file with its size and time, except the caches that programs keep by design."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
        if path.relative_to(directory).parts[0] != "cache"
        and not {"__pycache__", ".blip3o_index"} & set(path.parts)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Extend `place` by the checkpoint `joint`, its PyTorch files `hf`, and a separate home and
    caches."""
    path = tmp_path_factory.mktemp("bad_commands")
    bad_commands.write_files(path)
    tiny.write_checkpoint(path / "joint")
    assert cli.main(["convert", "export", f"--source={path}/joint", f"--out={path}/hf"]) == 0
    for name in ("cache", "temporary", "home"):
        (path / name).mkdir()
    return path


def cases_that_run():
    """Return all lines about files, and as many of the rest."""
    files = [case for case in bad_commands.all_of() if case.kind == "files"]
    others = [case for case in bad_commands.all_of() if case.kind != "files"]
    return files + random.Random(2).sample(others, max(0, 1000 - len(files)))


@pytest.mark.slow
def test_a_thousand_bad_commands_end_in_one_line(finished, monkeypatch, capfd):
    """Run the whole command in this process: 0 tracebacks, 0 hangs, 0 files, 0 accepted."""
    monkeypatch.chdir(finished)
    for name, value in {"XDG_CACHE_HOME": "cache", "TMPDIR": "temporary", "HOME": "home"}.items():
        monkeypatch.setenv(name, str(finished / value))
    monkeypatch.setattr(signal, "SIGALRM", signal.SIGALRM)
    signal.signal(signal.SIGALRM, _stop)
    before, faults = listing(finished), []
    for case in cases_that_run():
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # where no signal gets through
        signal.alarm(SECONDS)
        try:
            status = cli.main(case.argv)
        except SystemExit as exit:
            status = exit.code
        except _TooLong:
            status = f"still running after {SECONDS} s"
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
        err = capfd.readouterr().err
        lines = [line for line in err.split("\n") if "blip3o: error: " in line]
        one = len(lines) == 1 and err.rstrip("\n").endswith(lines[0]) and "Traceback" not in err
        if status != 2 or not one or not any(word in lines[0] for word in case.words):
            faults.append((case.argv, status, err[-500:]))
        after = listing(finished)
        if after != before:
            changed = sorted(
                name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
            )
            faults.append((case.argv, "changed", changed[:5]))
            before = after
    assert not faults, f"{len(faults)} faults, first {faults[:5]}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_process_itself(place, seed):
    arguments = (case for case in bad_commands.all_of(seed) if case.kind == "arguments")
    case = next(case for case in arguments if all(map(_can_be_given, case.argv)))
    environment = os.environ | {"PYTHONPATH": str(bad_commands.ROOT)}
    command = [sys.executable, "-m", "blip3o_jax", *case.argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2, done.stderr
    assert_names_it(case, done.stderr)


def _can_be_given(word):
    """Return whether a process can be started with `word`: the system accepts no NUL, and no half
    of a character."""
    try:
        return "\0" not in word and bool(os.fsencode(word))
    except UnicodeEncodeError:
        return False
