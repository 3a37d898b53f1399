"""Identity of data sets: by content, kept by copies, lost by changes, whatever names, sizes and
times say."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip3o_jax import cli
from blip3o_jax.config import ConfigError, DataConfig, SourceConfig, UserError
from blip3o_jax.data import encoded, index, index_builder, sources
from blip3o_jax.data.buckets import by_shape
from blip3o_jax.data.checked_file import DamagedArrays, pack, unpack
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.record import BadRecord, Source, read_record
from blip3o_jax.data.sources import webdataset
from tests import tiny
from tests.data.sources.test_webdataset import write as write_tar
from tests.data.test_buckets import HIGH, WIDE, png

TIME = (10**9, 10**9)


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(value: int, height: int = 20, width: int = 30) -> bytes:
    """Return a picture; all have one size."""
    data = png(height, width, value)
    return data + bytes(200 - len(data))


def folder(path: pathlib.Path, value: int = 0) -> pathlib.Path:
    path.mkdir()
    lines = []
    for i in range(3):
        (path / f"{i}.png").write_bytes(picture(40 + i + value))
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"caption {i}"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def tar(path: pathlib.Path, value: int = 0, shards: int = 1) -> pathlib.Path:
    path.mkdir()
    for n in range(shards):
        images = [(f"{n}-{i}.png", picture(40 + i + value)) for i in range(3)]
        captions = [(f"{n}-{i}.txt", f"caption {i}".encode()) for i in range(3)]
        write_tar(path / f"{n}.tar", *images, *captions)
    return path


def parquet(path: pathlib.Path, value: int = 0) -> pathlib.Path:
    path.mkdir()
    images = [picture(40 + i + value) for i in range(3)]
    table = pa.table({"image": images, "caption": [f"caption {i}" for i in range(3)]})
    pq.write_table(
        table, path / "a.parquet", row_group_size=2, compression="none", use_dictionary=False
    )
    return path


def array_record(path: pathlib.Path, value: int = 0) -> pathlib.Path:
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "caption": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: object) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield i, {"image": picture(40 + i + value), "caption": f"caption {i}"}

    Tiny.__module__ = "tiny"
    Tiny(data_dir=str(path), file_format="array_record").download_and_prepare()
    return path


FORMATS = [folder, tar, parquet, array_record]


def opened(path: pathlib.Path, **options: object) -> Source:
    return sources.open_source(SourceConfig(str(path)), **options)


def files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and index.DIRECTORY not in p.parts)


def test_a_wrong_format_is_refused_without_a_word_on_the_index(
    tmp_path: pathlib.Path, capsys
) -> None:
    """Leave the index out of the message: it is sound, and of the data's own format."""
    opened(tar(tmp_path / "a"))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"0.tar: not a readable parquet file .* set data.format"):
        sources.open_source(SourceConfig(str(tmp_path / "a" / "0.tar"), "parquet"))
    assert "index" not in capsys.readouterr().err
    source = opened(tmp_path / "a")
    assert len(source) == 3 and "index" not in capsys.readouterr().err


@pytest.mark.parametrize("write", FORMATS)
def test_a_copy_is_the_same_data_with_its_index_or_without(
    tmp_path: pathlib.Path, write, monkeypatch
) -> None:
    source = opened(write(tmp_path / "a"))
    shutil.copytree(
        tmp_path / "a", tmp_path / "bare", ignore=shutil.ignore_patterns(index.DIRECTORY)
    )
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    monkeypatch.setattr(index_builder, "REBUILD_LIMIT", 0)
    for copy in ("bare", "whole"):
        for file in files(tmp_path / copy):
            os.utime(file, TIME)
    assert opened(tmp_path / "bare").fingerprint == source.fingerprint
    monkeypatch.setattr(
        index_builder, "_build_index", lambda *args: pytest.fail("the data was read again")
    )
    copy = opened(tmp_path / "whole")
    assert copy.fingerprint == source.fingerprint and copy[2].caption == "caption 2"
    state = Loader([(source, 1.0)], dict, DataConfig(), 0).state()
    Loader([(copy, 1.0)], dict, DataConfig(), 0).restore(json.loads(json.dumps(state)))


