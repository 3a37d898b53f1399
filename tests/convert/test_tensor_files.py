"""Files of tensors against the libraries `safetensors` and `torch`, and every way a file can be
damaged.
"""

import json
import os
import pickle
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from blip3o_jax.config import UserError
from blip3o_jax.convert import tensor_files, weight_files
from blip3o_jax.convert.tensor_files import NAMES, cast, load_torch, read_json
from blip3o_jax.convert.tensor_writer import ShardedWriter


def read_weights(path):
    return weight_files.read_weights(path)[0]


SHAPES = ((3, 5), (), (2, 0, 4), (6,), (1, 1, 9))


def arrays(seed=0):
    """Return every dtype in every shape, as random bits, NaNs with payloads among them."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, dtype in enumerate(NAMES):
        for shape in SHAPES:
            bits = rng.integers(
                0, 2 if dtype == np.bool_ else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8
            )
            found[f"{i}.{'x'.join(map(str, shape))}"] = bits.view(dtype).reshape(shape)
    return found


def write(directory, tensors, limit=10**9, stem="model"):
    writer = ShardedWriter(
        directory, stem, {key: (x.shape, x.dtype) for key, x in tensors.items()}, limit
    )
    for key in reversed(tensors):
        writer.write(key, tensors[key])
    writer.close()
    return writer.files


def same(got, want):
    assert got.keys() == want.keys()
    for key, x in want.items():
        y = got[key]
        assert (y.shape, y.dtype) == (x.shape, x.dtype) and y.tobytes() == x.tobytes(), key


def from_torch(x):
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@pytest.mark.parametrize("chunk", [2**30, 7])
def test_written_by_the_library_and_read_here(tmp_path, monkeypatch, chunk):
    """Read them also where the system hands out a few bytes at a time."""
    monkeypatch.setattr(tensor_files, "MAX_CALL_BYTES", chunk)
    want = arrays()
    half = lambda x: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    own = {
        key: half(x) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x)
        for key, x in want.items()
    }
    safetensors.torch.save_file(own, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_weights(path)
        same({key: tensor.read() for key, tensor in found.items()}, want)
        assert all(
            (t.shape, t.nbytes, t.key) == (want[k].shape, want[k].nbytes, k)
            for k, t in found.items()
        )
    write(tmp_path / "again", want)
    same({key: tensor.read() for key, tensor in read_weights(tmp_path / "again").items()}, want)


def test_only_headers_are_read_until_a_tensor_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path, {"a": np.arange(1000.0), "b": np.ones(5)})
    read = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(args[2]) or original(*args))
    tensors = read_weights(tmp_path)
    assert not read
    tensors["b"].read()
    assert len(read) == 1 and read[0] > 8000


def header(entries, data=b"\0" * 8):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", r"ends within its header \(0 bytes\)"),
        (b"\x10\0\0", r"ends within its header \(3 bytes\)"),
        (header(entry())[:40], r"ends within its header \(40 bytes\)"),
        (b"\xff" * 64, "not a safetensors file"),
        (header(b"{"), "damaged safetensors header"),
        (header(b"[" * 100_000), "damaged safetensors header"),
        (header(b"\xff\xfe"), "damaged safetensors header"),
        (header([1]), "damaged safetensors header"),
        (
            header({"a": {"dtype": "F32", "shape": [2]}}),
            r"damaged safetensors header \('data_offsets'\)",
        ),
        (header(entry(offsets=(0, 4, 8))), "damaged safetensors header"),
        (header(entry(shape=(-2,))), "damaged safetensors header"),
        (header(entry(shape="ab")), "damaged safetensors header"),
        (header(entry(offsets=(0.0, 8.0))), "damaged safetensors header"),
        (header(entry(dtype="F8_E4M3")), "a has dtype F8_E4M3, which is not one of F64"),
        (header(entry(shape=(3,))), r"the offsets of a do not match its shape \(3,\)"),
        (header(entry(offsets=(4, 12))), "the offsets of a do not match"),
        (header(entry())[:-1], "cut off: a ends at byte"),
        (header(entry(), b"\0" * 9), "has 1 bytes after its last tensor"),
    ],
)
def test_damaged_files(tmp_path, contents, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        read_weights(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_file_cut_off_after_it_was_opened(tmp_path):
    (file,) = write(tmp_path, {"a": np.arange(100.0)})
    tensor = read_weights(tmp_path)["a"]
    os.truncate(file, 500)
    with pytest.raises(UserError, match=r"model.safetensors is cut off within a: copy it again"):
        tensor.read()


def test_an_index_that_does_not_agree_with_its_shards(tmp_path):
    files = write(tmp_path, {"a": np.ones(4), "b": np.ones(4)}, limit=32)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = [f.name for f in files]
    for places, message in (
        (
            {"a": names[0], "b": names[1], "c": names[1]},
            f"{names[1]} lacks c \\(1 in all\\), which {index.name} lists: copy both again",
        ),
        ({"a": names[0]} | {"c": names[0]}, f"{names[0]} lacks c"),
        ({"a": names[1], "b": names[1]}, f"{names[1]} lacks a"),
        (
            {"a": names[0], "b": "gone.safetensors"},
            "gone.safetensors is missing: .* lists 1 tensors of it, such as b",
        ),
        (
            {"a": names[0], "b": "../b.safetensors"},
            r"lists tensors in '../b.safetensors': shards must be in the directory of their index",
        ),
        ({"a": names[0], "b": str(files[1])}, f"lists tensors in '{files[1]}': shards must be in"),
        (
            {"a": names[0], "b": f"./{names[1]}"},
            f"lists tensors in './{names[1]}': shards must be in",
        ),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        index.write_text(json.dumps(good | {"weight_map": places}))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path)
    write(tmp_path / "two", {"a": np.ones(1), "b": np.ones(1)}, stem="shard")
    (tmp_path / "two" / index.name).write_text(
        json.dumps({"weight_map": {"a": "shard.safetensors"}})
    )
    with pytest.raises(
        UserError, match=r"shard.safetensors holds b \(1 in all\), which .* does not list there"
    ):
        read_weights(tmp_path / "two")
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json cannot be read as JSON"):
        read_weights(tmp_path)


def test_where_weights_are_looked_for(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no weights: looked for model.safetensors"):
        read_weights(tmp_path)
    for stem in ("diffusion_pytorch_model", "model"):  # later ones come first
        write(tmp_path, {stem: np.ones(1)}, stem=stem)
        assert list(read_weights(tmp_path)) == [stem]


def test_read_json(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match="does not exist"):
        read_json(file)
    for contents, message in (
        ("[1]", "is not a JSON object"),
        ("{'a'", "cannot be read as JSON"),
        (b"\xff", "cannot be read"),
    ):
        file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        with pytest.raises(UserError, match=message) as error:
            read_json(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    file.write_text('{"lambda_min_clipped": -Infinity}')  # as diffusers writes it
    assert read_json(file) == {"lambda_min_clipped": -np.inf}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_torch_files(tmp_path, zipped):
    """Read both of torch's formats; bfloat16, views of larger tensors and single numbers among the
    tensors.
    """
    base = torch.randn(6, 4)
    want = {
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "view": base.T[1:3],
        "number": torch.tensor(3.5),
        "half number": torch.tensor(0.1).to(torch.bfloat16),
        "half view": base.to(torch.bfloat16).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "short": torch.ones(3, dtype=torch.int16),
        "empty": torch.ones(0, 3),
    }
    torch.save(want, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path)
    same(
        {key: t.read() for key, t in found.items()},
        {key: from_torch(x.detach().contiguous()) for key, x in want.items()},
    )
    assert found["half"].dtype == ml_dtypes.bfloat16 and found["half view"].shape == (4, 6)


class EasyDict(dict):
    """Behave as the library easydict has it: items are attributes too, so a pickle holds both."""

    def __init__(self, values):
        for key, value in values.items():
            setattr(self, key, EasyDict(value) if isinstance(value, dict) else value)

    def __setattr__(self, key, value):
        super().__setattr__(key, value)
        super().__setitem__(key, value)


def save_easydict(monkeypatch, file, args, tensors):
    """Write a TA-Tok file as it is published, by a module that is gone when it is read."""
    with monkeypatch.context() as patch:
        module = types.ModuleType("easydict")
        module.EasyDict = EasyDict
        patch.setitem(sys.modules, "easydict", module)
        patch.setattr(EasyDict, "__module__", "easydict")
        torch.save({"model": {"args": EasyDict(args), "sd": tensors}}, file)


def test_easydict_is_read_without_the_library(tmp_path, monkeypatch):
    args = {
        "bottleneck": {"name": "bottleneck", "args": {"regularizer": {"args": {"top_k": 4}}}},
        "input_size": 384,
    }
    save_easydict(monkeypatch, tmp_path / "ta_tok.pth", args, {"w": torch.ones(2)})
    assert "easydict" not in sys.modules
    load_torch(tmp_path / "ta_tok.pth")  # torch adds to the list itself when it first loads
    before = set(torch.serialization.get_safe_globals())
    assert b"easydict" in (tmp_path / "ta_tok.pth").read_bytes()
    found = load_torch(tmp_path / "ta_tok.pth")["model"]
    assert found["args"] == args and isinstance(found["args"]["bottleneck"], dict)
    assert torch.equal(found["sd"]["w"], torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == before, "for this file alone"


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("where", ["zip", "pickle"])
def test_torch_files_run_no_code(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if where == "zip":
        torch.save({"w": Attack()}, file)
    else:
        file.write_bytes(pickle.dumps(Attack(), 2))
    with pytest.raises(UserError, match="cannot be read as a PyTorch file of weights") as error:
        read_weights(tmp_path)
    line = str(error.value)
    assert str(file) in line and "\n" not in line
    assert "weights_only" not in line and "weights-only" not in line.lower(), (
        "no advice to load it with its code run"
    )
    if where == "zip":
        assert (
            f"(it holds a {os.system.__module__}.system, which is not a tensor or "
            "plain container): copy it again"
        ) in line
    assert not (tmp_path / "attacked").exists()


def test_damaged_torch_files(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for contents in (b"", b"PK\x03\x04", whole[: len(whole) // 2], b"\x80\x02."):
        file.write_bytes(contents)
        with pytest.raises(UserError, match="cannot be read as a PyTorch file of weights") as error:
            read_weights(tmp_path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    float8 = {"w": torch.ones(2).to(torch.float8_e4m3fn)}
    for value, message in (
        ([1], "holds a list, not a state dict"),
        ({"w": 3}, "w is of type int, not a tensor"),
        (float8, r"w has dtype torch.float8"),
    ):
        torch.save(value, file)
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path)


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        UserError, match=r"a.bin is a PyTorch file: install PyTorch to read it \(pip install"
    ):
        load_torch(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("float32", "float16"),
        ("bfloat16", "float16"),
        ("float64", "float16"),
        ("float64", "float32"),
        ("float64", "bfloat16"),
    ],
)
def test_a_cast_refuses_what_becomes_infinite(wide, narrow):
    largest = float(ml_dtypes.finfo(narrow).max)
    values = np.array([[0.0, largest / 2, -1.5], [np.inf, -np.inf, np.nan]]).astype(wide)
    fits = cast("w", values, np.dtype(narrow))
    assert fits.dtype == np.dtype(narrow) and fits.shape == values.shape
    np.testing.assert_array_equal(fits[1].astype(np.float64), [np.inf, -np.inf, np.nan])
    values[0, 2] = -4 * largest if wide != "float64" or narrow == "float16" else -1e300
    with pytest.raises(UserError, match=r"^layer.w holds \d") as error:
        cast("layer.w", values, np.dtype(narrow))
    assert f", too large for {narrow}: choose a wider --dtype" in str(
        error.value
    ) and "inf" not in str(error.value)


def test_a_cast_rounds_to_nearest_and_copies_nothing_that_fits(rng):
    values = rng.normal(size=(4, 5)).astype(np.float32)
    assert cast("w", values, np.dtype(np.float32)) is values
    for dtype in (torch.bfloat16, torch.float16):
        want = from_torch(torch.from_numpy(values).to(dtype))
        np.testing.assert_array_equal(cast("w", values, want.dtype), want)
        np.testing.assert_array_equal(cast("w", want, values.dtype), want.astype(np.float32))
    assert cast("w", np.zeros((0, 3), np.float32), np.dtype(np.float16)).shape == (0, 3)
