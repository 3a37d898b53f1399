"""Run the whole command on the tiny model, and check what it refuses. No speed is checked."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest

from blip3o_jax import checksums, cli
from blip3o_jax.bench.peer import interleaved, worker
from blip3o_jax.bench.peer import report as peer_report
from blip3o_jax.config import SamplingConfig
from blip3o_jax.config.errors import install_command
from blip3o_jax.convert.exporter import export_weights
from blip3o_jax.parallel.flags import environment
from tests import tiny
from tests.conftest import CACHE


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return (PyTorch files, checkpoint) of the same model."""
    root = tmp_path_factory.mktemp("peer")
    tiny.write_checkpoint(root / "run")
    export_weights(root / "run", root / "hf", max_shard_bytes=10**9)
    return root / "hf", root / "run"


def run(weights, out, *flags):
    return cli.main(
        ["bench", "peer", f"--torch={weights[0]}", f"--jax={weights[1]}", f"--out={out}", *flags]
    )


@pytest.mark.parametrize(
    "items",
    [
        ("train_step", "ar_decode", "dit_step", "tokenizer"),
        pytest.param(interleaved.ITEMS, marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_report(weights, tmp_path, monkeypatch, capfd, items):
    for name, value in {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }.items():
        monkeypatch.setenv(name, value)
    flags = (
        "--rounds=2",
        "--batch_size=2",
        "--threads=1",
        "--eager_only",
        f"--items={','.join(items)}",
    )
    assert run(weights, tmp_path, *flags) == 0
    printed = capfd.readouterr()
    report = json.loads((tmp_path / "peer.json").read_text())
    assert [item["item"] for item in report["items"]] == list(items)
    assert set(report["sides"]) == {"jax", "torch"}
    assert {"jax", "torch", "transformers", "diffusers"} == {
        n for s in report["sides"].values() for n in s["versions"]
    }
    assert all(
        side["environment"] == environment("cpu", os.environ) for side in report["sides"].values()
    )
    assert report["sides"]["torch"]["threads"] == report["options"]["threads"] == 1
    assert report["command"].startswith("blip3o bench peer --torch=") and report["date"].startswith(
        "20"
    )
    for item in report["items"]:
        jax_side, torch_side = item["sides"]["jax"], item["sides"]["torch"]
        for side in (jax_side, torch_side):
            low, high = side["quartiles_s"]
            assert (
                0 < low <= side["median_s"] <= high
                and side["repetitions"] == len(side["seconds"]) >= 2
            )
            assert side["fraction_of_peak"] is None, "a CPU's limit is not known"
            assert side["peak_memory_bytes"] is None or 0 < side["peak_memory_bytes"] < 10**10
        assert item["ratio"] == {"torch": jax_side["median_s"] / torch_side["median_s"]}
        assert item["faster"] == ("jax" if item["ratio"]["torch"] < 1 else "torch")
        if item["item"] in ("ar_decode", "text_to_image"):
            assert item["difference"] == {}, "both draw"
        else:
            assert item["difference"]["torch"] < 1e-4
        if item["item"] != "text_to_image":
            assert item["cost"]["flops"] > 0
    assert "peer  tokenizer  round 2/2" in printed.err
    assert all(item in printed.out for item in items)
    markdown = (tmp_path / "peer.md").read_text()
    assert len(re.findall(r"^\| \w", markdown, re.MULTILINE)) == 1 + len(items)


def test_an_unknown_item(weights, tmp_path, capsys):
    assert run(weights, tmp_path / "out", "--items=tokenizer,walk") == 2
    error, message = (
        capsys.readouterr().err,
        "--items='walk' is not one of train_step, .*text_to_image",
    )
    assert re.fullmatch(f"blip3o: error: {message}\n", error), error
    assert not (tmp_path / "out").exists()


def test_without_gpu(weights, tmp_path, capfd):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(weights, tmp_path, "--device=gpu", "--items=tokenizer", "--eager_only") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.match(
        r"blip3o: error: bench peer --device=gpu: (JAX|PyTorch) finds no GPU; use --device=cpu",
        error,
    ), error


def test_without_torch(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert run(weights, tmp_path) == 2
    hint = f"PyTorch, but diffusers is not installed: {install_command('convert')}\n"
    assert hint in capsys.readouterr().err


def test_directories_of_different_models(weights, tmp_path, capsys):
    """Include models whose tensors all have the same shapes: another shift makes other images."""
    other = tmp_path / "other"
    shutil.copytree(weights[1], other)
    file = other / "checkpoints" / "config.json"
    config = checksums.read_json(file)
    config["model"]["flow"]["shift"] = 3.0
    checksums.write_json(file, config)
    assert run((weights[0], other), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"blip3o: error: model.flow.shift is 1.0 in \S+hf and 3.0 in \S+: they do not hold .*\n",
        error,
    ), error


def test_unequal_work_is_refused():
    outputs = {
        "jax": {"latents": np.ones((2, 3), np.float32)},
        "torch": {"latents": np.full((2, 3), 1.01, np.float32)},
    }
    started = {side: {"outputs": values} for side, values in outputs.items()}
    with pytest.raises(
        ValueError,
        match=r"vae_encode of torch differs from JAX's by 9.9e-03: the directories do not hold",
    ):
        interleaved.differences("vae_encode", started, "cpu")
    assert interleaved.differences("vae_encode", started, "gpu")["torch"] == pytest.approx(
        0.01 / 1.01, rel=1e-4
    )


def test_shares_of_limits():
    """Compute the fractions for an H200 at half its peak in arithmetic, and a quarter of its
    bandwidth; none for a device without figures."""
    start = {"build_s": 0.0, "first_s": 0.0}
    item = {
        "item": "ar_decode",
        "work": {"count": 10},
        "sides": {name: peer_report.summary([2.0], None, start) for name in ("jax", "torch")},
        "cost": {"flops": 989e12, "bytes": 2.4e12},
    }
    about = {"jax": {"device_kind": "NVIDIA H200"}, "torch": {"device_kind": "cpu"}}
    rated = peer_report.with_rates(item, about)
    assert rated["sides"]["jax"]["fraction_of_peak"] == pytest.approx(
        {"arithmetic": 0.5, "memory": 0.25}
    )
    assert rated["sides"]["jax"]["rate"] == 5.0
    assert rated["sides"]["torch"]["fraction_of_peak"] is None


def test_the_first_call_of_a_turn_is_not_counted(tmp_path, monkeypatch):
    calls = []
    prepared = worker.Prepared(lambda: calls.append(len(calls)) or len(calls))
    side = type(
        "Side",
        (),
        {"__init__": lambda self, task: None, "build": lambda self, item, inputs: prepared},
    )
    runner = worker._Runner(side, worker.Task("jax", tmp_path, "cpu", 1, 1, 1, SamplingConfig(), 0))
    runner.start("tokenizer", {})
    before = len(calls)
    clock = iter(range(100))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: float(next(clock)) + 10 * len(calls))
    assert runner.repeat(3) == [11.0, 11.0, 11.0] and len(calls) == before + 4
