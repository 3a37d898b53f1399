"""Compile a step for each requested topology and strategy, without a TPU, and compare them: `blip3o
bench sharding`.

Each combination is compiled by the TPU compiler in a separate process (compiled_step.py), which
decides whether the program fits, and a cost model walks the program (bench/cost): times are
predictions, never measurements. With `Options.measure` the same is done on the devices of this
machine, which also run the program, and both times are shown.
"""

import dataclasses
import itertools
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from blip3o_jax import files
from blip3o_jax.bench.isolated_process import Row
from blip3o_jax.bench.sharding import largest_batch, measure, page, table, topology
from blip3o_jax.bench.sharding.compiled_step import FITS, STEPS, TOO_LARGE, Task, compile_isolated
from blip3o_jax.bench.sharding.measure import LocalDevices
from blip3o_jax.bench.sharding.table import GIB
from blip3o_jax.config import Config, MeshConfig, UserError, check, check_choice
from blip3o_jax.data.token_lengths import assumed_row_length
from blip3o_jax.provenance import provenance
from blip3o_jax.train.vocabulary import expected_vocabulary

STRATEGIES = ("fsdp", "fsdp_tp", "fsdp_sp", "dp")
NAMES = {"train": "step", "rollout": "rollout"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Hold the options of the grid. `chosen`: the fields of config.mesh that the user has set; the
    others are open for each strategy. `measure`: how many steps to run on the devices of this
    machine, in place of topologies."""

    topologies: tuple[str, ...] = ()
    strategies: tuple[str, ...] = STRATEGIES
    slices: int = 1
    batch_per_chip: int | None = None  # None: the config's global batch
    largest_batch: bool = False
    step: str = "train"
    measure: int = 0
    chosen: frozenset[str] = frozenset()
    keep_hlo: bool = False
    schedules: bool = True  # see Task

    def __post_init__(self) -> None:
        check_choice("--step", self.step, STEPS)
        if self.measure:
            check(
                not self.topologies,
                "--measure runs on the devices that are here: leave --topology out",
            )
            check(
                self.slices == 1,
                f"--slices={self.slices} is about a --topology: leave it out with --measure",
            )
            check(
                not self.largest_batch,
                "--batch_per_chip=max needs the TPU compiler: give a number, or a "
                "--topology in place of --measure",
            )
        else:
            check(
                bool(self.topologies),
                "--topology names no topology: --topology=v5p:4x4x4, or --measure for what is here",
            )
        check(
            bool(self.strategies),
            f"--strategy names no strategy: --strategy={','.join(STRATEGIES)}",
        )
        batch = self.batch_per_chip
        check(batch is None or batch > 0, f"--batch_per_chip={batch} must be positive, or max")


def bench(
    config: Config,
    out: pathlib.Path,
    options: Options,
    command: str,
    compile_row: Callable[[Task], Row] = compile_isolated,
) -> dict[str, Any]:
    """Run the grid; write OUT/sharding.json after each row and OUT/sharding.html; return the
    report.

    UserError for an unknown topology or a missing compiler; an error of one combination goes into
    its row.
    """
    check(
        options.step != "rollout" or config.stage == "joint",
        "--step=rollout samples images, as stage 'joint' learns to: the config's stage is "
        f"{config.stage!r}",
    )
    from blip3o_jax.parallel import rules

    for name in options.strategies:
        check_choice("--strategy", name, rules.STRATEGIES)
        single_slice = name.removeprefix("hybrid").removeprefix("_") or "fsdp"
        check(
            options.slices > 1 or not name.startswith("hybrid"),
            f"--strategy={name} is for several slices: add --slices=2, or use {single_slice}",
        )
    check(
        "strategy" not in options.chosen, "--config.mesh.strategy is not read here: use --strategy"
    )
    targets: list[topology.Topology | LocalDevices] = [
        topology.parse(text, options.slices) for text in options.topologies
    ]
    if options.measure:
        targets = [measure.find_devices(config.mesh)]
    else:
        topology.check_compiler()
    config, _ = expected_vocabulary(config)
    if not config.data.max_length:
        # By the data in a run, of which there are none here.
        length = assumed_row_length(config.model)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, max_length=length)
        )
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        **provenance(command),
        "step": options.step,
        "measured_steps": options.measure,
        "chip": dataclasses.asdict(targets[0].chip) if options.measure else None,
        "rows": [],
    }
    grid = list(itertools.product(targets, options.strategies))
    for number, (where, strategy) in enumerate(grid, 1):
        task = make_task(config, where, strategy, options)
        about = describe(task)
        if options.keep_hlo:
            name = re.sub(r"[^\w.]+", "-", f"{where}-{strategy}")
            task = dataclasses.replace(task, hlo=(out / f"{name}.hlo.txt").absolute())
        began = time.monotonic()

        def log(text: str, at: str = f"sharding {number}/{len(grid)}  {where}  {strategy}") -> None:
            print(f"{at}  {text}", file=sys.stderr, flush=True)

        if options.largest_batch:
            row = about | largest_batch.largest(task, compile_row, log)
        else:
            log("compiling")
            row = about | compile_row(task)
        log(f"{_line(row)}  {time.monotonic() - began:.0f} s")
        report["rows"].append(row)
        report["rows"].sort(key=_order)
        write(report, out)
    return report


def make_task(
    config: Config, where: topology.Topology | LocalDevices, strategy: str, options: Options
) -> Task:
    """Return the compilation of one combination, with its mesh and batch."""
    # What is not set of the mesh is chosen as in training (parallel/planner.py).
    fields: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(MeshConfig)
        if field.name not in options.chosen | {"parts", "cpu_devices"}
    }
    mesh = dataclasses.replace(
        config.mesh, **fields | {"strategy": strategy, "slices": where.slices}
    )
    task = Task(
        dataclasses.replace(config, mesh=mesh),
        where,
        step=options.step,
        measure=options.measure,
        schedules=options.schedules,
    )
    if options.batch_per_chip:
        return largest_batch.with_batch(task, options.batch_per_chip * where.chips)
    if options.step == "train":
        return task
    # Every device needs a prompt, so their number is padded up, as in sampling.
    one = largest_batch.unit(task)
    return largest_batch.with_batch(task, -(-config.sampling.batch_size // one) * one)


def describe(task: Task) -> Row:
    """Return what a row states before anything is compiled."""
    config, where = task.config, task.topology
    return {
        "topology": str(where),
        "chip": where.chip.name,
        "chips": where.chips,
        "devices": where.devices,
        "slices": where.slices,
        "strategy": config.mesh.strategy,
        "step": task.step,
    } | (
        {
            "batch_size": config.data.batch_size,
            "batch_per_chip": config.data.batch_size / where.chips,
            "max_length": config.data.max_length,
        }
        if task.step == "train"
        else {
            "batch_size": config.sampling.batch_size,
            "batch_per_chip": config.sampling.batch_size / where.chips,
            "image_tokens": config.model.tokenizer.num_tokens,
            "denoising_steps": config.sampling.steps,
        }
    )


def _order(row: Row) -> tuple[Any, ...]:
    """Return the sort key: what fits before what does not, the most examples a second and chip
    within a topology.
    """
    return row["topology"], row["status"] != FITS, -table.rate(row)


def write(report: dict[str, Any], out: pathlib.Path) -> None:
    """Write sharding.json and sharding.html."""
    files.write_json(out / "sharding.json", report)
    files.replace_text(out / "sharding.html", page.render(report))


def _line(row: Row) -> str:
    text = row["status"]
    if row["status"] != FITS:
        return f"{text}: {row['error']}"
    measured = (
        f", measured {table.seconds(row['measured']['median_s'])} s" if "measured" in row else ""
    )
    return (
        f"{text}  {row['memory']['total'] / GIB:.1f} GiB  predicted {table.seconds(row['step_s'])} "
        f"s a {NAMES[row['step']]}"
        f"{measured}, MFU {row.get('measured', row)['mfu']:.1%}, limited by {row['limiter']}"
    )


def check_any(report: dict[str, Any]) -> None:
    """Raise UserError where no row was compiled."""
    if not any(row["status"] in (FITS, TOO_LARGE) for row in report["rows"]):
        raise UserError(
            "bench sharding: nothing could be compiled; the first row says: "
            f"{report['rows'][0]['error']}"
        )


def print_report(report: dict[str, Any]) -> None:
    """Print a table, the best strategy of each topology first."""
    start, rest = (
        [c for c in group if not c.page_only] for group in (table.START, table.columns(report))
    )
    printed = Table(box=None, pad_edge=False)
    for column in (*start, *rest):
        printed.add_column(
            column.name, justify="left" if column.left else "right", no_wrap=not column.left
        )
    for row in report["rows"]:
        shown = (*start, *rest) if row["status"] == FITS else start
        printed.add_row(
            *(column.value(row)[0] for column in shown), *[row["status"]] * (row["status"] != FITS)
        )
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(printed)
    for row in report["rows"]:
        name = f"{row['topology']} {row['strategy']}"
        if row["status"] != FITS:
            console.print(f"{name} {row['status']}: {row['error']}", soft_wrap=True, markup=False)
        if "tried" in row:
            tried = "; ".join(map(largest_batch.outcome, row["tried"]))
            console.print(f"{name} tried: {tried}", soft_wrap=True, markup=False, highlight=False)
    console.print(table.how(report), soft_wrap=True, markup=False, highlight=False)
