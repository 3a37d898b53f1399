"""Make bad command lines over every command, from argparse's own parser and from the settings'
annotations.

Each has one error. `arguments` are refused while they are parsed, `settings` when the config is
loaded, `files` when the command reads a path, in a directory that `write_files` has filled.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random
import typing
from collections.abc import Iterator

from blip3o_jax import cli, config
from blip3o_jax.config import fields
from blip3o_jax.config.constraints import Bounds

ROOT = pathlib.Path(__file__).parent.parent
HUGE = "9" * 5000
LONG = "a" * 5000
CONFIG = """
from tests import tiny

def get_config():
    return tiny.run_config("data", stage="autoencoder", steps=1, preview=0, data={"batch_size": 8})
"""
# What every command needs in addition to the flag that is wrong. Paths are those of `write_files`.
BASE = {
    "data shapes": ("--out=new",),
    "data index": ("data",),
    "train": ("--config=config.py", "--workdir=new"),
    "sample": ("--checkpoint=joint", "--prompt=a cat", "--out=new"),
    "edit": ("--checkpoint=joint", "--image=good.png", "--instruction=x", "--out=new"),
    "reconstruct": ("--checkpoint=joint", "--image=good.png", "--out=new"),
    "ask": ("--checkpoint=joint", "--image=good.png", "--question=x"),
    "evaluate": ("--checkpoint=joint", "--suite=shapes", "--out=new"),
    "params": ("--config=config.py",),
    "demo": ("--fast", "--workdir=new"),
    "rl": ("--config=config.py", "--workdir=new"),
    "rl rescore": ("--run=joint",),
    "rl serve-rewards": ("--reward=shapes",),
    "convert import": ("--source=hf", "--out=new"),
    "convert export": ("--source=joint", "--out=new"),
    "convert verify": ("--torch=hf", "--jax=joint"),
    "bench peer": ("--torch=hf", "--jax=joint", "--out=new"),
    "bench conversion": ("--config=config.py", "--out=new"),
    "bench sharding": ("--config=config.py", "--topology=v5e:2x2", "--out=new"),
    "bench anchors": ("--out=new",),
    "bench rl": ("--config=config.py", "--out=new"),
}


# Where the base itself goes no further than this.
ENDS = {
    "edit": "images given",
    "reconstruct": "images given",
    "ask": "images given",
    "rl": "stage 'joint'",
    "rl rescore": "rollouts.jsonl",
    "bench rl": "stage 'joint'",
    "evaluate": "images of 32 pixels",
}


@dataclasses.dataclass(frozen=True)
class Bad:
    """Hold one command line; its error must contain one of `words`."""

    kind: str
    argv: tuple[str, ...]
    words: tuple[str, ...]


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Return (name, parser) of each command that runs something."""

    def walk(
        name: str, parser: argparse.ArgumentParser
    ) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        if parser.get_default("run"):
            yield name.strip(), parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub, child in action.choices.items():
                    yield from walk(f"{name} {sub}", child)

    return walk("", cli.build_parser())


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.option_strings and a.dest not in ("help", "version")]


def of_arguments() -> Iterator[Bad]:
    """Return lines with a flag's value that no file can make valid, an unknown flag, one too many
    or one too few."""
    for name, parser in commands():
        base, words = BASE.get(name, ()), tuple(name.split())
        yield Bad("arguments", (*words, *base, "--nonsense=1"), ("--nonsense",))
        yield Bad("arguments", (*words, *base, "--new\nline"), ("--new",))
        yield Bad("arguments", (*words, *base, "stray"), ("stray",))
        if "--config=config.py" not in base:
            yield Bad("arguments", (*words, *base, "--config.steps=1"), ("--config.steps",))
        for action in flags(parser):
            flag = action.option_strings[0]
            others = tuple(given for given in base if given.partition("=")[0] != flag)
            if action.required:
                yield Bad("arguments", (*words, *others), (flag,))
            if action.nargs == 0:
                yield Bad("arguments", (*words, *others, f"{flag}=1"), (flag,))
                continue
            if action.nargs != "?":
                yield Bad("arguments", (*words, *others, flag), (flag,))
            for value in bad_values(action):
                yield Bad("arguments", (*words, *others, f"{flag}={value}"), (flag,))


