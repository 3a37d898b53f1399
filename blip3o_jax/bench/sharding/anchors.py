"""Compare the cost model with published training steps of decoder-only language models: `blip3o
bench anchors`.

Each anchor is a step with a published time on TPUs: this package's AR network is given its sizes
and compiled for the same chips, mesh and batch with a loss of text alone, and the predicted time is
compared with the published one. The cost model is not fitted to the anchors.

Differences from all published runs: MaxText's networks have other blocks. A MaxText block that runs
attention and a two-matrix MLP in parallel is here attention, then an MLP of three matrices of two
thirds the width, with as many parameters and FLOPs; queries and keys have a norm for each head
here; attention blocks are of 512 instead of 1024 or 2048. Each anchor names its further
differences.
"""

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from blip3o_jax import files
from blip3o_jax.bench.isolated_process import Row
from blip3o_jax.bench.sharding import topology
from blip3o_jax.bench.sharding.compiled_step import FITS, Task, compile_isolated
from blip3o_jax.config import (
    Config,
    DataConfig,
    DcAeConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    Qwen3Config,
    SanaConfig,
    SiglipVisionConfig,
    TaTokConfig,
    TaTokDecoderConfig,
    check_choice,
)
from blip3o_jax.provenance import provenance

V5E = "AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v5e/README.md"
V5P = "AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v5p/README.md"
TRILLIUM = "AI-Hypercomputer/tpu-recipes training/trillium"
IRONWOOD = "AI-Hypercomputer/tpu-recipes training/ironwood/README.md"
TIERS = "maxtext.readthedocs.io reference/models/tiering"

