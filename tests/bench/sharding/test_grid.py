"""The grid, its report, and what is refused; one real compile where the TPU compiler is installed."""

import dataclasses
import json
import re
import signal

import pytest

from blip3o_jax import cli
from blip3o_jax.bench.sharding import compiled_step, grid, page, topology
from blip3o_jax.bench.sharding.compiled_step import FAILED, FITS, REFUSED, TOO_LARGE
from blip3o_jax.config import MeshConfig, UserError
from tests import tiny

CONFIG = tiny.run_config()
SPEEDS = {"fsdp": 10.0, "fsdp_tp": 20.0}


def fake_row(task):
    """As if compiled: dp does not fit, fsdp_sp is refused, fsdp_tp is the fastest."""
    strategy = task.config.mesh.strategy
    if strategy == "dp":
        return {"status": TOO_LARGE, "error": "needs 20.0 GiB of the 15.8 GiB that a device has"}
    if strategy == "fsdp_sp":
        return {"status": REFUSED, "error": "<tokens> do not divide"}
    rate = SPEEDS[strategy] * (1 if task.topology.chip.name == "v5e" else 3)
    step_s = task.config.data.batch_size / task.topology.chips / rate
    traffic = {"count": 3, "size": 1e6, "seconds": 0.2 * step_s, "exposed": 0.1 * step_s}
    return {
        "status": FITS,
        "mesh": {"data": 1, "fsdp": 4},
        "memory": {"parameters": 2**30, "temporaries": 2**31, "total": 3 * 2**30, "capacity": 2**34},
        "compile_s": 1.0,
        "flops": {"ar": {"forward": 1e12}},
        "total_flops": 1e12,
        "hbm_bytes": 1e9,
        "seconds": {"compute": 0.6 * step_s, "HBM": 0.3 * step_s, "ICI": 0.1 * step_s, "DCN": 0.0},
        "part_seconds": {"ar": step_s},
        "step_s": step_s,
        "limiter": "compute",
        "collectives": [{"kind": "all-gather", "axes": ["fsdp"], "network": "ICI", **traffic}],
        "unknown": {},
        "unknown_share": 0.0,
        "mfu": 0.5,
        "examples_per_s_per_chip": rate,
    }


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "check_compiler", lambda: None)
    options = grid.Options(("v5e:2x2", "v5p:2x2x1"), ("dp", "fsdp", "fsdp_sp", "fsdp_tp"))
    return grid.bench(CONFIG, tmp_path, options, "blip3o bench sharding", fake_row), tmp_path


def test_the_best_strategy_of_a_topology_comes_first_and_what_does_not_fit_last(report):
    rows = json.loads((report[1] / "sharding.json").read_text())["rows"]
    assert rows == report[0]["rows"] and len(rows) == 8
    assert [r["strategy"] for r in rows if r["chip"] == "v5e"][:2] == ["fsdp_tp", "fsdp"]
    assert [r["status"] for r in rows if r["chip"] == "v5p"] == [FITS, FITS, TOO_LARGE, REFUSED]
    assert all("error" in r for r in rows if r["status"] != FITS)


def test_the_page_is_whole_and_asks_for_nothing(report):
    page = (report[1] / "sharding.html").read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page), "everything is in the file"
    assert page.count("<tr") >= 8 and "&lt;tokens&gt; do not divide" in page
    widths = [float(w) for w in re.findall(r'<rect class="\w+" x="[\d.]+" y="0" width="([\d.]+)"', page)]
    assert len(widths) == 4 and widths[0] == pytest.approx(2 * widths[1], rel=0.01), "0.6 and 0.3 of the time"
    assert "$" not in page, "a place of the template was not filled"


def test_the_table_says_what_each_row_found(report, capsys):
    grid.print_report(report[0])
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"v5e:2x2\s+fsdp_tp\s+2\s+3\.0\s+0\.100\s+50\.0%\s+compute\s+10\.0%\s+20\.00", lines[1])
    assert any("does not fit: needs 20.0 GiB" in line for line in lines)
    assert "not measured" in lines[-1]


def test_pareto_front():
    points = [(1, 5), (2, 3), (3, 4), (2, 6), (4, 1)]
    assert page.pareto(points) == [(1, 5), (2, 3), (4, 1)]


