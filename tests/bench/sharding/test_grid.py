"""Check the grid, its report, and what is refused."""

import dataclasses
import json
import re

import pytest

from blip3o_jax import cli
from blip3o_jax.bench.isolated_process import REFUSED
from blip3o_jax.bench.sharding import grid, measure, page, topology
from blip3o_jax.bench.sharding.compiled_step import FITS, TOO_LARGE
from blip3o_jax.bench.sharding.page import LIMITERS
from blip3o_jax.config import UserError
from blip3o_jax.parallel.chips import CHIPS
from tests import tiny

CONFIG = tiny.run_config()
SPEEDS = {"fsdp": 10.0, "fsdp_tp": 20.0}


def fake_row(task):
    """Return a row as if compiled: dp does not fit, fsdp_sp is refused, fsdp_tp is the fastest."""
    strategy = task.config.mesh.strategy
    if strategy == "dp":
        return {"status": TOO_LARGE, "error": "needs 20.0 GiB of the 15.8 GiB that a device has"}
    if strategy == "fsdp_sp":
        return {"status": REFUSED, "error": "<tokens> do not divide"}
    rate = SPEEDS[strategy] * (1 if task.topology.chip.name == "v5e" else 3)
    rows = (task.config.data if task.step == "train" else task.config.sampling).batch_size
    step_s = rows / task.topology.chips / rate
    traffic = {"count": 3, "size": 1e6, "seconds": 0.2 * step_s, "exposed": 0.1 * step_s}
    return {
        "status": FITS,
        "mesh": {"data": 1, "fsdp": 4},
        "memory": {
            "parameters": 2**30,
            "temporaries": 2**31,
            "total": 3 * 2**30,
            "capacity": 2**34,
        },
        "compile_s": 1.0,
        "flops": {"ar": {"forward": 1e12}},
        "total_flops": 1e12,
        "hbm_bytes": 1e9,
        "seconds": {"compute": 0.6 * step_s, "HBM": 0.3 * step_s, "ICI": 0.1 * step_s, "DCN": 0.0},
        "part_seconds": {
            "prefill": 0.1 * step_s,
            "decode": 0.2 * step_s,
            "dit": 0.4 * step_s,
            "vae": 0.3 * step_s,
        },
        "step_s": step_s,
        "limiter": "compute",
        "collectives": [{"kind": "all-gather", "axes": ["fsdp"], "network": "ICI", **traffic}],
        "unknown": {},
        "unknown_fraction": 0.0,
        "largest": [{"array": "f32[4,8]", "bytes": 2**20, "of": "%fusion in ar"}],
        "unsharded": ["a table is whole"],
        "mfu": 0.5,
        "examples_per_s_per_chip": rate,
    } | ({"measured": measured(task.measure, step_s, rate)} if task.measure else {})


