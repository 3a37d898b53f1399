"""Checkpoint directories: complete, asynchronous, resumable on another mesh.

    DIR/config.json          the resolved configuration of the run that wrote it
    DIR/text/                the text tokenizer's files
    DIR/<step>/state         parameters, optimizer, EMA, counters (Orbax)
    DIR/<step>/meta          {"data": seed and position of the data stream, "loss": ...} (JSON)

The last `keep` checkpoints stay, and the best by training loss. A directory that another process was killed in while
writing keeps its last finished step.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from blip3o_jax import config as config_lib
from blip3o_jax import files
from blip3o_jax.config import Config, UserError
from blip3o_jax.lora import FACTORS
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.text.tokenizers import TextTokenizer
from blip3o_jax.train.state import StatePlan, TrainState, merge_trees, plan_state


class Checkpoints:
    """The checkpoints of one run under `directory`: the last `keep` and the best."""

    def __init__(self, directory: pathlib.Path, keep: int):
        _write_small_arrays_whole()
        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        policies = [preservation_policy.LatestN(keep)]
        policies.append(preservation_policy.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))

    def describe(self, config: Config, tokenizer: TextTokenizer | None) -> None:
        """Writes what it takes to read the checkpoints; after `restore`, so that a run that does not fit changes nothing."""
        if jax.process_index() == 0:
            if tokenizer is not None:
                tokenizer.save(self.directory / "text")
            write_json(self.directory / "config.json", config_lib.to_dict(config))

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_position: Any, loss: float) -> None:
        """Starts writing in the background; the arrays are copied off the devices before this returns."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"data": data_position, "loss": loss})
        )
        with files.writing(self.directory):
            self._manager.save(step, args=items, metrics={"loss": loss})

    def restore(self, step: int, plan: StatePlan) -> tuple[TrainState, Any]:
        """State in the plan's shardings, and the position of the data stream."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(plan.abstract), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except ValueError as e:
            reason = str(e).strip().splitlines()[0]
            raise UserError(
                f"{self.directory}/{step} does not fit this configuration ({reason}); use the config.json beside it, "
                "or another --workdir"
            ) from e
        return restored["state"], restored["meta"]["data"]

    def check(self) -> None:
        """Raises what a save in the background has failed with, which else the next save would. Waits for none."""
        with files.writing(self.directory):
            if not self._manager.is_saving_in_progress():  # nothing to wait for but an error
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writes under way."""
        with files.writing(self.directory):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()


def _write_small_arrays_whole() -> None:
    """Copies of an array share the writing of it: Orbax has each cut out a slice, by a program compiled for its shape. That
    pays for large arrays only; without this it is most of the time a small model takes to save. (The handler that stands in
    for Orbax's own keeps no array metadata, which nothing here reads.)"""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    with _quiet():  # it would warn that a handler is replaced, as is meant
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's own log, which tells of errors that are raised as well, traceback and all."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def find(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """(checkpoint directory, step) of a run's workdir (of a recipe, its last stage's), its `checkpoints` directory, or one
    step in it.

    Raises UserError when there is none, naming what was looked for.
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / "recipe.json").is_file():
        path /= json.loads((path / "recipe.json").read_text(encoding="utf-8"))["stages"][-1]
    for root in (path / "checkpoints", path, path.parent):
        if (root / "config.json").is_file():
            if root == path.parent:
                steps = [int(path.name)] if path.name.isdigit() and (path / "state").is_dir() else []
            else:
                steps = [int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / "state").is_dir()]
            if steps:
                return root, max(steps)
    raise UserError(
        f"{path} is not a checkpoint: it holds no config.json with finished steps beside it; give the --workdir of a run, "
        "its checkpoints directory, or one step in that"
    )


def read_config(root: pathlib.Path) -> Config:
    """The configuration a checkpoint directory was written with. UserError for a file that holds none."""
    file = root / "config.json"
    try:
        return config_lib.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except config_lib.ConfigError as error:
        raise config_lib.ConfigError(f"{file}: {error}") from error
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): copy the checkpoint again") from error


