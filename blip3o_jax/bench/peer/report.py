"""Report what `bench peer` measured: as JSON, as a table on the terminal and as one in Markdown."""

import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from blip3o_jax import files
from blip3o_jax.parallel.chips import chip_of

WIDTH = 150  # of a row; a terminal that is narrower breaks the lines
COLUMNS = (
    "item",
    "JAX",
    "PyTorch eager",
    "PyTorch compiled",
    "ratio to eager",
    "to compiled",
    "faster",
    "peak GB",
    "difference",
)


def summary(seconds: list[float], peak: int | None, start: Mapping[str, Any]) -> dict[str, Any]:
    """Summarize one side and item. `first_s` is the first call, compiling included; `build_s` the
    time to read the weights."""
    low, median, high = (float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return {
        "median_s": median,
        "quartiles_s": [low, high],
        "spread": (high - low) / median,
        "repetitions": len(seconds),
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "build_s": start["build_s"],
        "first_s": start["first_s"],
    }


def with_rates(item: dict[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the item with rates, ratios (JAX's median over another side's: below 1, JAX is faster)
    and fractions of device peaks.
    """
    sides = item["sides"]
    cost = item.pop("cost")
    count = item["work"]["count"]
    for name, side in sides.items():
        kind = about[name]["device_kind"]
        side["rate"] = count / side["median_s"]
        side["gflops"] = cost["flops"] / side["median_s"] / 1e9 if "flops" in cost else None
        side["fraction_of_peak"] = _fraction_of_peak(kind, cost, side["median_s"])
    ours = sides["jax"]["median_s"]
    ratios = {name: ours / side["median_s"] for name, side in sides.items() if name != "jax"}
    return item | {
        "cost": cost,
        "ratio": ratios,
        "faster": min(sides, key=lambda name: sides[name]["median_s"]),
    }


def _fraction_of_peak(
    kind: str, cost: Mapping[str, float], seconds: float
) -> dict[str, float] | None:
    """Return the time at the device's peak over the time taken, for arithmetic and for memory; None
    where no peak is known.
    """
    chip, found = chip_of(kind), {}
    if chip:
        for limit, name, peak in (
            ("arithmetic", "flops", chip.flops),
            ("memory", "bytes", chip.hbm_rate),
        ):
            if name in cost:
                found[limit] = cost[name] / peak / seconds
    return found or None


def machine() -> dict[str, Any]:
    """Return what the comparison ran on."""
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    except OSError:
        pass
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "load_before": load,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def sizes(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the parameters of each part, and in all."""
    found = {
        part: sum(int(np.prod(t.shape)) for t in given.values()) for part, given in tensors.items()
    }
    return found | {"total": sum(found.values())}


def write(report: dict[str, Any], out: pathlib.Path) -> None:
    """Write the report as JSON and as Markdown."""
    files.write_json(out / "peer.json", report)
    files.replace_text(out / "peer.md", markdown(report))


def print_report(report: dict[str, Any]) -> None:
    """Print the table and its conditions on standard output."""
    console = Console()
    console.width = max(console.width, WIDTH)
    table = Table(title=f"JAX and PyTorch, {report['options']['device']}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("item", "faster") else "right")
    for item in report["items"]:
        table.add_row(*_cells(item))
    console.print(table)
    for line in _conditions(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page in Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(item) for item in report["items"])]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    conditions = "\n".join(f"- {line}" for line in _conditions(report))
    title = f"# JAX and PyTorch, {report['options']['device']}"
    return f"{title}\n\n```\n{report['command']}\n```\n\n{table}\n\n{conditions}\n"


def _cells(item: Mapping[str, Any]) -> list[str]:
    sides, ratio = item["sides"], item["ratio"]

    def timing(name: str) -> str:
        if name not in sides:
            return "does not compile" if name in item["failed"] else "-"
        side = sides[name]
        share = "".join(
            f", {100 * part:.0f} % of {limit}"
            for limit, part in (side["fraction_of_peak"] or {}).items()
        )
        return f"{_time(side['median_s'])} +-{50 * side['spread']:.0f} %{share}"

    times = lambda name: f"{ratio[name]:.2f}" if name in ratio else "-"
    memory = " / ".join(
        "-" if s["peak_memory_bytes"] is None else f"{s['peak_memory_bytes'] / 1e9:.2f}"
        for s in sides.values()
    )
    difference = f"{max(item['difference'].values()):.1e}" if item["difference"] else "-"
    faster = {"jax": "JAX", "torch": "PyTorch eager", "torch_compiled": "PyTorch compiled"}[
        item["faster"]
    ]
    columns = [timing(name) for name in ("jax", "torch", "torch_compiled")]
    return [
        item["item"],
        *columns,
        times("torch"),
        times("torch_compiled"),
        faster,
        memory,
        difference,
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _conditions(report: Mapping[str, Any]) -> list[str]:
    machine = report["machine"]
    options = report["options"]
    sides = report["sides"]
    versions = dict(report["versions"])
    for side in sides.values():
        versions |= side["versions"]
    kinds = sorted({side["device_kind"] for side in sides.values()})
    precision = "float32" if options["device"] == "cpu" else "bfloat16"
    sampling, environment = report["sampling"], sides["jax"]["environment"]
    parts = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in report["model"].items())
    return [
        f"{report['date']}; {machine['cpu']}, {machine['cores']} cores, device {', '.join(kinds)}; "
        "load before: "
        f"{machine['load_before']:.2f}",
        f"{options['threads']} threads for each side, {sides['jax']['devices']} JAX device(s); "
        f"{precision}; batch of "
        f"{options['batch_size']}; {options['rounds']} rounds in turns",
        "; ".join(f"{name} {version}" for name, version in versions.items()),
        f"parameters: {parts}",
        f"sampling: top-k {sampling['top_k']}, top-p {sampling['top_p']}, {sampling['steps']} "
        "denoising steps, guidance "
        f"{sampling['guidance']}",
        *(
            ["environment of all sides: " + " ".join(f"{n}={v}" for n, v in environment.items())]
            if environment
            else []
        ),
        "time: median of the repetitions +- half the interquartile range, without compilation and "
        "without the first repetition of a turn; ratio: JAX's time / PyTorch's, below 1 JAX is "
        "faster",
        "train_step trains from cached codes and latents, train_step_online includes the encoders; "
        "ar_decode samples all image tokens of a batch, dit_step is one denoising step",
        "difference: relative difference of the outputs for the same inputs; for token ids the "
        "fraction that differs; for train steps that of the losses of the first three steps",
        "peak memory: JAX / PyTorch eager / compiled, without the memory of the libraries"
        if options["device"] == "cpu"
        else "peak memory: JAX / PyTorch eager / compiled, as the device's allocators count it",
        *(
            f"{item['item']} does not compile in PyTorch: {why}"
            for item in report["items"]
            for why in item["failed"].values()
        ),
    ]
