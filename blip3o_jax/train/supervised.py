"""Train the supervised stages: implement the training loop's `Method` on data sets."""

import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax.config import Config, MeshConfig, UserError, check
from blip3o_jax.data.buckets import by_shape
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.index_builder import ProcessGroup
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.record import Source
from blip3o_jax.data.sources import open_held_out, open_mixture
from blip3o_jax.data.token_lengths import choose_row_length, token_lengths
from blip3o_jax.parallel import distributed
from blip3o_jax.parallel.batches import DevicePrefetch, host_rows
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train import loop
from blip3o_jax.train.encode import encoded_source, make_encode
from blip3o_jax.train.fingerprint import weights_fingerprint
from blip3o_jax.train.flops import peak_flops, step_flops
from blip3o_jax.train.held_out import HeldOutLosses
from blip3o_jax.train.initialize import saved_row_length
from blip3o_jax.train.loop import RunContext, Summary, TrainerSpec
from blip3o_jax.train.metrics import MetricLog, SilentLog
from blip3o_jax.train.skipped import SkippedRecords
from blip3o_jax.train.stages import STAGES, Batch, make_loss, make_preview
from blip3o_jax.train.state import StatePlan, TrainState
from blip3o_jax.train.train_step import make_step
from blip3o_jax.train.vocabulary import with_vocabulary


def train(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    on_begin: Callable[[], None] | None = None,
    place: str = "",
) -> Summary:
    """Train a supervised stage; see `loop.train`."""
    return loop.train(config, workdir, Supervised(), on_begin=on_begin, place=place)


class Supervised:
    """Implement `loop.Method` for the stages of train/stages.py: batches from the data mixture, one
    step on each.
    """

    def open(self, config: Config) -> None:
        check(
            not config.rl.rewards,
            "rl.rewards is for blip3o rl: leave it empty, or run that command",
        )
        processes = ProcessGroup(
            distributed.process_index(),
            distributed.process_count(),
            # A day: host 0 may read terabytes of shards for the first time.
            lambda: distributed.barrier("index", seconds=86400.0),
        )
        self._sources = open_mixture(config.data, processes)
        self._held_out = open_held_out(config.data, processes) if config.eval_every else []
        for source, _ in self._sources:
            for note in source.notes:
                distributed.log_host0(note)

    def vocabulary(self, config: Config, workdir: pathlib.Path) -> tuple[Config, Vocabulary | None]:
        config, vocabulary = with_vocabulary(config, self._sources, workdir)
        return with_row_length(config, vocabulary, self._sources, workdir), vocabulary

    def begin(self, context: RunContext, state: TrainState, position: Any) -> TrainerSpec:
        config = context.config
        strategy = context.strategy
        sources = self._sources
        held_out = self._held_out
        if position is not None and distributed.process_index() > 0:
            # The saved counts are sums over all hosts: host 0 alone continues them.
            position = position | {"skipped": {}}
        if config.model.buckets and "pixels" in STAGES[config.stage].fields:
            sources, held_out = (
                list(itertools.chain(*by_shape(side, config.model, config.data.max_pixels)))
                for side in (sources, held_out)
            )
        builder = ExampleBuilder(
            STAGES[config.stage].fields, config.model, config.data, context.vocabulary
        )
        rows = host_rows(strategy.batch_sharding(), config.data.batch_size // config.data.pack)
        # Measured before encoding, which changes no text.
        lengths = {
            source.fingerprint: _token_lengths(source, builder)
            for source, _ in (*sources, *held_out)
            if config.data.pack > 1
        }
        loader_of = lambda sources: Loader(
            sources,
            builder,
            config.data,
            config.seed,
            rows=rows,
            join=builder.join,
            lengths=[lengths[source.fingerprint] for source, _ in sources if lengths],
        )
        if position is not None:
            # Encoding may take hours: check first that the run can resume on these sources.
            loader_of(sources).restore(position)
        if config.stage == "joint" and config.data.cache_dir:
            both = _encode_sources(config, context.plan, strategy, state, [*sources, *held_out])
            sources, held_out = both[: len(sources)], both[len(sources) :]
        loader = loader_of(sources)
        if position is not None:
            loader.restore(position)
        loss = make_loss(config, context.image_token_offset)
        step = make_step(config, context.plan, strategy, loss)
        evaluate = (
            HeldOutLosses(config, context.plan, strategy, loss, loader_of(held_out))
            if held_out
            else None
        )
        preview = make_preview(config, context.image_token_offset)
        measured = peak_flops(jax.devices()[0]) is not None
        flops = functools.partial(step_flops, config, strategy) if measured else None
        data_metrics = _unused([source for source, _ in self._sources])
        # Last, since it starts a thread and worker processes, which an exception above would leak.
        batches = _PrefetchedBatches(
            DevicePrefetch(loader, strategy.batch_sharding()), data_metrics, rows
        )
        return TrainerSpec(batches, step, preview=preview, flops=flops, evaluate=evaluate)

    def close(self) -> None:
        pass


def with_row_length(
    config: Config,
    vocabulary: Vocabulary | None,
    sources: Sequence[tuple[Source, float]],
    workdir: pathlib.Path,
) -> Config:
    """Return the configuration with the row length that `data.max_length=0` asks for: that of the
    run in `workdir`, or else the one that fits the examples, which host 0 chooses for all.
    """
    if vocabulary is None or config.data.max_length:
        return config
    # The stages of a recipe have a key each: host 0 may be a stage ahead.
    key = f"row_length/{workdir.name}"
    if distributed.process_index() > 0:
        # Host 0 has set the key before the others come here (`host_0_first`).
        length = int(distributed.wait_for_key(key, 60.0))
    else:
        length = saved_row_length(workdir / "checkpoints")
        if not length:
            builder = ExampleBuilder(
                STAGES[config.stage].fields, config.model, config.data, vocabulary
            )
            chosen = choose_row_length(sources, builder, config.data.pack)
            length = chosen.length
            distributed.log_host0(f"data.max_length={length}: {chosen.reason}")
        if distributed.process_count() > 1:
            distributed.set_key(key, str(length))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length))


