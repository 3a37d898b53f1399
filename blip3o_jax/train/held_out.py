"""Compute the losses of held-out records along a run: the metrics eval/*."""

import itertools
from typing import Any

import jax
import numpy as np

from blip3o_jax.config import Config
from blip3o_jax.data.loader import Loader
from blip3o_jax.parallel.batches import global_batch
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.stages import Loss
from blip3o_jax.train.state import StatePlan, TrainState
from blip3o_jax.train.train_step import make_evaluate


class HeldOutLosses:
    """Evaluate the stage's loss on the first `config.eval_batches` batches of `loader`, whose
    records training does not see. They are read once; every evaluation has the same batches and
    the same random keys.
    """

    def __init__(
        self, config: Config, plan: StatePlan, strategy: Strategy, loss: Loss, loader: Loader
    ) -> None:
        self._program = make_evaluate(config, plan, strategy, loss)
        self._batches = [dict(batch) for batch in itertools.islice(loader, config.eval_batches)]
        self._rows = loader.rows
        self._batch_rows = loader.batch_rows
        self._strategy = strategy
        loader.close()

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Return {eval/NAME: mean over the batches}. All hosts call this together."""
        found = [self._metrics(state, number) for number in range(len(self._batches))]
        return {
            f"eval/{name}": float(np.mean([metrics[name] for metrics in found]))
            for name in found[0]
        }

    def _metrics(self, state: TrainState, number: int) -> dict[str, Any]:
        batch = global_batch(
            self._batches[number], self._strategy.batch_sharding(), self._rows, self._batch_rows
        )
        metrics = self._program(state["params"], state["frozen"], batch, np.uint32(number))
        return jax.device_get(metrics)
