"""Hold the contents of a report: scores, samples, curves, reconstructions and the run's settings.

Images are uint8 arrays: HWC, three channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Score:
    """Hold the fractions in [0, 1] of images that show what their prompt asks, over `prompts`
    prompts."""

    name: str
    prompts: int
    model: float  # the model's samples
    random: float  # images that have nothing to do with the prompt
    real: float  # real images with their captions: the accuracy of the scorer itself


@dataclasses.dataclass(frozen=True)
class Sample:
    """Hold one image of the model with its prompt and outcome."""

    prompt: str
    category: str
    image_HWC: np.ndarray
    correct: bool
    reason: str  # what the scorer found, in a few words


@dataclasses.dataclass(frozen=True)
class Curve:
    """Hold one metric over the steps of a stage, and where it was computed on held-out records too,
    (steps, values) of those; non-finite values are left out of the chart."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    held_out: tuple[Sequence[int], Sequence[float]] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Hold the curves of one training stage."""

    name: str
    curves: Sequence[Curve]
    note: str = ""  # one sentence under the heading


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Hold an image and its reconstruction."""

    original_HWC: np.ndarray
    reconstruction_HWC: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """Hold an image and its token ids."""

    image_HWC: np.ndarray
    ids_HW: np.ndarray  # codebook indices, one per image token
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Before:
    """Hold the scores and samples of the model before its last stage, for the same prompts in the
    order of `Scored`."""

    overall: Score
    categories: Sequence[Score]
    samples: Sequence[Sample]


@dataclasses.dataclass(frozen=True)
class ImageTaskExample:
    """Hold a reference image and the model's output for it: another image, or text."""

    image_HWC: np.ndarray
    instruction: str
    output_HWC: np.ndarray | None
    answer: str
    correct: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """Hold the results of a suite with reference images: the fractions of correct outputs of the
    model and of the baseline, and examples."""

    name: str
    note: str
    baseline: str  # in words
    scores: Sequence[
        tuple[str, int, float, float]
    ]  # category, number of prompts, model's fraction, baseline's; overall comes last
    examples: Sequence[ImageTaskExample]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Hold the image sampled for a held-out caption, the held-out picture of that caption, and the
    picture of the training set that is nearest to the sample."""

    caption: str
    sample_HWC: np.ndarray
    truth_HWC: np.ndarray
    nearest_HWC: np.ndarray
    nearest_caption: str
    distance: float  # of sample and nearest picture: root mean square error over pixels, of 255


@dataclasses.dataclass(frozen=True)
class HeldOutCaptions:
    """Hold the samples for held-out captions: `matched` is the fraction of samples that are nearer
    to the picture of their caption than to those of the other captions of a group of `choices`."""

    matched: float
    choices: int
    comparisons: Sequence[Comparison]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Hold the scores and the scored samples, before and after the last stage."""

    overall: Score
    categories: Sequence[Score]
    samples: Sequence[Sample]
    before: Before


@dataclasses.dataclass(frozen=True)
class Results:
    """Hold the contents of a report: of samples that are `scored`, or of `held_out` captions. The
    prompts of the samples and the images of `reconstructions` must be held out from training, as
    the page says."""

    title: str
    subtitle: str
    stages: Sequence[Stage]
    reconstructions: Sequence[Reconstruction]
    token_maps: Sequence[TokenMap]
    seconds: Mapping[str, float]  # of every part of the run, in order
    facts: Mapping[
        str, str
    ]  # shown next to the headline: {"parameters": "12.3 M", "peak memory": "3.1 GiB"}
    configuration: Mapping[str, Any]  # nested; each top-level key gets its own table
    versions: Mapping[str, str]
    scored: Scored | None = None
    image_tasks: Sequence[ImageTask] = ()
    held_out: HeldOutCaptions | None = None
