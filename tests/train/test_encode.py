"""The encoders' cache with a stand-in for the encoders: what is stored, named, resumed and left
out.
"""

import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import resource

import numpy as np
import pytest

from blip3o_jax.config import ConfigError
from blip3o_jax.data import encoded
from blip3o_jax.data.encoded import DamagedShard
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.record import BadRecord, Record, read_record
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.train import encode
from tests import tiny
from tests.test_checksums import flip

BATCH, RECORDS_PER_SHARD = 4, 8
CODES = {"codebook_size": 256}  # the stand-in's are means of pixels


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Return 16 records in two shards of two batches."""
    monkeypatch.setattr(encode, "BATCH", BATCH)
    for module in (encode, encoded):
        monkeypatch.setattr(module, "RECORDS_PER_SHARD", RECORDS_PER_SHARD)
    encoded.open_shard.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return tiny.write_data(tmp_path / "images")


class Encoders:
    """Provide codes and latents that identify the image; counts its calls and can be
    killed in one.
    """

    def __init__(self, dies_in=None):
        self.calls, self.dies_in = 0, dies_in

    def __call__(self, pixels, tokenizer_pixels):
        self.calls += 1
        if self.calls == self.dies_in:
            raise KeyboardInterrupt
        assert (
            pixels.shape == tokenizer_pixels.shape == (BATCH, 16, 16, 3)
            and pixels.dtype == np.uint8
        )
        means_B = pixels.astype(np.float64).mean(axis=(1, 2, 3))
        return np.tile(means_B.astype(np.int64)[:, None], 4), np.tile(
            means_B[:, None, None, None] / 3, (1, 4, 4, 4)
        )


def opened(folder, tmp_path, encoders, fingerprint="weights", batch_shards=1, **changes):
    cfg = tiny.run_config(
        folder, data={"cache_dir": str(tmp_path / "cache")} | changes, model={"tokenizer": CODES}
    )
    ((source, _),) = open_mixture(cfg.data)
    return (
        encode.encoded_source(source, encoders, fingerprint, cfg, batch_shards=batch_shards),
        source,
        cfg,
    )


def test_records_come_with_what_the_encoders_made_of_them(folder, tmp_path):
    cached, source, cfg = opened(folder, tmp_path, Encoders())
    views = ExampleBuilder(("pixels", "tokenizer_pixels"), cfg.model, cfg.data)
    row = ExampleBuilder(("pixels", "tokenizer_pixels"), cfg.model, cfg.data)
    assert len(cached) == len(source) == 16
    for i in (0, 7, 8, 15):
        want = views(source[i])["pixels"].astype(np.float64).mean()
        record = cached[i]
        assert (record.caption, record.image) == (source[i].caption, source[i].image)
        example = row(record)
        assert set(example) == {"codes", "latents"}
        assert (example["codes"].dtype, example["latents"].dtype) == (np.int32, np.float32)
        assert example["codes"].tolist() == [int(want)] * 4
        assert example["latents"].shape == (4, 4, 4) and np.all(
            example["latents"] == np.float32(want / 3)
        )


def test_the_batch_divides_over_the_devices(folder, tmp_path):
    """Encode on 3 devices: batches have 6 rows instead of 4: two for each shard of 8 records."""
    shapes = []

    def encoders(pixels, tokenizer_pixels):
        shapes.append(pixels.shape[0])
        return np.zeros((6, 4), int), np.zeros((6, 4, 4, 4))

    cached, _, _ = opened(folder, tmp_path, encoders, batch_shards=3)
    assert shapes == [6] * 4 and len(cached) == 16 and cached[15].outputs["codes"].shape == (4,)


def test_stopped_and_run_again_it_goes_on_with_the_next_part(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        opened(folder, tmp_path, Encoders(dies_in=3))
    rest = Encoders()
    cached, _, _ = opened(folder, tmp_path, rest)
    assert rest.calls == 2
    assert [len(cached[i].outputs["codes"]) for i in range(16)] == [4] * 16
    again = Encoders()
    opened(folder, tmp_path, again)
    assert again.calls == 0
    assert not list((tmp_path / "cache").rglob("*.partial"))


def files_of(tmp_path, name):
    return sorted((tmp_path / "cache").rglob(f"{name}-*"))


def all_records(cached):
    """Read anew, as another process would."""
    encoded.open_shard.cache_clear()
    return [cached[i].outputs for i in range(len(cached))]


def check_equal(got, want):
    for a, b in zip(got, want, strict=True):
        for name in ("codes", "latents"):
            np.testing.assert_array_equal(a[name], b[name])


SPOILED = {
    "a flipped bit in a record": (
        0,
        "codes",
        lambda file: flip(file, 8 * 128 + 8),
        "codes-00000.npy is damaged",
    ),
    "a flipped bit in the shape": (
        0,
        "latents",
        lambda file: flip_text(file, b"(8, 4"),
        "latents-00000.npy cannot be used",
    ),
    "a file cut short": (
        4,
        "latents",
        lambda file: os.truncate(file, file.stat().st_size - 4),
        "latents-00001.npy cannot be used",
    ),
    "a flipped bit in the json": (
        4,
        "shard",
        lambda file: flip(file, 100),
        "shard-00001.json cannot be used",
    ),
    "a missing array": (4, "codes", pathlib.Path.unlink, "codes-00001.npy cannot be used"),
}


def flip_text(file, text):
    """Turn the 8 of the first dimension into a 9."""
    flip(file, 8 * (file.read_bytes().index(text) + 1))


@pytest.mark.parametrize("case", SPOILED)
def test_a_damaged_part_is_named_and_encoded_again(folder, tmp_path, capsys, case):
    calls, name, spoil, message = SPOILED[case]
    cached, *_ = opened(folder, tmp_path, Encoders())
    want = all_records(cached)
    spoil(files_of(tmp_path, name)[calls > 0])
    encoded.open_shard.cache_clear()
    with pytest.raises(DamagedShard, match=message) as error:
        for i in range(
            16
        ):  # as the loader does: it is not the record's fault, which is not skipped for it
            read_record(cached, i, lambda record: record)
    assert "\n" not in str(error.value) and "is encoded again when the run is started again" in str(
        error.value
    )
    again = Encoders()
    cached, _, _ = opened(folder, tmp_path, again)
    assert again.calls == 2, "one of two shards"
    check_equal(all_records(cached), want)


def test_a_part_that_cannot_be_opened_is_encoded_again_at_once(folder, tmp_path, caplog):
    cached, _, _ = opened(folder, tmp_path, Encoders())
    want = all_records(cached)
    flip(files_of(tmp_path, "shard")[1], 100)
    encoded.open_shard.cache_clear()
    again = Encoders()
    cached, _, _ = opened(folder, tmp_path, again)
    assert again.calls == 2
    assert re.search(r"shard-00001.json cannot be used \(.*\): encoding shard 1 again", caplog.text)
    check_equal(all_records(cached), want)


NO_OUTPUTS = [(0, 256, "codes from"), (0, -1, "codes from -1"), (1, np.nan, "not finite")]


@pytest.mark.parametrize(("output", "value", "reason"), NO_OUTPUTS)
def test_what_is_no_output_of_encoders_is_refused(folder, tmp_path, output, value, reason):
    """Refuse it when it is written, by record; and when it is read, should a cache hold it all
    the same.
    """

    def encoders(pixels, tokenizer_pixels):
        outputs = tuple(np.array(x) for x in Encoders()(pixels, tokenizer_pixels))
        outputs[output][1, 1] = value
        return outputs

    cached, source, _ = opened(folder, tmp_path, encoders)
    assert len(cached[0].outputs["codes"]) == 4
    with pytest.raises(BadRecord, match=f"the encoders give .*{reason}") as error:
        cached[1]
    assert error.value.key == source[1].key
    arrays = {"codes": np.zeros((8, 4), int), "latents": np.zeros((8, 4, 4, 4))}
    arrays[("codes", "latents")[output]][2] = value
    encoded.write_shard(cached.directory, 0, arrays, {})
    with pytest.raises(DamagedShard, match=f"shard-00000.json: record 2 has .*{reason}"):
        all_records(cached)


def check_flip(cached, want, file, bit):
    """Check one flipped bit: an error of a line that names the file, or the same values."""
    shard = file.name.removesuffix(".npy").removesuffix(".json")[-5:]
    described = encoded.shard_file(cached.directory, int(shard)) if shard.isdigit() else None
    flip(file, bit)
    try:
        check_equal(all_records(cached), want)
        return "the same"
    except DamagedShard as error:
        assert "\n" not in str(error) and shard in str(error), (file, bit, error)
        described.with_suffix(".json.damaged").rename(described)
        return "refused"
    finally:
        flip(file, bit)


@pytest.mark.parametrize("flips", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_cache_changes_a_number_silently(folder, tmp_path, flips):
    """Flip half of them anywhere, half anywhere in a random file. Alignment of the arrays'
    headers is no value.
    """
    cached, _, _ = opened(folder, tmp_path, Encoders())
    want, rng = all_records(cached), random.Random(0)
    files = [path for path in sorted((tmp_path / "cache").rglob("*")) if path.is_file()]
    outcomes = set()
    for i in range(flips):
        (file,) = rng.choices(files, [path.stat().st_size for path in files] if i % 2 else None)
        outcomes.add(
            (
                file.name.partition("-")[0],
                check_flip(cached, want, file, rng.randrange(8 * file.stat().st_size)),
            )
        )
    assert {
        ("codes", "refused"),
        ("latents", "refused"),
        ("shard", "refused"),
    } <= outcomes or flips < 50
    assert ("shard", "the same") not in outcomes and any(
        outcome == "refused" for _, outcome in outcomes
    )


def test_other_weights_settings_or_files_are_other_directories(folder, tmp_path):
    for changes in ({}, {"fingerprint": "others"}, {"crop": "reference"}):
        encoders = Encoders()
        opened(folder, tmp_path, encoders, **changes)
        assert encoders.calls == 4, changes
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes() + b" ")
    encoders = Encoders()
    opened(folder, tmp_path, encoders)
    assert encoders.calls == 4
    directories = list((tmp_path / "cache").iterdir())
    assert len(directories) == 4 and all(
        d.name.startswith(f"v{encoded.VERSION}-") for d in directories
    )
    assert json.loads((directories[0] / "settings.json").read_text())["source"] == str(folder)


@pytest.mark.parametrize(
    "bad", [[2], [12, 13, 14, 15], list(range(16))], ids=["one", "a batch", "all"]
)
def test_unreadable_records_are_known_by_their_reason(folder, tmp_path, bad):
    """Leave the limit to the loader, which meets them where the run does."""
    for i in bad:
        (folder / f"{i:03d}.png").write_bytes(b"")
    cached, source, _ = opened(folder, tmp_path, Encoders())
    for i in range(16):
        if i in bad:
            with pytest.raises(BadRecord, match="the image has zero bytes") as error:
                cached[i]
            assert error.value.key == source[i].key and error.value.shard
        else:
            assert cached[i].outputs["codes"].shape == (4,)


def test_a_record_that_changed_since_it_was_indexed_ends_the_encoding(folder, tmp_path):
    data = (folder / "002.png").read_bytes()
    make = encode.encoded_source

    def changed(source, *args, **kwargs):
        (folder / "002.png").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return make(source, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "encoded_source", changed)
        with pytest.raises(
            ConfigError, match=r"002.png: its bytes are not those .* `blip3o data index"
        ):
            opened(folder, tmp_path, Encoders())
    assert not files_of(tmp_path, "shard")


def test_trouble_of_the_machine_ends_the_encoding(folder, tmp_path, monkeypatch):
    read, make = pathlib.Path.read_bytes, encode.encoded_source

    def fails(path):
        if path.name == "002.png":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read(path)

    def failing(*args, **kwargs):  # once the set is open
        monkeypatch.setattr(pathlib.Path, "read_bytes", fails)
        return make(*args, **kwargs)

    monkeypatch.setattr(encode, "encoded_source", failing)
    with pytest.raises(OSError, match=r"Stale file handle: .*002.png"):
        opened(folder, tmp_path, Encoders())
    assert not files_of(tmp_path, "shard")


def test_an_array_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    arrays = {"codes": np.zeros((8, 4), int), "latents": np.zeros((8, 4, 4, 64))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*latents-00000.npy"):
            encoded.write_shard(tmp_path, 0, arrays, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["codes-00000.npy"]


def test_a_source_is_named_by_its_files_wherever_they_lie(folder, tmp_path):
    cfg = tiny.run_config(folder)
    ((source, _),) = open_mixture(cfg.data)
    name = encoded.directory_name(source, {"weights": "a"})
    assert (
        name
        == encoded.directory_name(source, {"weights": "a"})
        != encoded.directory_name(source, {"weights": "b"})
    )
    folder.rename(tmp_path / "moved")
    ((moved, _),) = open_mixture(dataclasses.replace(cfg.data, path=str(tmp_path / "moved")))
    assert encoded.directory_name(moved, {"weights": "a"}) == name


def test_images_that_are_shown_are_encoded_with_those_that_are_drawn(tmp_path):
    """Encode rows of every task, in three batches of images for one of records; places without an
    image are zeros.
    """
    folder = tiny.write_data(tmp_path / "images")
    lines = [
        {"caption": "a", "image": "000.png"},
        {"instruction": "b", "image": "001.png", "input_image": "002.png"},
        {"instruction": "c", "image": "003.png", "input_images": ["004.png", "005.png"]},
        {"question": "d", "answer": "e", "input_image": "006.png"},
        {"task": "reconstruct", "input_image": "007.png"},
        {"caption": "f", "image": "none.png"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = {"tokenizer": CODES, "editing": {"reference_slots": 2}}
    cfg = tiny.run_config(folder, data={"cache_dir": str(tmp_path / "cache")}, model=model)
    ((source, _),) = open_mixture(cfg.data)
    encoders = Encoders()
    cached = encode.encoded_source(source, encoders, "weights", cfg)
    assert encoders.calls == 3, "nine images in batches of four"
    mean = lambda name: views(tiny_record(folder, name))["pixels"].astype(np.float64).mean()
    views = ExampleBuilder(("pixels",), cfg.model, cfg.data)
    drawn = ["000.png", "001.png", "003.png", None, "007.png"]
    shown = [(), ("002.png",), ("004.png", "005.png"), ("006.png",), ("007.png",)]
    for i in range(5):
        outputs = cached[i].outputs
        assert outputs["reference_codes"].shape == (2, 4) and outputs[
            "reference_latents"
        ].shape == (2, 4, 4, 4)
        for name, codes_N, latents in [
            (drawn[i], outputs["codes"], outputs["latents"]),
            *zip(
                (*shown[i], None, None),
                outputs["reference_codes"],
                outputs["reference_latents"],
                strict=False,
            ),
        ]:
            want = mean(name) if name else 0.0
            assert codes_N.tolist() == [int(want)] * 4 and np.all(latents == np.float32(want / 3))
    with pytest.raises(BadRecord, match=r"none.png: the image cannot be read"):
        cached[5]


def tiny_record(folder, name):
    return Record((folder / name).read_bytes(), "", name, "")