# The compiler's flags of the published runs, as their scripts set them. Left out: what hands
# collectives to the sparse cores, and the scheduler's flags of offloading, with which this compiler
# takes more than ten times as long.
GATHERS = (
    "--xla_enable_async_all_gather=true --xla_tpu_overlap_compute_collective_tc=true"
    " --xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
    " --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
)
V5E_FLAGS = (
    f"{GATHERS} --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    " --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
V5P_FLAGS = (
    f"{V5E_FLAGS} --xla_tpu_megacore_fusion_allow_ags=false "
    "--xla_enable_async_collective_permute=true"
    " --xla_tpu_enable_ag_backward_pipelining=true"
)
V6E_FLAGS = (
    f"{V5E_FLAGS} --xla_tpu_scoped_vmem_limit_kib=98304 "
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true"
    " --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 "
    "--xla_tpu_assign_all_reduce_scatter_layout=true"
    " --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
)
TPU7X_FLAGS = "--xla_tpu_scoped_vmem_limit_kib=61440 --xla_tpu_bf16_emission_mode=NATIVE_EMISSION"


@dataclasses.dataclass(frozen=True)
class Anchor:
    """Describe a published step with `rows` of `length` tokens a device; `seconds` as published, or
    computed from the published FLOP/s and FLOPs."""

    name: str
    topology: str
    ar: Qwen3Config
    rows: int
    length: int
    seconds: float
    source: str
    differs: str = ""  # from the published run, in addition to the module's list
    mesh: MeshConfig = MeshConfig()
    keep: str = (
        ""  # what the backward pass keeps where none of nn.REMAT_POLICIES says it, a name of KEEP
    )
    flags: str = ""  # the compiler's, in place of the launchers'


def _maxtext(layers: int, width: int, mlp: int, heads: int, **other: Any) -> Qwen3Config:
    """Return sizes of MaxText's own family of December 2023: heads of 256, an MLP of two matrices
    in parallel with attention, 32768 tokens, tied embeddings."""
    return Qwen3Config(
        vocab_size=32768,
        num_hidden_layers=layers,
        hidden_size=width,
        # Of 32768 that is 21504: two thirds, 21845, down to a product of small factors, for 172
        # tiles of 128 do not go into the compiler's windows and would cost a third more. The step
        # has 1 % fewer FLOPs for it.
        intermediate_size=mlp * 21 // 32,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=256,
        tie_word_embeddings=True,
        **other,
    )


def _llama(
    layers: int, width: int, mlp: int, heads: int, vocabulary: int, **other: Any
) -> Qwen3Config:
    """Return sizes of Llama 3.1, Mistral 7B and Llama 2 70B: eight key/value heads of 128, SwiGLU,
    an untied head."""
    return Qwen3Config(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        **other,
    )


LLAMA_8B = functools.partial(_llama, 32, 4096, 14336, 32, 128256)
LLAMA_70B = functools.partial(_llama, 80, 8192, 28672, 64)
OFFLOADED = (
    "layer inputs stay on the device, where the recipe offloads them with the attention's products"
)

ANCHORS = (
    Anchor(
        "32b-v5p-64",
        "v5p:4x4x4",
        _maxtext(32, 10240, 32768, 32, remat="dots"),
        rows=6,
        length=2048,
        seconds=7.44,
        source=f"{V5P}: 328 TFLOP/s a chip; 32b.sh has a batch of 6 a chip (8 in December 2023)",
        flags=V5P_FLAGS,
        differs="FSDP over all chips, not 16 x TP 4, whose activations would not fit: tensor "
        "parallelism here leaves the stream between layers whole on each device",
    ),
    Anchor(
        "16b-v5e-256",
        "v5e:16x16",
        _maxtext(32, 5120, 32768, 32),
        rows=6,
        length=2048,
        seconds=10.33,
        source=f"{V5E}: 120 TFLOP/s a chip",
        flags=V5E_FLAGS,
    ),
    Anchor(
        "32b-v5e-256",
        "v5e:16x16",
        _maxtext(32, 10240, 32768, 32),
        rows=4,
        length=2048,
        seconds=12.32,
        source=f"{V5E}: 132 TFLOP/s a chip",
        flags=V5E_FLAGS,
    ),
    Anchor(
        "64b-v5e-256",
        "v5e:16x16",
        _maxtext(64, 10240, 32768, 32),
        rows=2,
        length=2048,
        seconds=13.71,
        source=f"{V5E}: 118 TFLOP/s a chip",
        flags=V5E_FLAGS,
    ),
    Anchor(
        "llama2-70b-v5p-256",
        "v5p:4x8x8",
        LLAMA_70B(32000),
        rows=4,
        length=4096,
        seconds=23.68,
        source=f"{TIERS}: 692 tokens/s a chip; the recipe's script is for v5p-512, which is 256 "
        "chips",
        keep="narrow products",
        flags=V5P_FLAGS,
    ),
    Anchor(
        "llama3.1-8b-v6e-8",
        "v6e:2x4",
        LLAMA_8B(remat="offload"),
        rows=3,
        length=8192,
        seconds=3.443,
        source=f"{TRILLIUM}/Llama3.1-8B-MaxText/v6e-8",
        keep="narrow products on the host",
        flags=V6E_FLAGS,
        differs=OFFLOADED,
    ),
    Anchor(
        "llama3.1-8b-v6e-256",
        "v6e:16x16",
        LLAMA_8B(remat="offload"),
        rows=4,
        length=8192,
        seconds=4.546,
        source=f"{TRILLIUM}/Llama3.1-8B-MaxText/v6e-256",
        keep="narrow products on the host",
        flags=V6E_FLAGS,
        differs=OFFLOADED,
    ),
    Anchor(
        "mistral-7b-v6e-8",
        "v6e:2x4",
        _llama(32, 4096, 14336, 32, 32000, remat="offload"),
        rows=6,
        length=8192,
        seconds=6.320,
        source=f"{TRILLIUM}/Mistral-7B-MaxText",
        keep="narrow products on the host",
        flags=V6E_FLAGS,
        differs=OFFLOADED,
    ),
    Anchor(
        "llama3.1-70b-tpu7x-64",
        "tpu7x:4x4x4",
        LLAMA_70B(128256),
        rows=2,
        length=8192,
        seconds=12.20,
        source=f"{IRONWOOD}: 64 chips, bf16",
        keep="attention",
        differs="the recipe keeps queries, keys and values too, which are computed again here: 2 % "
        "more FLOPs",
        flags=TPU7X_FLAGS,
    ),
)


def configuration(anchor: Anchor, devices: int) -> Config:
    """Return the step as a configuration. The parts that text does not use are present, tiny and
    idle."""
    model = ModelConfig(
        ar=anchor.ar,
        tokenizer=TaTokConfig(
            encoder=SiglipVisionConfig(64, 64, 2, 1, image_size=28),
            decoder=TaTokDecoderConfig(64, 64, 1, 1, num_patches=4),
            bottleneck_dim=64,
            codebook_size=64,
        ),
        dit=SanaConfig(
            num_layers=1,
            num_attention_heads=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=64,
        ),
        vae=DcAeConfig(
            encoder_block_out_channels=(64,) * 6,
            decoder_block_out_channels=(64,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
        ),
    )
    return Config(
        stage="joint",
        steps=1000,
        model=model,
        trainable=("ar/.*",),
        mesh=dataclasses.replace(
            anchor.mesh,
            parts=tuple((part, "dp") for part in ("tokenizer", "connector", "dit", "vae")),
        ),
        data=DataConfig(
            batch_size=anchor.rows * devices, max_length=anchor.length, cache_dir="none"
        ),
        loss=LossConfig(ce_chunk=2048),
    )


def text_loss(
    config: Config, image_token_offset: int, keep: str = "", mlp: int = 0
) -> Callable[..., Any]:
    """Make the cross entropy of the next token over whole rows, with the signature of
    `stages.make_loss`. `keep`, `mlp`: see `KEEP`."""
    import jax.numpy as jnp

    from blip3o_jax import nn
    from blip3o_jax.ar.cross_entropy import cross_entropy
    from blip3o_jax.train.joint_loss import joint_normalizers
    from blip3o_jax.train.stages import Loss

    if keep:  # a process compiles one anchor
        nn.REMAT_POLICIES[config.model.ar.remat] = _kept(keep, mlp)

    def loss(model: Any, batch: dict[str, Any], keys_B: Any) -> tuple[Any, dict[str, Any]]:
        hidden_BLD = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        with nn.part("ar"):
            ce_sum, right = cross_entropy(
                hidden_BLD,
                model.ar.head(),
                jnp.roll(batch["tokens"], -1, axis=1),
                batch["loss_mask"],
                vocab_size=config.model.ar.vocab_size,
                chunk=config.loss.ce_chunk,
            )
        labels = jnp.sum(batch["label_count"])
        return ce_sum / labels, {"accuracy": right / labels}

    return Loss(loss, joint_normalizers)


# What the backward pass keeps: MaxText lists products by name; here the shape of a layer's kernel
# says which it is. Those of attention's projections are narrow; those that have the MLP's width on
# either side are computed again. "attention": what the kernel returns, and no product.
KEEP = ("narrow products", "narrow products on the host", "attention")


def _kept(keep: str, mlp: int) -> Callable[..., Any]:
    """Return the policy for jax.checkpoint of this name in KEEP."""
    import jax

    from blip3o_jax import nn

    policies = jax.checkpoint_policies
    if keep == "attention":
        return policies.save_only_these_names(nn.ATTENTION)
    products = policies.dots_with_no_batch_dims_saveable
    if keep.endswith("on the host"):
        products = policies.offload_dot_with_no_batch_dims("device", "pinned_host")

    def narrow(primitive: Any, *inputs: Any, **params: Any) -> Any:
        wide = primitive.name == "dot_general" and mlp in inputs[1].shape
        return (
            policies.nothing_saveable(primitive) if wide else products(primitive, *inputs, **params)
        )

    return narrow


def task_of(anchor: Anchor, hlo: pathlib.Path | None = None) -> Task:
    """Return the compilation of an anchor."""
    where = topology.parse(anchor.topology)
    loss = functools.partial(text_loss, keep=anchor.keep, mlp=anchor.ar.intermediate_size)
    return Task(configuration(anchor, where.devices), where, hlo=hlo, loss=loss, flags=anchor.flags)


def describe(anchor: Anchor) -> Row:
    """Return the columns of a row that are known before compiling."""
    ar, mesh = anchor.ar, anchor.mesh
    sizes = (
        f"L {ar.num_hidden_layers}, D {ar.hidden_size}, F {ar.intermediate_size}, "
        f"H {ar.num_attention_heads}/{ar.num_key_value_heads} x {ar.head_dim}, V {ar.vocab_size}"
    )
    return {
        "anchor": anchor.name,
        "topology": anchor.topology,
        "sizes": sizes,
        "rows_per_device": anchor.rows,
        "length": anchor.length,
        "strategy": mesh.strategy,
        "remat": anchor.keep or ar.remat,
        "published_s": anchor.seconds,
        "source": anchor.source,
        "differs": anchor.differs,
    }


def bench(
    out: pathlib.Path,
    only: Iterable[str],
    command: str,
    *,
    keep_hlo: bool = False,
    compile_row: Callable[[Task], Row] = compile_isolated,
) -> dict[str, Any]:
    """Compile the anchors, those named in `only` or all; write OUT/anchors.json after each; return
    the report."""
    for name in (only := tuple(only)):
        check_choice("--only", name, (anchor.name for anchor in ANCHORS))
    topology.check_compiler()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        **provenance(command),
        "rows": [],
    }
    for anchor in ANCHORS:
        if only and anchor.name not in only:
            continue
        began = time.monotonic()
        row = describe(anchor) | compile_row(
            task_of(anchor, out / f"{anchor.name}.hlo.txt" if keep_hlo else None)
        )
        if row["status"] == FITS:
            row["error"] = row["step_s"] / anchor.seconds - 1
        report["rows"].append(row)
        report["median_error"] = median_error(report["rows"])
        files.write_json(out / "anchors.json", report)
        print(
            f"anchors  {anchor.name}  {row['status']}  {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return report


def median_error(rows: list[Row]) -> float | None:
    """Return the median of the absolute errors."""
    errors = [abs(row["error"]) for row in rows if row["status"] == FITS]
    return statistics.median(errors) if errors else None


def print_report(report: dict[str, Any]) -> None:
    """Print a table of the anchors."""
    table = Table(box=None, pad_edge=False)
    for name in (
        "anchor",
        "published s",
        "predicted s",
        "error",
        "MFU",
        "limiter",
        "GiB/device",
        "compile s",
    ):
        table.add_column(
            name, justify="left" if name in ("anchor", "limiter") else "right", no_wrap=True
        )
    for row in report["rows"]:
        published = f"{row['published_s']:.2f}"
        if row["status"] != FITS:
            table.add_row(row["anchor"], published, row["status"])
            continue
        table.add_row(
            row["anchor"],
            published,
            f"{row['step_s']:.2f}",
            f"{row['error']:+.1%}",
            f"{row['mfu']:.1%}",
            row["limiter"],
            f"{row['memory']['total'] / 2**30:.1f}",
            f"{row['compile_s']:.0f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for row in report["rows"]:
        if row["status"] != FITS:
            console.print(
                f"{row['anchor']} {row['status']}: {row['error']}", soft_wrap=True, markup=False
            )
    if report.get("median_error") is not None:
        console.print(
            f"Median error, without sign: {report['median_error']:.1%}. Predicted, not measured, "
            "from the compiled program."
        )