def bad_values(action: argparse.Action) -> list[str]:
    """Return texts that are never a value of this flag."""
    if action.choices:
        return ["", "nonsense", "\0"]
    described = getattr(action.type, "__qualname__", "")
    if "number" in described or "_batch" in described:
        signed = "guidance" in action.dest
        return [
            "",
            "x",
            "nan",
            "1e999",
            "\0",
            "0x10",
            "1 2",
            HUGE,
            "--1",
            *([] if signed else ["-1", "-9"]),
        ]
    if described == "path":
        return ["", " ", "\0", "a\0b", "gs://bucket/x"]
    if described == "size":
        return [
            "",
            "x",
            "32",
            "32x",
            "x32",
            "0x32",
            "-32x32",
            "32x32x32",
            "32.5x32",
            "99999x32",
            f"{HUGE}x32",
            "\0",
        ]
    if described == "_size":  # of a file
        return ["", "x", "-1", "0", "5XB", "1e999GB", "nan", "\0"]
    if described == "_mesh":
        return [
            "fdsp=8",
            "fsdp=x",
            "fsdp=-2",
            "data=-1,fsdp=-1",
            f"fsdp={HUGE}",
            "strategy=x",
            "fsdp",
            "\0",
        ]
    if described == "address":
        return ["", "h", "h:", ":1", "h:0", "h:99999", "h:-1", "h:x", f"h:{HUGE}", "h\0:1"]
    if described == "word":
        return ["", " ", "\0", "\ud800"]
    return ["\0", "\ud800"] if described in ("text", "names") else ["\0"]


def of_settings() -> Iterator[Bad]:
    """Return for each field of each group values that its annotation refuses."""
    named = [name for name, base in BASE.items() if "--config=config.py" in base]
    turn = itertools.cycle(named)
    for path, hint in leaves(config.Config, ""):
        for text in bad_texts(hint):
            name = next(turn)
            argv = (*name.split(), *BASE[name], f"--config.{path}={text}")
            yield Bad("settings", argv, (path.rpartition(".")[2],))
        yield Bad("settings", ("params", *BASE["params"], f"--config.{path}x=1"), (path,))
    for path in (
        "",
        ".",
        "..",
        "model",
        "model.",
        ".steps",
        "steps.x",
        "data.sources[0].path",
        "joint.steps",
        "a\0b",
        "\n",
    ):
        yield Bad(
            "settings",
            ("params", *BASE["params"], f"--config.{path}=1"),
            ("config", "model", "steps"),
        )


def leaves(cls: type, path: str) -> Iterator[tuple[str, typing.Any]]:
    for name, hint in fields.field_types(cls).items():
        kind = fields.unwrapped(hint)[0]
        if fields.is_group(kind):
            yield from leaves(kind, fields.join(path, name))
        else:
            yield fields.join(path, name), hint


def bad_texts(hint: typing.Any) -> list[str]:
    kind, constraints, _ = fields.unwrapped(hint)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        wrong = {float: "(nan,)", int: "(1.5,)", str: "('\\x00',)"}
        element = wrong.get(fields.unwrapped(inner)[0], "(3,)")
        return [
            "",
            "x",
            "(",
            "3",
            "(" * 500,
            "{1: 2}",
            "(None,)",
            element,
            "\0",
            "__import__('os').getcwd()",
        ]
    if kind is bool:
        return ["", "maybe", "2", "\0"]
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return ["\0", "a\0b"] if kind is str else ["nonsense", "\0", "\n"]
    bounds = [c for c in constraints if isinstance(c, Bounds)]
    beyond = [str(kind(b.low) - kind(1)) for b in bounds] + [
        str(kind(b.high) + kind(1)) for b in bounds
    ]
    if kind is float:
        beyond = ["-1e30", "1e30"]
    return ["", "x", "nan", "inf", "-inf", HUGE, "\0", "1,5", *beyond]


