"""Compare the cost model with published training steps of decoder-only language models: `blip3o
bench anchors`.

Each anchor (published_steps.py) is a step with a published time on TPUs: this package's AR network
is given its sizes and compiled for the same chips, mesh and batch with a loss of text alone, and
the predicted time is compared with the published one. The cost model is not fitted to the anchors.
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
from blip3o_jax.bench.sharding.published_steps import ANCHORS, Anchor
from blip3o_jax.config import (
    Config,
    DataConfig,
    DcAeConfig,
    LossConfig,
    ModelConfig,
    SanaConfig,
    SiglipVisionConfig,
    TaTokConfig,
    TaTokDecoderConfig,
    check_choice,
)
from blip3o_jax.provenance import provenance


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