def _token_lengths(source: Source, builder: ExampleBuilder) -> np.ndarray:
    hosts = distributed.process_count()
    host = distributed.process_index()
    return token_lengths(source, builder, host, hosts, multihost_utils.process_allgather)


class _PrefetchedBatches:
    """Implement `loop.BatchIterator` with batches that are read ahead, since they do not depend on
    the state. `data_metrics`: metrics of the data sets, the same at every step.
    """

    def __init__(
        self, prefetch: DevicePrefetch, data_metrics: dict[str, float], rows: Sequence[int]
    ):
        self._prefetch = prefetch
        self._data_metrics = data_metrics
        self._skipped = SkippedRecords(rows)
        self._fetched = self._done = 0
        # Positions after the batches whose steps are not done.
        self._positions: collections.deque[dict[str, Any]] = collections.deque()

    def next(self, state: TrainState) -> Batch:
        del state
        batch = next(self._prefetch)
        # Fetched, the step not done: the loop reads one batch ahead.
        self._fetched += 1
        self._positions.append(self._prefetch.state())
        self._skipped.add(self._fetched, self._positions[-1]["skipped"])
        return batch

    def position(self) -> Any:
        """Return the position (see `loop.BatchIterator`); its "skipped" counts are this host's
        until `check` of the step.
        """
        return self._positions[-1]

    @property
    def wait_seconds(self) -> float:
        return self._prefetch.wait_seconds

    def host_metrics(self) -> dict[str, float]:
        return self._data_metrics

    def check(self, step: int, values: dict[str, float]) -> None:
        """Add what all hosts have skipped to the metrics, and to the position of the step."""
        self._done += 1
        position = self._positions.popleft()
        if distributed.process_index() == 0:  # which writes both
            position["skipped"] = self._skipped.total(self._done)
            values |= {
                f"data/skipped/{kind.replace(' ', '_')}": float(count)
                for kind, count in position["skipped"].items()
            }

    def start(self, log: MetricLog | SilentLog) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._prefetch.close()


def _unused(sources: list[Source]) -> dict[str, float]:
    """Return the counts of unused members and incomplete records of the data sets, as metrics."""
    reasons: collections.Counter[str] = collections.Counter()
    for source in sources:
        reasons.update(source.unused)
    values = {
        "data/unused_members": sum(reasons.values()),
        "data/incomplete_records": sum(s.incomplete for s in sources),
    }
    values |= {f"data/unused_members/{reason}": count for reason, count in reasons.items()}
    return {name: float(value) for name, value in values.items()}


def _encode_sources(
    config: Config,
    plan: StatePlan,
    strategy: Strategy,
    state: TrainState,
    sources: list[tuple[Source, float]],
) -> list[tuple[Source, float]]:
    """Fill the cache of the frozen encoders' outputs, and return the sources that read it."""
    if trained := {"tokenizer", "vae"} & set(state["params"]):
        raise UserError(
            f"data.cache_dir keeps the outputs of frozen encoders, but {', '.join(sorted(trained))}"
            " is trained: empty data.cache_dir, or leave them out of `trainable`"
        )

    encoders = {part: state["frozen"][part] for part in ("tokenizer", "vae")}
    if jax.process_count() > 1:
        # Each host encodes different shards, on its devices alone.
        strategy = Strategy.of(MeshConfig(data=-1, fsdp=1, strategy="dp"), jax.local_devices())
        # Gathered first, since a host's devices hold only shards of the encoders under fsdp.
        encoders = jax.device_put(
            multihost_utils.process_allgather(encoders, tiled=True), strategy.replicated()
        )
    fingerprint = weights_fingerprint(encoders)
    run = functools.partial(make_encode(plan, strategy), encoders)
    return [
        (
            encoded_source(source, run, fingerprint, config, batch_shards=strategy.batch_shards),
            weight,
        )
        for source, weight in sources
    ]
