"""Measure how fast and in how much memory weights of a real size are converted: `blip3o bench
conversion`.

A random model in the published layout is written, imported and exported, each in a separate
process, and the two directories are compared bit by bit. For comparison the safetensors library
reads and writes the same files.
"""

import dataclasses
import functools
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
from typing import Any

import numpy as np

from blip3o_jax.bench.isolated_process import run_isolated
from blip3o_jax.bench.random_model import write_random_model
from blip3o_jax.config import ModelConfig, UserError, check
from blip3o_jax.config.errors import install_command
from blip3o_jax.convert.directory import check_space
from blip3o_jax.convert.memory import PeakMemory
from blip3o_jax.convert.weight_files import read_weights
from blip3o_jax.files import write_json
from blip3o_jax.provenance import provenance


def run(
    model: ModelConfig, out: pathlib.Path, *, command: str, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Measure the conversions of a random model, write OUT/conversion.json and return it: seconds,
    bytes, bytes a second and peak resident bytes of each of read, write, import and export. The
    weights are removed. UserError where safetensors is not installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"bench conversion compares with the safetensors library: {install_command('convert')}"
        ) from error
    rows: dict[str, dict[str, float]] = {}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="weights-", dir=out) as work:
        source, checkpoint, exported, plain = (
            pathlib.Path(work, name) for name in ("source", "checkpoint", "exported", "plain")
        )
        print(f"writing a random model to {source}", file=sys.stderr)
        write_random_model(source, model, dtype=dtype)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        check_space(source, 2 * size)
        calls: dict[str, tuple[Any, tuple[pathlib.Path, ...]]] = {  # function, its arguments
            "plain read": (_plain_read, (source,)),
            "import": (_import, (source, checkpoint)),
            "plain read and write": (_plain_copy, (source, plain)),
            "export": (_export, (checkpoint, exported)),
        }
        for name, (call, paths) in calls.items():
            print(f"{name} ...", file=sys.stderr)
            row = run_isolated(functools.partial(call, *paths), {}, name)
            if "traceback" in row:
                raise RuntimeError(f"{name} failed in its process:\n{row['traceback']}")
            check("error" not in row, f"{name}: {row.get('error')}")
            rows[name] = row | {"bytes": size}
            shutil.rmtree(plain, ignore_errors=True)
        equal = _equal(source, exported)
    report = {
        **provenance(command),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "dtype": dtype,
        "tensors_equal": equal,
        "rows": rows,
    }
    write_json(out / "conversion.json", report)
    return report


def print_table(report: dict[str, Any]) -> None:
    """Print the report to standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Conversion")
    for name in ("", "seconds", "GB/s", "peak resident GB", "allowed GB"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in report["rows"].items():
        allowed = f"{row['allowed'] / 1e9:.2f}" if "allowed" in row else ""
        rate = row["bytes"] / 1e9 / row["seconds"]
        table.add_row(
            name, f"{row['seconds']:.1f}", f"{rate:.2f}", f"{row['peak'] / 1e9:.2f}", allowed
        )
    Console().print(table)
    print(f"{report['tensors_equal']} tensors, the same bits in source and export")


def _import(source: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    from blip3o_jax.convert.importer import import_weights
    from blip3o_jax.convert.source import open_source

    done = import_weights(open_source(source), out)
    return dataclasses.asdict(done) | {"allowed": done.allowed}


def _export(source: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    from blip3o_jax.convert.exporter import export_weights

    done = export_weights(source, out)
    return {"seconds": done.seconds, "peak": done.peak}


def _plain_read(source: pathlib.Path) -> dict[str, float]:
    from safetensors import numpy as library

    began = time.monotonic()
    with PeakMemory() as memory:
        for file in sorted(source.glob("*.safetensors")):
            for tensor in library.load_file(file).values():
                tensor.reshape(-1).view(np.uint8)[
                    ::2048
                ].sum()  # every page, in case they are only mapped
    return {"seconds": time.monotonic() - began, "peak": memory.peak}


def _plain_copy(source: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    from safetensors import numpy as library

    out.mkdir()
    began = time.monotonic()
    with PeakMemory() as memory:
        for file in sorted(source.glob("*.safetensors")):
            library.save_file(library.load_file(file), out / file.name)
    return {"seconds": time.monotonic() - began, "peak": memory.peak}


def _equal(source: pathlib.Path, exported: pathlib.Path) -> int:
    """Return the number of tensors, all of them equal; RuntimeError for one that is not."""
    (ours, _), (theirs, _) = read_weights(exported), read_weights(source)
    extra = {name for name in ours if ".scale_layer." in name}
    if set(ours) - extra != set(theirs):
        raise RuntimeError(
            f"other tensors than in the source: {sorted(set(ours) ^ set(theirs))[:3]}"
        )
    for name, tensor in theirs.items():
        a, b = tensor.read(), ours[name].read()
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not np.array_equal(a.view(np.uint8), b.view(np.uint8))
        ):
            raise RuntimeError(f"{name} was changed on its way")
    return len(theirs)
