"""Run the training loop, which all stages and methods use, from configuration to checkpoints.

`train` first opens the data, so that its errors precede any compilation, and the checkpoints. Each
step is dispatched, then the next batch is fetched while the devices compute, and only then the
metrics of the step before are read. With several hosts each runs this loop: arrays are global, and
host 0 alone writes metrics, messages and the files next to the checkpoints.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax import exits
from blip3o_jax.config import Config, UserError
from blip3o_jax.parallel.distributed import host_0_first, log_host0, process_index, set_phase
from blip3o_jax.parallel.preemption import Preempted, StopRequest
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.parallel.watchdog import Watchdog
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train.checkpoint import RECIPE, Checkpoints
from blip3o_jax.train.flops import StepFlops, peak_flops
from blip3o_jax.train.initialize import restore_or_create
from blip3o_jax.train.memory import check_memory
from blip3o_jax.train.metrics import GROUPS, ElapsedTime, MetricLog, SilentLog
from blip3o_jax.train.profile_window import ProfileWindow
from blip3o_jax.train.stages import Batch
from blip3o_jax.train.state import StatePlan, TrainState, plan_state, run_strategy
from blip3o_jax.train.train_step import TOTALS, example_keys
from blip3o_jax.train.workdir import WorkdirLock


@dataclasses.dataclass(frozen=True)
class Summary:
    """Hold the outcome of a finished run: the directory of its checkpoints, the last metrics (none
    where nothing was left to train), and the seconds, also of CPU time, from its start to its last
    step, over all its resumptions.
    """

    checkpoint: pathlib.Path
    step: int
    metrics: dict[str, float]
    seconds: float
    cpu_seconds: float


class BatchIterator(Protocol):
    """Provide the batches of a run, one per step."""

    @property
    def wait_seconds(self) -> float:
        """Return how long the last `next` waited for data."""
        ...

    def next(self, state: TrainState) -> Batch:
        """Return the next batch, on the devices.

        `state` is the state after the previous step, which may still be running.
        """
        ...

    def position(self) -> Any:
        """Return the position in the stream after the last batch, as a JSON value.

        None means that a run cannot resume from there.
        """
        ...

    def host_metrics(self) -> dict[str, float]:
        """Return the metrics of the last batch that are computed on the host."""
        ...

    def check(self, step: int, values: dict[str, float]) -> None:
        """Check a finished step's metrics, and add to them. Raises UserError to end the run."""
        ...

    def start(self, log: MetricLog | SilentLog) -> None:
        """Open the output files and take the run's log. Called once, after all checks."""
        ...

    def sync(self) -> None:
        """Flush all output to disk. Called before a step is saved."""
        ...

    def close(self) -> None: ...


