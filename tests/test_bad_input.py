"""What a user can get wrong, through the real command: one line on stderr, status 2, no traceback, nothing lost."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from tests import tiny

def get_config():
    return tiny.run_config(stage="autoencoder", steps=1, preview=0, data={"batch_size": 4})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with config.py, the working directory `joint` of a finished run, and no data."""
    path = tmp_path_factory.mktemp("bad_input")
    (path / "config.py").write_text(CONFIG)
    tiny.write_checkpoint(path / "joint")
    return path


def write_tar(path, count=8, **changes):
    """A webdataset shard; `changes` are member names (dots as underscores) and their contents."""
    files = {}
    for i, (image, caption) in enumerate(zip(tiny.images(count), tiny.CAPTIONS, strict=False)):
        files |= {f"{i:03d}.png": image, f"{i:03d}.txt": caption.encode()}
    with tarfile.open(path, "w") as archive:
        for name, data in (files | {name[1:].replace("_", "."): data for name, data in changes.items()}).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def blip3o(place, *arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(place / "cache")} | environment
    command = [sys.executable, "-m", "blip3o_jax", *map(str, arguments)]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def snapshot(directory):
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*")}


def refused(done, *words):
    """The error's line, after the checks that hold for all of them."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[-1].startswith("blip3o: error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in lines[-1]
    return lines


TRAIN = ("train", "--config=config.py", "--workdir=joint")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.data.pth=a.tar",), ("unknown config key data.pth: did you mean data.path?",)),
        ((), ("data.path is empty: set --config.data.path",)),
        (("--config.data.path=nowhere.tar",), ("nowhere.tar: no such file or directory",)),
        (("--config.data.path=config.py",), ("config.py: unknown format; expected .tar",)),
    ],
)
def test_settings_of_a_run(place, arguments, words):
    before = snapshot(place / "joint")
    assert len(refused(blip3o(place, *TRAIN, *arguments), *words)) == 1
    assert snapshot(place / "joint") == before


def test_a_tar_cut_in_half(place):
    whole = write_tar(place / "whole.tar")
    (place / "cut.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    before = snapshot(place / "joint")
    assert (
        len(refused(blip3o(place, *TRAIN, "--config.data.path=cut.tar"), "cut.tar: cut off or damaged at byte", "key: 005"))
        == 1
    )
    assert snapshot(place / "joint") == before


def test_a_batch_that_does_not_divide_over_the_mesh(place):
    write_tar(place / "whole.tar")
    done = blip3o(
        place,
        *TRAIN,
        "--config.data.path=whole.tar",
        "--config.data.batch_size=6",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert len(refused(done, "data.batch_size=6 does not divide over 8 batch shards", "use a multiple of 8")) == 1


def test_an_image_of_zero_bytes_is_skipped_and_counted_up_to_the_share_allowed(place):
    """One of 8. The run that allows it goes through; the next, which does not, leaves that run's checkpoint as it was."""
    write_tar(place / "empty.tar", _002_png=b"", _003_cls=b"1")
    train = ("train", "--config=config.py", "--workdir=run", "--config.data.path=empty.tar")
    done = blip3o(place, *train, "--config.data.max_bad_share=0.5", "--config.steps=3")
    assert done.returncode == 0, done.stderr
    assert "skipped empty.tar: 002: the image has zero bytes" in done.stderr
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["bad_records"] >= 1
    assert "empty.tar: 1 members not used: 1 of unknown suffix (003.cls first in empty.tar)" in done.stderr
    counted = {name: value for name, value in rows[-1].items() if name.startswith("data/")}
    assert counted == {"data/unused_members": 1, "data/unused_members/unknown_suffix": 1, "data/incomplete_records": 1}

    before = snapshot(place / "run" / "checkpoints" / "3")
    words = ("records (", "cannot be read, more than data.max_bad_share=1.0%", "empty.tar: 002: the image has zero bytes")
    refused(blip3o(place, *train, "--config.steps=9", "--config.seed=0"), *words)
    assert snapshot(place / "run" / "checkpoints" / "3") == before


def test_a_caption_that_is_not_utf8(place):
    write_tar(place / "latin.tar", _005_txt=b"caf\xe9")
    train = ("train", "--config=config.py", "--workdir=latin", "--config.data.path=latin.tar", "--config.data.batch_size=8")
    done = blip3o(place, *train)
    refused(done, "cannot be read", "latin.tar: 005: the text is not UTF-8 (byte 3)")


def test_a_prompt_longer_than_the_sequence(place):
    before = snapshot(place / "joint")
    done = blip3o(place, "sample", "--checkpoint=joint", "--out=out", "--prompt=a cat", f"--prompt={'cat ' * 90}")
    assert len(refused(done, "prompt 'cat cat cat", "is more than the model's 72: shorten it")) == 1
    assert not (place / "out").exists() and snapshot(place / "joint") == before


@pytest.mark.parametrize("command", (("sample", "--prompt=a cat"), ("evaluate", "--suite=shapes")))
def test_a_directory_that_is_no_checkpoint(place, command):
    (place / "pictures").mkdir(exist_ok=True)
    done = blip3o(place, *command, "--checkpoint=pictures", "--out=out")
    assert len(refused(done, "pictures is not a checkpoint: it holds no config.json")) == 1
    assert not (place / "out").exists()