@pytest.mark.parametrize("write", FORMATS)
def test_equal_names_sizes_and_times_are_not_the_same_data(tmp_path: pathlib.Path, write) -> None:
    """Give them different digests: they once shared the encoders' cache and the file of shapes."""
    both = []
    for n, value in enumerate((0, 100)):
        path = write(tmp_path / "ab"[n], value)
        for file in files(path):
            os.utime(file, TIME)
        both.append(path)
    shards = [
        [(p.name, p.stat().st_size) for p in files(path) if p.suffix != ".json"] for path in both
    ]
    assert shards[0] == shards[1], "the test is about such sets"
    first, second = map(opened, both)
    assert first.fingerprint != second.fingerprint
    assert encoded.directory_name(first, {}) != encoded.directory_name(second, {})
    with pytest.raises(
        UserError, match=r"b: its content is another \(.*/a then\), 3 records then, 3 now"
    ):
        Loader([(second, 1.0)], dict, DataConfig(), 0).restore(
            Loader([(first, 1.0)], dict, DataConfig(), 0).state()
        )


def replace(path: pathlib.Path, old: bytes, new: bytes) -> None:
    """Replace in the one file that has it; without another size."""
    for file in files(path):
        if old in (data := file.read_bytes()):
            file.write_bytes(data.replace(old, new))
            return
    raise AssertionError(f"{old} is nowhere")


@pytest.mark.parametrize("write", [tar, parquet, folder])
def test_a_record_that_changed_is_bad_until_the_set_is_indexed_anew(
    tmp_path: pathlib.Path, write, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(index_builder, "REBUILD_LIMIT", 0)
    path = write(tmp_path / "a")
    before = opened(path)
    if write is folder:  # whose captions are read at opening
        replace(path, picture(41), picture(141))
    else:
        replace(path, b"caption 1", b"caption 7")
    source = opened(path)
    assert source.fingerprint == before.fingerprint and source[0].caption == "caption 0"
    with pytest.raises(
        BadRecord,
        match=rf"not those that were indexed; .* `blip3o data index {path}` rebuilds the index",
    ):
        source[1]
    capsys.readouterr()
    assert cli.main(["data", "index", str(path)]) == 0
    after = opened(path)
    assert f"3 records, digest {after.fingerprint}" in capsys.readouterr().out
    assert (
        after.fingerprint != before.fingerprint
        and after[1].caption == f"caption {1 if write is folder else 7}"
    )


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (folder, "captions.jsonl: 1.png"),
        (tar, "0.tar: 0-1"),
        (parquet, "a.parquet: row 1"),
        (array_record, r"tiny-train.array_record-00000-of-00001: \d"),
    ],
)
def test_the_command_names_what_cannot_be_used(
    tmp_path: pathlib.Path, write, name, capsys, monkeypatch
) -> None:
    """Name a picture whose header is sound and whose pixels are cut off."""
    whole = picture
    cut = whole(41)[:60]
    monkeypatch.setitem(globals(), "picture", lambda value: cut if value == 41 else whole(value))
    path = write(tmp_path / "a")
    for again in (False, True):
        assert cli.main(["data", "index", str(path)]) == 0
        output = capsys.readouterr().out
        assert re.search(rf"{name}: the image cannot be decoded: .+\n", output), output
        assert output.count("cannot be decoded") == 1
        assert "3 records, 2 of them usable, digest" in output
        # All of a folder is read again.
        assert ("1 of 1 shards" in output) == (again and write is not folder)
    assert cli.main(["data", "index", str(path), "--no_decode"]) == 0
    assert "3 records, digest" in capsys.readouterr().out
    if write is folder:
        (path / "1.png").unlink()
        assert cli.main(["data", "index", str(path)]) == 0
        output = capsys.readouterr().out
        assert "1 that cannot be read (1.png, line 2 first in" in output
        assert "1.png: the image cannot be read: No such file" in output


def test_a_change_of_size_or_of_captions_is_seen_at_opening(tmp_path: pathlib.Path, capsys) -> None:
    path = tar(tmp_path / "a")
    first = opened(path).fingerprint
    replace(path, b"caption 1", b"caption 7")  # a small shard is recognised by its time of change
    second = opened(path).fingerprint
    assert (
        f"{path}: rebuilt the index: {path}/0.tar changed without another size"
        in capsys.readouterr().err
    )
    write_tar(path / "0.tar", ("x.png", bytes(10**5)), ("x.txt", b"x"))
    assert len({first, second, opened(path).fingerprint}) == 3
    assert f"{path}: rebuilding the index: {path}/0.tar: its size was" in capsys.readouterr().err
    path = folder(tmp_path / "b")
    seen = {opened(path).fingerprint}
    replace(path, b"caption 1", b"caption 7")
    seen.add(opened(path).fingerprint)
    assert "captions.jsonl: it is not as it was indexed" in capsys.readouterr().err
    (path / "1.png").unlink()
    lacking = opened(path)
    seen.add(lacking.fingerprint)
    assert "the size of 1.png was" in capsys.readouterr().err and lacking.incomplete == 1
    with pytest.raises(BadRecord, match=r"1.png: the image cannot be read: No such file"):
        lacking[1]
    (path / "1.png").write_bytes(picture(41))
    with pytest.raises(
        BadRecord, match=r"1.png: it could not be read when the set was indexed, now it can"
    ):
        lacking[1]
    assert opened(path)[1].caption == "caption 7" and len(seen) == 3
    assert opened(path, rebuild=index_builder.ALL).fingerprint not in (first, lacking.fingerprint)


