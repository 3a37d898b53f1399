"""Score the text of an image against the text that its prompt quotes. A recogniser reads the image;
its text is compared with the text between double quotes.

    reference    1 - d / len(target), d = min(distance, len(target)), or 0 where the text that was
                 read contains the target
    strict       1 - distance / max(len(target), len(read))

`distance` is Levenshtein's: insertions, deletions and substitutions. The reference, the published
reward of BLIP3o-NEXT (arXiv 2510.15857) and Flow-GRPO (arXiv 2505.05470), gives 1 for the word
among other characters, which policies exploit; `strict` counts every further character, and is 1
for exactly the asked text only.

Deviations from the published reward:
1. Of several quoted spans the published one takes the first. Here `reference` is the mean over the
   spans; `strict` compares all of them, joined in the order with the smallest distance, with all
   that was read.
2. `strict` reads line by line from the top and each line from the left, independent of the
   recogniser's order.
3. Both compare texts in the form of ocr_text.py, where characters that the recogniser cannot
   distinguish are equal; the published one folds case and drops spaces only, so that a curly
   apostrophe costs an edit.
4. Small images are enlarged and get a border, since the detector misses letters at the very edge.

Shape suffixes: B images, H height, W width, C colour channels.
"""

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.config.errors import install_command
from blip3o_jax.rl.rewards.ocr_text import normalise, unreadable
from blip3o_jax.rl.rewards.options import choice, flag, number
from blip3o_jax.rl.rewards.reward import Scores

QUOTES = dict.fromkeys(
    map(ord, "\u201c\u201d\u201e\u201f\u00ab\u00bb\uff02"), '"'
)  # typographic ones, to straight ones
MAX_REORDERED = 4  # spans tried in every order; more are compared in the order of the prompt


@dataclasses.dataclass(frozen=True)
class TextLine:
    """Hold the text that was read in one place. `box`: x0, y0, x1, y1 in pixels."""

    text: str
    confidence: float
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Hold the comparison of the text that was read with the text that was asked."""

    score: float  # in [0, 1]
    distance: int  # edits between what was read and what was asked; of several spans their sum
    exact: bool


Reader = Callable[[np.ndarray], Sequence[TextLine]]


def create(
    scoring: str = "strict",
    min_side: str = "128",
    border: str = "0.1",
    detect: str = "true",
    min_confidence: str = "0.5",
) -> "Ocr":
    """Create the reward for the registry.

    `scoring` is strict or reference. Images are enlarged until their shorter side has `min_side`
    pixels, and get a border of `border` times their side. `detect=false` reads the whole image as
    one line of text. Lines below `min_confidence` are ignored (strict only).
    """
    for package in ("rapidocr", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"reward ocr needs the package {package}: {install_command('rl')}")
    reader = Recogniser(
        min_side=number("ocr", "min_side", min_side, int, 16, 4096),
        border=number("ocr", "border", border, float, 0, 1),
        detect=flag("ocr", "detect", detect),
    )
    compare = {"strict": strict, "reference": reference}[
        choice("ocr", "scoring", scoring, ("strict", "reference"))
    ]
    least = (
        number("ocr", "min_confidence", min_confidence, float, 0, 1) if compare is strict else 0.0
    )
    return Ocr(reader, compare, least)


@dataclasses.dataclass(frozen=True)
class Ocr:
    """Score the text of images. Parts: `exact` (0 or 1), `distance` (edits), `confidence` (of the
    text that was read, a mean over its characters)."""

    read: Reader
    compare: Callable[[Sequence[TextLine], Sequence[str]], Comparison]
    min_confidence: float = 0.0

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        del metadata
        quoted(prompt)

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        del metadata
        found, confidence = [], []
        for image_HWC, prompt in zip(images_BHWC, prompts, strict=True):
            lines = [line for line in self.read(image_HWC) if line.confidence > self.min_confidence]
            found.append(self.compare(lines, quoted(prompt)))
            weight = sum(len(line.text) for line in lines)
            confidence.append(
                sum(line.confidence * len(line.text) for line in lines) / weight if weight else 0.0
            )
        parts = {
            "exact": [c.exact for c in found],
            "distance": [c.distance for c in found],
            "confidence": confidence,
        }
        return Scores(
            np.array([c.score for c in found], np.float32),
            {name: np.array(v, np.float32) for name, v in parts.items()},
        )


def quoted(prompt: str) -> tuple[str, ...]:
    """Return the texts between double quotes, straight or typographic. UserError where there is
    none, an empty one, a quote that is not closed, or letters that cannot be read."""
    outside_and_inside = prompt.translate(QUOTES).split('"')
    spans = tuple(outside_and_inside[1::2])
    shown = repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")
    if not spans:
        raise UserError(
            f"reward ocr: prompt {shown} quotes no text: write it between double quotes, as in a "
            'sign "OPEN"'
        )
    if len(outside_and_inside) % 2 == 0:
        raise UserError(
            f"reward ocr: prompt {shown} opens a double quote that it does not close: close it or "
            "take it out"
        )
    if not all(normalise(span) for span in spans):
        raise UserError(
            f"reward ocr: prompt {shown} has empty quotes, or quotes "
            "characters that the recogniser cannot read: "
            "write the text to be drawn into them"
        )
    if letters := unreadable("".join(spans)):
        raise UserError(
            f"reward ocr: prompt {shown} quotes {letters[:20]!r}, which the recogniser has no "
            "characters for: "
            "it reads Latin, Greek, Chinese and Japanese"
        )
    return spans


def strict(lines: Sequence[TextLine], spans: Sequence[str]) -> Comparison:
    """Return the score of all text read against all text asked: each missing, wrong or surplus
    character costs one edit."""
    read = "".join(normalise(line.text) for line in in_reading_order(lines))
    targets = [normalise(span) for span in spans]
    orders = itertools.permutations(targets) if len(targets) <= MAX_REORDERED else [targets]
    distance = min(levenshtein(read, target) for target in {"".join(order) for order in orders})
    longest = max(len(read), sum(map(len, targets)))
    return Comparison(1 - distance / longest, distance, distance == 0)


def reference(lines: Sequence[TextLine], spans: Sequence[str]) -> Comparison:
    """Score as published, in the recogniser's own order of lines."""
    read = normalise("".join(line.text for line in lines))
    targets = [normalise(span) for span in spans]
    distances = [
        0 if target in read else min(levenshtein(read, target), len(target)) for target in targets
    ]
    score = sum(1 - d / len(target) for d, target in zip(distances, targets, strict=True)) / len(
        targets
    )
    return Comparison(score, sum(distances), not any(distances))


