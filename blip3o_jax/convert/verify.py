"""Compare a checkpoint with the PyTorch files it was imported from or exported to.

PyTorch's side is the stock classes, filled by PyTorch's own loaders (torch_files.py), so that an
error in reading files shows in the weights. The checkpoint's weights are read group by group
(mapping.py) and compared bit by bit. Outputs are compared too (compare.py): an error in the tables
that is the same in both directions leaves the weights equal and shows in the outputs.

A checkpoint with low-rank factors is compared with files of merged weights: the weights by the
merged sums in the files' dtype, the outputs with the factors unmerged.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax.config import Config, ModelConfig, UserError
from blip3o_jax.config.errors import install_command
from blip3o_jax.convert.conversions import prefix_of
from blip3o_jax.convert.mapping import Group, groups
from blip3o_jax.convert.merged import MergedWeights
from blip3o_jax.convert.progress import ByteProgress
from blip3o_jax.convert.report import Difference, PartReport, Report
from blip3o_jax.convert.source import TorchSource, open_source
from blip3o_jax.convert.stock_config import OWN_FIELDS
from blip3o_jax.convert.tables import CONVERTED_PARTS
from blip3o_jax.lora import base_config
from blip3o_jax.train.checkpoint import find, read_config

JOINT = ("ar", "connector", "dit")  # the parts that the joint losses use


def verify(
    torch_dir: pathlib.Path,
    checkpoint: pathlib.Path,
    *,
    diffusion: pathlib.Path | None = None,
    ta_tok: pathlib.Path | None = None,
    ta_tok_config: pathlib.Path | None = None,
    initialise: Iterable[str] = (),
    ema: bool = False,
    parts: Sequence[str] = (),
    seed: int = 0,
    variant: str = "",
) -> Report:
    """Compare `parts` (default: all), one at a time, then the joint losses.

    The joint losses are compared if AR, connector and DiT are among the parts. `diffusion`,
    `ta_tok`, `ta_tok_config`, `initialise` and `variant` are those of the import; parts that it
    initialised are not in the files and are not compared. Raises UserError when the two sides have
    different tensors, or PyTorch is not installed.
    """
    config_lib.check(seed >= 0, f"--seed={seed} must be 0 or more")
    compare, computations, torch_files = _comparison()
    initialise = tuple(initialise)
    source = open_source(
        torch_dir,
        diffusion=diffusion,
        ta_tok=ta_tok,
        ta_tok_config=ta_tok_config,
        initialise=initialise,
        variant=variant,
    )
    root, step = find(checkpoint)
    config = read_config(root)
    weights = MergedWeights(root, step, config.model, ema=ema)
    merged = dataclasses.replace(config, model=base_config(config.model))
    given = [part for part in CONVERTED_PARTS if source.tensors.get(part)]
    for name in parts:
        config_lib.check_choice("--parts", name, given)
    chosen = [part for part in given if not parts or part in parts]
    if missing := [part for part in chosen if part not in weights.parts]:
        raise UserError(
            f"{root} holds no part {', '.join(missing)}, only {', '.join(weights.parts)}: select "
            "parts to compare with --parts"
        )
    for part in chosen:
        _check_same_tensors(part, source, merged, torch_dir, root)

    sizes = {part: sum(t.nbytes for t in source.tensors[part].values()) for part in chosen}
    reports = []
    for part in chosen:
        model = torch_files.load_torch(source, (part,))
        with ByteProgress(f"verify {part}", sizes[part]) as progress:
            differing = _compare_weights(
                part, source, merged.model, weights, getattr(model, part), progress
            )
        _print_line(f"{part}  outputs")
        of_part = computations.part_computations(part, source, seed)
        expected = [compare.run_torch(computation, model) for computation in of_part]
        del model  # free PyTorch's side before the checkpoint is read
        outputs = compare.compare(checkpoint, config, ema, (part,), of_part, expected)
        reports.append(PartReport(part, len(source.tensors[part]), differing, outputs))
    notes = [*source.notes, *_notes(source, merged, chosen)]
    if skipped := _why_no_joint_loss(chosen, initialise):
        notes.append(f"joint losses were not compared: {skipped}")
    else:
        _print_line("joint  losses")
        computation = computations.joint_computation(source, seed)
        expected = [compare.run_torch(computation, torch_files.load_torch(source, JOINT))]
        reports.append(
            PartReport(
                "joint",
                0,
                (),
                compare.compare(checkpoint, config, ema, JOINT, [computation], expected),
            )
        )
    return Report(str(torch_dir), str(checkpoint), seed, tuple(reports), tuple(notes))


def _comparison() -> tuple[Any, Any, Any]:
    """Import the modules that need PyTorch."""
    try:
        from blip3o_jax.convert import compare, computations, torch_files
    except ImportError as error:
        raise UserError(
            f"convert verify runs the PyTorch model, but {error.name} is not installed:"
            f" {install_command('convert')}"
        ) from error
    return compare, computations, torch_files


def _print_line(line: str) -> None:
    print(f"verify  {line}", file=sys.stderr)


def _check_same_tensors(
    part: str, source: TorchSource, config: Config, torch_dir: pathlib.Path, root: pathlib.Path
) -> None:
    """Raise UserError unless both sides have tensors of the same names and shapes."""
    theirs = {
        key: shape
        for group in groups(part, source.config.model)
        for key, shape in group.tensors.items()
    }
    ours = {
        key: shape for group in groups(part, config.model) for key, shape in group.tensors.items()
    }
    for key in [*theirs, *ours]:
        if theirs.get(key) != ours.get(key):
            sizes = [
                f"has it as {list(s[key])}" if key in s else "has none" for s in (theirs, ours)
            ]
            raise UserError(
                f"{prefix_of(part, config.model)}{key}: {torch_dir} {sizes[0]}, {root} {sizes[1]}: "
                "neither was converted from the other; give the matching pair"
            )


def _compare_weights(
    part: str,
    source: TorchSource,
    cfg: ModelConfig,
    weights: MergedWeights,
    module: Any,
    progress: ByteProgress,
) -> tuple[Difference, ...]:
    """Return the tensors of a part that are not bitwise equal to PyTorch's `module`.

    Both are compared in float32, which represents their values exactly; merged sums are first
    rounded to the files' dtype.
    """
    differing = []
    state = module.state_dict()
    for group in groups(part, cfg):
        arrays = weights.read(part, group.shapes)
        for layer, (key, shape) in enumerate(group.tensors.items()):
            tensor = source.tensors[part][key]
            got = group.to_torch(
                {p: a[layer] if group.rule.stacked else a for p, a in arrays.items()}, shape
            )
            if any(weights.is_merged(part, path) for path in group.shapes):
                got = got.astype(tensor.dtype)
            got = got.astype(np.float32)
            want = state[key].numpy()
            rows = _shared_vocabulary_rows(group, source)
            if not _bitwise_equal(got[:rows], want[:rows]):
                differing.append(
                    Difference(tensor.key, _max_relative_error(got[:rows], want[:rows]))
                )
            progress.add(part, tensor.nbytes)
    return tuple(differing)


def _shared_vocabulary_rows(group: Group, source: TorchSource) -> int | None:
    """Return the number of rows to compare; None for all.

    If the import initialised the image tokens' rows, only the text tokenizer's are in the files.
    """
    return (
        source.text_rows
        if group.rule.vocabulary and "image_embeddings" in source.initialise
        else None
    )


def _bitwise_equal(a: np.ndarray, b: np.ndarray) -> bool:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))


def _max_relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest absolute difference divided by the largest absolute value."""
    got, want = got.astype(np.float32), want.astype(np.float32)
    return float(np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny))


