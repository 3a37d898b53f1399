"""Define rewards as users write them, for the tests: good ones, and ones that fail as their
metadata specify."""

import os
import sys
import time

import numpy as np

from blip3o_jax.rl.rewards.reward import Scores


def brightness(images_BHWC, prompts, metadata, scale="1"):
    del prompts, metadata
    return images_BHWC.mean(axis=(1, 2, 3)) / 255 * float(scale)


def obedient(images_BHWC, prompts, metadata):
    """Return the brightness, and one part: the length of the prompt. `do` names the failure."""
    scores_B = brightness(images_BHWC, prompts, metadata)
    for row, asked in enumerate(metadata):
        match asked.get("do"):
            case "hang":
                time.sleep(600)
            case "crash":
                os._exit(3)
            case "raise":
                raise RuntimeError("no mood\nat all")
            case "nan":
                scores_B[row] = np.nan
            case "huge":
                scores_B[row] = 1e7
            case "short":
                scores_B = scores_B[:-1]
            case "large":
                scores_B[row] = 1e6
            case "infinite":
                scores_B[row] = -np.inf
            case "beyond float32":
                scores_B[row] = 1e300
            case "short part":
                return Scores(scores_B, {"length": scores_B[1:]})
            case "column":
                return Scores(scores_B[:, None])
            case "words":
                return Scores(np.array(["good"] * len(scores_B)))
            case "nothing":
                return None
            case "exit":
                sys.exit(2)
            case "once" if not os.path.exists(asked["path"]):
                with open(asked["path"], "w"):
                    os._exit(4)
    return Scores(scores_B, {"length": np.array([len(prompt) for prompt in prompts], np.float32)})


def any_options(images_BHWC, prompts, metadata, **options):
    return brightness(images_BHWC, prompts, metadata) + len(options)


def with_threshold(images_BHWC, prompts, metadata, threshold):
    return brightness(images_BHWC, prompts, metadata) > float(threshold)


def of_images_alone(images_BHWC):
    return brightness(images_BHWC, None, None)


def light(images_BHWC, prompts, metadata):
    """Return 1 where nothing heavy is imported and nothing makes threads."""
    del images_BHWC, prompts, metadata
    import cv2

    heavy = {"jax", "tensorflow", "torch"} & set(sys.modules)
    assert not heavy, heavy
    assert cv2.getNumThreads() == 1
    assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert len(os.listdir("/proc/self/task")) <= 2, (
        "the one that waits for the parent's end, and this"
    )
    return [1.0]


not_callable = 3
