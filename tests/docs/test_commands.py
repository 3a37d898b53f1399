"""Check that every command of README.md, docs/ and the docstrings of configs/ runs: `blip3o` lines
pass the command's own parser and their settings pass the config's, others name a known program."""

import argparse
import ast
import pathlib
import re
import shlex

import pytest

from blip3o_jax import cli, config
from tests.docs.pages import PAGES, ROOT, fences

# Programs a reader has, and the files of this project that are run as one.
PROGRAMS = {
    "pip",
    "pytest",
    "python3",
    "mkdocs",
    "ruff",
    "git",
    "export",
    "cd",
    "grep",
    "mypy",
    "jupyter",
}
SHELL = {"", "bash", "sh", "console"}
# Config files whose argument is a checkpoint or a data set, which no reader of the page has yet.
OF_A_FILE = {"configs/finetune.py", "configs/edit.py", "configs/rl.py", "configs/own.py"}
ANY_CONFIG = "from blip3o_jax.config import Config\ndef get_config(arg=''): return Config()\n"


def joined(text: str) -> list[str]:
    """Return the commands of a block, each on one line, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def commands_of_pages() -> list[tuple[str, str]]:
    """Return (place, command) for each line of the shell blocks, and each `blip3o ...` in the
    text."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT)
        for fence in fences(page):
            if fence.language not in SHELL:
                continue
            for line in joined(fence.text):
                # A block without a language may hold a drawing or what a command prints.
                if fence.language or re.match(
                    r"(blip3o [a-z]|pip |pytest\b|mkdocs |launch/\S+\.sh )", line
                ):
                    found.append((f"{name}:{fence.line}", line))
        prose = re.sub(r"^( *)```.*?^\1```", "", page.read_text("utf-8"), flags=re.M | re.S)
        spans = re.findall(r"`(blip3o [a-z][^`\n]*--[^`]*)`", prose)
        found += [(f"{name}, in the text", " ".join(span.split())) for span in spans]
    return found


def commands_of_configs() -> list[tuple[str, str]]:
    """Return (file, command) for each `blip3o` line of a config file's docstring."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines = joined(docstring.partition("Hardware:")[0])
        found += [(f"configs/{path.name}", line) for line in lines if line.startswith("blip3o ")]
    return found


def all_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of all commands below it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(all_flags, action.choices.values()))
    return found


FLAGS = all_flags(cli.build_parser())
COMMANDS = sorted(set(commands_of_pages() + commands_of_configs()))


def words(command: str) -> list[str]:
    """Return the arguments; what usage marks as optional, `[--flag=X]`, is given."""
    command = re.sub(r"\[(--[^\]]*)\]", r"\1", command)
    command = re.sub(r"\[:[A-Z]+\]|\[[a-z]+\]", "", command)
    command = command.replace(" ...", "")
    return shlex.split(command, comments=True)


@pytest.fixture(scope="module")
def any_config(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("configs") / "any.py"
    path.write_text(ANY_CONFIG, encoding="utf-8")
    return path


def check_blip3o(arguments: list[str], any_config: pathlib.Path) -> None:
    """Parse a command, then resolve its settings as far as that goes without a checkpoint."""
    args = cli.parse(arguments)
    named = getattr(args, "config", None)
    if not isinstance(named, str):
        return
    file = named.partition(":")[0]
    if re.fullmatch(r"[A-Z]+\.py", file):  # FILE.py, C.py: whichever the reader has
        return
    assert (ROOT / file).is_file(), f"{file} is no file of this project"
    overrides = [pair for pair in args.overrides if pair != ("a.b", "v") and pair[0] != "a.b"]
    if file in OF_A_FILE:
        config.load_recipe(f"{any_config}:x", overrides)
    else:
        config.load_recipe(f"{ROOT / file}{named[len(file) :]}", overrides)


def check_launcher(arguments: list[str], any_config: pathlib.Path) -> None:
    """Check that every flag of a launcher is in its header, and that a command of blip3o follows
    `--`."""
    script = (ROOT / arguments[0]).read_text(encoding="utf-8")
    own, _, more = (list(part) for part in partition(arguments[1:], "--"))
    for flag in own:
        if flag.startswith("-"):
            assert flag.partition("=")[0] in script, f"{arguments[0]} knows no {flag}"
    check_blip3o([word.replace("gs://", "/gcs/") for word in more], any_config)


def partition(values: list[str], at: str) -> tuple[list[str], list[str], list[str]]:
    cut = values.index(at) if at in values else len(values)
    return values[:cut], values[cut : cut + 1], values[cut + 1 :]


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[f"{p}-{c[:40]}" for p, c in COMMANDS])
def test_a_command_that_is_shown_is_one_that_runs(place, command, any_config, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *arguments = words(command)
    try:
        if program == "blip3o":
            check_blip3o(arguments, any_config)
        elif program.startswith("launch/"):
            check_launcher([program, *arguments], any_config)
        elif "/" in program:
            assert (ROOT / program).is_file()
        else:
            assert program in PROGRAMS, f"add {program!r} to PROGRAMS if every reader has it"
            for word in arguments if program == "python3" else ():
                assert not word.endswith(".py") or (ROOT / word).is_file(), f"{word} is no file"
    except SystemExit:
        refusal = capsys.readouterr().err
        # A sentence names the flags that it speaks of and leaves out the rest.
        shortened = "in the text" in place and "arguments are required" in refusal
        unknown = {word.partition("=")[0] for word in arguments if word.startswith("--")} - FLAGS
        if unknown or not shortened:
            pytest.fail(f"{place}: {command}: {refusal}")


def test_an_extra_that_is_shown_is_one_of_setup_py():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r'^        "(\w+)": \[', setup, re.MULTILINE))
    assert {"tpu", "docs", "test"} <= extras
    for page in PAGES:
        for names in re.findall(r"-e '\.\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras, f"{page.name}: .[{names}]"


def test_all_pages_are_read():
    places = {place.partition(":")[0] for place, _ in COMMANDS}
    assert {"README.md", "docs/rl.md", "docs/pods.md", "docs/quick_start.md"} <= places
    assert len(COMMANDS) > 100
