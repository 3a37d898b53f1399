"""Rollouts as the batches of the training loop: draw images, have them judged on the host, compare
them, hand them over.

policy now --> draw (devices) --> rewards (processes of the host) --> advantages --> batch, for
`rl.num_iterations` steps

A rollout is drawn in pieces. All are sent to the devices at once, so that rewards of one are
computed while the next is drawn. With `rl.off_policy_steps` the rewards of a rollout are awaited only after
the next one was drawn: the devices never wait for them, and each step trains on images that the
policy before it has drawn.

Everything follows from (seed, number of the rollout): nothing of a rollout is kept but its number.
"""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.data.loader import global_batch, host_rows
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl import judged, rollout
from blip3o_jax.rl.advantages import Advantages, choose_groups
from blip3o_jax.rl.judged import Verdicts
from blip3o_jax.rl.log import RolloutLog, best_and_worst
from blip3o_jax.rl.monitor import RatioMonitor
from blip3o_jax.rl.prompts import PromptRows, prompt_indices
from blip3o_jax.rl.rewards.pool import Pending, RewardPool, check_failed
from blip3o_jax.train.loop import Batch, Setup
from blip3o_jax.train.metrics import MetricLog, SilentLog
from blip3o_jax.train.state import TrainState


@dataclasses.dataclass
class _Drawn:
    """A rollout whose images are being judged. `images`: this host's, of `rows`; `pending`, a
    handle for each piece. `seconds`: of drawing; once it is judged, `waited`: seconds for its
    rewards, and their `timings` (`Judged.seconds`).
    """

    number: int
    prompts: list[Prompt]
    rows: list[int]
    images: np.ndarray
    record: rollout.Record
    pending: list[Pending]
    seconds: float
    waited: float = 0.0
    timings: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Rollouts:
    """`loop.Feed` of reinforcement learning. `reference`: parameters of the policy that the run
    started from, or None; `open_log` drops the lines of rollouts that are drawn again.
    """

    def __init__(
        self,
        setup: Setup,
        prompts: list[Prompt],
        pool: RewardPool,
        reference: Any,
        position: dict[str, Any],
        open_log: Callable[[], RolloutLog],
    ):
        self._setup, self._prompts, self._pool = setup, prompts, pool
        self._open_log, self._log = open_log, None
        self._rl = setup.config.rl
        self._reference = reference
        self._identity = {name: position[name] for name in ("reference", "prompts")}
        self._next, self._step, self._uses = position["rollout"], setup.start, 0
        image_ids = setup.vocabulary.image_token_offset, setup.vocabulary.image_token_end
        self._draw_images = rollout.make_draw(setup.config, setup.plan, setup.strategy, image_ids)
        self._add_reference = rollout.make_reference(
            setup.config, setup.plan, setup.strategy, image_ids
        )
        self._sharding = setup.strategy.batch_sharding()
        self._join = jax.jit(
            lambda rows, *x: jnp.concatenate(x)[rows], out_shardings=self._sharding
        )
        self._rows = PromptRows(prompts, setup.config, setup.vocabulary)
        self._ahead: _Drawn | None = None  # with rl.off_policy_steps
        self._batch: Batch = {}
        self._metrics: dict[str, float] = {}
        self._monitor = RatioMonitor(setup.config)
        self._since = time.monotonic()  # what was handed over last was handed over
        self.wait_seconds = 0.0

    def next(self, state: TrainState) -> Batch:
        began, self._step = time.monotonic(), self._step + 1
        if self._uses == 0:
            self._batch = self._collect(state)
        self._uses = (self._uses + 1) % self._rl.num_iterations
        self.wait_seconds = time.monotonic() - began
        return dict(self._batch)

    def position(self) -> dict[str, Any] | None:
        """None between two updates on one rollout: the policy that drew it is gone."""
        if self._uses:
            return None
        undone = (
            self._ahead is not None
        )  # drawn but not trained on: drawn again by a run that goes on from here
        return {"rollout": self._next - undone} | self._identity

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def check(self, step: int, values: dict[str, float]) -> None:
        self._monitor.check(step, values)

    def start(self, log: MetricLog | SilentLog) -> None:
        self._metric_log, self._log = log, self._open_log()

    def sync(self) -> None:
        self._log.sync()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _collect(self, state: TrainState) -> Batch:
        jax.block_until_ready(state["step"])
        updating = time.monotonic() - self._since
        batch = self._rollout(state)
        self._since = time.monotonic()
        self._metrics |= _shares(
            updating, self._metrics["seconds/draw"], self._metrics["seconds/reward_wait"]
        )
        return batch

    def _rollout(self, state: TrainState) -> Batch:
        if self._rl.off_policy_steps:
            drawn = self._ahead or self._draw(state)
            self._ahead = self._draw(state)
        else:
            drawn = self._draw(state)
        found, verdicts = [drawn], [self._judged(drawn)]
        spread = judged.advantages(verdicts[0], self._rl)
        for _ in range(self._rl.dynamic_sampling):
            if not spread.degenerate_P[
                choose_groups(spread.degenerate_P, self._rl.num_prompts)
            ].any():
                break
            found.append(self._draw(state))
            verdicts.append(self._judged(found[-1]))
            spread = judged.advantages(judged.joined(verdicts), self._rl)
        self._metrics = self._measured(found, judged.joined(verdicts), spread)
        return self._assembled(found, judged.joined(verdicts), spread.degenerate_P)

    def _draw(self, state: TrainState) -> _Drawn:
        """Draws rollout number `_next`; its images are submitted to the rewards."""
        began, rl, number = time.monotonic(), self._rl, self._next
        self._next += 1
        chosen = [
            self._prompts[i]
            for i in prompt_indices(
                len(self._prompts), number, rl.num_prompts, self._setup.config.seed
            )
        ]
        pieces = rollout.chunks(rl)
        size, per = rl.num_prompts * rl.num_generations // pieces, rl.num_prompts // pieces
        rows = host_rows(self._sharding, size)
        running = [
            self._piece(state, chosen[i * per : (i + 1) * per], number, i) for i in range(pieces)
        ]
        images, pending = [], []
        for i, (pixels, _) in enumerate(running):
            images.append(_local(pixels, rows))
            mine = [chosen[i * per + row // rl.num_generations] for row in rows]
            pending.append(
                self._pool.submit(images[-1], [p.text for p in mine], [p.metadata for p in mine])
            )
        record = jax.tree.map(lambda *x: self._concatenated(x), *(record for _, record in running))
        if rollout.has_reference(rl):
            record |= self._add_reference(self._reference, state["frozen"], record)
        all_rows = [i * size + row for i in range(pieces) for row in rows]
        return _Drawn(
            number,
            chosen,
            all_rows,
            np.concatenate(images),
            record,
            pending,
            time.monotonic() - began,
        )

    def _piece(
        self, state: TrainState, prompts: list[Prompt], number: int, piece: int
    ) -> tuple[jax.Array, rollout.Record]:
        setup, rl = self._setup, self._rl
        tokens_PL, lengths_P = self._rows.of(prompts)
        count = len(prompts) * rl.num_generations
        first = number * rl.num_prompts * rl.num_generations + piece * count
        indices_B = np.arange(first, first + count).astype(np.uint32)
        seed, rollout_number = np.uint32(setup.config.seed), np.uint32(number)
        return self._draw_images(
            state["params"], state["frozen"], tokens_PL, lengths_P, indices_B, seed, rollout_number
        )

    def _judged(self, drawn: _Drawn) -> Verdicts:
        """Waits for the rewards."""
        began = time.monotonic()
        results = [pending.result() for pending in drawn.pending]
        mine = judged.joined([Verdicts(r.total_B, r.failed_B, r.parts) for r in results])
        verdicts = judged.gathered(
            mine, drawn.rows, self._rl.num_prompts * self._rl.num_generations
        )
        drawn.waited, drawn.timings = time.monotonic() - began, [r.seconds for r in results]
        # Of the whole rollout, so that all hosts stop; each tells the reasons that it has seen.
        reasons = sum((collections.Counter(r.reasons) for r in results), collections.Counter())
        check_failed(verdicts.failed_B, reasons, self._rl.max_failed_fraction)
        prompts = [drawn.prompts[row // self._rl.num_generations] for row in drawn.rows]
        first = drawn.number * self._rl.num_prompts * self._rl.num_generations
        self._log.write(drawn.number, drawn.rows, first, prompts, drawn.images, mine)
        if drawn.number % self._rl.samples_every == 0:
            kept = np.flatnonzero(~mine.failed_B)
            if len(kept):
                grid = best_and_worst(
                    drawn.images[kept], [prompts[i].text for i in kept], mine.total_B[kept]
                )
                self._metric_log.images(self._step, "best and worst", grid)
        return verdicts

    def _measured(
        self, found: list[_Drawn], verdicts: Verdicts, spread: Advantages
    ) -> dict[str, float]:
        """Metrics of all that was drawn for a batch, what is refilled and what has its place
        included.
        """
        prompts, timings = (
            [x for drawn in found for x in getattr(drawn, name)] for name in ("prompts", "timings")
        )
        values = judged.reward_metrics(verdicts, spread, prompts, self._rl.num_generations) | {
            "seconds/draw": sum(drawn.seconds for drawn in found),
            "seconds/reward_wait": sum(drawn.waited for drawn in found),
            "reward/latency": float(np.median([seconds["median"] for seconds in timings])),
            "reward/queue": float(np.mean([seconds["queue"] for seconds in timings])),
        }
        return values | ({"reward/drawn": float(len(found))} if self._rl.dynamic_sampling else {})

    def _assembled(
        self, found: list[_Drawn], verdicts: Verdicts, degenerate_Q: np.ndarray
    ) -> Batch:
        """The batch of the groups chosen from what was drawn."""
        rl = self._rl
        groups = choose_groups(degenerate_Q, rl.num_prompts)
        rows = (groups[:, None] * rl.num_generations + np.arange(rl.num_generations)).ravel()
        record = found[0].record
        if len(found) > 1:
            record = jax.tree.map(
                lambda *x: self._join(rows, *x), *(drawn.record for drawn in found)
            )
            verdicts = verdicts.take(rows)
        told, count = judged.columns(verdicts, rl), len(verdicts.total_B)
        mine = host_rows(self._sharding, count)
        return record | global_batch(
            {name: x[mine] for name, x in told.items()}, self._sharding, mine, count
        )

    def _concatenated(self, pieces: tuple[jax.Array, ...]) -> jax.Array:
        return (
            pieces[0] if len(pieces) == 1 else self._join(np.arange(sum(map(len, pieces))), *pieces)
        )


def _shares(update: float, draw: float, reward: float) -> dict[str, float]:
    """Of the time of a step: of the updates on the rollout before, of drawing, of waiting for
    rewards.
    """
    seconds = {"update": update, "draw": draw, "reward_wait": reward}
    total = max(sum(seconds.values()), 1e-9)
    return {"seconds/update": update} | {
        f"share/{name}": value / total for name, value in seconds.items()
    }


def _local(images: jax.Array, rows: list[int]) -> np.ndarray:
    """Rows of a global array that this host's devices hold."""
    held: dict[int, np.ndarray] = {}
    for shard in images.addressable_shards:
        start, _, _ = shard.index[0].indices(len(images))
        if start not in held:
            held |= {start + i: row for i, row in enumerate(np.asarray(shard.data))}
    return np.stack([held[row] for row in rows])
