"""Save and restore checkpoints asynchronously, on any mesh, with a checksum of every file.

    DIR/config.json           the resolved configuration of the run that wrote it, with its CRC32C
    DIR/text/                 the text tokenizer's files and a manifest of them
    DIR/<step>/state          parameters, optimizer, EMA, counters (Orbax)
    DIR/<step>/meta           {"data": seed and position of the data stream, "loss": ...} (JSON)
    DIR/<step>/manifest.json  the step's number, and size and CRC32C of every other file of it
    DIR/<step>.damaged        a step that a resumed run found damaged and set aside

The last `keep` checkpoints stay, and the best by training loss. checkpoint_steps.py defines which
steps are finished and intact.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from blip3o_jax import checksums, files
from blip3o_jax import config as config_lib
from blip3o_jax.checksums import MANIFEST, DamagedFile
from blip3o_jax.config import Config, TextConfig, UserError
from blip3o_jax.config.errors import first_line
from blip3o_jax.parallel.distributed import host_0_first, log_host0
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.text.tokenizers import TextTokenizer
from blip3o_jax.train.checkpoint_steps import (
    CheckedStep,
    all_steps,
    check_intact,
    damage,
    misfit,
    set_aside,
)
from blip3o_jax.train.state import (
    WEIGHTS,
    StatePlan,
    TrainState,
    merge_trees,
    not_finite,
    plan_state,
)

RECIPE = "recipe.json"  # of a workdir whose stages each have a run below it


class Checkpoints:
    """Manage the checkpoints of one run under `directory`: the last `keep` and the best. Changes
    nothing on disk before `open`.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = directory.absolute()
        self._keep = keep
        self._damaged: dict[int, str] = {}  # step -> what is wrong with it
        self._manager: ocp.CheckpointManager | None = None
        _write_small_arrays_whole()

    def steps(self) -> list[int]:
        """Return all steps, ascending, whether intact or damaged."""
        return all_steps(self.directory)

    def newest_intact(self, *, shared: bool = False) -> int | None:
        """Return the newest intact step, or None if there is no step; log newer damaged ones.

        With `shared` all hosts call this, and each reads some of the files. Raises UserError if
        all steps are damaged.
        """
        for step in reversed(all_steps(self.directory)):
            self._damaged[step] = damage(self.directory / str(step), shared=shared)
            if not self._damaged[step]:
                del self._damaged[step]
                for newer, reason in self._damaged.items():
                    log_host0(
                        f"{self.directory}/{newer} is damaged ({reason}): going on from {step}"
                    )
                return step
        if self._damaged:
            newest, reason = next(iter(self._damaged.items()))
            raise UserError(
                f"{self.directory}/{newest} is damaged ({reason}), and no other step is intact:"
                " copy the checkpoint again, or start in another --workdir"
            )
        return None

    def check_tokenizer(self, tokenizer: TextTokenizer | None) -> None:
        """Raise UserError if the run began with another text tokenizer.

        The same captions would have other tokens.
        """
        directory = self.directory / "text"
        if tokenizer is None or not directory.is_dir():
            return
        with tempfile.TemporaryDirectory() as place:
            write_tokenizer(pathlib.Path(place) / "text", tokenizer)
            mine = checksums.listed(pathlib.Path(place) / "text")
        try:
            stored = checksums.listed(directory)
        except DamagedFile:  # of the manifest: compare the files themselves
            stored = {
                name: checksums.of_file(directory / name)
                for name in mine
                if (directory / name).is_file()
            }
        if mine != stored:
            raise UserError(
                f"the text tokenizer (model.text.path) is another than the one in {directory},"
                " which this run began with: put that one back, or start in another --workdir"
            )

    def open(self, config: Config, tokenizer: TextTokenizer | None) -> None:
        """Prepare the directory for writing.

        Set damaged steps aside, write config.json and the tokenizer, and remove what a kill left
        unfinished. All hosts call this, after the run has passed all checks.
        """
        with host_0_first("checkpoints"):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for step in all_steps(self.directory):
                    if (
                        step in self._damaged
                        or not (self.directory / str(step) / MANIFEST).is_file()
                    ):
                        set_aside(self.directory / str(step))
                self._write_tokenizer(tokenizer)
                checksums.write_json(self.directory / "config.json", config_lib.to_dict(config))
        self._opened()

    def _write_tokenizer(self, tokenizer: TextTokenizer | None) -> None:
        directory = self.directory / "text"
        if tokenizer is None or (directory.is_dir() and not checksums.find_damage(directory)):
            return
        if directory.exists():
            set_aside(directory)
        write_tokenizer(directory, tokenizer)

    def _opened(self) -> ocp.CheckpointManager:
        if self._manager is None:
            policies = [preservation_policy.LatestN(self._keep)]
            # The best by mean training loss since the save before: a single step's loss would
            # choose by noise.
            policies.append(
                preservation_policy.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1)
            )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                temporary_path_class=CheckedStep,
            )
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "meta")
            )
        return self._manager

    def last_saved(self) -> int | None:
        """Return the last step saved or being saved; None before `open` and the first `save`."""
        return self._manager.latest_step() if self._manager is not None else None

    def save(self, step: int, state: TrainState, data_position: Any, loss: float) -> None:
        """Copy the state off the devices, and write it in the background.

        Raises UserError for a state that is not finite, from which no run could resume.
        """
        if names := not_finite(state):
            raise UserError(
                f"step {step} is not saved: {len(names)} arrays of its state are not finite, first"
                f" {names[0]}; the last step saved is {self.last_saved()}: run again with a lower"
                " optimizer.learning_rate"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({"data": data_position, "loss": loss}),
        )
        with files.writing(self.directory):
            self._opened().save(step, args=items, metrics={"loss": loss})

    def restore(self, step: int, plan: StatePlan) -> tuple[TrainState, Any]:
        """Return the state of an intact step in the plan's shardings, and its data position."""
        directory = self.directory / str(step)
        with reading(str(directory)):
            try:
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                    state = checkpointer.restore(
                        directory / "state", args=ocp.args.StandardRestore(plan.abstract)
                    )
            except json.JSONDecodeError:  # a ValueError, of the checkpoint's own files
                raise
            except ValueError as e:
                weights = {group: plan.abstract.get(group, {}) for group in WEIGHTS}
                reason = misfit(directory, weights) or first_line(e)
                raise UserError(
                    f"{directory} does not fit this configuration ({reason}); use the config.json"
                    " next to it, or another --workdir"
                ) from e
            return state, json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8"))[
                "data"
            ]

    def check(self) -> None:
        """Raise the error of a background save, which otherwise the next save would raise.

        A save in progress is not waited for.
        """
        with files.writing(self.directory):
            # Once no save is in progress, `wait_until_finished` only raises a stored error.
            if self._manager is not None and not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves in progress."""
        if self._manager is None:
            return
        with files.writing(self.directory):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()


def _write_small_arrays_whole() -> None:
    """Set Orbax to write arrays below 1 MiB from one replica.

    By default every replica writes a slice, which a program compiled for its shape cuts out. That
    pays for large arrays only; for small models it takes most of the time of a save. The handler
    set here stores no array metadata, which nothing reads.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    with _quiet():  # Orbax warns that a handler is replaced, which is intended
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's log, which repeats errors that are raised, with their tracebacks."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def find(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """Return (checkpoint directory, step) for a run's workdir (for a recipe, its last stage's), its
    `checkpoints` directory, or one step in it.

    Raises UserError if there is none, naming the path.
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / RECIPE).is_file():
        path /= read_stages(path)[-1]
    for root in (path / "checkpoints", path, path.parent):
        if (root / "config.json").is_file():
            named = root == path.parent
            steps = [step for step in all_steps(root) if not named or path.name == str(step)]
            if steps:
                return root, max(steps)
    raise UserError(
        f"{path} is not a checkpoint: it holds no config.json next to finished steps; give"
        " the --workdir of a run, its checkpoints directory, or one step in that"
    )


