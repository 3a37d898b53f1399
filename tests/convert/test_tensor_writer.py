"""Files of tensors as they are written here, read by the library `safetensors`."""

import json
import os

import numpy as np
import pytest
import safetensors.torch

from blip3o_jax.convert import tensor_files
from blip3o_jax.convert.tensor_writer import ShardedWriter
from tests.convert.test_tensor_files import arrays, from_torch, read_weights, same, write


def test_written_here_and_read_by_the_library(tmp_path):
    want = dict(reversed(arrays().items()))  # single bytes first
    (file,) = write(tmp_path, want)
    assert file == tmp_path / "model.safetensors"
    same({key: from_torch(x) for key, x in safetensors.torch.load_file(file).items()}, want)
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    header = json.loads(file.read_bytes()[8:].split(b"]}}", 1)[0] + b"]}}")
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for key, entry in header.items():
        if key != "__metadata__":
            assert (start + entry["data_offsets"][0]) % tensor_files.DTYPES[
                entry["dtype"]
            ].itemsize == 0, "aligned"


def test_shards_and_their_index(tmp_path):
    tensors = {
        f"{i}": np.full(size, i, np.float32) for i, size in enumerate([10, 10, 5, 1, 100, 24])
    }
    files = write(tmp_path, tensors, limit=100)
    assert [f.name for f in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 600} and list(index["weight_map"]) == sorted(tensors)
    held = [set(safetensors.torch.load_file(f)) for f in files]
    assert held == [{"0", "1", "2"}, {"3"}, {"4"}, {"5"}], (
        "full to the last byte, and one tensor larger than a shard may be"
    )
    for key, name in index["weight_map"].items():
        assert key in safetensors.torch.load_file(tmp_path / name)
    same({key: tensor.read() for key, tensor in read_weights(tmp_path).items()}, tensors)


def test_a_tensor_is_written_row_by_row(tmp_path, rng):
    table = rng.normal(size=(7, 3)).astype(np.float32)
    other = np.arange(5, dtype=np.int8)
    writer = ShardedWriter(
        tmp_path, "model", {"t": (table.shape, table.dtype), "o": (other.shape, other.dtype)}, 10**9
    )
    writer.write("o", other)
    writer.write_rows("t", table[:3], 0)
    for bad, first in ((table[:3], 5), (table[:3, :2], 3), (table[:3].astype(np.float64), 3)):
        with pytest.raises(ValueError, match=f"given from row {first}, "):
            writer.write_rows("t", bad, first)
    with pytest.raises(ValueError, match=r"never written: \['t'\]"):
        writer.close()
    writer = ShardedWriter(tmp_path / "again", "model", {"t": (table.shape, table.dtype)}, 10**9)
    for first in (0, 3, 6):
        writer.write_rows("t", table[first : first + 3], first)
    writer.close()
    same(
        {key: tensor.read() for key, tensor in read_weights(tmp_path / "again").items()},
        {"t": table},
    )


def test_the_files_have_their_size_at_once(tmp_path):
    writer = ShardedWriter(
        tmp_path,
        "model",
        {"a": ((1000,), np.dtype(np.float32)), "b": ((), np.dtype(np.int8))},
        10**9,
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 4001
    with pytest.raises(ValueError, match="float64"):
        writer.write("a", np.zeros(1000))
    with pytest.raises(ValueError, match=r"\(999,\)"):
        writer.write("a", np.zeros(999, np.float32))
    writer.write("a", np.ones(1000, np.float32))
    with pytest.raises(ValueError, match=r"never written: \['b'\]"):
        writer.close()
    assert (tmp_path / "model.safetensors").stat().st_size == size
    with pytest.raises(FileExistsError):
        ShardedWriter(tmp_path, "model", {"a": ((1,), np.dtype(np.float32))}, 10**9)


def test_no_file_stays_open_where_the_disk_is_full(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, {"a": np.ones(4)})
    assert set(os.listdir("/proc/self/fd")) == before
