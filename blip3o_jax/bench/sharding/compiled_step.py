"""One train step compiled ahead of time for one topology and strategy, and what is found in it.

Runs as a process of its own (`compile_apart`): the compiler's memory goes back with it, and whatever ends it ends one row.
"""

import dataclasses
import json
import math
import os
import pathlib
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from blip3o_jax.bench.sharding import topology
from blip3o_jax.config import Config, ConfigError, UserError

Row = dict[str, Any]
FITS, TOO_LARGE, REFUSED, FAILED = "fits", "does not fit", "refused", "failed"


@dataclasses.dataclass(frozen=True)
class Task:
    """`config` with the mesh and the global batch that are meant; `hlo`: where to keep the program's text. With `replicas`,
    parameters that do not divide over all chips are kept several times over: mesh.data is doubled until they do."""

    config: Config
    topology: topology.Topology
    hlo: pathlib.Path | None = None
    replicas: bool = False


def compile_apart(task: Task) -> Row:
    """`compiled` in a process of its own; a process that is killed becomes a row that says so."""
    package = pathlib.Path(__file__).parents[3]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | topology.settings(task.topology.chip) | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="blip3o-sharding-") as scratch:
        given, found, said = (pathlib.Path(scratch) / name for name in ("task", "row", "log"))
        given.write_bytes(pickle.dumps(task))
        with said.open("wb") as log:
            command = [sys.executable, "-m", "blip3o_jax.bench.sharding.compiled_step", str(given), str(found)]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)
            try:
                status = process.wait()
            finally:
                process.kill()
                process.wait()
        if found.exists():
            return json.loads(found.read_text(encoding="utf-8"))
        last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        killed = "; where that is -9 memory ran out on this machine" if status < 0 else ""
        return {"status": FAILED, "error": f"the compiling process ended with status {status}{killed}: {last[0][:300]}"}