def measured(steps, step_s, rate):
    """Return a time two and a half times the predicted one; eight times with fsdp_tp, which has the
    highest prediction."""
    slower = 8 if rate == 60 else 2.5
    seconds = {
        "median_s": slower * step_s,
        "fastest_s": 2 * step_s,
        "slowest_s": 9 * step_s,
        "ratio": slower,
    }
    return seconds | {
        "seconds": [slower * step_s] * steps,
        "mfu": 0.5 / slower,
        "examples_per_s_per_chip": rate / slower,
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
    assert "<h3>Largest arrays of a device</h3>" in page and "a table is whole" in page
    widths = [
        float(w) for w in re.findall(r'<rect class="\w+" x="[\d.]+" y="0" width="([\d.]+)"', page)
    ]
    assert len(widths) == len(LIMITERS) and widths[0] == pytest.approx(2 * widths[1], rel=0.01), (
        "0.6 and 0.3 of the time"
    )
    assert "$" not in page, "a place of the template was not filled"


def test_the_table_says_what_each_row_found(report, capsys):
    grid.print_report(report[0])
    lines = capsys.readouterr().out.splitlines()
    assert re.search(
        r"v5e:2x2\s+fsdp_tp\s+2\s+3\.0\s+0\.100\s+50\.0%\s+compute\s+10\.0%\s+20\.00", lines[1]
    )
    assert any("does not fit: needs 20.0 GiB" in line for line in lines)
    assert "not measured" in lines[-1]


def run(tmp_path, monkeypatch, capsys, config=CONFIG, **options):
    """Return the report, the page, and the lines printed."""
    monkeypatch.setattr(topology, "check_compiler", lambda: None)
    monkeypatch.setattr(
        measure,
        "find_devices",
        lambda mesh: measure.LocalDevices(dataclasses.replace(CHIPS["H200"], source="H200s"), 4),
    )
    found = grid.bench(config, tmp_path, grid.Options(**options), "blip3o bench sharding", fake_row)
    grid.print_report(found)
    return found, (tmp_path / "sharding.html").read_text(), capsys.readouterr()


def test_a_rollouts_columns(tmp_path, monkeypatch, capsys):
    options = {
        "topologies": ("v5e:2x2",),
        "strategies": ("fsdp_tp", "dp"),
        "step": "rollout",
        "batch_per_chip": 4,
    }
    report, page, said = run(tmp_path, monkeypatch, capsys, **options)
    head, line, *_ = said.out.splitlines()
    assert re.search(r"rollout s +prefill s +decode s +dit s +vae s +MFU .* images/s/chip", head)
    assert re.search(r"v5e:2x2 +fsdp_tp +4 +3\.0 +0\.200 +0\.02 +0\.04 +0\.08 +0\.06 +50\.0%", line)
    row = report["rows"][0]
    assert (row["step"], row["batch_size"], row["image_tokens"], row["denoising_steps"]) == (
        "rollout",
        16,
        4,
        30,
    )
    assert "max_length" not in row and "examples" not in re.sub(
        r"<style>.*</style>", "", page, flags=re.DOTALL
    )
    assert (
        page.count("<th><button>") == 4 + 1 + 5 + 6
        and "chip-seconds for an image, predicted" in page
    )


def test_measured_and_predicted_times_are_reported_together(tmp_path, monkeypatch, capsys):
    report, page, said = run(
        tmp_path,
        monkeypatch,
        capsys,
        measure=3,
        strategies=("fsdp", "fsdp_tp", "dp"),
        batch_per_chip=6,
    )
    head, first, second, *_ = said.out.splitlines()
    assert re.search(r"predicted s +measured s +spread s +measured / predicted +MFU", head)
    # By what was measured fsdp is the better; fsdp_tp was predicted to be.
    assert re.search(
        r"4 x H200 +fsdp +6 +3\.0 +0\.200 +0\.500 +0\.400-1\.800 +2\.50 +20\.0%", first
    )
    assert re.search(
        r"4 x H200 +fsdp_tp +6 +3\.0 +0\.100 +0\.800 +0\.200-0\.900 +8\.00 +6\.2%", second
    )
    assert "a device's rates (H200s). Measured: the median of 3 turns" in said.out.splitlines()[-1]
    assert (
        report["measured_steps"] == 3
        and report["chip"]["source"] == "H200s"
        and report["rows"][0]["devices"] == 4
    )
    assert "measured 0.500 s</text>" in page and "chip-seconds for an example, measured" in page
    assert "never measured" not in page and "<h3>Measured</h3>" in page
    bars = [
        float(w)
        for w in re.findall(r'<rect class="measured" x="270" y="\d+" width="([\d.]+)"', page)
    ]
    assert bars[1] == pytest.approx(1.6 * bars[0], rel=0.01)


def test_the_largest_batch_and_those_that_were_tried(tmp_path, monkeypatch, capsys):
    """Use a compiler that needs 3 GiB for each example: five examples a chip fit."""

    def compile_row(task):
        n = task.config.data.batch_size // 4
        memory = {"memory": {"total": 3 * n * 2**30, "capacity": 2**34}}
        return fake_row(task) | (
            memory
            if n <= 5
            else {"status": TOO_LARGE, "error": "needs more", "needs_bytes": 3 * n * 2**30}
        )

    monkeypatch.setattr(topology, "check_compiler", lambda: None)
    options = grid.Options(("v5e:2x2",), ("fsdp",), largest_batch=True)
    row = grid.bench(CONFIG, tmp_path, options, "blip3o bench sharding", compile_row)["rows"][0]
    assert (row["status"], row["batch_per_chip"], row["batch_size"]) == (FITS, 5, 20)
    assert {t["batch_per_chip"]: t["status"] for t in row["tried"]} == {
        1: FITS,
        5: FITS,
        6: TOO_LARGE,
    }
    grid.print_report({"rows": [row], "step": "train", "measured_steps": 0})
    said = capsys.readouterr()
    tried = "1 a chip fits (3.0 GiB); 5 a chip fits (15.0 GiB); 6 a chip does not fit (18.0 GiB)"
    assert f"v5e:2x2 fsdp tried: {tried}" in said.out
    assert "sharding 1/1  v5e:2x2  fsdp  compiling with 5 a chip\n" in said.err
    assert "<h3>Batches tried</h3>" in (tmp_path / "sharding.html").read_text()


def test_pareto_front():
    points = [(1, 5), (2, 3), (3, 4), (2, 6), (4, 1)]
    assert page.pareto(points) == [(1, 5), (2, 3), (4, 1)]


def test_batch_per_chip():
    where = topology.parse("v5e:2x4")
    task = grid.make_task(CONFIG, where, "fsdp", grid.Options(("v5e:2x4",), batch_per_chip=3))
    assert task.config.data.batch_size == 24
    assert (
        grid.make_task(CONFIG, where, "fsdp", grid.Options(("v5e:2x4",))).config.data.batch_size
        == 8
    )
    rollout = grid.make_task(
        CONFIG, topology.parse("v5e:4x6"), "fsdp", grid.Options(("v5e:4x6",), step="rollout")
    )
    assert rollout.config.sampling.batch_size == 24, "16, up to one for each device"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--topology names no topology: --topology=v5p:4x4x4, or --measure"),
        (["--topology=v5p:4x4"], "v5p has 3 axes"),
        (["--topology=v5e:2x2", "--step=sample"], "--step='sample' is not one of train, rollout"),
        (["--topology=v5e:2x2", "--config.mesh.tensr=2"], "did you mean mesh.tensor"),
        (
            ["--topology=v5e:2x2", "--measure"],
            "--measure runs on the devices that are here: leave --topology out",
        ),
        (
            ["--topology=v5e:2x2", "--strategy=nonsense"],
            "--strategy='nonsense' is not one of dp, fsdp",
        ),
        (
            ["--topology=v5e:2x2", "--strategy=hybrid_dp"],
            "for several slices: add --slices=2, or use dp",
        ),
        (
            ["--topology=v5e:2x2", "--config.mesh.strategy=dp"],
            "--config.mesh.strategy is not read here: use --strategy",
        ),
        (["--measure", "--slices=2"], "--slices=2"),
        (["--measure", "--batch_per_chip=max"], "--batch_per_chip=max needs the TPU compiler"),
        (
            ["--measure", "--step=rollout", "--config.stage=tokenizer"],
            "the config's stage is 'tokenizer'",
        ),
        (
            ["--topology=v5e:2x2", "--step=rollout", "--config.stage=autoencoder"],
            "the config's stage is 'autoencoder'",
        ),
    ],
)
def test_what_cannot_be_ends_in_one_line(flags, says, tmp_path, capfd):
    config = "configs/pretrain.py:0.6b"
    assert cli.main(["bench", "sharding", f"--config={config}", f"--out={tmp_path}", *flags]) == 2
    error = capfd.readouterr().err.strip()
    assert says in error and error.startswith("blip3o: error: ") and "\n" not in error