_CONFIG = b"from blip3o_jax.config import Config\n\ndef get_config():\n    return "
# Content of files, by name; None is a directory.
FILES: dict[str, bytes | None] = {
    "empty": b"",
    "garbage": bytes(random.Random(0).randbytes(4096)),
    "cut.json": b'{"prompt": "a cat", "n": [1, 2',
    "cut.jsonl": b'{"prompt": "a cat"}\n{"prompt": "a d',
    "list.json": b"[1, 2, 3]",
    "number.json": b"1",
    "deep.json": b"[" * 100_000,
    "digits.json": b'{"steps": ' + b"9" * 5000 + b"}",
    "unknown.json": b'{"stepps": 1}',
    "text.txt": b"a cat\na dog\n",
    "folder": None,
    "empty.png": b"",
    "text.png": b"this is no picture",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "syntax.py": b"def get_config(:\n",
    "nul.py": b"x = 1\0\n",
    "latin.py": b"# caf\xe9\ndef get_config():\n    return 1\n",
    "none.py": b"CONFIG = 1\n",
    "number.py": b"def get_config():\n    return 1\n",
    "raises.py": b"def get_config():\n    raise RuntimeError('two\\nlines')\n",
    "leaves.py": b"import sys\n\ndef get_config():\n    sys.exit(0)\n",
    "leaves_at_once.py": b"raise SystemExit('bye')\n",
    "deep.py": b"def get_config():\n    return get_config()\n",
    "argument.py": b"def get_config(size):\n    return size\n",
    "nan.py": _CONFIG + b"Config(watchdog=float('nan'))\n",
    "kind.py": _CONFIG + b"Config(steps='many')\n",
    "names.py": _CONFIG + b"{1: Config()}\n",
    "outside.py": _CONFIG + b"{'../x': Config()}\n",
    "empty_recipe.py": b"def get_config():\n    return {}\n",
}


def write_files(place: pathlib.Path) -> None:
    """Fill `place` with what is wrong to read, and `good.png`."""
    from tests import tiny

    (place / "config.py").write_text(CONFIG)
    tiny.write_data(place / "data")
    (place / "good.png").write_bytes(tiny.images(1)[0])
    for name, content in FILES.items():
        if content is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(content)
    (place / "cut.png").write_bytes(tiny.images(1)[0][:60])
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nowhere")
    for name in (
        "empty",
        "garbage",
        "list.json",
        "number.json",
        "deep.json",
        "digits.json",
        "unknown.json",
    ):
        for kind in ("checkpoint", "hf"):
            directory = place / f"{kind}_{name.partition('.')[0]}"
            directory.mkdir()
            (directory / "config.json").write_bytes(FILES[name] or b"")
    (place / "checkpoint_defaults").mkdir()
    (place / "checkpoint_defaults" / "config.json").write_text(
        json.dumps(config.to_dict(config.Config()))
    )


