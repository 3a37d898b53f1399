"""Run a process of the reward pool.

Libraries that create threads are imported inside functions: `start` first sets their number. The
rewards are created once in each process. If that fails, the process stays, and every call raises
the reason.
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

# The pool has one process for each core, so that further threads would only compete. JAX must leave
# the accelerator to the run; XLA reads the number of cores from NPROC.
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
    """Set the environment and create the rewards; runs first in each process."""
    os.environ.update(ENVIRONMENT)
    make(configs, threads=1)


def make(configs: tuple[RewardConfig, ...], threads: int) -> None:
    """Create the rewards of this process, with `threads` threads for OpenCV."""
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
    """Return the rewards' outcome, and the seconds that they took."""
    made, began = rewards(), time.monotonic()
    return made(images_BHWC, prompts, metadata), time.monotonic() - began


def check(prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise UserError if the rewards could not be created, or one cannot score a prompt."""
    made = rewards()
    for text, metadata in prompts:
        made.check(text, metadata)


def rewards() -> "WeightedRewards":
    """Return the rewards of this process, or raise the reason why they could not be created."""
    if isinstance(_made, Exception):
        raise _made
    return _made
