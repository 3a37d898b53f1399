"""Each format read back record by record; each kind of damage named in one line."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import re
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip3o_jax.config import DataConfig, SourceConfig
from blip3o_jax.data.record import BadRecord, Record, Source
from blip3o_jax.data.sources import open_mixture, open_source

COUNT = 5
CAPTIONS = [f"caption {i}: \N{SNOWMAN}" for i in range(COUNT)]


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(i) for i in range(COUNT)]


def write_tar(path: pathlib.Path, members: list[tuple[str, bytes]]) -> pathlib.Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = (
                len(data),
                1.5,
            )  # a fractional time needs an extended header, as webdataset writes
            archive.addfile(info, io.BytesIO(data))
    return path


def pair(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:04d}.png", IMAGES[i]), (f"{i:04d}.txt", CAPTIONS[i].encode())]


def write_folder(path: pathlib.Path, lines: list[bytes] | None = None) -> pathlib.Path:
    path.mkdir()
    for i, image in enumerate(IMAGES):
        (path / f"{i}.png").write_bytes(image)
    lines = lines or [
        json.dumps({"file_name": f"{i}.png", "text": c}).encode() for i, c in enumerate(CAPTIONS)
    ]
    (path / "metadata.jsonl").write_bytes(b"\n\n".join(lines))
    return path


def write_parquet(path: pathlib.Path, start: int = 0, struct: bool = True) -> pathlib.Path:
    images = [{"bytes": b, "path": None} if struct else b for b in IMAGES[start:]]
    table = pa.table({"image": images, "caption" if struct else "text": CAPTIONS[start:]})
    pq.write_table(table, path, row_group_size=2)
    return path


def check_records(source: Source, count: int = COUNT) -> None:
    """Check all records, from the source and from one that went through a pickle."""
    assert len(source) == count
    for each in (source, pickle.loads(pickle.dumps(source))):
        got = {r.caption: r.image for r in (each[i] for i in reversed(range(count)))}
        assert got == dict(zip(CAPTIONS[-count:], IMAGES[-count:], strict=True))


def opened(path: object, **fields: str) -> Source:
    return open_source(SourceConfig(str(path), **fields))


def test_webdataset_tar_directory_glob_and_braces(tmp_path: pathlib.Path) -> None:
    with_json = [
        ("0004.JPG", IMAGES[4]),
        ("0004.json", json.dumps({"text": CAPTIONS[4]}).encode()),
        ("0004.cls", b"1"),
    ]
    write_tar(tmp_path / "s-00008.tar", [*pair(0), *pair(1), *pair(2)])
    write_tar(tmp_path / "s-00009.tar", [*pair(3), *with_json])
    for path in (tmp_path, tmp_path / "*.tar", tmp_path / "s-{00008..00009}.tar"):
        check_records(opened(path))
    check_records(opened(tmp_path / "s-00009.tar"), 2)
    assert opened(tmp_path)[4] == Record(
        IMAGES[4], CAPTIONS[4], "0004", str(tmp_path / "s-00009.tar")
    )
    with pytest.raises(ValueError, match=r"s-00010.tar: no such file"):
        opened(tmp_path / "s-{00008..00010}.tar")


def test_tar_cut_anywhere_is_refused_with_the_last_good_key(tmp_path: pathlib.Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [*pair(0), *pair(1), *pair(2)]).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    for size in range(512, end + 1, 256):  # in headers, in data, and exactly between members
        cut.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(cut))}: (cut off or damaged at byte \d+|not a tar)"
        ):
            opened(cut)
    with pytest.raises(ValueError, match=r"byte 12288 \(last good key: 0002\)"):
        opened(cut)
    with tarfile.open(tmp_path / "whole.tar") as archive:
        inside = archive.getmember("0001.txt").offset_data + 4
    cut.write_bytes(whole[:inside])
    with pytest.raises(ValueError, match=r"last good key: 0000"):
        opened(cut)
    damaged = bytearray(whole)
    damaged[inside - 400] ^= 255  # in the header before it
    cut.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut off or damaged at byte \d+ \(last good key: 0000\)"):
        opened(cut)
    for content in (b"", b"no tar at all" * 100):
        cut.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut.tar: not a tar file"):
            opened(cut)


def test_incomplete_examples_are_bad_records(tmp_path: pathlib.Path) -> None:
    members = [
        *pair(0),
        ("a/only.png", IMAGES[1]),
        ("words.txt", b"x"),
        ("odd.png", IMAGES[1]),
        ("odd.txt", b"\xff\xfe"),
    ]
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert [source[0].key, len(source)] == ["0000", 4]
    for index, expected in [
        (1, "a/only: no caption"),
        (2, "words: no image"),
        (3, "odd: the text is not UTF-8"),
    ]:
        with pytest.raises(BadRecord, match=f"a.tar: {expected}") as caught:
            source[index]
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ValueError, match=r"b.tar: no example has both an image"):
        opened(write_tar(tmp_path / "b.tar", [("x.png", IMAGES[0]), ("y.txt", b"y")]))


def test_folder(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f")
    check_records(opened(folder))
    check_records(opened(folder / "metadata.jsonl"))
    before = opened(folder).fingerprint
    assert opened(folder).fingerprint == before
    (folder / "3.png").write_bytes(png(77) + b"more")
    assert opened(folder).fingerprint != before


def test_folder_bad_lines(tmp_path: pathlib.Path) -> None:
    lines = [
        (b'{"image": "0.png", "caption": "fine"}', ""),
        (b'{"image": "0.png", "caption": "\xff"}', "line 3: the text is not UTF-8"),
        (b'{"image": "0.png"}', "line 5: no caption"),
        (b'{"caption": "c"}', "line 7: no image"),
        (
            b'{"image": "gone.png", "caption": "c"}',
            "gone.png: the image cannot be read: No such file",
        ),
        (b'{"image": ', "line 11: broken JSON"),
        (b"[]", "line 13: the JSON is not an object"),
    ]
    source = opened(write_folder(tmp_path / "f", [line for line, _ in lines]))
    assert source[0].caption == "fine"
    for index, (_, expected) in enumerate(lines[1:], 1):
        with pytest.raises(BadRecord, match=expected):
            source[index]
    assert source.fingerprint


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: pathlib.Path, struct: bool) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", struct=struct))
    check_records(source)
    assert source[3].key == "row 3"
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "0.parquet")
    check_records(opened(tmp_path))


def test_parquet_bad_files_and_records(tmp_path: pathlib.Path) -> None:
    words = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 2, 3], np.int32)), pa.py_buffer(b"\xff\xfeb")
    )
    pq.write_table(
        pa.table({"image": [IMAGES[0], None], "text": words, "key": ["k0", "k1"]}),
        tmp_path / "a.parquet",
    )
    source = opened(tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match=r"a.parquet: k0: the text is not UTF-8"):
        source[0]
    with pytest.raises(BadRecord, match=r"a.parquet: k1: no image"):
        source[1]
    pq.write_table(pa.table({"img": [b""]}), tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b.parquet: needs the columns image and caption or text; it has img"
    ):
        opened(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"c.parquet: not a readable parquet file"):
        opened(tmp_path / "c.parquet")
    twice = pa.Table.from_arrays(
        [pa.array(IMAGES), *[pa.array(CAPTIONS)] * 2], ["image", "text", "text"]
    )
    pq.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(
        ValueError, match=r"d.parquet: the name text is there twice among the columns"
    ):
        opened(tmp_path / "d.parquet")
    pq.write_table(
        pa.table({"image": IMAGES, "text": CAPTIONS, "zzzz": CAPTIONS}), tmp_path / "e.parquet"
    )
    footer = (tmp_path / "e.parquet").read_bytes().replace(b"zzzz", b"\xff\xff\xff\xff")
    (tmp_path / "e.parquet").write_bytes(footer)
    with pytest.raises(ValueError, match=r"e.parquet: not a readable parquet file"):
        opened(tmp_path / "e.parquet")


def test_names_from_data_are_escaped_in_messages(tmp_path: pathlib.Path) -> None:
    table = {"image": IMAGES[:1], "text": pa.nulls(1), "id": ["a\nb\x1b[31m"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(BadRecord) as error:
        opened(tmp_path / "a.parquet")[0]
    assert str(error.value).startswith(rf"{tmp_path}/a.parquet: a\nb\x1b[31m: no caption")


def not_utf8() -> pa.Array:
    return pa.array([b"\xff"] * COUNT).view(pa.string())


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        (pa.array([1234567891] * COUNT, pa.timestamp("ns")), "234567891"),
        (pa.array([5001] * COUNT, pa.time64("ns")), "5001"),
        (pa.array([2**62] * COUNT, pa.duration("us")), "53375995 days"),
        (pa.array([2**30] * COUNT, pa.date32()), str(2**30)),
        (not_utf8(), r"\xff"),
        (pa.StructArray.from_arrays([not_utf8()], ["q"]), r"\xff"),
    ],
)
def test_parquet_values_that_python_cannot_hold(
    tmp_path: pathlib.Path, ids: pa.Array, key: str
) -> None:
    pq.write_table(pa.table({"image": IMAGES, "text": CAPTIONS, "id": ids}), tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet")
    assert (source[1].caption, source.incomplete) == (CAPTIONS[1], 0)
    assert key in source[1].key
    pq.write_table(
        pa.table({"image": IMAGES, "caption": ids, "key": CAPTIONS}), tmp_path / "b.parquet"
    )
    with pytest.raises(BadRecord, match=re.escape(f"b.parquet: {CAPTIONS[0]}: ")):
        opened(tmp_path / "b.parquet")[0]


def test_tfds(tmp_path: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text()
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "caption": text,
                "key": text,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: object) -> dict:
            return {
                "train": self._generate_examples(CAPTIONS),
                "test": self._generate_examples([b"\xff", "b"]),
            }

        def _generate_examples(self, captions: list):
            for i, caption in enumerate(captions):
                yield i, {"image": IMAGES[i], "caption": caption, "key": f"k{i}"}

    Tiny.__module__ = "tiny"  # of no package, or TFDS would look for files in its directory
    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    (tmp_path / "tiny/incomplete.X_1.0.0").mkdir()
    (tmp_path / "tiny/incomplete.X_1.0.0/dataset_info.json").write_text("{}")
    source = opened(tmp_path)
    check_records(source)
    assert {source[i].key for i in range(COUNT)} == {f"k{i}" for i in range(COUNT)}
    assert pathlib.Path(source[0].shard).exists()
    test = opened(tmp_path / "tiny", split="test")
    assert test.fingerprint != source.fingerprint
    assert len(opened(tmp_path, split="train[:2]")) == 2
    with pytest.raises(BadRecord, match=r"k0: the text is not UTF-8"):
        [test[i] for i in range(2)]
    with pytest.raises(
        ValueError,
        match=r"cannot read data.split='val': Unknown split 'val'. "
        r"Should be one of \['train', 'test'\]",
    ):
        opened(tmp_path, split="val")
    with pytest.raises(ValueError, match=r"data.split='train\[50%:1%\]' holds no record"):
        opened(tmp_path, split="train[50%:1%]")
    directory = pathlib.Path(source[0].shard).parent
    _check_hostile_tfds(directory, pathlib.Path(source[0].shard))


def _check_hostile_tfds(directory: pathlib.Path, shard: pathlib.Path) -> None:
    """Check what a set of TFDS from elsewhere may say and hold."""

    def refused(name: str, old: str, new: str, message: str) -> None:
        whole = (directory / name).read_text()
        assert old in whole
        (directory / name).write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match=message):
            opened(directory)
        (directory / name).write_text(whole)

    inner = "tensorflow_datasets.core.features.text_feature.Text"
    refused("features.json", inner, "this.X", r"features.json: the class this.X is not one of")
    assert "this" not in sys.modules
    template = "{DATASET}-{SPLIT}"
    for outside in ("../../", str(directory.parent / "a")):
        refused("dataset_info.json", template, outside, "leads out of the data set, to ")
    info = directory / "dataset_info.json"
    whole = info.read_text()
    info.write_text(whole.replace(f'"{COUNT}"', f'"{COUNT - 2}"'))
    short = opened(directory)
    assert (len(short), short.unused) == (COUNT - 2, {"undeclared": 2})
    assert opened(directory, split="train[:1]").unused == {}
    info.write_text(whole)
    refused(
        "dataset_info.json", template, "other", "other.*: the shard cannot be read: No such file"
    )


def test_what_cannot_be_a_data_set(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, expected in [
        (tmp_path / "none", "none: no such file or directory; check data.path"),
        (tmp_path / "*.tar", r"\*.tar: no such file"),
        (tmp_path / "notes.md", "notes.md: unknown format"),
        (tmp_path, "unknown format; expected dataset_info.json"),
        (tmp_path / "empty.jsonl", "empty.jsonl: the data set is empty"),
        (tmp_path / "{0..99999999999}.tar", "stands for more than 1000000 files"),
        (tmp_path / "{1..9999}{1..9999}.tar", "stands for more than 1000000 files"),
        (tmp_path / "{5..1}.tar", r"the range \{5..1\} is empty: write \{1..5\}"),
    ]:
        with pytest.raises(ValueError, match=expected) as caught:
            opened(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "shards/b.tar").mkdir(parents=True)
    os.mkfifo(tmp_path / "shards/a.tar")
    os.mkfifo(tmp_path / "a.parquet")
    (tmp_path / "a.tar").symlink_to("a.tar")
    for path, expected in [
        ("shards", "shards/a.tar is a pipe or a device"),
        ("a.parquet", "a.parquet is a pipe or a device"),
        ("a.tar", "no such file"),
    ]:
        with pytest.raises(ValueError, match=re.escape(expected)):
            opened(tmp_path / path)
    (tmp_path / "shards/a.tar").unlink()
    with pytest.raises(ValueError, match=r"shards/b.tar: the shard cannot be read: Is a directory"):
        opened(tmp_path / "shards")
    for kind in ("tfds", "webdataset", "parquet", "folder"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            opened(tmp_path, format=kind)


def test_mixture(tmp_path: pathlib.Path) -> None:
    folder, shard = write_folder(tmp_path / "f"), write_tar(tmp_path / "a.tar", pair(0))
    data = DataConfig(path=str(folder), sources=(SourceConfig(str(shard), weight=3.0),))
    assert [(s.name, w) for s, w in open_mixture(data)] == [(str(folder), 1.0), (str(shard), 3.0)]
    with pytest.raises(ValueError, match=r"data.path is empty"):
        open_mixture(DataConfig())


# What every format says of the same five things, with images by their number.
THINGS = [
    {"caption": "a cat", "image": 0},
    {"instruction": "make it red", "image": 1, "input_image": 0},
    {"instruction": "put them together", "image": 2, "input_images": [0, 1]},
    {"task": "reconstruct", "input_image": 3},
    {"question": "how many?", "answer": "two", "input_image": 4},
]


def things(at: str) -> list[Record]:
    """Return them as records of the shard `at`, their keys left out."""
    return [
        Record(IMAGES[0], "a cat", "", at),
        Record(IMAGES[1], "make it red", "", at, "edit", (IMAGES[0],)),
        Record(IMAGES[2], "put them together", "", at, "edit", (IMAGES[0], IMAGES[1])),
        Record(IMAGES[3], "", "", at, "reconstruct", (IMAGES[3],)),
        Record(b"", "how many?", "", at, "understand", (IMAGES[4],), "two"),
    ]


def without_key(source: Source) -> list[Record]:
    return [dataclasses.replace(source[i], key="") for i in range(len(source))]


def test_every_task_from_json_lines(tmp_path: pathlib.Path) -> None:
    name = lambda n: [f"{i}.png" for i in n] if isinstance(n, list) else f"{n}.png"
    lines = [
        {key: name(value) if "image" in key else value for key, value in thing.items()}
        for thing in THINGS
    ]
    lines[1]["output_image"] = lines[1].pop("image")
    source = opened(write_folder(tmp_path / "d", [json.dumps(line).encode() for line in lines]))
    assert without_key(source) == things(str(tmp_path / "d" / "metadata.jsonl"))
    before = source.fingerprint
    (tmp_path / "d" / "4.png").write_bytes(IMAGES[0])
    assert opened(tmp_path / "d").fingerprint != before, (
        "an image that is only shown counts as well"
    )


def test_every_task_from_a_tar(tmp_path: pathlib.Path) -> None:
    members = [
        ("0.png", IMAGES[0]),
        ("0.txt", b"a cat"),
        ("1.png", IMAGES[1]),
        ("1.input.png", IMAGES[0]),
    ]
    members += [
        ("1.txt", b"make it red"),
        ("2.input1.png", IMAGES[1]),
        ("2.input0.png", IMAGES[0]),
        ("2.png", IMAGES[2]),
    ]
    members += [
        ("2.json", b'{"instruction": "put them together"}'),
        ("3.png", IMAGES[3]),
        ("3.json", b'{"task": "reconstruct"}'),
    ]
    members += [
        ("4.input.png", IMAGES[4]),
        ("4.json", b'{"question": "how many?", "answer": "two"}'),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert without_key(opened(path)) == things(str(path))


def test_every_task_from_parquet(tmp_path: pathlib.Path) -> None:
    images = lambda n: (
        [IMAGES[i] for i in n] if isinstance(n, list) else n if n is None else IMAGES[n]
    )
    column = lambda name: [thing.get(name) for thing in THINGS]
    columns = {
        name: column(name) for name in ("task", "caption", "instruction", "question", "answer")
    }
    shown = [
        images(x) if isinstance(x, list) else [images(x)] if x is not None else None
        for x in (thing.get("input_images", thing.get("input_image")) for thing in THINGS)
    ]
    columns |= {"image": [images(x) for x in column("image")], "input_images": shown}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert without_key(opened(path)) == things(str(path))


def test_every_task_from_tfds(tmp_path: pathlib.Path) -> None:
    """Read records that have all features: what a task does not need is empty."""
    import tensorflow_datasets as tfds

    words = ("task", "caption", "instruction", "question", "answer")

    class Mixed(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
            features = {
                "image": image,
                "input_images": tfds.features.Sequence(image),
            } | dict.fromkeys(words, text)
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager: object) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> object:
            for i, thing in enumerate(THINGS):
                shown = thing.get("input_images", thing.get("input_image", []))
                shown = [
                    io.BytesIO(IMAGES[n]) for n in (shown if isinstance(shown, list) else [shown])
                ]
                drawn = io.BytesIO(IMAGES[thing.get("image", 3)])  # TFDS takes a file
                yield (
                    i,
                    {"image": drawn, "input_images": shown}
                    | {name: thing.get(name, "") for name in words},
                )

    Mixed.__module__ = "mixed"  # as Tiny above
    Mixed(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = opened(tmp_path / "mixed")
    found = {record.caption: record for record in without_key(source)}
    assert found == {record.caption: record for record in things(source.files[0])}


def test_which_words_a_task_takes(tmp_path: pathlib.Path) -> None:
    shown = {"image": "1.png", "input_image": "0.png"}
    lines = [
        {"task": "t2i", "instruction": "make it red", "caption": "a red cat", "image": "1.png"},
        {"instruction": "make it red", "caption": "a red cat", **shown},
        {"task": "edit", "caption": "make it red", **shown},
        {"instruction": "", "caption": "a red cat", "image": "1.png"},
    ]
    source = opened(write_folder(tmp_path / "d", [json.dumps(line).encode() for line in lines]))
    said = [(record.task, record.caption) for record in without_key(source)]
    assert said == [
        ("t2i", "a red cat"),
        ("edit", "make it red"),
        ("edit", "make it red"),
        ("t2i", "a red cat"),
    ]


def test_an_image_of_zero_bytes_is_drawn_again_as_it_is(tmp_path: pathlib.Path) -> None:
    """Leave the error to the decoder."""
    folder = write_folder(tmp_path / "d")
    (folder / "0.png").write_bytes(b"")
    record = opened(folder, task="reconstruct")[0]
    assert (record.task, record.image, record.references) == ("reconstruct", b"", (b"",))
    with pytest.raises(ValueError, match=r"data.sources.task='edit' is not one of '', reconstruct"):
        SourceConfig(str(folder), task="edit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"caption": "x", "image": "1.png", "input_image": "0.png"},
            "input images with a caption",
        ),
        ({"instruction": "", "image": "1.png", "input_image": "0.png"}, "the instruction is empty"),
        (
            {"instruction": "x", "image": "1.png"},
            "no input image; task edit needs one in input_image or input_images",
        ),
        ({"instruction": "x", "input_image": "0.png"}, "no image; expected the one to be drawn"),
        ({"question": "x", "input_image": "0.png"}, "no answer to the question"),
        (
            {"task": "paint", "caption": "x", "image": "0.png"},
            "task 'paint' is not one of t2i, edit, reconstruct, understand",
        ),
        ({"task": "reconstruct"}, "no input image"),
        ({"caption": "x", "image": 3}, "images are given by their paths"),
        (
            {"instruction": "x", "image": "1.png", "input_image": "9.png"},
            "the image cannot be read: No such file",
        ),
    ],
)
def test_what_a_task_lacks_makes_a_bad_record(
    tmp_path: pathlib.Path, line: dict, message: str
) -> None:
    source = opened(write_folder(tmp_path / "d", [json.dumps(line).encode()]))
    with pytest.raises(BadRecord, match=re.escape(message)):
        source[0]


def folder_of(path: pathlib.Path, *lines: bytes) -> Source:
    return opened(write_folder(path, list(lines)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            rb'{"file_name": "0.png", "text": "a cake \ud83c"}',
            r"the text has half a character \('\\ud83c' at 7\)",
        ),
        (
            b'{"file_name": "0.png", "text": "a", "n": ' + b"1" * 5000 + b"}",
            "broken JSON: Exceeds the limit",
        ),
        (b'{"file_name": "0.png", "text": ' + b"[" * 100_000 + b"}", "broken JSON: "),
        (
            rb'{"file_name": "0.png\u0000", "text": "a"}',
            "the image cannot be read: no file can have this name",
        ),
        (
            rb'{"file_name": "\ud83c.png", "text": "a"}',
            "the image cannot be read: no file can have this name",
        ),
        (
            b'{"file_name": "' + b"a" * 5000 + b'.png", "text": "a"}',
            "the image cannot be read: File name too long",
        ),
        (b'{"file_name": "0.png", "text": [1, 2]}', "no caption; expected text"),
        (b'{"file_name": "0.png", "text": []}', "no caption; expected text"),
        (b'{"file_name": "0.png", "text": {"en": "a"}}', "no caption; expected text"),
    ],
)
def test_one_odd_line_is_one_bad_record(tmp_path: pathlib.Path, line: bytes, reason: str) -> None:
    source = folder_of(tmp_path / "set", line, b'{"file_name": "1.png", "text": "fine"}')
    with pytest.raises(BadRecord, match=reason) as error:
        source[0]
    assert str(error.value).startswith(f"{tmp_path}/set/metadata.jsonl: ")
    assert source[1].caption == "fine"


def test_byte_order_marks_are_no_text(tmp_path: pathlib.Path) -> None:
    mark = "\ufeff".encode()
    folder = folder_of(tmp_path / "set", mark + b'{"file_name": "0.png", "text": "first"}\r')
    assert folder[0].caption == "first"
    members = [("0.png", IMAGES[0]), ("0.txt", mark + b" a cat\r\n"), ("1.png", IMAGES[1])]
    tar = opened(
        write_tar(tmp_path / "a.tar", [*members, ("1.json", mark + b'{"caption": "a dog"}')])
    )
    assert [tar[i].caption for i in range(2)] == ["a cat", "a dog"]
    pq.write_table(pa.table({"image": IMAGES[:1], "text": ["\ufeffa cow"]}), tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet")[0].caption == "a cow"


def test_of_a_list_of_captions_the_first_is_taken(tmp_path: pathlib.Path) -> None:
    lists = [["", "a cat", "one cat"], ["a dog"], [], None]
    pq.write_table(pa.table({"image": IMAGES[:4], "caption": lists}), tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet")
    assert [source[0].caption, source[1].caption] == ["a cat", "a dog"]
    for index in (2, 3):
        with pytest.raises(BadRecord, match="no caption"):
            source[index]
    line = (
        b'{"input_image": "0.png", "question": ["how many?", "what?"], "answer": ["two", "cats"]}'
    )
    assert folder_of(tmp_path / "set", line)[0].answer == "two"


def test_a_damaged_row_group_costs_its_own_records(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet")  # groups of 2, 2 and 1 rows
    column = pq.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 16] = bytes(16)
    path.write_bytes(data)
    source = opened(path)
    assert [source[i].caption for i in (0, 1, 4)] == [CAPTIONS[i] for i in (0, 1, 4)]
    for index in (2, 3):
        with pytest.raises(
            BadRecord, match=rf"^{path}: row {index}: the row group cannot be read: .+"
        ):
            source[index]
        monkeypatch.setattr(
            pq,
            "ParquetFile",
            lambda file: pytest.fail("a damaged group is read again for each row"),
        )
