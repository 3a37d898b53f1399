"""Compile one step, of training or of a rollout, for one strategy and one topology, and report the
cost of the program.

For a topology it is compiled ahead of time; on devices that are present it is also run on request.
"""

import dataclasses
import functools
import pathlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from blip3o_jax.bench import isolated_process
from blip3o_jax.bench.cost import bundles
from blip3o_jax.bench.isolated_process import Row
from blip3o_jax.bench.sharding import measure, topology
from blip3o_jax.bench.sharding.measure import LocalDevices
from blip3o_jax.config import Config

STEPS = ("train", "rollout")
FITS, TOO_LARGE = "fits", "does not fit"


@dataclasses.dataclass(frozen=True)
class Task:
    """Describe one compilation: `config` with the mesh and the global batch; `step` of STEPS;
    `hlo`: where to keep the program's text; `measure`: how many times to run it. `loss` replaces
    `stages.make_loss`; `flags` are the compiler's, in place of the launchers'. Without `schedules`
    the compiler does not write them, and its estimates are used."""

    config: Config
    topology: topology.Topology | LocalDevices
    step: str = "train"
    measure: int = 0
    hlo: pathlib.Path | None = None
    loss: Callable[[Config, int], Any] | None = None
    flags: str = ""
    schedules: bool = True


def compile_isolated(task: Task) -> Row:
    """Run `compile_step` in a separate process; a process that is killed becomes a row with the
    error. The traceback of a bug goes to stderr and not into the row."""
    row = _compile_isolated(task)
    if "traceback" in row:
        print(row.pop("traceback"), file=sys.stderr)
    return row


def _compile_isolated(task: Task) -> Row:
    if isinstance(task.topology, LocalDevices):
        return isolated_process.run_isolated(
            functools.partial(compile_step, task), dict(measure.environment(task.config.mesh))
        )
    environment = topology.settings(task.topology.chip)
    environment["LIBTPU_INIT_ARGS"] = flags = task.flags or environment["LIBTPU_INIT_ARGS"]
    if not task.schedules:
        return isolated_process.run_isolated(functools.partial(compile_step, task), environment)
    with tempfile.TemporaryDirectory(prefix="blip3o-schedules-") as schedules:
        environment["LIBTPU_INIT_ARGS"] = f"{flags} {bundles.dump_flags(pathlib.Path(schedules))}"
        return isolated_process.run_isolated(
            functools.partial(compile_step, task, pathlib.Path(schedules)), environment
        )


