import subprocess
import sys
import types

import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax import cli
from blip3o_jax.cli import settings
from blip3o_jax.config import Config, UserError

COMMANDS = (
    "data",
    "data shapes",
    "train",
    "sample",
    "edit",
    "reconstruct",
    "ask",
    "evaluate",
    "params",
    "demo",
    "convert",
    "convert import",
    "convert export",
    "convert verify",
    "bench",
    "bench peer",
    "bench conversion",
    "bench sharding",
)

CONFIG = "from blip3o_jax.config import Config\n\ndef get_config():\n    return Config()\n"


@pytest.fixture
def stub(monkeypatch):
    """Stand in for the module a command imports; returns the calls made to it."""

    def install(name: str, function: str, result=None, raises: BaseException | None = None) -> list:
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            if raises is not None:
                raise raises
            return result

        # The packages on the way are stood in for too, so that no test here waits for jax, which
        # `check_names` imports as well (test_settings.py).
        monkeypatch.setattr(settings, "check_names", lambda config: None)
        *packages, leaf = name.split(".")
        parent = blip3o_jax
        for part in [*packages, leaf]:
            module = types.ModuleType(f"{parent.__name__}.{part}")
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setattr(parent, part, module, raising=False)
            parent = module
        setattr(parent, function, record)
        return calls

    return install


@pytest.mark.parametrize("command", ("", *COMMANDS))
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: blip3o {command}".rstrip())


def test_every_command_stands_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for command in ("data", "train", "sample", "evaluate", "params", "demo", "convert", "bench"):
        assert f"    {command} " in out