def compiled(task: Task) -> Row:
    """Compiles, then counts. Bytes and FLOPs are of one device, seconds predicted."""
    import jax

    from blip3o_jax.bench.cost import walk
    from blip3o_jax.bench.cost.network import Network
    from blip3o_jax.train.flops import useful_flops
    from blip3o_jax.train.stages import make_loss
    from blip3o_jax.train.step import make_step

    chip = task.topology.chip
    config, strategy, plan = planned(task)
    row: Row = {"mesh": dict(strategy.mesh.shape)}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=strategy.batch_sharding())
        for name, (shape, dtype) in batch_shapes(config).items()
    }
    row["memory"] = held(plan.abstract, batch) | {"capacity": chip.hbm_bytes}
    began = time.monotonic()
    lowered = make_step(config, plan, strategy, make_loss(config, 0)).lower(plan.abstract, batch)
    row["lower_s"] = time.monotonic() - began
    began = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"status": TOO_LARGE, "compile_s": time.monotonic() - began} | _told(str(error))
    row |= {"status": FITS, "compile_s": time.monotonic() - began}
    row["memory"] |= _memory(program.memory_analysis())
    text = program.as_text()
    if task.hlo:
        task.hlo.write_text(text, encoding="utf-8")
    network = Network.of(chip, dict(strategy.mesh.shape), list(strategy.mesh.devices.flat))
    row |= predicted(walk.program_cost(text, network))

    row["useful_flops"] = useful_flops(config, strategy, batch)
    row["compiler_flops"] = (program.cost_analysis() or {}).get("flops")
    row["mfu"] = row["useful_flops"] / task.topology.devices / chip.flops / row["step_s"]
    row["examples_per_s_per_chip"] = config.data.batch_size / task.topology.chips / row["step_s"]
    return row | {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def planned(task: Task) -> tuple[Config, Any, Any]:
    """(configuration, strategy, state) on the task's mesh, or on one with more replicas. ConfigError for what cannot be."""
    from blip3o_jax.parallel.rules import Strategy
    from blip3o_jax.train.state import plan_state

    devices, mesh, first = topology.make_devices(task.topology), task.config.mesh, None
    while True:
        config = dataclasses.replace(task.config, mesh=mesh)
        try:
            strategy = Strategy.of(mesh, devices)
            strategy.check_batch(config.data.batch_size, config.optimizer.accumulate)
            return config, strategy, plan_state(config, strategy)
        except (ConfigError, NotImplementedError) as error:  # the latter: JAX cannot lay the mesh onto the torus
            first = first or ConfigError(" ".join(str(error).split()))
            mesh = dataclasses.replace(mesh, data=2 * mesh.data)
            if not task.replicas or len(devices) % mesh.data:
                raise first from None


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a global batch as the loader makes it (data/examples.py, data/sequence.py)."""
    from blip3o_jax.train.stages import STAGES

    model, rows, length = config.model, config.data.batch_size, config.data.max_length
    fields, size = STAGES[config.stage].fields, model.tokenizer.encoder.image_size
    latents = (rows, model.latent_size, model.latent_size, model.vae.latent_channels)
    views = {
        "pixels": {"pixels": ((rows, model.image_size, model.image_size, 3), "uint8")},
        "tokenizer_pixels": {"tokenizer_pixels": ((rows, size, size, 3), "uint8")},
        "caption": {"text_ids": ((rows, length), "int32"), "text_mask": ((rows, length), "bool")},
        "row": {name: ((rows, length), "int32") for name in ("tokens", "segment_ids", "positions")}
        | {"loss_mask": ((rows, length), "float32"), "image_span": ((rows,), "int32")},
    }
    if config.stage == "joint" and config.data.cache_dir:
        cached = {"codes": ((rows, model.tokenizer.num_tokens), "int32"), "latents": (latents, "float32")}
        return views["row"] | cached | {"bad_records": ((rows,), "int32")}
    return {name: value for field in fields for name, value in views[field].items()} | {"bad_records": ((rows,), "int32")}


def held(state: Any, batch: Any) -> dict[str, int]:
    """Bytes of one device for each kind of what a step is given."""
    import jax

    def shard_bytes(tree: Any) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    kinds = {"parameters": "params", "frozen": "frozen", "optimizer": "opt", "averages": "ema"}
    sizes = {kind: shard_bytes(state[name]) for kind, name in kinds.items()}
    return sizes | {"batch": shard_bytes(batch)}


def _memory(analysis: Any) -> dict[str, int]:
    """The compiler's own account."""
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
        "total": arguments + outputs + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
    }


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _told(message: str) -> Row:
    """What the compiler says of a program that does not fit: "Used 120.5G of 95.74G hbm", or that its temporaries alone
    "(40.25G) exceeds available HBM (15.75G)"."""
    row: Row = {"error": re.sub(r"\s+", " ", message)[:400]}
    number = r"([\d.]+)([KMGT]?)"
    forms = rf"[Uu]sed {number} of {number} hbm", rf"\({number}\) exceeds available HBM \({number}\)"
    if found := next(filter(None, (re.search(form, message) for form in forms)), None):
        used, capacity = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        row |= {"needs_bytes": used, "capacity_bytes": capacity}
        row["error"] = f"needs {used / 2**30:.1f} GiB of the {capacity / 2**30:.1f} GiB that a device has"
    return row


def predicted(cost: Any) -> Row:
    """A `walk.Cost` as plain values."""
    flops: dict[str, dict[str, float]] = {}
    for (part, direction), value in cost.flops.items():
        flops.setdefault(part, {})[direction] = value
    return {
        "flops": flops,
        "total_flops": cost.total_flops,
        "hbm_bytes": cost.hbm_bytes,
        "seconds": {name: cost.seconds[name] for name in ("compute", "HBM", "ICI", "DCN")},
        "part_seconds": dict(cost.part_seconds),
        "step_s": cost.total_seconds,
        "limiter": cost.limiter,
        "collectives": [
            {"kind": kind, "axes": list(axes), "network": network, **dataclasses.asdict(traffic)}
            for (kind, axes, network), traffic in cost.collectives.items()
        ],
        "unknown": {name: dataclasses.asdict(value) for name, value in cost.unknown.items()},
        "unknown_share": cost.unknown_share,
    }


def _end_with_parent() -> None:
    """The parent never writes: its end of the pipe closes when it ends, however it does."""
    sys.stdin.buffer.read()
    os._exit(1)


def main(given: str, found: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task: Task = pickle.loads(pathlib.Path(given).read_bytes())
    try:
        row = compiled(task)
    except UserError as error:
        row = {"status": REFUSED, "error": " ".join(str(error).split())}
    except Exception as error:
        import traceback

        traceback.print_exc()
        row = {"status": FAILED, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    pathlib.Path(found).write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