def test_shapes_and_buckets_are_distinguished_by_content(
    tmp_path: pathlib.Path, cache: pathlib.Path
) -> None:
    """Open two sets, of which one is wide where the other is high: the file of shapes of the first
    is none for the second.
    """
    config = tiny.run_config(model={"buckets": (WIDE, HIGH)})
    found = []
    for name, shape in (("a", (20, 30)), ("b", (30, 20))):
        path = tmp_path / name
        path.mkdir()
        (path / "0.png").write_bytes(picture(40, *shape))
        (path / "captions.jsonl").write_text('{"image": "0.png", "caption": "c"}')
        for file in files(path):
            os.utime(file, TIME)
        found += by_shape([(opened(path), 1.0)], config.model)
    assert [source.shape for ((source, _),) in found] == [WIDE, HIGH]
    assert found[0][0][0].fingerprint != found[1][0][0].fingerprint
    for file in cache.rglob("shapes-*"):  # damage is no shape
        data = bytearray(file.read_bytes())
        data[-8] ^= 1
        file.write_bytes(data)
    assert by_shape([(opened(tmp_path / "a"), 1.0)], config.model)[0][0][0].shape == WIDE


def test_an_index_that_is_damaged_anywhere_is_made_anew(tmp_path: pathlib.Path, capsys) -> None:
    path = tar(tmp_path / "a")
    digest = opened(path).fingerprint
    [file] = (path / index.DIRECTORY).iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedArrays):
            unpack(file)
    for cut in (0, 10, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert opened(path).fingerprint == digest
        assert (
            f"{file}: the index cannot be used" in capsys.readouterr().err
            and file.read_bytes() == whole
        )
    # Whole, but of other data: a shard copied over, or somebody's idea of a joke.
    header, arrays = unpack(file)
    for name, value in (("offsets", 2**62), ("sizes", 2**62)):
        file.unlink()  # what is mapped stays as it is
        file.write_bytes(pack(header, arrays | {name: np.full_like(arrays[name], value)}))
        assert (
            opened(path)[0].caption == "caption 0"
            and "rebuilding the index" in capsys.readouterr().err
        )
    for odd in (
        {"unused": [1]},
        {"incomplete": "x"},
        {"incomplete": {"no_image": [-5, "b"]}},
        {"unused": {"link": ["a", "b"]}},
        {"extra": {"broken": "x"}},
    ):
        file.unlink()
        file.write_bytes(pack(header | odd, arrays))
        assert opened(path).incomplete == 0, odd
        assert "the index cannot be used" in capsys.readouterr().err, odd


@pytest.mark.parametrize("write", [folder, parquet, array_record])
def test_trouble_of_the_machine_while_indexing_is_not_kept_as_damage(
    tmp_path: pathlib.Path, write, monkeypatch
) -> None:
    path = write(tmp_path / "a")
    fails(monkeypatch, write)
    with pytest.raises(UserError, match=r"cannot be read: .*Input/output error"):
        opened(path)
    monkeypatch.undo()
    assert opened(path).incomplete == 0


def fails(monkeypatch: pytest.MonkeyPatch, write) -> None:
    """Make the disk fail while records are read, as the readers of each format tell it."""
    from array_record.python import array_record_module

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Reader:
        def __init__(self, *args: object) -> None: ...

        def num_records(self) -> int:
            return 3

        def read(self, *args: object) -> None:
            raise RuntimeError("UNKNOWN: Input/output error")

    if write is folder:
        monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    elif write is parquet:
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    else:
        monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)


def test_trouble_of_the_machine_ends_the_sorting_by_shape(
    tmp_path: pathlib.Path, monkeypatch
) -> None:
    source = opened(folder(tmp_path / "a"))
    model = dataclasses.replace(tiny.model(), buckets=(WIDE, HIGH))
    read = pathlib.Path.read_bytes

    def fail(path: pathlib.Path) -> bytes:
        if path.name == "1.png":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        by_shape([(source, 1.0)], model)