@pytest.mark.parametrize("command", ("", *COMMANDS))
def test_help_imports_nothing_heavy(command):
    """Check the imports that cost the seconds: time on a shared machine says little."""
    code = f"""
import sys
from blip3o_jax import cli
from blip3o_jax.cli import settings
try:
    cli.main({[*command.split(), "--help"]!r})
except SystemExit:
    pass
heavy = {{"jax", "flax", "numpy", "optax", "orbax", "grain"}}
heavy |= {{"ml_collections", "PIL", "cv2", "rich"}}
heavy &= set(sys.modules)
print("HEAVY", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "blip3o_jax", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("blip3o: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["paint"], "argument COMMAND: 'paint' is not one of data, train,"),
        (["evalute"], "; did you mean evaluate? (see blip3o --help)"),
        (
            # Reported before the flag that it replaces is missed.
            ["sample", "--chekpoint=c", "--out=o", "--prompt=a"],
            "unrecognized argument: --chekpoint=c; did you mean --checkpoint? (see blip3o sample",
        ),
        (["train", "--workdir=w"], "--config"),
        (
            ["train", "--config=c.py", "--workdir=w", "--learning_rate=1"],
            "unrecognized argument: --learning_rate=1",
        ),
        (
            ["train", "--config=c.py", "--workdir=w", "--config.steps"],
            "--config.steps needs a value: --config.steps=VALUE",
        ),
        (["train", "--conf=c.py", "--workdir=w"], "--config"),
        (["sample", "--checkpoint=c", "--out=o"], "--prompt --prompts_file"),
        (
            ["sample", "--checkpoint=c", "--out=o", "--prompt=a", "--config.x=1"],
            "unrecognized argument: --config.x=1",
        ),
        (
            ["train", "--config=c.py", "--config.steps", "3"],
            "--config.steps needs a value: --config.steps=VALUE",
        ),
        (["train", "--config=c.py", "--workdir="], "argument --workdir: the path is empty"),
        (
            ["train", "--config=c.py", "--workdir=a\0b"],
            "'a\\x00b' must be a path: it contains a NUL character",
        ),
        (["train", "--config=c.py", "--work\ndir=x"], "unrecognized argument: --work\\ndir=x"),
        (
            ["sample", "--checkpoint=c", "--out=gs://bucket/x", "--prompt=a"],
            "is no directory: mount the bucket",
        ),
        (
            ["sample", "--checkpoint=c", "--out=o", "--prompt=a", "--size=99999x8"],
            "'99999' must lie between 1 and 16,384",
        ),
        (
            ["sample", "--checkpoint=c", "--out=o", "--prompt=a", "--seed=-1"],
            "'-1' must lie between 0 and 4,294,967,295",
        ),
        (
            ["sample", "--checkpoint=c", "--out=o", "--prompt=a", "--seed=" + "9" * 5000],
            "is not a whole number",
        ),
        (
            ["sample", "--checkpoint=c", "--out=o", "--prompt=a", "--guidance=nan"],
            "'nan' must lie between -1,000 and 1,000",
        ),
        (
            ["sample", "--checkpoint=c", "--out=o", "--prompt=a", "--steps=0"],
            "'0' must lie between 1 and 10,000",
        ),
        (["evaluate", "--checkpoint=c", "--out=o"], "--suite"),
        (["sample", "--checkpoint=c", "--out=o", "--prompt="], "argument --prompt: it is empty"),
        (["data", "index", " "], "argument PATH: it is empty: give one"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.startswith("blip3o: error: ") and words in err and err.count("\n") == 1


def test_train_passes_the_overridden_config(tmp_path, stub):
    calls = stub("train.recipe", "run")
    (tmp_path / "c.py").write_text(CONFIG)
    flags = ["--config.steps=3", "--config.data.path=a=b.tar", "--config.steps=4"]
    assert cli.main(["train", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w", *flags]) == 0
    ((recipe, workdir), _) = calls[0]
    assert (recipe[""].steps, recipe[""].data.path, workdir) == (4, "a=b.tar", tmp_path / "w")


def test_a_run_is_named_after_its_config(tmp_path, stub):
    calls = stub("train.recipe", "run")
    (tmp_path / "c.py").write_text(
        "from blip3o_jax.config import Config\n\ndef get_config(x=''):\n    return Config()\n"
    )
    for argument in ("", ":1.7b", ":some/where", ":ocr:some/where", ":geneval:some/where"):
        assert cli.main(["train", f"--config={tmp_path}/c.py{argument}"]) == 0
    names = ["c", "c-1.7b", "c-where", "c-ocr-where", "c-geneval-where"]
    assert [str(args[1]) for args, _ in calls] == [f"runs/{name}" for name in names]


def test_sample_passes_only_the_settings_given(tmp_path, stub):
    calls = stub("pipeline", "generate_to_directory")
    argv = [
        "sample",
        "--checkpoint=c",
        f"--out={tmp_path}",
        "--prompt=a",
        "--prompt=b",
        "--top_k=5",
        "--guidance=0",
    ]
    assert cli.main(argv) == 0
    (_, requests, _), keywords = calls[0]
    assert requests == [("t2i", "a", (), None), ("t2i", "b", (), None)]
    assert keywords == {"seed": 0, "overrides": {"guidance": 0.0, "top_k": 5}}


def test_images_are_shown_as_they_are_given(tmp_path, stub, capsys):
    calls = stub("pipeline", "generate_to_directory")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.new("RGB", (12, 8 + i), (i, 0, 0)).save(path)
    shown = [f"--image={path}" for path in paths]
    assert (
        cli.main(
            [
                "edit",
                "--checkpoint=c",
                "--out=o",
                *shown,
                "--instruction=make it red",
                "--size=16x24",
                "--reference_guidance=1.5",
            ]
        )
        == 0
    )
    assert cli.main(["reconstruct", "--checkpoint=c", "--out=o", *shown, "--seed=3"]) == 0
    ((task, text, images, size),), keywords = calls[0][0][1], calls[0][1]
    assert (task, text, [x.shape for x in images], size) == (
        "edit",
        "make it red",
        [(8, 12, 3), (9, 12, 3)],
        (16, 24),
    )
    assert keywords == {"seed": 0, "overrides": {"reference_guidance": 1.5}}
    assert [(task, image[0, 0, 0]) for task, _, (image,), _ in calls[1][0][1]] == [
        ("reconstruct", 0),
        ("reconstruct", 1),
    ]
    assert (
        cli.main(["edit", "--checkpoint=c", "--out=o", "--image=none.png", "--instruction=x"]) == 2
    )
    assert (
        capsys.readouterr().err
        == "blip3o: error: none.png: the image cannot be read: No such file or directory\n"
    )


def test_prompts_file(tmp_path, stub, capsys):
    calls = stub("pipeline", "generate_to_directory")
    path = tmp_path / "prompts.txt"
    argv = ["sample", "--checkpoint=c", "--out=o", f"--prompts_file={path}"]
    path.write_text("a café\n\n  two dogs \n", encoding="utf-8")
    assert cli.main(argv) == 0
    path.write_text('{"prompt": "a cat", "tag": "single"}\n', encoding="utf-8")
    assert cli.main(argv) == 0
    assert [[text for _, text, _, _ in call[0][1]] for call in calls] == [
        ["a café", "two dogs"],
        ["a cat"],
    ]
    path.write_bytes(b"caf\xe9\n")
    assert cli.main(argv) == 2
    path.write_text("\n")
    assert cli.main(argv) == 2
    path.unlink()
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"blip3o: error: {path}:1 is not UTF-8 text: invalid continuation byte at byte 3",
        f"blip3o: error: {path} holds no prompt: write one a line",
        f"blip3o: error: {path}: No such file or directory",
    ]
    assert len(calls) == 2


def test_the_other_commands_call_one_function(tmp_path, stub, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    data, runner = stub("data.shapes.builder", "prepare"), stub("evaluation.runner", "evaluate")
    table, demo = (
        stub("parameter_counts", "print_table"),
        stub("demo.run", "run", result={"seconds": 1.5}),
    )
    sized = Config(steps=3)
    stub("train.checkpoint", "find")
    vocabulary = stub("train.vocabulary", "expected_vocabulary", result=(sized, "as given"))
    assert cli.main(["data", "shapes", "--out=d", "--num_test=9"]) == 0
    assert (
        cli.main(["evaluate", "--checkpoint=c", "--suite=shapes", "--out=o", "--num_prompts=7"])
        == 0
    )
    assert cli.main(["params", f"--config={tmp_path}/c.py", "--config.steps=2"]) == 0
    assert (
        data[0][1]["num_test"] == 9
        and runner[0][1]["num_prompts"] == 7
        and vocabulary[0][0][0].steps == 2
        and table[0][0] == (sized, "as given")
    )
    capsys.readouterr()
    assert cli.main(["demo", "--fast"]) == 0
    assert demo[0][1] == {"fast": True}
    assert capsys.readouterr().out.splitlines()[-1] == '{"seconds": 1.5}'
    own = stub("demo.held_out", "run", result={"seconds": 2.5})
    assert cli.main(["demo", f"--config={tmp_path}/c.py", "--config.steps=3"]) == 0
    (stages, workdir), flags = own[0]
    assert (stages[""].steps, workdir.as_posix(), flags) == (3, "runs/c", {"fast": False})
    assert cli.main(["demo", "--config.steps=3"]) == 2 and len(demo) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            UserError("a.tar is cut short\n  at byte 12"),
            "blip3o: error: a.tar is cut short at byte 12",
        ),
        (UserError("a\x1b[31m.tar is cut short"), r"blip3o: error: a\x1b[31m.tar is cut short"),
        (NotADirectoryError(20, "Not a directory", "x/y"), "blip3o: error: x/y: Not a directory"),
    ],
)
def test_a_users_error_is_one_line_without_traceback(stub, capsys, monkeypatch, error, line):
    monkeypatch.delenv("BLIP3O_TRACEBACK", raising=False)
    stub("demo.run", "run", raises=error)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == line + "\n"
    monkeypatch.setenv("BLIP3O_TRACEBACK", "1")
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith(line + "\n")


def test_a_bug_keeps_its_traceback(stub):
    stub("demo.run", "run", raises=ValueError("shapes do not match"))
    with pytest.raises(ValueError, match="shapes do not match"):
        cli.main(["demo"])


def test_an_interrupt_says_how_to_resume(tmp_path, stub, capsys):
    stub("train.recipe", "run", raises=KeyboardInterrupt())
    (tmp_path / "c.py").write_text(CONFIG)
    assert cli.main(["train", f"--config={tmp_path}/c.py", "--workdir=w"]) == 130
    assert "resumes from the last checkpoint" in capsys.readouterr().err


def test_a_list_of_anchors_names_some(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "anchors", "--out=o", "--only=,"])
    assert (
        "argument --only: ',' names nothing: leave the flag out for all" in capsys.readouterr().err
    )
