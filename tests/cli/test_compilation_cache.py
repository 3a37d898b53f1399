"""Check where compiled programs are stored."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from blip3o_jax.cli import compilation_cache
from blip3o_jax.cli.compilation_cache import VARIABLE, set_compilation_cache


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = jax.config.jax_compilation_cache_dir
    yield
    os.environ.pop(VARIABLE, None)  # set by the function, so not undone by monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_default_is_in_the_users_cache_by_kind_of_machine(tmp_path):
    set_compilation_cache(None)
    directory = pathlib.Path(os.environ[VARIABLE])
    assert directory.parent == tmp_path / "home/blip3o_jax/compiled"
    assert directory.name == compilation_cache._machine()


def test_machines_with_other_instructions_have_other_directories(monkeypatch):
    names = []
    for flags in ("fpu sse", "fpu sse avx512f"):
        monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, f=flags, **__: f"flags\t: {f}\n")
        names.append(compilation_cache._machine())
    assert names[0] != names[1]


def test_a_directory_in_the_environment_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "mine")
    set_compilation_cache(None)
    assert os.environ[VARIABLE] == "mine"


def test_a_given_directory_wins(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "mine")
    set_compilation_cache(tmp_path / "given")
    assert os.environ[VARIABLE] == jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
    assert (tmp_path / "given").is_dir()


def test_no_directory_that_can_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    set_compilation_cache(None)
    assert VARIABLE not in os.environ


def test_a_command_stores_its_programs(tmp_path):
    """Compile in a process of its own, whose JAX reads the variable that the command has set."""
    code = """
import sys
from blip3o_jax import cli
from blip3o_jax.cli import params

def run(args):
    import jax
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.jit(lambda x: x + 1)(2)

params.run = run
sys.exit(cli.main(["params", "--config=configs/overfit.py"]))
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    [directory] = (tmp_path / "home/blip3o_jax/compiled").iterdir()
    assert list(directory.iterdir())