def _notes(source: TorchSource, config: Config, chosen: Sequence[str]) -> list[str]:
    """Return notes on initialised parts and on settings that differ between the two sides."""
    notes = [
        f"{name} was initialised by the import and is not in the files: not compared"
        for name in source.initialise
    ]
    for part in [part for part in (*chosen, "flow") if hasattr(config.model, part)]:
        theirs, ours = (getattr(model, part) for model in (source.config.model, config.model))
        notes += _changed(theirs, ours, part)
    return notes


def _changed(theirs: Any, ours: Any, where: str) -> list[str]:
    """Return a line for each field of a (nested) configuration that differs."""
    lines = []
    for field in dataclasses.fields(ours):
        a = getattr(theirs, field.name)
        b = getattr(ours, field.name)
        name = f"{where}.{field.name}"
        if dataclasses.is_dataclass(a):
            lines += _changed(a, b, name)
        elif a != b and (field.name not in OWN_FIELDS or field.name == "param_dtype"):
            lines.append(f"{name} is {a} in the files and {b} in the checkpoint")
    return lines


def _why_no_joint_loss(chosen: Sequence[str], initialise: Sequence[str]) -> str:
    """Return the reason why the joint losses cannot be compared, or ""."""
    if missing := [part for part in JOINT if part not in chosen]:
        return f"they need {', '.join(missing)} too"
    return "the image tokens' rows are not in the files" if "image_embeddings" in initialise else ""
