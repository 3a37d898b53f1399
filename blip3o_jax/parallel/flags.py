"""Recommended environment of each chip kind, with reason and source: the one place for XLA flags.

    eval "$(python3 blip3o_jax/parallel/flags.py v5p)"       sets it; variables and flags that are
                                                             set already take precedence
    python3 blip3o_jax/parallel/flags.py --explain           prints the table

The script needs only Python's standard library. TPU flags go into LIBTPU_INIT_ARGS, which libtpu
reads: the XLA in jaxlib rejects them in XLA_FLAGS. Settings whose source says "measured" were
measured with this package; the others are taken from their source and were not measured.
"""

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Mapping

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = ("h100", "h200")
CHIPS = ("cpu", *TPUS, *GPUS)
LISTS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables that hold several flags
MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py"
TOOLBOX = "https://docs.nvidia.com/jax-toolbox/environment-variables"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Describe one environment variable, or one flag in a variable of LISTS."""

    chips: tuple[str, ...]
    variable: str
    value: str
    reason: str
    source: str
    # The version of libtpu from which on the compiler refuses the flag; empty: none does.
    refused_from: tuple[int, ...] = ()


SETTINGS = (
    Setting(
        ("cpu",),
        "XLA_FLAGS",
        "--xla_cpu_experimental_ynn_fusion_type=",
        "XLA 0.10 hands dots and convolutions to YNNPACK; with XLA's own the autoencoder decodes"
        " 1.2 to 1.4 times as fast and a train step is no slower; image tokens take 1.15 times as"
        " long",
        "measured: four images of 320 pixels, a 55M-parameter model, jax 0.10.2, two cores",
    ),
    *(
        Setting(
            TPUS,
            "LIBTPU_INIT_ARGS",
            flag,
            "fsdp gathers parameters layer by layer: the gathers overlap the layer before",
            f"{MAXTEXT}, CF_FOR_ALL_GATHER (on by default, to be sure)",
        )
        for flag in (
            "--xla_enable_async_all_gather=true",
            "--xla_tpu_overlap_compute_collective_tc=true",
            "--xla_tpu_enable_async_collective_fusion=true",
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        )
    ),
    *(
        Setting(
            chips,
            "LIBTPU_INIT_ARGS",
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
            "the same; jax 0.11 and later come with a libtpu that supports it on v5e alone, and"
            " refuses to compile for other chips with it",
            f"{MAXTEXT}, CF_FOR_ALL_GATHER; the refusal is libtpu 0.0.48's and 0.0.50's",
            refused_from,
        )
        for chips, refused_from in ((("v5e",), ()), (("v4", "v5p", "v6e", "tpu7x"), (0, 0, 43)))
    ),
    *(
        Setting(
            TPUS,
            "LIBTPU_INIT_ARGS",
            flag,
            "several slices: the sum of gradients over the data centre's network is spread over the"
            " backward pass",
            f"{MAXTEXT}, DATA_PARALLEL_OVERLAP",
        )
        for flag in (
            "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
            "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        )
    ),
    Setting(
        TPUS,
        "LIBTPU_INIT_ARGS",
        "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
        "no products in windows, over shards that go round the chips: for the 1.7B model on 8 chips"
        " of v5p the compiler makes them, and a step was predicted to take 0.78 s with and 0.43 s"
        " without",
        f"{MAXTEXT}, used there for v6e; the prediction is of `blip3o bench sharding`",
    ),
    *(
        Setting(
            chips,
            "LIBTPU_INIT_ARGS",
            f"--xla_tpu_scoped_vmem_limit_kib={kib}",
            reason,
            f"{MAXTEXT}, DENSE_VMEM_LIMIT_FLAG, used there for v6e; what is said of cycles is of"
            " `blip3o bench sharding`",
        )
        for chips, kib, reason in (
            (
                ("v5e", "v6e"),
                98304,
                (
                    "larger tiles of matrix products: three quarters of a core's VMEM instead of 16"
                    " MiB; in the compiler's schedules for v6e an MLP's products take 18 % fewer"
                    " cycles (with 24 MiB 13 %, at a third of the compile time)"
                ),
            ),
            (
                ("v5p", "tpu7x"),
                24576,
                (
                    "somewhat larger tiles of matrix products than with 16 MiB; by the compiler's"
                    " schedules for v5p this model's train step is as fast as with three quarters"
                    " of a core's VMEM, and it compiles in two thirds of the time"
                ),
            ),
        )
    ),
    Setting(
        GPUS,
        "XLA_FLAGS",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "collectives are scheduled to overlap compute",
        TOOLBOX,
    ),
    Setting(
        GPUS,
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.9",
        "JAX takes 75 % of the memory otherwise; some is left to NCCL and cuDNN",
        "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance",
    ),
)


def exports(chip: str) -> str:
    """Return shell lines that set the environment of `chip`, for `eval`."""
    lines = []
    for variable, value in _values(chip).items():
        # The last of two equal flags wins.
        value = f"{value} ${{{variable}:-}}" if variable in LISTS else f"${{{variable}:-{value}}}"
        lines.append(f'export {variable}="{value}"')
    return "\n".join(lines)


def environment(chip: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return what `exports` would set in the environment `given`, for processes that are started
    from Python.
    """
    return {
        variable: f"{value} {given.get(variable, '')}".strip()
        if variable in LISTS
        else given.get(variable) or value
        for variable, value in _values(chip).items()
    }


def _libtpu() -> tuple[int, ...]:
    """Return the version of the installed libtpu; without one, a version after all others, so that
    flags that any version refuses are left out.
    """
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return (sys.maxsize,)
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _values(chip: str) -> dict[str, str]:
    values: dict[str, list[str]] = {}
    for setting in SETTINGS:
        refused = setting.refused_from and _libtpu() >= setting.refused_from
        if chip in setting.chips and not refused:
            values.setdefault(setting.variable, []).append(setting.value)
    return {
        variable: " ".join(parts) if variable in LISTS else parts[0]
        for variable, parts in values.items()
    }


def explain() -> str:
    blocks = (
        f"{' '.join(s.chips)}\n  {s.variable}: {s.value}\n  why: {s.reason}\n  source: {s.source}"
        for s in SETTINGS
    )
    return "\n".join(blocks)


def main(argv: list[str]) -> int:
    if argv == ["--explain"]:
        print(explain())
        return 0
    if len(argv) == 1 and argv[0] in CHIPS:
        print(exports(argv[0]))
        return 0
    print(f"flags.py: give one of {', '.join(CHIPS)}, or --explain", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
