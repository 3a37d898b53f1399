"""Measure the rates of present devices, and a program's seconds on them."""

import dataclasses
import os

import jax
import pytest

from blip3o_jax.bench import isolated_process
from blip3o_jax.bench.sharding import compiled_step, grid, measure
from blip3o_jax.bench.sharding.compiled_step import FITS
from blip3o_jax.config import MeshConfig, UserError
from blip3o_jax.parallel.chips import CHIPS
from blip3o_jax.train.vocabulary import expected_vocabulary
from tests import tiny

CPU = dataclasses.replace(
    CHIPS["H100"], name="cpu", flops=1e11, hbm_rate=1e10, link_rate=5e9, dcn_rate=5e9
)


def test_rates_that_nobody_publishes_are_calibrated(monkeypatch):
    monkeypatch.setattr(measure, "CPU_SIDE", 64)
    monkeypatch.setattr(measure, "COPY", 2**16)
    chip = measure.calibrate(jax.devices())
    assert chip.name == "cpu" and 1e6 < chip.flops < 1e13 and 1e5 < chip.hbm_rate < 1e12
    assert chip.link_rate == chip.dcn_rate == chip.hbm_rate / 2 and chip.hbm_bytes > 2**24
    assert chip.source.startswith("calibrated in this run, all devices at once (8): ")
    assert "float32 products of 64 x 64" in chip.source


def test_the_best_turn_counts_and_the_first_does_not(monkeypatch):
    clock = iter([0, 9, 10, 13, 20, 22, 30, 34, 40, 45, 50, 56])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure._best_seconds(lambda: 1) == 2


class Work:
    """Count its turns; turn i takes the i-th of `turns` seconds."""

    strategy = tiny.strategy()

    def first_arguments(self):
        return (0,)

    def next_arguments(self, arguments, result):
        return (result,)


def test_median_and_spread_are_of_the_turns_after_the_warm_up(monkeypatch):
    seconds, now, calls = [90, 80, 3, 1, 2, 7, 4], [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def program(turn):
        calls.append(turn)
        now[0] += seconds[turn]
        return turn + 1

    found = measure.time_program(Work(), program, steps=5)
    assert calls == list(range(7)), "each turn starts from the result of the one before"
    assert found == {"seconds": [3, 1, 2, 7, 4], "median_s": 3, "fastest_s": 1, "slowest_s": 7}


def test_devices_are_looked_for_in_a_process_with_as_many_as_the_mesh_has(monkeypatch):
    seen = {}

    def run(work, environment, name):
        seen.update(environment)
        return {"devices": 8, "chip": dataclasses.asdict(CPU) | {"kinds": ["cpu"]}}

    monkeypatch.setattr(isolated_process, "run_isolated", run)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = measure.find_devices(MeshConfig(cpu_devices=8))
    assert seen["JAX_NUM_CPU_DEVICES"] == "8" and int(seen["NPROC"]) > 8, (
        "threads enough for all to wait for each other"
    )
    assert (str(found), found.chips, found.chip.kinds) == ("8 x cpu", 8, ("cpu",))
    assert measure.LocalDevices(CHIPS["tpu7x"], 8).chips == 4


def test_no_device_is_a_users_error(monkeypatch):
    monkeypatch.setattr(
        isolated_process, "run_isolated", lambda *args: {"status": "failed", "error": "no GPU"}
    )
    with pytest.raises(UserError, match="--measure finds no device to run on: no GPU"):
        measure.find_devices(MeshConfig())


@pytest.mark.usefixtures("quick_compile")
def test_a_rollout_is_compiled_counted_and_run():
    config = expected_vocabulary(tiny.run_config(sampling={"batch_size": 8, "steps": 1}))[0]
    options = grid.Options(step="rollout", measure=2)
    row = compiled_step.compile_step(
        grid.make_task(config, measure.LocalDevices(CPU, 8), "dp", options)
    )
    measured = row["measured"]
    assert row["status"] == FITS and row["mesh"]["data"] == 8 and row["batch_per_chip"] == 1
    assert (
        len(measured["seconds"]) == 2 and measured["ratio"] == measured["median_s"] / row["step_s"]
    )
    assert measured["mfu"] == pytest.approx(row["mfu"] / measured["ratio"])
    assert measured["examples_per_s_per_chip"] == pytest.approx(1 / measured["median_s"])
    assert row["memory"]["cache"] == 2 * 2 * 36 * 2 * 8 * 4 and row["memory"]["temporaries"] > 0
    assert {"prefill", "decode", "dit", "vae"} <= set(row["part_seconds"])
    assert not [name for name in row["unknown"] if "loop" in name]
