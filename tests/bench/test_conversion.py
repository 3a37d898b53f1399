"""Run `blip3o bench conversion` on the tiny model: the report's fields, and that it finds a flipped
bit."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import safetensors.numpy

from blip3o_jax.bench import conversion
from blip3o_jax.bench.random_model import write_random_model
from blip3o_jax.config import UserError
from blip3o_jax.convert.mapping import tensor_shapes
from blip3o_jax.convert.source import open_source
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from tests import tiny

# Bytes and the chat's tags fill most of the 283 ids of text.
MODEL = dataclasses.replace(tiny.model(), ar=dataclasses.replace(tiny.model().ar, vocab_size=320))


def test_report(tmp_path, monkeypatch, capsys, quick_compile):
    monkeypatch.setattr(
        conversion, "run_isolated", lambda work, environment, name: work()
    )  # starting four takes the time
    report = conversion.run(MODEL, tmp_path / "out", command="blip3o bench", dtype="bfloat16")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["conversion.json"], (
        "the weights are removed"
    )
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    count = sum(len(tensor_shapes(part, MODEL)) for part in PUBLISHED_PARTS)
    assert report["tensors_equal"] == count and report["dtype"] == "bfloat16"
    assert set(report["machine"]) == {"processor", "cores", "load"} and report["date"].startswith(
        "20"
    )
    assert list(report["rows"]) == ["plain read", "import", "plain read and write", "export"]
    numbers = sum(
        int(np.prod(s)) for part in PUBLISHED_PARTS for s in tensor_shapes(part, MODEL).values()
    )
    for row in report["rows"].values():
        assert row["seconds"] > 0 and 10**7 < row["peak"] < 10**10
        assert 2 * numbers < row["bytes"] < 2 * numbers + 200_000, "a header and the tensors"
    read = report["rows"]["import"]
    assert read["allowed"] == read["host_bytes"] + read["largest"] * 5 // 4 + 2**30
    assert read["parameters"] >= 2 * numbers
    conversion.print_table(report)
    printed = capsys.readouterr().out
    assert (
        all(name in printed for name in report["rows"])
        and f"{count} tensors, the same bits" in printed
    )


def test_a_random_model_is_a_source(tmp_path):
    write_random_model(tmp_path, MODEL, dtype="float16")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert all(x.dtype == np.float16 for x in tensors.values())
    found = open_source(tmp_path).config.model
    assert (found.ar.vocab_size, found.dit.num_layers, found.vae.latent_channels) == (320, 2, 4)
    assert found.tokenizer.encoder.patch_size == 8 and found.ar.param_dtype == "float16"


@pytest.mark.parametrize("change", ["bit", "dtype", "missing", "more"])
def test_what_is_not_equal_is_found(tmp_path, change):
    tensors = {"a": np.ones((2, 3), np.float32), "b.scale_layer.shift": np.zeros(3, np.float32)}
    other = {"a": tensors["a"].copy()}
    for name, values in (("exported", tensors), ("source", other)):
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(values, tmp_path / name / "model.safetensors")
    assert conversion._equal(tmp_path / "source", tmp_path / "exported") == 1
    if change == "bit":
        other["a"].view(np.uint32)[1, 2] ^= 1
    other |= {"dtype": {"a": other["a"].astype(np.float16)}, "more": {"c": other["a"]}}.get(
        change, {}
    )
    if change == "missing":
        other = {"d": other["a"]}
    safetensors.numpy.save_file(other, tmp_path / "source" / "model.safetensors")
    with pytest.raises(
        RuntimeError,
        match="a was changed on its way" if change in ("bit", "dtype") else "other tensors than",
    ):
        conversion._equal(tmp_path / "source", tmp_path / "exported")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        UserError, match=r"bench conversion compares with the safetensors library: pip install"
    ):
        conversion.run(MODEL, tmp_path / "out", command="blip3o bench")
    assert not (tmp_path / "out").exists()


def test_a_step_whose_process_fails_is_one_line(tmp_path, monkeypatch):
    row = {"status": "failed", "error": "the import process ended with status -9"}
    monkeypatch.setattr(conversion, "run_isolated", lambda work, environment, name: row)
    with pytest.raises(UserError, match=r"^plain read: the import process ended with status -9$"):
        conversion.run(MODEL, tmp_path / "out", command="")
    row["traceback"] = "Traceback ... line 7, in library"  # of a bug
    with pytest.raises(RuntimeError, match="line 7, in library"):
        conversion.run(MODEL, tmp_path / "out", command="")
