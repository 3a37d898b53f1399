"""Make rollouts as the batches of the training loop: sample images, score them on the host, compute
advantages.

    current policy --> sample (devices) --> rewards (processes of the host) --> advantages
    --> batch, for `rl.num_iterations` steps

A rollout is sampled in micro-batches. All are dispatched to the devices at once, so that the
rewards of one are computed while the next is sampled. With `rl.off_policy_steps=1` the rewards of a
rollout are awaited only after the next one was sampled: the devices never wait for them, and each
step trains on images of the policy before it.

A rollout is a function of (seed, number of the rollout), so a checkpoint stores the number alone.
"""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.data.prompts import Prompt
from blip3o_jax.parallel.batches import global_batch, host_rows
from blip3o_jax.rl import reward_batch, rollout_programs
from blip3o_jax.rl.advantages import Advantages, choose_groups
from blip3o_jax.rl.log import RolloutLog, best_and_worst
from blip3o_jax.rl.monitor import RatioMonitor
from blip3o_jax.rl.prompts import PromptRows, prompt_indices
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.rl.rewards.pool import Pending, RewardPool, check_failed
from blip3o_jax.train.loop import RunContext
from blip3o_jax.train.metrics import MetricLog, SilentLog
from blip3o_jax.train.stages import Batch
from blip3o_jax.train.state import TrainState


@dataclasses.dataclass
class RolloutBatch:
    """Hold a rollout whose rewards are being computed.

    `images` are this host's, `rows` of the rollout. `arrays` are the inputs of the loss
    (`rollout_programs`), `pending` one handle for the rewards of each micro-batch, and `seconds`
    the time of sampling. After the rewards have arrived, `reward_wait` is the time spent waiting
    for them and `timings` their `PoolResult.seconds`.
    """

    number: int
    prompts: list[Prompt]
    rows: list[int]
    images: np.ndarray
    arrays: rollout_programs.RolloutArrays
    pending: list[Pending]
    seconds: float
    reward_wait: float = 0.0
    timings: list[dict[str, float]] = dataclasses.field(default_factory=list)


