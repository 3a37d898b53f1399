"""Run the real command and configs/overfit.py on user errors: a run on odd data finishes and counts
the records it skips; the rest ends in one line on stderr and status 2, with nothing lost."""

import contextlib
import io
import json
import logging
import pathlib
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from blip3o_jax import cli
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
# On the devices of the test session, which the file would split anew.
OVERFIT = (f"--config={ROOT}/configs/overfit.py", "--config.mesh.cpu_devices=0")
TRAIN = ("train", *OVERFIT, "--workdir=run")
# Layers cost compile time, and nothing here depends on them. The first stage sees every record.
SMALL = (
    *(
        f"--config.model.{name}=1"
        for name in (
            "tokenizer.encoder.num_hidden_layers",
            "tokenizer.decoder.num_hidden_layers",
            "text_tower.num_hidden_layers",
            "ar.num_hidden_layers",
            "dit.num_layers",
        )
    ),
    "--config.model.vae.encoder_layers_per_block=(0,1,1,0)",
    "--config.model.vae.decoder_layers_per_block=(0,1,1,0)",
    "--config.preview=0",
    "--config.log_every=1",
    "--config.steps=1",
    "--config.autoencoder.steps=8",
    "--config.joint.steps=3",
    "--config.joint.checkpoint.every=1",
    "--config.joint.checkpoint.keep=3",
    "--config.joint.loss.flow_samples=1",
)
ODD = "--config.data.sources=[{'path': 'odd'}, {'path': 'odd.parquet'}, {'path': 'odd.tar'}]"
ALLOWED = "--config.data.max_bad_fraction=0.9"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return the working directory of all commands here, with a sound shard, whole.tar."""
    path = tmp_path_factory.mktemp("bad_input")
    write_tar(path / "whole.tar", captioned(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def run(place):
    """Return (status, stderr, errors of the data: key -> reason) of a run on odd data, with
    workdir `run`."""
    wrong = write_odd_records(place)
    return *blip3o(*TRAIN, *SMALL, ODD, ALLOWED), wrong


def blip3o(*arguments):
    """Run the command in this process; return its status and what it writes to stderr."""
    err = io.StringIO()
    handler = logging.StreamHandler(err)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(err):
            status = cli.main([*map(str, arguments)])
    finally:
        logging.getLogger().removeHandler(handler)
    return status, err.getvalue()


def refused(*arguments):
    """Return the error's line of a command that is refused, the last on stderr."""
    status, err = blip3o(*arguments)
    *before, line = err.splitlines()
    assert status == 2 and line.startswith("blip3o: error: "), err
    assert not any("blip3o: error: " in line for line in before)
    return line


def captioned(count):
    """Return the members of a shard: (name, content)."""
    pairs = zip(tiny.images(count), tiny.CAPTIONS, strict=False)
    return [
        member
        for i, (image, caption) in enumerate(pairs)
        for member in ((f"{i:03d}.png", image), (f"{i:03d}.txt", caption.encode()))
    ]


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def snapshot(directory):
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*")}