class TrainerSpec(NamedTuple):
    """Define a run for the loop: batches, a step (state, batch) -> (state, metrics), a preview
    (stages.make_preview), if they are counted, the FLOPs of a step on a batch, and the metrics of
    held-out records, which are computed every `eval_every` steps.
    """

    batches: BatchIterator
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    preview: Callable[..., jax.Array] | None = None
    flops: Callable[[Batch], StepFlops] | None = None
    evaluate: Callable[[TrainState], dict[str, float]] | None = None


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Describe a run before its first step; `start`: number of steps done."""

    config: Config
    workdir: pathlib.Path
    plan: StatePlan
    strategy: Strategy
    vocabulary: Vocabulary | None
    image_token_offset: int
    start: int


class Method(Protocol):
    """Define a way to train; the loop calls its methods in this order."""

    def open(self, config: Config) -> None:
        """Open and check the data, to report its faults before anything is compiled."""
        ...

    def vocabulary(self, config: Config, workdir: pathlib.Path) -> tuple[Config, Vocabulary | None]:
        """Return the configuration and the vocabulary; see `with_vocabulary`."""
        ...

    def begin(self, context: RunContext, state: TrainState, position: Any) -> TrainerSpec:
        """Return the batches and programs of the run. `position` is the saved
        `BatchIterator.position`, or None. Writes nothing under the working directory: the run may
        still end with an error here.
        """
        ...

    def close(self) -> None:
        """Release all resources. Always called, even if no other method was."""
        ...


def train(
    config: Config,
    workdir: str | pathlib.Path,
    method: Method,
    *,
    on_begin: Callable[[], None] | None = None,
    place: str = "",
) -> Summary:
    """Train up to step `config.steps`, from the last checkpoint under `workdir` if there is one.

    Nothing under `workdir` changes before all checks of the run have passed; then `on_begin` is
    called. Raises Preempted when SIGTERM ends the run before its last step, after saving the step.
    `place` follows the run's name in the line of progress, such as "2/5" for the second stage of
    five.
    """
    elapsed = ElapsedTime()
    workdir = pathlib.Path(workdir).absolute()
    strategy = run_strategy(config)
    if strategy.mesh.size > 1:
        log_host0(strategy.describe())
    # A wrong size of the batch is reported before the directory is touched.
    strategy.check_batch(config.data.batch_size, config.optimizer.accumulate, config.data.pack)
    if (workdir / RECIPE).exists():  # readers of `workdir` would never find this run's checkpoints
        raise UserError(
            f"{workdir / RECIPE} says that this --workdir holds the stages of a recipe: start a"
            " single run in another"
        )
    with contextlib.ExitStack() as until_done:
        # The lock first: `method.open` may start processes, which a refused second run must not.
        set_phase("lock" if process_index() == 0 else "barrier", 0)
        lock = until_done.enter_context(WorkdirLock(workdir))
        set_phase("start", 0)
        until_done.push(exits.bounded_close(method.close))
        method.open(config)
        # From here on SIGTERM is handled, and the watchdog runs: training a tokenizer or encoding
        # the data below may take hours.
        stop = until_done.enter_context(StopRequest())
        watch = until_done.enter_context(Watchdog(config.watchdog))
        watch.enter("vocabulary" if process_index() == 0 else "barrier", 0)
        # Host 0 trains a tokenizer and writes it; the others read it.
        with host_0_first("vocabulary"):
            config, vocabulary = method.vocabulary(config, workdir)

        watch.enter("restore", 0)
        plan = plan_state(config, strategy)
        check_memory(config, plan, strategy)
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        until_done.push(exits.bounded_close(checkpoints.close))
        image_token_offset = vocabulary.image_token_offset if vocabulary else 0
        tokenizer = vocabulary.tokenizer if vocabulary else None
        checkpoints.check_tokenizer(tokenizer)
        state, position, start = restore_or_create(
            config, plan, strategy, checkpoints, image_token_offset
        )
        context = RunContext(config, workdir, plan, strategy, vocabulary, image_token_offset, start)
        spec = method.begin(context, state, position)
        until_done.push(exits.bounded_close(spec.batches.close))

        lock.begun = True
        if on_begin is not None:
            on_begin()
        checkpoints.open(config, tokenizer)
        log = (
            MetricLog(workdir, start, config.steps, f"{config.title} {place}".strip())
            if process_index() == 0
            else SilentLog()
        )
        until_done.push(exits.bounded_close(log.close))
        elapsed.resume(log.last_row)
        log.describe(config_lib.to_dict(config), shlex.join(sys.argv))
        profile = ProfileWindow(workdir / "tensorboard", config.profile_steps)
        until_done.push(exits.bounded_close(profile.close))
        spec.batches.start(log)
        run = _Run(context, spec, checkpoints, lock, log, profile, stop, watch, elapsed)
        metrics = run.steps(state)
        # Up to the last step, so that a later start, which has nothing to train, returns the same.
        total = elapsed.read() | dict(log.last_row) | metrics
    return Summary(
        workdir / "checkpoints",
        config.steps,
        metrics,
        total["perf/elapsed_seconds"],
        total["perf/cpu_seconds"],
    )


@dataclasses.dataclass
class _Run:
    """Run the loop's steps and hold everything they need."""

    context: RunContext
    spec: TrainerSpec
    checkpoints: Checkpoints
    lock: WorkdirLock
    log: MetricLog | SilentLog
    profile: ProfileWindow
    stop: StopRequest
    watch: Watchdog
    elapsed: ElapsedTime

    @property
    def config(self) -> Config:
        return self.context.config

    def steps(self, state: TrainState) -> dict[str, float]:
        """Run steps start + 1 .. config.steps; return the last step's metrics."""
        config = self.config
        start = self.context.start
        if start >= config.steps:
            log_host0(_nothing_to_do(config, start, self.checkpoints.directory))
            return {}
        values = {}
        previous = None
        stopped = False
        meter = _Meter(config)
        with self.log.once("waiting for the first batch"):
            batch, position, host_metrics = self.fetch(state, meter, start + 1)
        if self.spec.flops is not None:
            meter.flops = self.spec.flops(batch)
        for step in range(start + 1, config.steps + 1):
            self.watch.enter("compile" if step == start + 1 else "step", step)
            self.profile.before_step(step)
            with (
                self.log.once("compiling", _shapes(batch)),
                # A transfer inside the step, such as a Python number that became an argument, would
                # stop the devices at every step.
                jax.transfer_guard("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=step),
            ):
                state, metrics = self.spec.step(state, batch)
            self.profile.after_step(step, metrics)
            # The position of the batch of this step: `fetch` below replaces it by that of the next
            # batch.
            done_position = position
            done_host_metrics = host_metrics | self.evaluate(step, state)
            if step < config.steps:
                batch, position, host_metrics = self.fetch(state, meter, step + 1)
            if previous is not None:
                values = self.record(*previous, meter)
            previous = (step, metrics, done_host_metrics)
            # At every step on every host, as the preemption service requires.
            stopped |= self.stop.due(step)
            if done_position is not None and (
                stopped or step == config.steps or step % config.checkpoint.every == 0
            ):
                values = self.record(*previous, meter)
                previous = None
                with self.log.once("saving"):
                    self.save(step, state, done_position, meter.mean_loss())
                if stopped and step < config.steps:
                    raise Preempted(
                        f"{config.title}: stopped by SIGTERM, step {step} of {config.steps} is"
                        " saved"
                    )
                with self.log.once("compiling the preview", _shapes(batch)):
                    self.preview(step, state, batch)
        return values

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Return the metrics of the held-out records where they are due after `step`."""
        every = self.config.eval_every
        if self.spec.evaluate is None or not (step == self.config.steps or step % every == 0):
            return {}
        self.watch.enter("evaluate", step)
        with self.log.once("compiling the evaluation"):
            return self.spec.evaluate(state)

    def save(self, step: int, state: TrainState, position: Any, loss: float) -> None:
        """Save a checkpoint, after the files that belong to its steps."""
        self.watch.enter("save", step)
        # Another run may have taken the lock over while this process was suspended.
        self.lock.check()
        # Logs before the checkpoint: a run that resumes at this step finds all rows up to it.
        self.log.sync()
        self.spec.batches.sync()
        self.checkpoints.save(step, state, position, loss)

    def fetch(
        self, state: TrainState, meter: "_Meter", step: int
    ) -> tuple[Batch, Any, dict[str, float]]:
        """Return the next batch, the position in the stream after it, and its host metrics."""
        self.watch.enter("data", step)
        batches = self.spec.batches
        batch = batches.next(state)
        meter.waited += batches.wait_seconds
        return batch, batches.position(), batches.host_metrics()

    def record(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        host_metrics: dict[str, float],
        meter: "_Meter",
    ) -> dict[str, float]:
        """Wait for the step's metrics, write them every `log_every` steps, and raise UserError
        after too many non-finite steps in a row.
        """
        self.watch.enter("step", step)
        self.checkpoints.check()
        # One transfer for all metrics; this waits for the step.
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        totals = [name for name in numbers if name.startswith(f"{TOTALS}/")]
        meter.count({name.removeprefix(f"{TOTALS}/"): numbers.pop(name) for name in totals})
        values = host_metrics | with_groups(numbers)
        meter.losses.append(values["train/loss"])
        # Checked on the host, one step late: the device's loop needs no answer, and steps that are
        # not finite change nothing.
        if values["train/bad_steps"] >= self.config.max_nonfinite:
            raise UserError(
                f"{self.config.title}: loss, gradient or the parameters after it were not finite in"
                f" {self.config.max_nonfinite} steps in a row, up to step {step}; none of these was"
                f" applied, and {self._saved()}: run again with a lower optimizer.learning_rate or"
                " optimizer.clip_norm"
            )
        self.spec.batches.check(step, values)
        evaluated = any(name.startswith("eval/") for name in host_metrics)
        if step in (1, self.config.steps) or step % self.config.log_every == 0 or evaluated:
            values |= meter.read() | self.elapsed.read()
            self.log.write(step, values)
        return values

    def _saved(self) -> str:
        step = self.checkpoints.last_saved()
        return "no step is saved yet" if step is None else f"the last step saved is {step}"

    def preview(self, step: int, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Write images of a few rows of `batch` to TensorBoard, on runs of a single host."""
        if self.spec.preview is None or jax.process_count() > 1:
            return
        # The same number of rows on every device; those past `config.preview` are not shown.
        batch_shards = self.context.strategy.batch_shards
        count = -(-self.config.preview // batch_shards) * batch_shards
        rows = jax.tree.map(lambda x: x[:count], batch)
        leading = rows["bad_records"].shape
        keys_B = example_keys(self.config.seed, state["step"], math.prod(leading)).reshape(leading)
        images_BHWC = self._preview_program(state["params"], state["frozen"], rows, keys_B)
        images_BHWC = images_BHWC[: math.prod((self.config.preview, *leading[1:]))]
        self.log.images(
            step, "eval/preview", np.asarray(jax.numpy.round(images_BHWC * 255)).astype(np.uint8)
        )

    @functools.cached_property
    def _preview_program(self) -> Any:
        assert self.spec.preview is not None
        return make_preview_program(self.spec.preview, self.context.plan, self.context.strategy)


def _nothing_to_do(config: Config, start: int, directory: pathlib.Path) -> str:
    """Return the line for a run whose checkpoint is at the last step, or beyond it: then it may be
    that of a longer run.
    """
    if start == config.steps:
        return f"{config.title}: step {start} of {config.steps} is done already"
    return (
        f"{config.title}: {directory}/{start} is beyond steps={config.steps}, so nothing is"
        " trained: raise steps to go on, or start in another --workdir"
    )


def make_preview_program(
    preview: Callable[..., jax.Array], plan: StatePlan, strategy: Strategy
) -> Callable[..., jax.Array]:
    """Return the compiled (params, frozen, batch, keys_B) -> images [B, H, W, 3] of a preview."""

    def program(params: Any, frozen: Any, batch: Batch, keys_B: jax.Array) -> jax.Array:
        return preview(plan.model(params, frozen), batch, keys_B)

    return strategy.jit(program)


def _shapes(batch: Batch) -> tuple[Any, ...]:
    """Return the shapes of a batch, for each of which the step is compiled."""
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


def with_groups(metrics: dict[str, float]) -> dict[str, float]:
    """Return a step's metrics under the names of train/metrics.py: names without a group get
    train/, except bad_records, which gets data/.
    """
    named = {}
    for name, value in metrics.items():
        group = name.partition("/")[0]
        if name == "bad_records":
            name = "data/bad_records"
        elif group not in GROUPS:
            name = f"train/{name}"
        named[name] = value
    return named


class _Meter:
    """Measure rates since the last reading."""

    def __init__(self, config: Config):
        self.config = config
        self.flops: StepFlops | None = None
        self.losses: list[float] = []
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self._since = time.monotonic()
        self.totals: dict[str, float] = collections.defaultdict(float)

    def count(self, totals: Mapping[str, float]) -> None:
        """Count a step and the totals of its batch."""
        self.steps += 1
        for name, value in totals.items():
            self.totals[name] += value

    def mean_loss(self) -> float:
        """Return the mean of the finite losses since the last call, by which the best checkpoint is
        chosen.
        """
        finite = [loss for loss in self.losses if np.isfinite(loss)]
        self.losses.clear()
        return float(np.mean(finite)) if finite else float("inf")

    def read(self) -> dict[str, float]:
        """Return rates and memory since the last reading, and start over."""
        seconds = max(1e-9, time.monotonic() - self._since)
        totals = self.totals
        examples = totals.get("examples", self.steps * self.config.data.batch_size)
        values = {
            "perf/step_time_seconds": seconds / max(1, self.steps),
            "perf/examples_per_s": examples / seconds,
            "perf/data_wait_fraction": self.waited / seconds,
            # ru_maxrss is in KiB on Linux.
            "perf/host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if "tokens" in totals:
            values["perf/tokens_per_s"] = totals["tokens"] / seconds
        if "slots" in totals and self.steps:
            values["data/filled_slots"] = totals["examples"] / totals["slots"]
            values["data/filled_tokens"] = totals["tokens"] / totals["row_tokens"]
        if self.flops is not None:
            rate = 1 / seconds / jax.device_count()
            model = self.flops.model * self.steps * rate
            values["perf/tflops_per_device"] = model / 1e12
            if peak := peak_flops(jax.devices()[0]):
                values["perf/mfu"] = model / peak
                values["perf/useful_mfu"] = self.flops.useful(totals, self.steps) * rate / peak
        stats = jax.local_devices()[0].memory_stats()
        if stats:
            values["perf/device_memory_gib"] = stats.get("peak_bytes_in_use", 0) / 2**30
        self._reset()
        return values