def test_a_grid_in_which_nothing_was_compiled_is_an_error():
    rows = [
        {"status": REFUSED, "error": "does not divide"},
        {"status": REFUSED, "error": "nor this"},
    ]
    with pytest.raises(
        UserError, match="nothing could be compiled; the first row says: does not divide"
    ):
        grid.check_any({"rows": rows})
    grid.check_any({"rows": [*rows, {"status": TOO_LARGE}]})


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--batch_per_chip=0", "'0' must lie between 1 and 16,777,216, nor max"),
        ("--batch_per_chip=-1", "'-1' must lie between 1 and"),
        ("--batch_per_chip=many", "'many' is not a whole number, nor max"),
        ("--measure=0", "'0' must lie between 1 and"),
    ],
)
def test_what_is_no_number_ends_in_one_line(flag, says, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        cli.main(
            [
                "bench",
                "sharding",
                "--config=configs/pretrain.py",
                f"--out={tmp_path}",
                "--topology=v5e:2x2",
                flag,
            ]
        )
    error = capfd.readouterr().err
    assert (
        exit.value.code == 2
        and says in error
        and error.startswith("blip3o: error: ")
        and error.count("\n") == 1
    )


def test_options_refuse_an_empty_strategy_list():
    with pytest.raises(UserError, match="--strategy"):
        grid.Options(("v5e:2x2",), ())