def read_stages(workdir: pathlib.Path) -> list[str]:
    """Return the directory names of a recipe's stages, in order. Raises DamagedFile where
    recipe.json, which may come from an untrusted source, names none or leads out of its directory.
    """
    file = workdir / RECIPE
    stages = checksums.read_json(file).get("stages")
    if not isinstance(stages, list) or not stages or not all(map(_is_directory_name, stages)):
        raise DamagedFile(f"{file} names no stage in that directory: put back a copy of it")
    return stages


def _is_directory_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", "..") and pathlib.PurePath(name).name == name


def read_config(root: pathlib.Path) -> Config:
    """Return the configuration that a checkpoint directory was written with. Raises ConfigError for
    a file without a valid one.
    """
    file = root / "config.json"
    try:
        return config_lib.from_dict(checksums.read_json(file, edited=True))
    except config_lib.ConfigError as error:
        raise config_lib.ConfigError(f"{file}: {error}") from error


def stored_text(root: pathlib.Path, text: TextConfig) -> TextConfig:
    """Return `text` with the path of the tokenizer that a checkpoint directory holds. Raises
    UserError if the tokenizer is damaged.
    """
    if reason := checksums.find_damage(root / "text"):
        raise UserError(
            f"{root}/text is damaged ({reason}): copy the checkpoint's text tokenizer again"
        )
    return dataclasses.replace(text, path=str(root / "text"), train_size=0)