def in_reading_order(lines: Sequence[TextLine]) -> list[TextLine]:
    """Sort lines into rows from the top, each row from the left. A line belongs to the row whose
    first line reaches below its middle."""
    rows: list[list[TextLine]] = []
    for line in sorted(lines, key=lambda line: line.box[1] + line.box[3]):
        if rows and (line.box[1] + line.box[3]) / 2 < rows[-1][0].box[3]:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box[0])]


def levenshtein(a: str, b: str) -> int:
    """Return the least number of insertions, deletions and substitutions of characters that turn
    `a` into `b`.
    """
    before = list(range(len(b) + 1))  # from a[:i] to each b[:j]
    for i, char in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (char != other)))
        before = row
    return before[-1]


class Recogniser:
    """Read text with PaddleOCR's detection and recognition models (PP-OCR), which rapidocr's wheel
    contains, on one thread. They are loaded with the first image, so that a process that only
    checks prompts never loads them."""

    def __init__(self, min_side: int = 128, border: float = 0.1, detect: bool = True):
        self.min_side = min_side
        self.border = border
        self.detect = detect
        self._engine: Any = None

    def __call__(self, image_HWC: np.ndarray) -> list[TextLine]:
        """Return the lines of text in a uint8 RGB image [H, W, 3], in the recogniser's order; boxes
        in pixels of the image that the recogniser gets."""
        self._engine = self._engine or _engine()
        shown_HWC = self._shown(image_HWC)
        found = self._engine(shown_HWC, use_det=self.detect, use_cls=False, use_rec=True)
        if found.txts is None:
            return []
        whole = np.array([(0, 0), shown_HWC.shape[1::-1]])
        corners = found.boxes if self.detect else [whole] * len(found.txts)
        boxes = [
            (*np.min(points, axis=0).tolist(), *np.max(points, axis=0).tolist())
            for points in corners
        ]
        return [
            TextLine(*line)
            for line in zip(found.txts, map(float, found.scores), boxes, strict=True)
        ]

    def _shown(self, image_HWC: np.ndarray) -> np.ndarray:
        """Return the image with its border, enlarged, in the channel order that rapidocr takes
        arrays in (BGR).
        """
        side = min(image_HWC.shape[:2])
        bgr_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
        width = round(self.border * side)
        framed_HWC = cv2.copyMakeBorder(bgr_HWC, width, width, width, width, cv2.BORDER_REPLICATE)
        scale = max(self.min_side / side, 1)
        return cv2.resize(framed_HWC, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def _engine() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
    import rapidocr

    return rapidocr.RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": 0.0,
            "Global.use_cls": False,
            # The defaults enlarge every image to 736 pixels at least, where letters as high as the
            # image are not seen any more.
            "Det.limit_type": "max",
            "Det.limit_side_len": 512,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
