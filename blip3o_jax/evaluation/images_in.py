"""Suites of what the model does with images that it is shown, on the embedded data set.

    shapes_edit   edits of held-out scenes: right where the edit was done and the rest is as it was (data/shapes/edit_scorer.py)
    shapes_qa     questions about held-out scenes: right where the answer is the same words (data/shapes/questions.py)
    reconstruct   held-out scenes drawn again from their tokens: PSNR in dB and SSIM; right where the scorer of text to image
                  finds in it what the scene's caption asks for

Baselines: an edit's input unchanged; the most frequent answer of a question's kind; for
reconstruction another scene.
"""

import collections
from collections.abc import Sequence

import cv2
import numpy as np

from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import edit_scorer, edits, questions, render
from blip3o_jax.evaluation.judged import Judged, Prompt, tally
from blip3o_jax.evaluation.shapes import COUNT, check_size
from blip3o_jax.pipeline import Request


class ShapesEdit:
    def prompts(self, count: int | None, seed: int = 0) -> list[Prompt]:
        return edits.prompts("test", count or COUNT, seed)

    def requests(self, asked: Sequence[Prompt], image_size: int) -> list[Request]:
        check_size("shapes_edit", image_size)
        inputs = self._pictures(asked, image_size, "before")
        size = (image_size, image_size)
        return [
            Request("edit", p["caption"], (image,), size)
            for p, image in zip(asked, inputs, strict=True)
        ]

    def judge(self, images_BHWC: np.ndarray, asked: Sequence[Prompt]) -> Judged:
        """`psnr` is that of what was to stay."""
        inputs = self._pictures(asked, images_BHWC.shape[1], "before")
        verdicts = [
            edit_scorer.score_edit(*pair, p)
            for *pair, p in zip(inputs, images_BHWC, asked, strict=True)
        ]
        told = [f"{v.reason} ({v.psnr:.1f} dB)" for v in verdicts]
        return tally([v.correct for v in verdicts], told, asked, psnr=[v.psnr for v in verdicts])

    def baselines(
        self, images_BHWC: np.ndarray, asked: Sequence[Prompt], seed: int = 0
    ) -> dict[str, Judged]:
        size = images_BHWC.shape[1]
        pictures = {"real_images": "after", "input_unchanged": "before"}
        return {
            name: self.judge(self._pictures(asked, size, side), asked)
            for name, side in pictures.items()
        }

    def _pictures(self, asked: Sequence[Prompt], image_size: int, side: str) -> np.ndarray:
        """Drawn anew from the prompts' keys."""
        return np.stack([render(getattr(_edit(p["key"]), side), image_size) for p in asked])


class ShapesQa:
    def prompts(self, count: int | None, seed: int = 0) -> list[Prompt]:
        return questions.prompts("test", count or COUNT, seed)

    def requests(self, asked: Sequence[Prompt], image_size: int) -> list[Request]:
        return [
            Request("understand", p["caption"], (render(_question(p["key"]).scene, image_size),))
            for p in asked
        ]

    def judge(self, said: Sequence[str], asked: Sequence[Prompt]) -> Judged:
        right = [questions.right(words, p["answer"]) for words, p in zip(said, asked, strict=True)]
        return tally(
            right,
            [f"{words!r}, asked {p['answer']!r}" for words, p in zip(said, asked, strict=True)],
            asked,
        )

    def baselines(
        self, said: Sequence[str], asked: Sequence[Prompt], seed: int = 0
    ) -> dict[str, Judged]:
        """The most frequent answer of each kind, among these very questions: the best that a
        constant can do.
        """
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for p in asked:
            counts[p["category"]][p["answer"]] += 1
        return {
            "most_frequent_answer": self.judge(
                [counts[p["category"]].most_common(1)[0][0] for p in asked], asked
            )
        }


class Reconstruct:
    def prompts(self, count: int | None, seed: int = 0) -> list[Prompt]:
        return shapes.prompts("test", count or COUNT, seed)

    def requests(self, asked: Sequence[Prompt], image_size: int) -> list[Request]:
        check_size("reconstruct", image_size)
        size = (image_size, image_size)
        return [
            Request("reconstruct", "", (image,), size)
            for image in self._originals(asked, image_size)
        ]

    def judge(self, images_BHWC: np.ndarray, asked: Sequence[Prompt]) -> Judged:
        originals = self._originals(asked, images_BHWC.shape[1])
        verdicts = [shapes.score(image, p) for image, p in zip(images_BHWC, asked, strict=True)]
        pairs = list(zip(originals, images_BHWC, strict=True))
        found = [(edit_scorer.psnr(*pair), ssim(*pair)) for pair in pairs]
        told = [
            f"{db:.1f} dB, SSIM {similar:.3f}, {v.reason}"
            for (db, similar), v in zip(found, verdicts, strict=True)
        ]
        psnrs, ssims = zip(*found, strict=True)
        return tally([v.correct for v in verdicts], told, asked, psnr=psnrs, ssim=ssims)

    def baselines(
        self, images_BHWC: np.ndarray, asked: Sequence[Prompt], seed: int = 0
    ) -> dict[str, Judged]:
        originals = self._originals(asked, images_BHWC.shape[1])
        return {
            "real_images": self.judge(originals, asked),
            "images_of_other_prompts": self.judge(np.roll(originals, 1, 0), asked),
        }

    def _originals(self, asked: Sequence[Prompt], image_size: int) -> np.ndarray:
        return np.stack([render(shapes.sample(*_place(p["key"])), image_size) for p in asked])


def ssim(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of uint8 images: windows with a deviation of 1.5
    pixels, mean over colours.
    """
    a, b = (x.astype(np.float64) for x in (a_HWC, b_HWC))
    blur = lambda x: cv2.GaussianBlur(x, (11, 11), 1.5)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = (
        blur(a * a) - mean_a**2,
        blur(b * b) - mean_b**2,
        blur(a * b) - mean_a * mean_b,
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        np.mean(
            (2 * mean_a * mean_b + c1)
            * (2 * both + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    )


def _place(key: str) -> tuple[int, int, str]:
    """ "test-0-000012" -> (0, 12, "test")."""
    split, seed, index = key.rsplit("-", 2)
    return int(seed), int(index), split.rpartition("-")[2]


def _edit(key: str) -> edits.Edit:
    return edits.sample_edit(*_place(key))


def _question(key: str) -> questions.Question:
    return questions.sample_question(*_place(key))
