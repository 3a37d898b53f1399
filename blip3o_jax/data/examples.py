"""Record -> the arrays of one example. Picklable, since worker processes run it.

| field            | arrays                                                                                              |
| ---------------- | --------------------------------------------------------------------------------------------------- |
| pixels           | `pixels` uint8 [S, S, 3], the autoencoder's view                                                      |
| tokenizer_pixels | `tokenizer_pixels` uint8 [T, T, 3], the vision tokenizer's view                                       |
| caption          | `text_ids` int32 [L], `text_mask` bool [L]                                                            |
| row              | `tokens`, `loss_mask`, `segment_ids`, `positions` [L] and `image_span` [] (data/sequence.py)          |

A record that comes with the frozen encoders' outputs yields `codes` and `latents` in place of both views.
"""

import dataclasses
from typing import Any

import numpy as np

from blip3o_jax.config import DataConfig, ModelConfig
from blip3o_jax.data import images, sequence
from blip3o_jax.data.encoded import EncodedRecord
from blip3o_jax.data.record import Record
from blip3o_jax.text.vocabulary import Vocabulary

FIELDS = ("pixels", "tokenizer_pixels", "caption", "row")
_VIEWS = {"pixels", "tokenizer_pixels"}


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """`fields` of FIELDS -> one example. `vocabulary` is needed for caption and row only."""

    fields: tuple[str, ...]
    model: ModelConfig
    data: DataConfig
    vocabulary: Vocabulary | None = None

    def __call__(self, record: Record) -> dict[str, np.ndarray]:
        example: dict[str, Any] = {}
        if _VIEWS & set(self.fields):
            if isinstance(record, EncodedRecord):
                example |= {"codes": record.codes, "latents": record.latents}
            else:
                example |= self._views(record)
        if "caption" in self.fields:
            example |= sequence.caption_row(self.vocabulary, record.caption, self.data.max_length, record.key)
        if "row" in self.fields:
            tokenizer = self.model.tokenizer
            example |= sequence.text_to_image_row(
                self.vocabulary,
                self.model.template,
                record.caption,
                image=tokenizer.num_tokens,
                max_length=self.data.max_length,
                pool_scale=tokenizer.pool_scale,
                key=record.key,
            )
        return example

    def _views(self, record: Record) -> dict[str, np.ndarray]:
        image = images.decode(record.image)
        views = images.views(image, self.model.image_size, self.model.tokenizer.encoder.image_size, self.data.crop)
        return {name: view for name, view in zip(("pixels", "tokenizer_pixels"), views, strict=True) if name in self.fields}