@pytest.mark.parametrize(
    ("strategy", "slices", "chosen", "want"),
    [
        ("fsdp", 1, {}, {"data": 1, "fsdp": -1, "tensor": 1, "sequence": 1}),
        ("dp", 1, {}, {"data": -1, "fsdp": 1}),
        ("fsdp_tp", 1, {}, {"fsdp": -1, "tensor": 2}),
        ("fsdp_sp", 1, {}, {"fsdp": -1, "sequence": 2}),
        ("fsdp_tp", 1, {"tensor": 4}, {"fsdp": -1, "tensor": 4}),
        ("hybrid", 2, {}, {"data": 2, "fsdp": -1, "slices": 2}),
        ("hybrid_fsdp_tp", 2, {}, {"data": 2, "tensor": 2, "slices": 2}),
    ],
)
def test_mesh_sizes(strategy, slices, chosen, want):
    mesh = grid.mesh_for(MeshConfig(**chosen), strategy, slices, frozenset(chosen))
    assert mesh.strategy == strategy
    assert {name: getattr(mesh, name) for name in want} == want


def test_parameters_that_do_not_divide_are_kept_several_times_over(monkeypatch):
    """A width of 20 does not divide over 8 chips; over 4 of them, twice, it does. Not where the user has chosen the mesh."""
    import jax

    where = topology.parse("v5e:2x4")
    monkeypatch.setattr(topology, "make_devices", lambda where: jax.devices())
    model = dataclasses.replace(CONFIG.model, dit=dataclasses.replace(CONFIG.model.dit, caption_channels=20))
    config = dataclasses.replace(CONFIG, model=model)
    free = grid.make_task(config, where, "fsdp", grid.Options(("v5e:2x4",)))
    mesh = compiled_step.planned(free)[1].mesh.shape
    assert (mesh["data"], mesh["fsdp"]) == (2, 4)
    chosen = grid.Options(("v5e:2x4",), chosen=frozenset({"fsdp"}))
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=8))
    with pytest.raises(UserError, match="does not divide over mesh axes fsdp = 8"):
        compiled_step.planned(grid.make_task(config, where, "fsdp", chosen))


def test_batch_per_chip():
    where = topology.parse("v5e:2x4")
    task = grid.make_task(CONFIG, where, "fsdp", grid.Options(("v5e:2x4",), batch_per_chip=3))
    assert task.config.data.batch_size == 24
    assert grid.make_task(CONFIG, where, "fsdp", grid.Options(("v5e:2x4",))).config.data.batch_size == 8


@pytest.mark.parametrize("stage", ["joint", "autoencoder", "contrastive", "tokenizer"])
def test_shapes_are_those_of_a_real_batch(stage):
    cfg, _, batch = tiny.prepared(stage)
    want = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    assert compiled_step.batch_shapes(cfg) == want


def test_a_cached_run_has_codes_and_latents_in_place_of_pixels():
    cfg, _, batch = tiny.prepared("joint")
    cached = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir="somewhere"))
    want = {name: (x.shape, str(x.dtype)) for name, x in tiny.cached_batch(cfg, batch).items()}
    assert compiled_step.batch_shapes(cached) == want


@pytest.mark.parametrize(
    ("message", "used", "capacity"),
    [
        ("Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded hbm capacity by 24.76G.", 120.5, 95.74),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (40.25G) exceeds available HBM (15.75G).",
            40.25,
            15.75,
        ),
    ],
)
def test_what_the_compiler_says_of_too_little_memory(message, used, capacity):
    told = compiled_step._told(f"RESOURCE_EXHAUSTED: {message}")
    assert told["needs_bytes"] == used * 2**30 and told["capacity_bytes"] == capacity * 2**30
    assert told["error"] == f"needs {used:.1f} GiB of the {capacity:.1f} GiB that a device has"


def test_a_process_that_is_killed_becomes_a_row(monkeypatch):
    """The system ends a process that takes too much memory."""
    program = f"import os; print('reading'); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    popen = compiled_step.subprocess.Popen
    monkeypatch.setattr(compiled_step.subprocess, "Popen", lambda command, **kw: popen([command[0], "-u", "-c", program], **kw))
    row = compiled_step.compile_apart(compiled_step.Task(CONFIG, topology.parse("v5e:2x2")))
    assert row["status"] == FAILED
    assert "status -9; where that is -9 memory ran out on this machine: reading" in row["error"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--topology=v5p:4x4"], "v5p has 3 axes"),
        (["--topology=,"], "names no topology"),
        (["--topology=v5e:2x2", "--batch_per_chip=-1"], "--batch_per_chip=-1"),
        (["--topology=v5e:2x2", "--config.mesh.tensr=2"], "did you mean mesh.tensor"),
    ],
)
def test_what_cannot_be_ends_in_one_line(flags, says, tmp_path, capfd):
    config = "configs/pretrain.py:0.6b"
    assert cli.main(["bench", "sharding", f"--config={config}", f"--out={tmp_path}", *flags]) == 2
    error = capfd.readouterr().err.strip()
    assert says in error and error.startswith("blip3o: error: ") and "\n" not in error


def test_options_refuse_an_empty_strategy_list():
    with pytest.raises(UserError, match="--strategy"):
        grid.Options(("v5e:2x2",), ())
