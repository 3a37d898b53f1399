"""Encode with the dual encoder of a run of stage `contrastive`. Imported only where the reward is
made, since it imports jax.

Shape suffixes: B images, H height, W width, C colour channels, L tokens, D width of the embedding.
"""

import jax
import numpy as np
from flax import nnx

from blip3o_jax.blip3o import Blip3o, scale_pixels
from blip3o_jax.config import MeshConfig, UserError
from blip3o_jax.data.images import crop_and_resize
from blip3o_jax.data.record import RowTooLong
from blip3o_jax.data.sequence import caption_row
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train import checkpoint as checkpoints

CONTRASTIVE_PARTS = ("tokenizer", "text_tower")


class ContrastiveEncoder:
    """Load the encoder from the run's workdir, its checkpoints directory or one step, on one
    device. `batch`: images encoded at once."""

    def __init__(self, path: str, batch: int):
        root, _ = checkpoints.find(path)
        config = checkpoints.read_config(root)
        if config.stage != "contrastive":
            raise UserError(
                f"reward clip: {root} was written by stage {config.stage!r}; give a run of stage "
                "'contrastive'"
            )
        strategy = Strategy.of(MeshConfig(data=1, fsdp=1, strategy="dp"), jax.local_devices()[:1])
        self._params = checkpoints.restore_parts(path, strategy, CONTRASTIVE_PARTS)
        self._graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: Blip3o(config.model, CONTRASTIVE_PARTS, seed=0))
        )
        text = checkpoints.stored_text(root, config.model.text)
        self._vocabulary = Vocabulary(load_tokenizer(text), config.model.tokenizer.codebook_size)
        self._size = config.model.tokenizer.image_size
        self._length = config.data.max_length
        self._batch = batch
        self._embed_images = strategy.jit(self._pooled)
        self._embed_text = strategy.jit(self._tower)

    def images(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Return the embeddings of uint8 images, float32 [B, D]. Batches smaller than `batch` are
        padded, so that one program is compiled."""
        shown = [crop_and_resize(image, self._size) for image in images_BHWC]
        padded_BHWC = np.stack(shown + [shown[-1]] * (self._batch - len(shown)))
        return np.asarray(self._embed_images(self._params, padded_BHWC), np.float32)[: len(shown)]

    def text(self, prompt: str) -> np.ndarray:
        try:
            row = caption_row(self._vocabulary, prompt, self._length)
        except RowTooLong as e:
            raise UserError(
                f"reward clip: prompt {prompt[:60]!r}... is {e.length} tokens, the encoder takes "
                f"{self._length}: shorten it"
            ) from e
        return np.asarray(
            self._embed_text(self._params, row["text_ids"][None], row["text_mask"][None]),
            np.float32,
        )[0]

    def _pooled(self, params: nnx.State, pixels_BHWC: jax.Array) -> jax.Array:
        tokenizer = nnx.merge(self._graphdef, params).tokenizer
        return tokenizer.embed_image(scale_pixels(pixels_BHWC)).pooled_BD

    def _tower(
        self, params: nnx.State, text_ids_BL: jax.Array, text_mask_BL: jax.Array
    ) -> jax.Array:
        return nnx.merge(self._graphdef, params).text_tower(text_ids_BL, text_mask_BL)