def test_an_index_that_changes_in_use_ends_the_run_and_skips_no_record(
    tmp_path: pathlib.Path,
) -> None:
    source = opened(tar(tmp_path / "a"))
    next((tmp_path / "a").rglob("*.index")).unlink()
    with pytest.raises(
        ConfigError, match=r"the index changed while in use .*: start the command again"
    ):
        read_record(source, 0, lambda record: record)


def test_a_directory_that_cannot_be_written_to_has_its_index_in_the_users_cache(
    tmp_path: pathlib.Path, cache
) -> None:
    path = tar(tmp_path / "a")
    (path / index.DIRECTORY).write_text("no directory")
    digest = opened(path).fingerprint
    [file] = (cache / "blip3o_jax" / "index").iterdir()
    before = file.stat().st_mtime_ns
    assert opened(path).fingerprint == digest and file.stat().st_mtime_ns == before
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no directory")
    with pytest.raises(
        UserError,
        match=r"0.tar: its index can be written nowhere \(.*make room or set XDG_CACHE_HOME",
    ):
        opened(path)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the shards that were read, in their order."""
    names, build = [], index_builder._build_index

    def counted(shard: str, *args):
        names.append(pathlib.Path(shard).name)
        time.sleep(0.1 * (int(names[-1][0]) % 2))  # longer than the other host takes for its own
        return build(shard, *args)

    monkeypatch.setattr(index_builder, "_build_index", counted)
    return names


def test_what_was_indexed_before_a_stop_is_not_read_again(
    tmp_path: pathlib.Path,
    built: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webdataset, "FORMAT", dataclasses.replace(webdataset.FORMAT, threads=1))
    path = tar(tmp_path / "a", shards=4)
    whole = (path / "2.tar").read_bytes()
    (path / "2.tar").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"2.tar: cut off"):
        opened(path)
    (path / "2.tar").write_bytes(whole)
    built.clear()
    assert len(opened(path)) == 12 and built == ["2.tar", "3.tar"]
    assert not list(path.rglob("*.partial"))


def test_hosts_share_the_work(tmp_path: pathlib.Path, built: list[str]) -> None:
    path = tar(tmp_path / "a", shards=5)
    barrier, digests = threading.Barrier(2), {}

    def host(number: int) -> None:
        digests[number] = opened(
            path, processes=index_builder.ProcessGroup(number, 2, barrier.wait)
        ).fingerprint

    threads = [threading.Thread(target=host, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [f"{n}.tar" for n in range(5)]
    assert digests[0] == digests[1] == opened(path).fingerprint


def test_paths_stay_inside_the_set(tmp_path: pathlib.Path) -> None:
    path = folder(tmp_path / "a")
    (tmp_path / "secret.png").write_bytes(png(20, 30))
    (path / "out.png").symlink_to(tmp_path / "secret.png")
    (path / "in.png").symlink_to("0.png")
    os.mkfifo(path / "pipe.png")
    names = [
        "in.png",
        "../a/0.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "out.png",
        "pipe.png",
        "a\0b",
        "\ud800",
    ]
    lines = [json.dumps({"image": name, "caption": "c"}) for name in names]
    (path / "captions.jsonl").write_text("\n".join(lines))
    source = opened(path)
    assert [source[n].image for n in range(2)] == [picture(40)] * 2
    for n in range(2, 5):
        with pytest.raises(
            BadRecord, match=r"leads out of the data set, to .*secret.png: set data.images"
        ) as caught:
            source[n]
        assert caught.value.key == names[n]
    for n in range(5, 8):
        with pytest.raises(BadRecord, match="the image cannot be read"):
            source[n]
    elsewhere = sources.open_source(SourceConfig(str(path), images=str(tmp_path)))
    images = [elsewhere[n].image for n in (0, 2, 3, 4)]
    assert images == [picture(40), *[png(20, 30)] * 3], (
        "paths may lead into data.images, and are looked for there first"
    )
    (tmp_path / "in.png").write_bytes(png(20, 30, 7))
    assert sources.open_source(SourceConfig(str(path), images=str(tmp_path)))[0].image == png(
        20, 30, 7
    )
    with pytest.raises(UserError, match=r"data.images=nowhere is not a directory"):
        sources.open_source(SourceConfig(str(path), images="nowhere"))