class RolloutIterator:
    """Implement `loop.BatchIterator` for reinforcement learning. `reference`: parameters of the
    reference policy, or None; `open_log` drops the lines of rollouts that are sampled again."""

    def __init__(
        self,
        context: RunContext,
        prompts: list[Prompt],
        pool: RewardPool,
        reference: Any,
        position: dict[str, Any],
        open_log: Callable[[], RolloutLog],
    ):
        self._context = context
        self._prompts = prompts
        self._pool = pool
        self._open_log = open_log
        self._log: RolloutLog | None = None
        self._rl = context.config.rl
        self._reference = reference
        self._identity = {name: position[name] for name in ("reference", "prompts")}
        self._next_rollout = position["rollout"]
        self._step = context.start
        self._iteration = 0  # optimizer steps on the current rollout
        vocabulary = context.vocabulary
        assert vocabulary is not None, "a run of reinforcement learning has text"
        image_ids = vocabulary.image_token_offset, vocabulary.image_token_end
        programs = context.config, context.plan, context.strategy, image_ids
        self._run_rollout = rollout_programs.make_rollout(*programs)
        self._run_reference = rollout_programs.make_reference(*programs)
        self._sharding = context.strategy.batch_sharding()
        # Rows of several rollouts are gathered on the devices: their arrays never come to the host.
        self._take = jax.jit(
            lambda rows, *x: jnp.concatenate(x)[rows], out_shardings=self._sharding
        )
        self._prompt_rows = PromptRows(prompts, context.config, vocabulary)
        self._ahead: RolloutBatch | None = None  # sampled, not trained on: off_policy_steps=1
        self._batch: Batch = {}
        self._metrics: dict[str, float] = {}
        self._monitor = RatioMonitor(context.config)
        self._since = time.monotonic()  # when the last rollout was returned
        self.wait_seconds = 0.0

    def next(self, state: TrainState) -> Batch:
        began = time.monotonic()
        self._step += 1
        if self._iteration == 0:
            self._batch = self._next_batch(state)
        self._iteration = (self._iteration + 1) % self._rl.num_iterations
        self.wait_seconds = time.monotonic() - began
        # A copy: one batch serves `num_iterations` steps, whatever the caller does with its dict.
        return dict(self._batch)

    def position(self) -> dict[str, Any] | None:
        """Return None between two steps on one rollout: the policy that sampled it is gone."""
        if self._iteration:
            return None
        # A run that resumes here samples the rollout again that was not trained on.
        return {"rollout": self._next_rollout - (self._ahead is not None)} | self._identity

    def host_metrics(self) -> dict[str, float]:
        return self._metrics

    def check(self, step: int, values: dict[str, float]) -> None:
        self._monitor.check(step, values)

    def start(self, log: MetricLog | SilentLog) -> None:
        self._metric_log = log
        self._log = self._open_log()

    def sync(self) -> None:
        assert self._log is not None, "start() opens the log"
        self._log.sync()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _next_batch(self, state: TrainState) -> Batch:
        # Waits for the last update, so that its time is not counted as sampling.
        jax.block_until_ready(state["step"])
        update = time.monotonic() - self._since
        batch = self._rollout(state)
        self._since = time.monotonic()
        self._metrics |= _time_metrics(
            update, self._metrics["rl/time/rollout"], self._metrics["rl/time/reward_wait"]
        )
        return batch

    def _rollout(self, state: TrainState) -> Batch:
        """Return the batch of a rollout, or of several where groups without a difference are
        replaced (`rl.dynamic_sampling`).
        """
        if self._rl.off_policy_steps:
            rollout = self._ahead or self._sample(state)
            self._ahead = self._sample(state)
        else:
            rollout = self._sample(state)
        rollouts = [rollout]
        rewards = self._await_rewards(rollout)
        advantages = reward_batch.compute_advantages(rewards, self._rl)
        for _ in range(self._rl.dynamic_sampling):
            groups = choose_groups(advantages.degenerate_P, self._rl.num_prompts)
            if not advantages.degenerate_P[groups].any():
                break
            rollouts.append(self._sample(state))
            rewards = reward_batch.concatenate([rewards, self._await_rewards(rollouts[-1])])
            advantages = reward_batch.compute_advantages(rewards, self._rl)
        self._metrics = self._rollout_metrics(rollouts, rewards, advantages)
        return self._assemble(rollouts, rewards, advantages)

    def _sample(self, state: TrainState) -> RolloutBatch:
        """Sample the next rollout and submit its images to the rewards."""
        began = time.monotonic()
        rl = self._rl
        number = self._next_rollout
        self._next_rollout += 1
        indices = prompt_indices(
            len(self._prompts), number, rl.num_prompts, self._context.config.seed
        )
        prompts = [self._prompts[i] for i in indices]
        count = rollout_programs.num_micro_batches(rl)
        size = rl.num_prompts * rl.num_generations // count  # images of a micro-batch
        per = rl.num_prompts // count  # prompts of a micro-batch
        rows = host_rows(self._sharding, size)
        # All are dispatched before any is awaited.
        running = [
            self._sample_micro_batch(state, prompts[i * per : (i + 1) * per], number, i)
            for i in range(count)
        ]
        images, pending = [], []
        for i, (pixels, _) in enumerate(running):
            images.append(_host_images(pixels, rows))
            own = [prompts[i * per + row // rl.num_generations] for row in rows]
            pending.append(
                self._pool.submit(images[-1], [p.text for p in own], [p.metadata for p in own])
            )
        arrays = jax.tree.map(lambda *x: self._concatenate(x), *(arrays for _, arrays in running))
        if self._reference is not None:
            arrays |= self._run_reference(self._reference, state["frozen"], arrays)
        return RolloutBatch(
            number,
            prompts,
            [i * size + row for i in range(count) for row in rows],
            np.concatenate(images),
            arrays,
            pending,
            time.monotonic() - began,
        )

    def _sample_micro_batch(
        self, state: TrainState, prompts: list[Prompt], number: int, micro_batch: int
    ) -> tuple[jax.Array, rollout_programs.RolloutArrays]:
        rl = self._rl
        tokens_PL, lengths_P = self._prompt_rows.tokenize(prompts)
        count = len(prompts) * rl.num_generations
        first = number * rl.num_prompts * rl.num_generations + micro_batch * count
        indices_B = np.arange(first, first + count).astype(np.uint32)
        seed = np.uint32(self._context.config.seed)
        return self._run_rollout(
            state["params"],
            state["frozen"],
            tokens_PL,
            lengths_P,
            indices_B,
            seed,
            np.uint32(number),
        )

    def _await_rewards(self, rollout: RolloutBatch) -> RewardBatch:
        """Wait for the rewards of a rollout; log its images with them."""
        began = time.monotonic()
        rl = self._rl
        results = [pending.result() for pending in rollout.pending]
        own = reward_batch.concatenate(
            [RewardBatch(r.total_B, r.failed_B, r.parts) for r in results]
        )
        rewards = reward_batch.gather(own, rollout.rows, rl.num_prompts * rl.num_generations)
        rollout.reward_wait = time.monotonic() - began
        rollout.timings = [r.seconds for r in results]
        # All hosts check the fraction of the whole rollout, so that all stop; each lists the
        # reasons of its own images.
        reasons = sum((collections.Counter(r.reasons) for r in results), collections.Counter())
        check_failed(rewards.failed_B, reasons, rl.max_failed_fraction)
        prompts = [rollout.prompts[row // rl.num_generations] for row in rollout.rows]
        first = rollout.number * rl.num_prompts * rl.num_generations
        assert self._log is not None, "start() opens the log"
        self._log.write(rollout.number, rollout.rows, first, prompts, rollout.images, own)
        if rollout.number % rl.samples_every == 0:
            valid = np.flatnonzero(~own.failed_B)
            if len(valid):
                grid = best_and_worst(
                    rollout.images[valid], [prompts[i].text for i in valid], own.total_B[valid]
                )
                self._metric_log.images(self._step, "rl/completions", grid)
        return rewards

    def _rollout_metrics(
        self, rollouts: list[RolloutBatch], rewards: RewardBatch, advantages: Advantages
    ) -> dict[str, float]:
        """Return the metrics of all images sampled for a batch, replaced groups included."""
        prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
        timings = [seconds for rollout in rollouts for seconds in rollout.timings]
        values = reward_batch.reward_metrics(
            rewards, advantages, prompts, self._rl.num_generations
        ) | {
            "rl/time/rollout": sum(rollout.seconds for rollout in rollouts),
            "rl/time/reward_wait": sum(rollout.reward_wait for rollout in rollouts),
            "rl/time/reward_latency": float(np.median([seconds["median"] for seconds in timings])),
            "rl/time/reward_queue": float(np.mean([seconds["queue"] for seconds in timings])),
        }
        if self._rl.dynamic_sampling:
            values["rl/num_gen_batches"] = float(len(rollouts))
        return values

    def _assemble(
        self, rollouts: list[RolloutBatch], rewards: RewardBatch, advantages: Advantages
    ) -> Batch:
        """Return the batch of the chosen groups."""
        rl = self._rl
        groups = choose_groups(advantages.degenerate_P, rl.num_prompts)
        rows = (groups[:, None] * rl.num_generations + np.arange(rl.num_generations)).ravel()
        arrays = rollouts[0].arrays
        if len(rollouts) > 1:
            arrays = jax.tree.map(
                lambda *x: self._take(rows, *x), *(rollout.arrays for rollout in rollouts)
            )
            rewards = rewards.take(rows)
        inputs = reward_batch.loss_inputs(rewards, rl)
        count = len(rewards.total_B)
        own = host_rows(self._sharding, count)
        return arrays | global_batch(
            {name: x[own] for name, x in inputs.items()}, self._sharding, own, count
        )

    def _concatenate(self, arrays: tuple[jax.Array, ...]) -> jax.Array:
        if len(arrays) == 1:
            return arrays[0]
        return self._take(np.arange(sum(map(len, arrays))), *arrays)


def _time_metrics(update: float, rollout: float, reward_wait: float) -> dict[str, float]:
    """Return the seconds from one rollout to the next, and the fraction of each phase: the
    optimizer steps on the rollout before, sampling, waiting for rewards.
    """
    seconds = {"update": update, "rollout": rollout, "reward_wait": reward_wait}
    total = max(sum(seconds.values()), 1e-9)
    return {"rl/step_time": sum(seconds.values()), "rl/time/update": update} | {
        f"rl/time_fraction/{name}": value / total for name, value in seconds.items()
    }


def _host_images(images: jax.Array, rows: list[int]) -> np.ndarray:
    """Return `rows` of a global array, which the devices of this host hold."""
    by_row: dict[int, np.ndarray] = {}
    for shard in images.addressable_shards:
        start, _, _ = shard.index[0].indices(len(images))
        # Replicas of a shard, along mesh axes that do not divide the batch, are read once.
        if start not in by_row:
            by_row |= {start + i: row for i, row in enumerate(np.asarray(shard.data))}
    return np.stack([by_row[row] for row in rows])
