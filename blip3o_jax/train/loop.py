"""The training loop, one for every stage: a straight line from configuration to checkpoints.

`train` prepares (data first, so that its errors come before any compile), then for each step: dispatch, fetch the next
batch while the devices work, and only then read the metrics of the step before. With several hosts each runs this same line:
every array is a global one, and what there is one of (metrics, messages, files beside the checkpoints) is host 0's.
"""

import contextlib
import dataclasses
import functools
import pathlib
import resource
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax import config as config_lib
from blip3o_jax.config import Config, MeshConfig, UserError
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.loader import DevicePrefetch, Loader, host_rows
from blip3o_jax.data.record import Source
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.parallel.distributed import host, host_0_first, say
from blip3o_jax.parallel.preemption import Preempted, StopRequest
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.parallel.watchdog import Watchdog
from blip3o_jax.train.checkpoint import Checkpoints, read_config, restore_parts
from blip3o_jax.train.encode import encoded_source, weights_fingerprint
from blip3o_jax.train.flops import peak_flops, useful_flops
from blip3o_jax.train.metrics import MetricLog, SilentLog
from blip3o_jax.train.stages import STAGES, make_loss, make_preview
from blip3o_jax.train.state import WEIGHTS, StatePlan, TrainState, create_state, plan_state
from blip3o_jax.train.step import make_step, row_keys
from blip3o_jax.train.vocabulary import with_vocabulary


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished run hands back: where its checkpoints are, its last metrics, and seconds in all."""

    checkpoint: pathlib.Path
    step: int
    metrics: dict[str, float]
    seconds: float


def train(config: Config, workdir: str | pathlib.Path) -> Summary:
    """Trains `config.steps` steps, from the last checkpoint under `workdir` where there is one.

    Raises Preempted when SIGTERM stopped it before the last step, which then is saved.
    """
    began = time.monotonic()
    workdir = pathlib.Path(workdir).absolute()
    strategy = Strategy.of(config.mesh)
    strategy.check_batch(config.data.batch_size, config.optimizer.accumulate)
    sources = open_mixture(config.data)
    with contextlib.ExitStack() as until_done:
        stop = until_done.enter_context(StopRequest())
        watch = until_done.enter_context(Watchdog(config.watchdog))
        watch.enter("vocabulary" if host() == 0 else "barrier", 0)
        with host_0_first("vocabulary"):
            config, vocabulary = with_vocabulary(config, sources, workdir)

        watch.enter("restore", 0)
        plan = plan_state(config, strategy)
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        until_done.callback(checkpoints.close)
        image_first = vocabulary.image_first if vocabulary else 0
        state, position, start = _restore_or_create(config, plan, strategy, checkpoints, image_first)
        checkpoints.describe(config, vocabulary.tokenizer if vocabulary else None)
        if config.stage == "joint" and config.data.cache_dir:
            sources = _encode_sources(config, plan, strategy, state, sources)
        builder = ExampleBuilder(STAGES[config.stage].fields, config.model, config.data, vocabulary)
        rows = host_rows(strategy.batch_sharding(), config.data.batch_size)
        loader = Loader(sources, builder, config.data, config.seed, rows=rows)
        if position is not None:
            loader.restore(position)
        log = MetricLog(workdir, start, config.steps, config.stage) if host() == 0 else SilentLog()
        until_done.callback(log.close)
        batches = DevicePrefetch(loader, strategy.batch_sharding())
        until_done.callback(batches.close)
        step_fn = make_step(config, plan, strategy, make_loss(config, image_first))
        draw = make_preview(config, image_first)
        run = _Run(config, plan, strategy, checkpoints, batches, log, step_fn, draw, stop, watch)
        metrics = run.steps(state, start)
    return Summary(workdir / "checkpoints", config.steps, metrics, time.monotonic() - began)


@dataclasses.dataclass
class _Run:
    """The loop proper, with what it needs at every step."""

    config: Config
    plan: StatePlan
    strategy: Strategy
    checkpoints: Checkpoints
    batches: DevicePrefetch
    log: MetricLog | SilentLog
    step_fn: Any
    draw: Any  # see make_preview
    stop: StopRequest
    watch: Watchdog

    def steps(self, state: TrainState, start: int) -> dict[str, float]:
        """Runs steps start + 1 .. config.steps; returns the last step's metrics."""
        if start >= self.config.steps:
            say(f"{self.config.stage}: step {start} of {self.config.steps} is done already")
            return {}
        config, values, previous = self.config, {}, None
        meter = _Meter(config)
        batch, position = self.fetch(meter, start + 1)
        if peak_flops(jax.devices()[0]) is not None:
            meter.flops = useful_flops(self.config, self.strategy, batch)
        for step in range(start + 1, config.steps + 1):
            self.watch.enter("compile" if step == start + 1 else "step", step)
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = self.step_fn(state, batch)
            done_position = position
            if step < config.steps:
                batch, position = self.fetch(meter, step + 1)
            if previous is not None:
                values = self.record(*previous, meter)
            previous = (step, metrics)
            stopped = self.stop.due(step)
            if stopped or step == config.steps or step % config.checkpoint.every == 0:
                values = self.record(*previous, meter)
                previous = None
                self.watch.enter("save", step)
                self.checkpoints.save(step, state, done_position, meter.mean_loss())
                if stopped and step < config.steps:
                    raise Preempted(f"{config.stage}: stopped by SIGTERM, step {step} of {config.steps} is saved")
                self.preview(step, state, batch)
        return values

    def fetch(self, meter: "_Meter", step: int) -> tuple[dict[str, jax.Array], Any]:
        """The next batch on the devices, and the position of the stream behind it."""
        self.watch.enter("data", step)
        batch = next(self.batches)
        meter.waited += self.batches.wait_seconds
        return batch, self.batches.state()

    def record(self, step: int, metrics: dict[str, jax.Array], meter: "_Meter") -> dict[str, float]:
        """Waits for the step's metrics; writes them every `log_every` steps; stops a run that no longer is finite."""
        self.watch.enter("step", step)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        meter.losses.append(values["loss"])
        meter.steps += 1
        if values["bad_steps"] >= self.config.max_nonfinite:
            raise UserError(
                f"{self.config.stage}: loss or gradient was not finite in {self.config.max_nonfinite} steps in a row, up to "
                f"step {step}; they were not applied, and the last good checkpoint is intact: resume with a lower "
                "optimizer.learning_rate or optimizer.clip_norm"
            )
        if step == 1 or step % self.config.log_every == 0 or step == self.config.steps:
            values |= meter.read()
            self.log.write(step, values)
        return values

    def preview(self, step: int, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Draws a few rows of `batch` into TensorBoard, where all of them are on this host."""
        if self.draw is None or jax.process_count() > 1:
            return
        rows = jax.tree.map(lambda x: x[: self.config.preview], batch)
        keys_B = row_keys(self.config.seed, state["step"], next(iter(rows.values())).shape[0])
        images_BHWC = self._drawn(state["params"], state["frozen"], rows, keys_B)
        self.log.images(step, "preview", np.asarray(jax.numpy.round(images_BHWC * 255)).astype(np.uint8))

    @functools.cached_property
    def _drawn(self) -> Any:
        return jax.jit(lambda params, frozen, batch, keys_B: self.draw(self.plan.model(params, frozen), batch, keys_B))


class _Meter:
    """Rates since the last reading."""

    def __init__(self, config: Config):
        self.config = config
        self.flops: float | None = None  # of one step
        self.losses: list[float] = []
        self._reset()

    def _reset(self) -> None:
        self.steps, self.waited, self._since = 0, 0.0, time.monotonic()

    def mean_loss(self) -> float:
        """Mean of the finite losses since the last call: what "best checkpoint" goes by."""
        finite = [loss for loss in self.losses if np.isfinite(loss)]
        self.losses.clear()
        return float(np.mean(finite)) if finite else float("inf")

    def read(self) -> dict[str, float]:
        """examples/s, tokens/s, share of the time spent waiting for data, memory, MFU; then starts over."""
        seconds = max(1e-9, time.monotonic() - self._since)
        examples = self.steps * self.config.data.batch_size / seconds
        values = {
            "examples_per_s": examples,
            "data_wait": self.waited / seconds,
            "host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if self.config.stage == "joint":
            values["tokens_per_s"] = examples * self.config.data.max_length
        if self.flops is not None:
            peak = peak_flops(jax.devices()[0]) * jax.device_count()
            values["mfu"] = self.flops * self.steps / seconds / peak
        stats = jax.local_devices()[0].memory_stats()
        if stats:
            values["device_memory_gib"] = stats.get("peak_bytes_in_use", 0) / 2**30
        self._reset()
        return values


def _restore_or_create(
    config: Config, plan: StatePlan, strategy: Strategy, checkpoints: Checkpoints, image_first: int
) -> tuple[TrainState, Any, int]:
    """(state, position of the data stream or None, steps done)."""
    latest = checkpoints.latest()
    if latest is not None:
        state, position = checkpoints.restore(latest, plan)
        changed = "; ".join(changed_settings(read_config(checkpoints.directory), config))
        say(f"{config.stage}: resuming at step {latest} of {checkpoints.directory}" + (f" with {changed}" if changed else ""))
        return state, position, latest
    given = {}
    for path in dict.fromkeys(path for _, path in config.checkpoint.init_from):
        parts = tuple(part for part, other in config.checkpoint.init_from if other == path)
        restored = restore_parts(path, strategy, parts)
        given |= {part: _fitted(plan, part, restored[part], path) for part in parts}
    return create_state(config, plan, given, image_first), None, 0


def _fitted(plan: StatePlan, part: str, values: Any, path: str) -> dict[str, Any]:
    """The arrays of one part as the plan wants them: by group, in its own dtypes and shardings. They must cover the part."""
    wanted = {
        jax.tree_util.keystr(keys): group
        for group in WEIGHTS
        for keys, _ in jax.tree_util.tree_leaves_with_path(plan.abstract[group].get(part, {}))
    }
    found = {jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(values)}
    if missing := sorted(set(wanted) ^ set(found)):
        raise UserError(f"checkpoint.init_from: part {part} of {path} and of this model differ, first in {missing[0]}")

    def put(keys: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        value = found[jax.tree_util.keystr(keys)]
        if value.shape != target.shape:
            raise UserError(
                f"checkpoint.init_from: {part}{jax.tree_util.keystr(keys)} of {path} has shape {value.shape}, this model's "
                f"{target.shape}: give the run the configuration of that checkpoint"
            )
        return jax.device_put(value.astype(target.dtype), target.sharding)

    return {
        group: jax.tree_util.tree_map_with_path(put, plan.abstract[group][part])
        for group in WEIGHTS
        if part in plan.abstract[group]
    }


def _encode_sources(
    config: Config, plan: StatePlan, strategy: Strategy, state: TrainState, sources: list[tuple[Source, float]]
) -> list[tuple[Source, float]]:
    """The sources with the frozen encoders' outputs from the cache, filled first where it is not."""
    if trained := {"tokenizer", "vae"} & set(state["params"]):
        raise UserError(
            f"data.cache_dir keeps the outputs of frozen encoders, but {', '.join(sorted(trained))} is trained: "
            "empty data.cache_dir, or leave them out of `trainable`"
        )

    encoders = {part: state["frozen"][part] for part in ("tokenizer", "vae")}
    if jax.process_count() > 1:  # hosts fill different parts, each by itself, on its own devices
        strategy = Strategy.of(MeshConfig(data=-1, fsdp=1, strategy="dp"), jax.local_devices())
        encoders = jax.device_put(multihost_utils.process_allgather(encoders, tiled=True), strategy.replicated())
    rows, shards = strategy.batch_sharding(), strategy.batch_shards

    @jax.jit
    def encode(encoders: Any, pixels: jax.Array, tokenizer_pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The other parts' parameters are zeros that no operation reads: XLA drops them.
        nothing = {group: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), plan.abstract[group]) for group in WEIGHTS}
        model = plan.model(nothing["params"], nothing["frozen"] | encoders)
        pixels, tokenizer_pixels = (jax.lax.with_sharding_constraint(x, rows) for x in (pixels, tokenizer_pixels))
        return model.codes(tokenizer_pixels), model.latents(pixels)

    fingerprint = weights_fingerprint(encoders)
    run = functools.partial(encode, encoders)
    return [(encoded_source(source, run, fingerprint, config, shards=shards), weight) for source, weight in sources]


def changed_settings(old: Config, new: Config) -> list[str]:
    """["optimizer.learning_rate: 1e-4 -> 5e-5", ...]"""
    before, after = (config_lib.flat(config_lib.to_dict(config)) for config in (old, new))
    return [f"{key}: {before.get(key)} -> {after[key]}" for key in after if before.get(key) != after[key]]