ABSENT = ("nowhere", "dangling", "loop", "text.txt/under", LONG)
BAD_PATHS = {
    "checkpoint": (
        *ABSENT,
        "text.txt",
        "folder",
        *(
            f"checkpoint_{n}"
            for n in ("empty", "garbage", "list", "number", "deep", "digits", "unknown", "defaults")
        ),
    ),
    "hf": (
        *ABSENT,
        "text.txt",
        "folder",
        *(f"hf_{n}" for n in ("empty", "garbage", "list", "number", "deep", "digits", "unknown")),
    ),
    "prompts": (*ABSENT, "folder", "empty", "garbage", "cut.json", "cut.jsonl"),
    "image": (*ABSENT, "folder", "empty.png", "text.png", "cut.png", "garbage", "postscript.png"),
    "json": (
        *ABSENT,
        "folder",
        "empty",
        "garbage",
        "cut.json",
        "list.json",
        "number.json",
        "deep.json",
        "digits.json",
        "unknown.json",
    ),
    "weights": (*ABSENT, "folder", "empty", "garbage", "text.txt"),
    "config": (
        *(f"{path}.py" for path in ("nowhere", "dangling/x", LONG)),
        "text.txt",
        "folder",
        "config.py:argument",
        *(n for n in FILES if n.endswith(".py")),
    ),
    "out": ("text.txt", "text.txt/under", "loop", LONG),
    "out file": ("folder", "text.txt/under", "nowhere/file", LONG),
    "suite": (
        "nonsense",
        ",",
        "shapes,x",
        "shapes,x=1",
        "ocr,x=1",
        "http",
        "http,urls=x",
        "python:",
        "python:nowhere",
        "python:os.system",
        "python:nowhere.f",
    ),
    "reward": (
        "nonsense",
        ",",
        "shapes,x",
        "shapes,x=1",
        "ocr,x=1",
        "http",
        "http,urls=x",
        "python:",
        "python:nowhere",
        "python:nowhere.f",
        "geneval,detector=x",
    ),
}
KINDS = {
    "checkpoint": "checkpoint",
    "prompts_file": "prompts",
    "image": "image",
    "ta_tok": "weights",
    "ta_tok_config": "json",
    "diffusion": "hf",
    "torch": "hf",
    "jax": "checkpoint",
    "run_dir": "checkpoint",
    "config": "config",
    "suite": "suite",
    "reward": "reward",
    "workdir": "out",
    "compile_cache": "out",
}
LISTS = {
    "parts": ("nonsense", "ar,nonsense", ","),
    "initialise": ("nonsense",),
    "items": ("nonsense", "tokenizer,nonsense"),
    "strategy": ("nonsense", "fsdp,nonsense"),
    "topology": ("nonsense", "v5e", "v5e:", "v5e:0x0", "v5e:x", "v9:2x2"),
    "step": ("nonsense", ""),
    "only": ("nonsense", ","),
    "token_env": ("NO_SUCH_VARIABLE",),
    "host": ("0.0.0.0", "no host"),
}


DATA_SETS = (*ABSENT, "text.txt", "empty", "garbage", "folder", "good.png")
INSTEAD = {"--prompts_file": ("--prompt", "--suite")}  # flags of the base that exclude a flag


def of_files() -> Iterator[Bad]:
    """Return lines with a path that a command cannot use, or a name that does not exist."""
    for name, parser in commands():
        base, words = BASE.get(name, ()), tuple(name.split())
        for value in DATA_SETS if name == "data index" else ():
            yield Bad("files", (*words, value), ("path", value[:20]))
        for action in flags(parser):
            flag = action.option_strings[0]
            kind = KINDS.get(action.dest)
            if action.dest == "source":
                kind = "hf" if name == "convert import" else "checkpoint"
            if action.dest == "out":
                kind = "out file" if name in ("convert verify", "rl rescore") else "out"
            for value in (*BAD_PATHS.get(kind, ()), *LISTS.get(action.dest, ())):
                others = tuple(
                    given
                    for given in base
                    if given.partition("=")[0] not in (flag, *INSTEAD.get(flag, ()))
                )
                others += (
                    ("--suite=ocr",) if name == "evaluate" and flag == "--prompts_file" else ()
                )
                expected = (
                    flag,
                    action.dest,
                    value.partition(".py")[0][:20],
                    *([ENDS[name]] if name in ENDS else ()),
                )
                yield Bad("files", (*words, *others, f"{flag}={value}"), expected)


def all_of(seed: int = 0) -> list[Bad]:
    """Return every command line, without repetition, in an order given by `seed`."""
    found = list(dict.fromkeys((*of_arguments(), *of_settings(), *of_files())))
    random.Random(seed).shuffle(found)
    return found
