"""What a user can get wrong, through the real command: one line on stderr, status 2, no traceback,
nothing lost.
"""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

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
        for name, data in (
            files | {name[1:].replace("_", "."): data for name, data in changes.items()}
        ).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def blip3o(place, *arguments, **environment):
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(place / "cache")} | environment
    )
    command = [sys.executable, "-m", "blip3o_jax", *map(str, arguments)]
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


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
        len(
            refused(
                blip3o(place, *TRAIN, "--config.data.path=cut.tar"),
                "cut.tar: cut off or damaged at byte",
                "key: 005",
            )
        )
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
    assert (
        len(
            refused(
                done, "data.batch_size=6 does not divide over 8 batch shards", "use a multiple of 8"
            )
        )
        == 1
    )


def write_odd_records(path):
    """A folder of 24 captioned images and a parquet file of 8; what is wrong with them: key ->
    reason.
    """
    (path / "odd").mkdir()
    captions = [*tiny.CAPTIONS, *tiny.CAPTIONS, *tiny.CAPTIONS][:24]
    lines = [{"file_name": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    for i, data in enumerate(tiny.images(24)):
        (path / "odd" / f"{i}.png").write_bytes(data)
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", "x" * ((1 << 20) + 9), zip=True)
    Image.new("RGB", (20, 20)).save(
        path / "odd" / "0.png", pnginfo=notes, icc_profile=bytes((1 << 20) + 9)
    )
    (path / "odd" / "1.png").write_bytes(b"")
    Image.new("RGB", (20, 20)).save(path / "odd" / "2.png", "EPS")
    Image.new("1", (10_000, 8_001)).save(path / "odd" / "3.png")
    lines[4]["caption"] = "a birthday cake \ud83c"
    lines[5]["file_name"] = "\0.png"
    raw = [json.dumps(line).encode() for line in lines]
    raw[0] = b"\xef\xbb\xbf" + raw[0]
    raw[6] = raw[6].replace(b'"caption"', b'"n": ' + b"1" * 5000 + b', "caption"')
    raw[7] = raw[7].replace(b'"caption"', b'"n": ' + b"[" * 100_000 + b', "caption"')
    raw[8] = b'{"file_name": "8.png", "caption": "caf\xe9"}'
    (path / "odd" / "captions.jsonl").write_bytes(b"\r\n".join(raw))

    table = pa.table(
        {"image": tiny.images(8), "text": [["", caption] for caption in tiny.CAPTIONS[:8]]}
    )
    pq.write_table(table, path / "odd.parquet", row_group_size=4)
    column = pq.read_metadata(path / "odd.parquet").row_group(1).column(0)
    data = bytearray((path / "odd.parquet").read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 32] = bytes(32)
    (path / "odd.parquet").write_bytes(data)
    return {
        "1.png": "the image has zero bytes",
        "2.png": "the image cannot be decoded: it is no JPEG, PNG, WebP, GIF, BMP or TIFF file",
        "3.png": "the image is too large: 10000 x 8001 pixels",
        "line 5": "the text has half a character ('\\ud83c' at 16)",
        "\\x00.png": "the image cannot be read: no file can have this name",
        "line 7": "broken JSON: Exceeds the limit",
        "line 8": "broken JSON: ",
        "line 9": "the text is not UTF-8 (byte 38)",
        "row 5": "the row group cannot be read: ",
    }


def test_odd_records_are_skipped_and_counted_up_to_the_share_allowed(place):
    """The run that allows them goes through; the next, which does not, leaves its checkpoint as it
    was.
    """
    odd = write_odd_records(place)
    sources = "[{'path': 'odd'}, {'path': 'odd.parquet'}]"
    train = ("train", "--config=config.py", "--workdir=run", f"--config.data.sources={sources}")
    done = blip3o(place, *train, "--config.data.max_bad_fraction=0.9", "--config.steps=12")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for key, reason in odd.items():
        assert f": {key}: {reason}" in done.stderr
    assert "odd/captions.jsonl: 0.png" not in done.stderr, "metadata of any size"
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["data/unused_members"] == 0 and rows[-1]["data/incomplete_records"] == 5
    assert "odd.parquet: 4 of 8 records incomplete: 4 that cannot be read" in done.stderr
    counts = {name: count for name, count in rows[-1].items() if name.startswith("skipped/")}
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["bad_records"] == sum(counts.values()) >= len(odd)
    assert counts["skipped/the_row_group_cannot_be_read"] >= 4

    before = snapshot(place / "run" / "checkpoints" / "12")
    words = ("records (", "cannot be read, more than data.max_bad_fraction=1.0%", "odd")
    refused(blip3o(place, *train, "--config.steps=40", "--config.seed=0"), *words)
    assert snapshot(place / "run" / "checkpoints" / "12") == before


def test_a_prompt_longer_than_the_sequence(place):
    before = snapshot(place / "joint")
    done = blip3o(
        place,
        "sample",
        "--checkpoint=joint",
        "--out=out",
        "--prompt=a cat",
        f"--prompt={'cat ' * 90}",
    )
    assert len(refused(done, "prompt 'cat cat cat", "is more than the model's 72: shorten it")) == 1
    assert not (place / "out").exists() and snapshot(place / "joint") == before


@pytest.mark.parametrize("command", (("sample", "--prompt=a cat"), ("evaluate", "--suite=shapes")))
def test_a_directory_that_is_no_checkpoint(place, command):
    (place / "pictures").mkdir(exist_ok=True)
    done = blip3o(place, *command, "--checkpoint=pictures", "--out=out")
    assert len(refused(done, "pictures is not a checkpoint: it holds no config.json")) == 1
    assert not (place / "out").exists()