def compile_step(task: Task, schedules: pathlib.Path | None = None) -> Row:
    """Compile the step, then count. Bytes and FLOPs are of one device, seconds predicted, except
    those under "measured". `schedules`: where the compiler writes them (bench/cost/bundles.py)."""
    import jax

    from blip3o_jax.bench.cost import hlo, walk
    from blip3o_jax.bench.cost.network import Network
    from blip3o_jax.bench.sharding import buffers

    where = task.topology
    chip = task.topology.chip
    work = plan_work(task)
    mesh = work.strategy.mesh
    row: Row = {
        "mesh": dict(mesh.shape),
        "batch_size": work.rows,
        "batch_per_chip": work.rows / where.chips,
    }
    row["memory"] = work.argument_bytes() | {"capacity": chip.hbm_bytes}
    began = time.monotonic()
    lowered = work.lower()
    row["lower_s"] = time.monotonic() - began
    began = time.monotonic()
    try:
        program = lowered.compile()
        row |= {"status": FITS, "compile_s": time.monotonic() - began}
        if task.measure:
            row["measured"] = measure.time_program(work, program, task.measure)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return (
            row
            | {"status": TOO_LARGE, "compile_s": time.monotonic() - began}
            | _parse_too_large(str(error))
        )
    row["memory"] |= _memory(program.memory_analysis(), work.within)
    # The optimized program after scheduling: its order is that of execution.
    text = program.as_text()
    if task.hlo:
        task.hlo.write_text(text, encoding="utf-8")
    network = Network.of(chip, dict(mesh.shape), list(mesh.devices.flat))
    parsed = hlo.parse(text)
    unsharded = buffers.unsharded(parsed, work.weights, work.logits, work.config.model.ar.dtype)
    row |= {"largest": buffers.largest(parsed), "unsharded": unsharded}
    row |= predicted(
        walk.program_cost(parsed, network, bundles.read(schedules) if schedules else None)
    )

    row["model_flops"] = work.model_flops()
    row["compiler_flops"] = (program.cost_analysis() or {}).get("flops")
    row |= _rates(row, row["step_s"], where)
    if task.measure:
        measured = row["measured"]
        measured |= {"ratio": measured["median_s"] / row["step_s"]} | _rates(
            row, measured["median_s"], where
        )
    return row | {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _rates(row: Row, seconds: float, where: topology.Topology | LocalDevices) -> Row:
    """Return the rates of a step of `seconds`. Examples are rows of a training batch, or images."""
    return {
        "mfu": row["model_flops"] / where.devices / where.chip.flops / seconds,
        "examples_per_s_per_chip": row["batch_size"] / where.chips / seconds,
    }


def plan_work(task: Task) -> Any:
    """Return the work (train_step.py, rollout.py) on the mesh that a run of the task's config has
    on its devices. ConfigError where that does not fit."""
    import jax

    from blip3o_jax.bench.sharding.rollout import Rollout
    from blip3o_jax.bench.sharding.train_step import TrainStep
    from blip3o_jax.train.state import run_strategy

    make = {"train": TrainStep, "rollout": Rollout}[task.step]
    devices = (
        jax.devices()
        if isinstance(task.topology, LocalDevices)
        else topology.make_devices(task.topology)
    )
    return make(task.config, run_strategy(task.config, devices), task.loss)


def _memory(analysis: Any, within: dict[str, int]) -> dict[str, int]:
    """Return the compiler's memory analysis; `within`, bytes of named temporaries, are subtracted
    from the temporaries."""
    arguments, outputs = (
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )
    return within | {
        "temporaries": max(0, analysis.temp_size_in_bytes - sum(within.values())),
        "program": analysis.generated_code_size_in_bytes,
        "total": arguments
        + outputs
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes,
    }


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _parse_too_large(message: str) -> Row:
    """Parse the compiler's error for a program that does not fit: "Used 120.5G of 95.74G hbm", or
    that its temporaries alone "(40.25G) exceeds available HBM (15.75G)"."""
    row: Row = {"error": re.sub(r"\s+", " ", message)[:400]}
    number = r"([\d.]+)([KMGT]?)"
    forms = (
        rf"[Uu]sed {number} of {number} hbm",
        rf"\({number}\) exceeds available HBM \({number}\)",
    )
    if found := next(filter(None, (re.search(form, message) for form in forms)), None):
        used, capacity = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        row |= {"needs_bytes": used, "capacity_bytes": capacity}
        row["error"] = (
            f"needs {used / 2**30:.1f} GiB of the {capacity / 2**30:.1f} GiB that a device has"
        )
    return row


def predicted(cost: Any) -> Row:
    """Return a `cost.Cost` as plain values."""
    from blip3o_jax.bench.cost.cost import LIMITERS

    flops: dict[str, dict[str, float]] = {}
    for (part, direction), value in cost.flops.items():
        flops.setdefault(part, {})[direction] = value
    return {
        "flops": flops,
        "total_flops": cost.total_flops,
        "hbm_bytes": cost.hbm_bytes,
        "seconds": {name: cost.seconds[name] for name in LIMITERS},
        "part_seconds": dict(cost.part_seconds),
        "step_s": cost.total_seconds,
        "limiter": cost.limiter,
        "collectives": [
            {"kind": kind, "axes": list(axes), "network": network, **dataclasses.asdict(traffic)}
            for (kind, axes, network), traffic in cost.collectives.items()
        ],
        "unknown": {name: dataclasses.asdict(value) for name, value in cost.unknown.items()},
        "unknown_fraction": cost.unknown_fraction,
    }