def write_tokenizer(directory: pathlib.Path, tokenizer: TextTokenizer) -> None:
    """Write a text tokenizer's files and their manifest to the new directory, all or none."""
    partial = directory.with_name(f".{directory.name}.partial")
    # Left by a kill.
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    checksums.write_manifest(partial)
    # A directory is renamed atomically: it is there whole or not at all.
    partial.rename(directory)


def restore_parts(
    path: str | pathlib.Path, strategy: Strategy, parts: tuple[str, ...] = (), *, ema: bool = True
) -> Any:
    """Restore the parameters of `parts` (all by default) as {part: nested dict} on the strategy's
    mesh; if `ema` is set and the run kept an EMA, its values. No optimizer state is restored.
    Raises UserError for a damaged step.
    """
    root, step = find(path)
    config = read_config(root)
    abstract = plan_state(config, strategy).abstract
    trained = "ema" if ema and abstract["ema"] else "params"
    missing = set(parts) - set(abstract["params"]) - set(abstract["frozen"])
    if missing:
        raise UserError(
            f"{root} holds no part {', '.join(sorted(missing))}: it was written by stage"
            f" {config.stage!r}"
        )
    wanted = {
        group: chosen  # Orbax takes an empty dict for a leaf
        for group in (trained, "frozen")
        if (
            chosen := {
                name: tree for name, tree in abstract[group].items() if not parts or name in parts
            }
        )
    }
    check_intact(root, step, shared=strategy.mesh.is_multi_process)
    with reading(str(root / str(step))):
        reason = misfit(root / str(step), wanted)
    if reason:  # before Orbax, which would leave out what is stored and not asked for
        raise UserError(
            f"{root}/config.json does not fit {root}/{step} ({reason}): put back the config.json"
            " of the run that wrote the step"
        )
    with reading(str(root / str(step))), ocp.PyTreeCheckpointer() as checkpointer:
        # Partial: optimizer state and the other parts are not read.
        restored = checkpointer.restore(
            root / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    return merge_trees(restored.get(trained, {}), restored.get("frozen", {}))


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise UserError for the exceptions, of any type, that the libraries raise on truncated,
    altered or missing files of `name`. Errors of the system or of a device, such as exhausted
    memory, are raised unchanged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise _unreadable(name, first_line(error)) from error
    except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except ValueError as error:
        raise _unreadable(name, first_line(error)) from error
    except Exception as error:
        raise _unreadable(name, f"{type(error).__name__}: {first_line(error)}") from error


def _unreadable(name: str, reason: str) -> UserError:
    return UserError(
        f"{name} cannot be read ({reason.partition(' [')[0]}): copy the checkpoint again, or take"
        " another step"
    )


def write_weights(
    directory: pathlib.Path, config: Config, tokenizer: TextTokenizer, weights: dict[str, Any]
) -> None:
    """Write a checkpoint of weights alone, {"params": ..., "frozen": ...} by part, as step 0, for
    `restore_parts` and `checkpoint.init_from`. At most the bytes of the largest array are in
    flight.
    """
    _write_small_arrays_whole()
    largest = max(
        shard.data.nbytes for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards
    )
    # Weights hardly compress; trying to would take most of the time.
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=largest // 10**9 + 1, use_compression=False
    )
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, temporary_path_class=CheckedStep
    )
    handlers = {"state": handler, "meta": ocp.JsonCheckpointHandler()}
    with (
        ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager,
        _quiet(),
    ):
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(weights), meta=ocp.args.JsonSave({"data": None, "loss": None})
        )
        manager.save(0, args=items)
    if jax.process_index() == 0:
        write_tokenizer(directory / "text", tokenizer)
        checksums.write_json(directory / "config.json", config_lib.to_dict(config))