def rows_of(stage):
    lines = pathlib.Path("run", stage, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_odd_folder(path):
    """Write a folder of 24 captioned images whose captions.jsonl begins with a byte-order mark."""
    path.mkdir()
    captions = [*tiny.CAPTIONS, *tiny.CAPTIONS][:24]
    lines = [{"file_name": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    for i, data in enumerate(tiny.images(24)):
        (path / f"{i}.png").write_bytes(data)
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", "x" * ((1 << 20) + 9), zip=True)
    Image.new("RGB", (20, 20)).save(path / "0.png", pnginfo=notes, icc_profile=bytes((1 << 20) + 9))
    (path / "1.png").write_bytes(b"")
    Image.new("RGB", (20, 20)).save(path / "2.png", "EPS")
    Image.new("1", (10_000, 8_001)).save(path / "3.png")
    lines[4]["caption"] = "a birthday cake \ud83c"
    lines[5]["file_name"] = "\0.png"
    raw = [json.dumps(line).encode() for line in lines]
    raw[0] = BYTE_ORDER_MARK + raw[0]
    raw[6] = raw[6].replace(b'"caption"', b'"n": ' + b"1" * 5000 + b', "caption"')
    raw[7] = raw[7].replace(b'"caption"', b'"n": ' + b"[" * 100_000 + b', "caption"')
    raw[8] = b'{"file_name": "8.png", "caption": "caf\xe9"}'
    (path / "captions.jsonl").write_bytes(b"\r\n".join(raw))


def write_odd_parquet(path):
    """Write 8 rows with lists of captions; bytes of the second row group's page are overwritten."""
    table = pa.table(
        {"image": tiny.images(8), "text": [["", caption] for caption in tiny.CAPTIONS[:8]]}
    )
    pq.write_table(table, path, row_group_size=4)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 32] = bytes(32)
    path.write_bytes(data)


def write_odd_tar(path):
    """Write a sound shard with a name that is not UTF-8, and byte-order marks before captions."""
    members = [
        (name.replace("005", "caf\xe9"), data if name.endswith("png") else BYTE_ORDER_MARK + data)
        for name, data in captioned(16)
    ]
    members[7] = ("003.json", BYTE_ORDER_MARK + b'{"caption": "a picture"}')
    write_tar(path, members, format=tarfile.USTAR_FORMAT, encoding="latin-1")


def write_odd_records(path):
    """Write odd/, odd.parquet and odd.tar; return what is wrong with them: key -> reason."""
    write_odd_folder(path / "odd")
    write_odd_parquet(path / "odd.parquet")
    write_odd_tar(path / "odd.tar")
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.data.pth=a.tar",), ("unknown config key data.pth: did you mean data.path?",)),
        ((), ("data.path is empty: set --config.data.path",)),
        (("--config.data.path=nowhere.tar",), ("nowhere.tar: no such file or directory",)),
        (("--config.data.path=odd.py",), ("odd.py: unknown format; expected .tar",)),
        (("--config.data.path=cut.tar",), ("cut.tar: cut off or damaged at byte", "key: 005")),
        (
            ("--config.data.path=twice.tar",),
            ("twice.tar: two members are called 000.png", "write the exports to a shard each"),
        ),
        (
            ("--config.data.path=whole.tar", "--config.data.batch_size=6"),
            ("data.batch_size=6 does not divide over 8 batch shards", "use a multiple of 8"),
        ),
    ],
)
def test_a_run_that_cannot_begin(place, arguments, words):
    """Check a new working directory and that of another run."""
    whole = (place / "whole.tar").read_bytes()
    (place / "cut.tar").write_bytes(whole[: len(whole) // 2])
    second = [(name.replace("txt", "json"), b"{}") for name, _ in captioned(8)]
    write_tar(place / "twice.tar", captioned(8) + second)
    (place / "odd.py").touch()
    line = refused("train", *OVERFIT, "--workdir=new", *arguments)
    assert all(word in line for word in words), line
    assert not (place / "new").exists()


def test_a_run_on_odd_records_goes_through_and_counts_them(run):
    status, err, wrong = run
    assert status == 0, err
    for key, reason in wrong.items():
        assert f": {key}: {reason}" in err
    assert "odd.parquet: 4 of 8 records incomplete: 4 that cannot be read" in err
    rows = rows_of("autoencoder")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["data/unused_members"] == 0 and rows[-1]["data/incomplete_records"] == 5
    counts = {name: count for name, count in rows[-1].items() if name.startswith("data/skipped/")}
    assert rows[-1]["data/bad_records"] == sum(counts.values()) >= len(wrong)
    assert counts["data/skipped/the_row_group_cannot_be_read"] >= 4


def test_metadata_of_any_size_is_no_reason_to_skip(run):
    assert "odd/captions.jsonl: 0.png" not in run[1]


def test_a_name_that_is_not_utf8_is_no_reason_to_skip(run):
    assert "skipped odd.tar" not in run[1], run[1]


def test_a_byte_order_mark_is_no_text(run):
    vocabulary = pathlib.Path("run", "joint", "checkpoints", "text", "tokenizer.model")
    assert BYTE_ORDER_MARK not in vocabulary.read_bytes()


def test_too_many_odd_records_end_the_run(place, run):
    """Check that the files which the run has saved stay."""
    before = snapshot(place / "run" / "autoencoder" / "checkpoints" / "8")
    every = "--config.data.batch_size=48"  # all records in the first batch, before any compile
    line = refused(*TRAIN, *SMALL, ODD, every, "--config.autoencoder.steps=40")
    assert "cannot be read, more than data.max_bad_fraction=20.0%" in line and "odd" in line
    assert snapshot(place / "run" / "autoencoder" / "checkpoints" / "8") == before


def test_damaged_checkpoints_are_reported_and_made_again(place, run):
    """Damage three steps: the newest is an empty directory, the next lacks its meta, the third
    its arrays."""
    saved = place / "run" / "joint" / "checkpoints"
    (saved / "5").mkdir()
    shutil.rmtree(saved / "3" / "meta")
    for path in (saved / "2" / "state").rglob("d/*"):
        path.unlink()
    status, err = blip3o(*TRAIN, *SMALL, ODD, ALLOWED)
    assert status == 0, err
    for step in (5, 3, 2):
        assert f"joint/checkpoints/{step} is damaged (" in err
        assert (saved / f"{step}.damaged").is_dir()
    assert "going on from 1" in err
    assert [row["step"] for row in rows_of("joint")] == [1, 2, 3]


def test_a_prompt_longer_than_the_sequence(place, run):
    before = snapshot(place / "run")
    line = refused(
        "sample", "--checkpoint=run", "--out=out", "--prompt=a cat", f"--prompt={'cat ' * 150}"
    )
    assert "prompt 'cat cat cat" in line and "is more than the model's 96: shorten it" in line
    assert not (place / "out").exists() and snapshot(place / "run") == before


@pytest.mark.parametrize("command", (("sample", "--prompt=a cat"), ("evaluate", "--suite=shapes")))
def test_a_directory_that_is_no_checkpoint(place, command):
    (place / "pictures").mkdir(exist_ok=True)
    line = refused(*command, "--checkpoint=pictures", "--out=out")
    assert "pictures is not a checkpoint: it holds no config.json" in line
    assert not (place / "out").exists()
