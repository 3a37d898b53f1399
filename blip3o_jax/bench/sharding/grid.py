"""`blip3o bench sharding`: the train step compiled for every topology and strategy asked for, without a TPU, and compared.

Each combination is compiled by the TPU compiler itself in a process of its own (compiled_step.py) and its program is walked by
a cost model (bench/cost): whether it fits is the compiler's verdict; times are predictions, never measurements.
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from blip3o_jax.bench.sharding import page, topology
from blip3o_jax.bench.sharding.compiled_step import FITS, Row, Task, compile_apart
from blip3o_jax.config import Config, MeshConfig, check

STRATEGIES = ("fsdp", "fsdp_tp", "fsdp_sp", "dp")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Options:
    """`chosen`: the fields of config.mesh that the user has set; the others are chosen here for each strategy."""

    topologies: tuple[str, ...]
    strategies: tuple[str, ...] = STRATEGIES
    slices: int = 1
    batch_per_chip: int = 0  # 0: the config's global batch
    chosen: frozenset[str] = frozenset()
    keep_hlo: bool = False

    def __post_init__(self) -> None:
        check(bool(self.topologies), "--topology names no topology: --topology=v5p:4x4x4")
        check(bool(self.strategies), f"--strategy names no strategy: --strategy={','.join(STRATEGIES)}")
        check(self.batch_per_chip >= 0, f"--batch_per_chip={self.batch_per_chip} must be positive")


def bench(
    config: Config,
    out: pathlib.Path,
    options: Options,
    command: str,
    compile_row: Callable[[Task], Row] = compile_apart,
) -> dict[str, Any]:
    """Runs the grid; writes OUT/sharding.json after each row and OUT/sharding.html; returns the report.

    UserError for an unknown topology or a missing compiler; what is wrong with one combination is said in its row.
    """
    topologies = [topology.parse(text, options.slices) for text in options.topologies]
    topology.check_compiler()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "rows": [],
    }
    grid = list(itertools.product(topologies, options.strategies))
    for number, (where, strategy) in enumerate(grid, 1):
        task = make_task(config, where, strategy, options)
        about = describe(task)
        if options.keep_hlo:
            name = f"{where}-{strategy}".replace(":", "-").replace(" ", "-")
            task = dataclasses.replace(task, hlo=(out / f"{name}.hlo.txt").absolute())
        print(f"sharding {number}/{len(grid)}  {where}  {strategy}  compiling", file=sys.stderr, flush=True)
        began = time.monotonic()
        row = about | compile_row(task)
        print(f"sharding {number}/{len(grid)}  {_line(row)}  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        report["rows"].append(row)
        report["rows"].sort(key=_order)
        write(report, out)
    return report


def make_task(config: Config, where: topology.Topology, strategy: str, options: Options) -> Task:
    mesh = mesh_for(config.mesh, strategy, where.slices, options.chosen)
    rows = options.batch_per_chip * where.chips or config.data.batch_size
    data = dataclasses.replace(config.data, batch_size=rows)
    chosen = {"data", "fsdp"} & options.chosen
    return Task(dataclasses.replace(config, mesh=mesh, data=data), where, replicas=mesh.fsdp == -1 and not chosen)


def mesh_for(mesh: MeshConfig, strategy: str, slices: int, chosen: frozenset[str]) -> MeshConfig:
    """`mesh` with sizes that suit the strategy, but for the fields that the user has chosen.

    Parameters over all chips of a slice (fsdp), whole replicas in each slice (data); pairs of neighbours for tensors or
    sequences: with an MLP of three times the width more than two or three chips spend their time exchanging
    (scaling-book, "training").
    """
    sizes = {"data": slices, "fsdp": -1, "sequence": 1, "tensor": 1, "slices": slices}
    if strategy.removeprefix("hybrid_") == "dp":
        sizes |= {"data": -1, "fsdp": 1}
    elif strategy.endswith("fsdp_tp"):
        sizes["tensor"] = 2
    elif strategy.endswith("fsdp_sp"):
        sizes["sequence"] = 2
    free = {name: size for name, size in sizes.items() if name not in chosen}
    if "fsdp" not in chosen and "data" in chosen and mesh.data == -1:
        free["fsdp"] = 1
    return dataclasses.replace(mesh, strategy=strategy, **free)


def describe(task: Task) -> Row:
    """What a row says before anything is compiled."""
    config, where = task.config, task.topology
    return {
        "topology": str(where),
        "chip": where.chip.name,
        "chips": where.chips,
        "devices": where.devices,
        "slices": where.slices,
        "strategy": config.mesh.strategy,
        "batch_size": config.data.batch_size,
        "batch_per_chip": config.data.batch_size / where.chips,
        "max_length": config.data.max_length,
    }


def _order(row: Row) -> tuple[Any, ...]:
    """The best first: what fits before what does not, the most examples a second and chip within a topology."""
    return row["topology"], row["status"] != FITS, -row.get("examples_per_s_per_chip", 0.0)


def versions() -> dict[str, str]:
    from importlib import metadata

    found: dict[str, str] = {}
    for name in ("jax", "libtpu", "blip3o_jax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(report: dict[str, Any], out: pathlib.Path) -> None:
    text = json.dumps(report, indent=1)
    (out / "sharding.json").write_text(text + "\n", encoding="utf-8")
    (out / "sharding.html").write_text(page.render(report), encoding="utf-8")


def _line(row: Row) -> str:
    text = f"{row['topology']}  {row['strategy']}  {row['status']}"
    if row["status"] != FITS:
        return f"{text}: {row['error']}"
    return (
        f"{text}  {row['memory']['total'] / GIB:.1f} GiB  predicted {row['step_s']:.3f} s a step, MFU {row['mfu']:.1%}, "
        f"limited by {row['limiter']}"
    )


def print_report(report: dict[str, Any]) -> None:
    """A table, the best strategy of each topology first."""
    table = Table(box=None, pad_edge=False)
    for name, side in COLUMNS.items():
        table.add_column(name, justify=side, no_wrap=side == "right")
    for row in report["rows"]:
        table.add_row(*_cells(row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for row in report["rows"]:
        if row["status"] != FITS:
            console.print(f"{row['topology']} {row['strategy']} {row['status']}: {row['error']}", soft_wrap=True, markup=False)
    console.print("Times are predicted from the compiled program, not measured.")


COLUMNS = {
    "topology": "left",
    "strategy": "left",
    "batch/chip": "right",
    "GiB/device": "right",
    "step s": "right",
    "MFU": "right",
    "limiter": "left",
    "exposed": "right",
    "ex/s/chip": "right",
    "compile s": "right",
    "unknown": "right",
}


def _cells(row: Row) -> Iterator[str]:
    start = (row["topology"], row["strategy"], f"{row['batch_per_chip']:g}")
    if row["status"] != FITS:
        return iter((*start, row["status"]))
    exposed = sum(c["exposed"] for c in row["collectives"]) / row["step_s"]
    return iter(
        (
            *start,
            f"{row['memory']['total'] / GIB:.1f}",
            f"{row['step_s']:.3f}",
            f"{row['mfu']:.1%}",
            row["limiter"],
            f"{exposed:.1%}",
            f"{row['examples_per_s_per_chip']:.2f}",
            f"{row['compile_s']:.0f}",
            f"{row['unknown_share']:.1%}",
        )
    )
