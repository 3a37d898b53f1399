"""Run a process of the reward pool. Imports no library at the top that makes threads: `start` sets
their number first.

The rewards are made once a process. Where that fails, the process stays, and every task raises the
reason.
"""

import os
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blip3o_jax.config import RewardConfig, UserError

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.rl.rewards.weighted import Outcome, WeightedRewards

# The pool has as many processes as cores to use; more threads would only take turns.
# JAX must leave the accelerator to the run: NPROC is what XLA takes for the number of cores.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_PLATFORMS": "cpu",
    "ORT_DISABLE_TELEMETRY": "1",
}

_made: "WeightedRewards | Exception"


def start(configs: tuple[RewardConfig, ...]) -> None:
    """Run first in each process."""
    os.environ.update(ENVIRONMENT)
    make(configs, threads=1)


def make(configs: tuple[RewardConfig, ...], threads: int) -> None:
    """Make the rewards of this process. OpenCV gets `threads`."""
    global _made
    try:
        import cv2

        from blip3o_jax.rl.rewards.weighted import WeightedRewards

        cv2.setNumThreads(threads)
        _made = WeightedRewards(configs)
    except UserError as e:
        _made = e
    except Exception:
        _made = RuntimeError(f"a reward cannot be made:\n{traceback.format_exc()}")


def score(
    images_BHWC: "np.ndarray", prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> tuple["Outcome", float]:
    """Return what the rewards give, and the seconds they took."""
    made, began = rewards(), time.monotonic()
    return made(images_BHWC, prompts, metadata), time.monotonic() - began


def check(prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise UserError for rewards that could not be made, and for the first prompt that one of
    them cannot score.
    """
    made = rewards()
    for text, metadata in prompts:
        made.check(text, metadata)


def rewards() -> "WeightedRewards":
    """Return the rewards of this process. Raises why they could not be made."""
    if isinstance(_made, Exception):
        raise _made
    return _made
