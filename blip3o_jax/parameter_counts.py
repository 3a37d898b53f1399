"""Count the parameters of a configuration's parts, without allocating them."""

import math

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from blip3o_jax.blip3o import Blip3o, path_name
from blip3o_jax.config import Config
from blip3o_jax.train.freezing import trainable_filter
from blip3o_jax.train.stages import stage_parts


def count_parameters(config: Config) -> dict[str, dict[str, int]]:
    """Return {part: {"parameters": n, "padding": n, "trainable": n}} of the stage's model.

    "padding" counts the parameters of the vocabulary tables' padding rows, which the other numbers
    exclude.
    """
    cfg = config.model
    trainable = trainable_filter(config)
    model = nnx.eval_shape(lambda: Blip3o(cfg, stage_parts(config), seed=0))
    padding_rows = cfg.ar.padded_vocab_size - cfg.ar.vocab_size
    counts: dict[str, dict[str, int]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        row = counts.setdefault(str(path[0]), {"parameters": 0, "padding": 0, "trainable": 0})
        padding = 0
        if path[0] == "ar" and "vocab" in variable.axes:
            padding = padding_rows * math.prod(variable.shape) // cfg.ar.padded_vocab_size
        size = math.prod(variable.shape) - padding
        row["parameters"] += size
        row["padding"] += padding
        row["trainable"] += size if trainable(path_name(path)) else 0
    return counts


def print_table(config: Config, note: str = "") -> None:
    """Print the parameter table of the stage's model, and `note` below, to standard output."""
    with jax.default_device(jax.devices("cpu")[0]):
        counts = count_parameters(config)
    table = Table(title=f"Parameters, stage {config.stage}")
    table.add_column("part")
    for name in ("parameters", "trainable", "padded rows"):
        table.add_column(name, justify="right")
    total = {"parameters": 0, "padding": 0, "trainable": 0}
    for part, row in counts.items():
        table.add_row(part, *(f"{row[k]:,}" for k in ("parameters", "trainable", "padding")))
        total = {k: total[k] + row[k] for k in total}
    table.add_section()
    table.add_row("total", *(f"{total[k]:,}" for k in ("parameters", "trainable", "padding")))
    Console().print(table)
    if note:
        print(note)
