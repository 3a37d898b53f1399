"""Finish the steps of a checkpoint directory on disk, and check whether they are intact.

A step is finished when its directory has its final name and holds a manifest; it is intact when all
files match the manifest, and the manifest is of the step that the directory's name says: a renamed
directory holds the state of another step. Resuming, sampling, exporting and `init_from` all use
intact steps only. A reader of a step reads its files twice, once for the checksums and once for the
values, the second time mostly from the page cache.
"""

import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.parallel.distributed import log_host0

_STEP = re.compile("0|[1-9][0-9]{0,17}")  # as Orbax reads them too
# Files without which nothing of a step can be read.
_REQUIRED = ("state/manifest.ocdbt", "state/_METADATA", "meta/metadata")


class CheckedStep(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Write a step's manifest before the step gets its final name.

    Orbax renames a step on host 0 once all hosts have written it. Here the rename has two phases,
    and the manifest is written between them, when all of Orbax's files are in place. Host 0 reads
    the step once for that, in the background. A kill in between leaves a temporary name, which a
    resumed run removes. Orbax uses this class for the items inside a step too, which have no
    separate manifest.
    """

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> "CheckedStep":
        if not final_path.name.isdigit():
            return super().from_final(final_path, **options)
        between = final_path.parent / (final_path.name + ocp.path.atomicity.TMP_DIR_SUFFIX)
        return super().from_final(between, **options)

    def get_final(self) -> epath.Path:
        between = super().get_final()
        return between.parent / between.name.removesuffix(ocp.path.atomicity.TMP_DIR_SUFFIX)

    async def finalize(self) -> None:
        await super().finalize()
        between = pathlib.Path(super().get_final())
        if between != pathlib.Path(self.get_final()):
            checksums.write_manifest(between, step=int(self.get_final().name))
            between.rename(self.get_final())


def all_steps(directory: pathlib.Path) -> list[int]:
    """Return the steps that have their final name, ascending, whether intact or damaged.

    A file with such a name is a damaged step. Names such as "007" are not steps.
    """
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _STEP.fullmatch(path.name))


def damage(directory: pathlib.Path, *, shared: bool = False) -> str:
    """Return a description of a step's damage, "" if it is intact.

    With `shared` all hosts call this: each reads some of the files, and all return the same fault.
    """
    step = int(directory.name)
    if not shared or jax.process_count() == 1:
        return checksums.find_damage(directory, required=_REQUIRED, step=step)
    found = checksums.find_damage(
        directory, jax.process_index(), jax.process_count(), _REQUIRED, step=step
    )
    # Collectives exchange arrays of equal shape, so that the text is padded to 512 bytes.
    packed = np.zeros(512, np.uint8)
    text = found.encode()[: len(packed)]
    packed[: len(text)] = np.frombuffer(text, np.uint8)
    reasons = (
        row.tobytes().rstrip(b"\0").decode(errors="replace")
        for row in multihost_utils.process_allgather(packed)
    )
    return next(filter(None, reasons), "")


def check_intact(root: pathlib.Path, step: int, *, shared: bool = False) -> None:
    """Raise UserError if a step is damaged, naming the newest intact step.

    The user decides which weights to use. `shared` is as in `Checkpoints.newest_intact`.
    """
    reason = damage(root / str(step), shared=shared)
    if not reason:
        return
    others = (other for other in reversed(all_steps(root)) if other != step)
    intact = next((other for other in others if not damage(root / str(other), shared=shared)), None)
    advice = (
        "no other step is intact"
        if intact is None
        else f"{root}/{intact} is the newest step that is intact: name it"
    )
    raise UserError(f"{root}/{step} is damaged ({reason}): copy the checkpoint again; {advice}")


def misfit(directory: pathlib.Path, wanted: dict[str, Any]) -> str:
    """Return in what a step's arrays first differ from those of `wanted`, {group: {part: arrays}},
    by name and shape; "" where they do not. Groups and parts that `wanted` lacks are not compared.
    """
    path = epath.Path(directory.absolute() / "state")
    stored = ocp.PyTreeCheckpointHandler().metadata(path).tree
    for group, parts in wanted.items():
        found_parts = stored.get(group)
        if not isinstance(found_parts, dict):  # for an empty group Orbax returns a leaf
            found_parts = {}
        for part, arrays in parts.items():
            here = _shapes(part, arrays)
            there = _shapes(part, found_parts.get(part, {}))
            for name in sorted(here.keys() | there.keys()):
                found, expected = there.get(name, "absent"), here.get(name, "absent")
                if found != expected:
                    return f"{name} is {found} in it, {expected} by the configuration"
    return ""


def _shapes(part: str, arrays: Any) -> dict[str, str]:
    """Return {path: "of shape (2, 3)"} of a part's arrays, or of what Orbax knows of them."""
    return {
        "/".join((part, jax.tree_util.keystr(keys, simple=True, separator="/"))).rstrip("/"): (
            f"of shape {tuple(leaf.shape)}"
        )
        for keys, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def set_aside(directory: pathlib.Path) -> None:
    """Rename a damaged directory to a name that nothing reads, and keep it for inspection."""
    number = 1
    aside = directory.with_name(f"{directory.name}.damaged")
    while os.path.lexists(aside):
        number, aside = number + 1, directory.with_name(f"{directory.name}.damaged-{number}")
    directory.rename(aside)
    log_host0(f"{directory} is set aside as {aside.name}")
