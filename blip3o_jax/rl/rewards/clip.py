"""Score the similarity of image and prompt: the cosine of their embeddings by a dual encoder from a
local directory.

    score = <x, y> / (|x| |y|),    x of the image, y of the prompt

A directory is either a run of stage `contrastive` of this package, or one that `save_pretrained` of
the transformers library wrote, with a CLIP or a SigLIP and its processor. The scores of different
encoders are not comparable: a trained SigLIP's are around 0.1, a CLIP's around 0.3.

Shape suffixes: B images, H height, W width, C colour channels, D width of the embedding.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import first_line, install_command
from blip3o_jax.rl.rewards.options import number
from blip3o_jax.rl.rewards.reward import Reward, Scores

# Size of the cache of prompts' embeddings: all images of a group have the same prompt.
TEXTS_KEPT = 4096


class DualEncoder(Protocol):
    """Embed images and prompts in one space."""

    def images(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Return the embeddings of uint8 images, float32 [B, D], of any length; B is at most the
        encoder's `batch`."""
        ...

    def text(self, prompt: str) -> np.ndarray:
        """Return the embedding of a prompt, float32 [D], of any length. UserError for one that is
        too long."""
        ...


def create(path: str = "", batch: str = "4") -> "Clip":
    """Make the reward for the registry, `clip` and of `siglip`. `batch`: images that are encoded at
    once."""
    size = number("clip", "batch", batch, int, 1, 4096)
    if not path:
        raise UserError(
            "reward clip: set its option path to a contrastive run or to a transformers directory"
        )
    config = pathlib.Path(path) / "config.json"
    if config.is_file() and "model_type" in checksums.read_json(config, edited=True):
        return Clip(TransformersEncoder(path), size)
    from blip3o_jax.rl.rewards.contrastive import ContrastiveEncoder

    return Clip(ContrastiveEncoder(path, size), size)


class Clip(Reward):
    """Score by the cosine similarity of image and prompt."""

    def __init__(self, encoder: DualEncoder, batch: int):
        self._images, self._batch = encoder.images, batch
        self._text = functools.lru_cache(maxsize=TEXTS_KEPT)(
            lambda prompt: _unit(encoder.text(prompt))
        )

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        del metadata
        self._text(prompt)

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        del metadata
        starts = range(0, len(images_BHWC), self._batch)
        x_BD = _unit(
            np.concatenate(
                [self._images(images_BHWC[start : start + self._batch]) for start in starts]
            )
        )
        y_BD = np.stack([self._text(prompt) for prompt in prompts])
        return Scores(np.einsum("bd,bd->b", x_BD, y_BD))


class TransformersEncoder:
    """Encode with CLIP, SigLIP or SigLIP2 and its processor. Never downloads."""

    def __init__(self, path: str):
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"reward clip: {path} is read by {package}: {install_command('convert')}"
                )
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        try:
            # Without trust_remote_code=False, transformers asks on the terminal whether to run
            # code from the directory.
            local = {"local_files_only": True, "trust_remote_code": False}
            self._model = transformers.AutoModel.from_pretrained(path, **local).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
            self._processor = transformers.AutoImageProcessor.from_pretrained(path, **local)
        except (OSError, ValueError) as e:
            raise UserError(f"reward clip: {path} cannot be read: {first_line(e)[:200]}") from e
        if not hasattr(self._model, "get_text_features"):
            raise UserError(
                f"reward clip: {path} holds a {type(self._model).__name__}, which does not embed "
                "images and texts"
            )
        text = self._model.config.text_config
        self._length = text.max_position_embeddings
        # SigLIP was trained on padded texts and attends to the padding; CLIP masks it.
        self._padding = (
            "max_length" if self._model.config.model_type.startswith("siglip") else False
        )
        self._no_grad = torch.inference_mode

    def images(self, images_BHWC: np.ndarray) -> np.ndarray:
        pixels = self._processor(
            images=list(images_BHWC), return_tensors="pt", input_data_format="channels_last"
        )
        with self._no_grad():
            return self._model.get_image_features(**pixels).pooler_output.float().numpy()

    def text(self, prompt: str) -> np.ndarray:
        tokens = self._tokenizer(
            [prompt],
            padding=self._padding,
            max_length=self._length,
            truncation=False,
            return_tensors="pt",
        )
        count = tokens["input_ids"].shape[1]
        if count > self._length:
            raise UserError(
                f"reward clip: prompt {prompt[:60]!r}... is {count} tokens, the encoder takes "
                f"{self._length}: shorten it"
            )
        with self._no_grad():
            return self._model.get_text_features(**tokens).pooler_output[0].float().numpy()


def _unit(x_BD: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1; zeros stay zeros."""
    return x_BD / np.maximum(np.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)