def restore_parts(path: str | pathlib.Path, strategy: Strategy, parts: tuple[str, ...] = (), *, ema: bool = True) -> Any:
    """Parameters of `parts` (all by default) as {part: nested dict} on the strategy's mesh, the averaged ones where the run
    kept them and `ema` is set; no optimizer state is read."""
    root, step = find(path)
    config = read_config(root)
    abstract = plan_state(config, strategy).abstract
    trained = "ema" if ema and abstract["ema"] else "params"
    missing = set(parts) - set(abstract["params"]) - set(abstract["frozen"])
    if missing:
        raise UserError(f"{root} holds no part {', '.join(sorted(missing))}: it was written by stage {config.stage!r}")
    wanted = {
        group: chosen  # Orbax takes an empty dict for a leaf
        for group in (trained, "frozen")
        if (chosen := {name: tree for name, tree in abstract[group].items() if not parts or name in parts})
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            root / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            ),
        )
    return merge_trees(restored.get(trained, {}), restored.get("frozen", {}))


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter in a checkpoint's files, to read in slices: with what they are cut from kept while this is, for the next
    ones. `name` is for errors."""

    name: str
    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        with _whole(self.name):
            return self.array[index].read().result()

    def read(self) -> np.ndarray:
        """All of it."""
        return self[...]


@contextlib.contextmanager
def _whole(name: str) -> Iterator[None]:
    """UserError for what the libraries raise where files are cut off, altered or gone."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0].partition(" [")[0]
        raise UserError(f"{name} cannot be read ({reason}): copy the checkpoint again, or take another step") from error


class Weights:
    """The parameters of one step as arrays of this host, read from the files when they are asked for and not before.

    `parts`: the parts there are; `ema` takes averaged parameters in place of those they are averages of. UserError for files
    that are damaged.
    """

    def __init__(self, root: pathlib.Path, step: int, *, ema: bool = False):
        self._path = (root / str(step) / "state").absolute()
        with _whole(str(self._path)):
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self._path)).tree
        if ema and not tree.get("ema"):
            raise UserError(f"{root} holds no averaged weights: it was trained with optimizer.ema_decay=0; leave out --ema")
        # (part, path within it) -> (group, shape and dtype)
        self._leaves = {
            (keys[0], "/".join(keys[1:])): (group, leaf)
            for group in ("frozen", "ema" if ema else "params")
            for keys, leaf in _flat_metadata(tree.get(group) or {})
        }
        self.parts = tuple(dict.fromkeys(part for part, _ in self._leaves))

    def dtype(self, part: str) -> np.dtype:
        """Of the part's parameters, which are all alike but for low-rank factors."""
        leaves = ((path, leaf) for (name, path), (_, leaf) in self._leaves.items() if name == part)
        return np.dtype(next(leaf.dtype for path, leaf in leaves if not path.endswith(FACTORS)))

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """{path: shape} of all of a part's parameters, low-rank factors among them."""
        return {path: tuple(leaf.shape) for (name, path), (_, leaf) in self._leaves.items() if name == part}

    def read(self, part: str, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """{path: whole array} of some of a part's parameters. KeyError for one that is not there."""
        opened = {path: self.open(part, path) for path in paths}
        reading = {path: (stored.name, stored.array.read()) for path, stored in opened.items()}
        arrays = {}
        for path, (name, future) in reading.items():
            with _whole(name):
                arrays[path] = future.result()
        return arrays

    def open(self, part: str, path: str) -> Stored:
        group, _ = self._leaves[part, path]
        files = {"driver": "file", "path": f"{self._path}/"}
        store = {"driver": "ocdbt", "base": files, "path": ".".join((group, part, *path.split("/")))}
        context = ts.Context({"cache_pool": {"total_bytes_limit": 2**62}})
        name = f"{self._path}: {part}/{path}"
        with _whole(name):
            array = ts.open({"driver": "zarr", "kvstore": store}, context=context, open=True, read=True).result()
        return Stored(name, array)


def _flat_metadata(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, leaf) of nested dicts and lists as Orbax hands them back."""
    children = enumerate(tree) if isinstance(tree, list | tuple) else tree.items() if isinstance(tree, dict) else None
    if children is None:
        yield keys, tree
        return
    for key, child in children:
        yield from _flat_metadata(child, (*keys, str(key)))


def write_weights(directory: pathlib.Path, config: Config, tokenizer: TextTokenizer, weights: dict[str, Any]) -> None:
    """A checkpoint directory of weights alone, {"params": ..., "frozen": ...} by part, as step 0: what `restore_parts` reads
    and runs start from. Written from where the arrays are, no more in flight than the largest."""
    _write_small_arrays_whole()
    largest = max(shard.data.nbytes for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards)
    # Weights hardly compress; trying to would take most of the time.
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=largest // 10**9 + 1, use_compression=False)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {"state": handler, "meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager, _quiet():
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(weights), meta=ocp.args.JsonSave({"data": None, "loss": None}))
        manager.save(0, args=items)
    if jax.process_index() == 0:
        tokenizer.save(directory / "text")
        write_json(directory / "config.json", config_lib.to_dict(config))
