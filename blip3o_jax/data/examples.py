"""Convert a record to the arrays of one example. Picklable, since worker processes run it.

    field              arrays
    pixels             `pixels` uint8 [P, Q, 3], the autoencoder's view (nearest of `model.sizes`)
    tokenizer_pixels   `tokenizer_pixels` uint8 [T, T, 3], the vision tokenizer's view
    caption            `text_ids` int32 [L], `text_mask` bool [L]
    row                `tokens`, `loss_mask`, `segment_ids`, `positions` [L] and `image_span` []
                       (data/sequence.py)

A record that comes with the frozen encoders' outputs yields `codes` and `latents` in place of both
views.

With R = `model.editing.reference_slots`, rows of every task mix in a batch: the row also has
`target` [], `reference_span` and `reference_mask` [R], and each view has its `reference_*` [R,
...]. Missing images are zeros.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import DataConfig, ModelConfig
from blip3o_jax.data import images, sequence
from blip3o_jax.data.encoded import EncodedRecord
from blip3o_jax.data.record import BadRecord, Record, RowTooLong
from blip3o_jax.text.vocabulary import Vocabulary

FIELDS = ("pixels", "tokenizer_pixels", "caption", "row")
_VIEWS = {"pixels", "tokenizer_pixels"}
Views = tuple[np.ndarray, np.ndarray]  # of one image: the autoencoder's and the vision tokenizer's


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Build examples with the given `fields` of FIELDS from records. `vocabulary` is required for
    caption and row.
    """

    fields: tuple[str, ...]
    model: ModelConfig
    data: DataConfig
    vocabulary: Vocabulary | None = None

    def _vocab(self) -> Vocabulary:
        assert self.vocabulary is not None, "the fields caption and row need a vocabulary"
        return self.vocabulary

    def __call__(self, record: Record) -> dict[str, np.ndarray]:
        example: dict[str, Any] = {}
        if _VIEWS & set(self.fields):
            example |= (
                record.outputs if isinstance(record, EncodedRecord) else self._views_of(record)
            )
        if "caption" in self.fields:
            example |= sequence.caption_row(
                self._vocab(),
                record.caption,
                self.data.max_length,
                record.key,
                self.data.too_long == "truncate",
            )
        if "row" in self.fields:
            example |= self._row(record, self.data.max_length)
        return example

    def join(
        self, examples: Sequence[dict[str, np.ndarray]], records: Sequence[Record]
    ) -> dict[str, np.ndarray]:
        """Pack `data.pack` examples, made of `records`, into one row. Raises RowTooLong if they do
        not fit; with data.too_long="truncate" the longest ones are built again from less text."""
        keys = [record.key for record in records]
        try:
            return sequence.pack_rows(examples, keys, self.data.max_length)
        except RowTooLong as error:
            if self.data.too_long != "truncate":
                raise
            length = sequence.max_example_length(examples, self.data.max_length)
            try:
                examples = [
                    example | self._row(record, length)
                    # Only the examples that are longer than their part of the row are built again.
                    if np.count_nonzero(example["segment_ids"]) > length
                    else example
                    for example, record in zip(examples, records, strict=True)
                ]
            except RowTooLong:  # too long even without any text
                raise error from None
            return sequence.pack_rows(examples, keys, self.data.max_length)

    def _row(self, record: Record, max_length: int) -> dict[str, np.ndarray]:
        tokenizer = self.model.tokenizer
        reference_slots = self.model.editing.reference_slots
        lengths: dict[str, Any] = {
            "max_length": max_length,
            "pool_scale": tokenizer.pool_scale,
            "key": record.key,
            "truncate": self.data.too_long == "truncate",
        }
        if reference_slots:
            return sequence.task_row(
                self._vocab(),
                self.model.template,
                record.task,
                record.caption,
                record.answer,
                references=len(record.references),
                reference_slots=reference_slots,
                num_image_tokens=tokenizer.num_tokens,
                **lengths,
            )
        if record.task != "t2i":
            raise BadRecord(
                record.shard,
                record.key,
                f"task {record.task} shows images: set model.editing.reference_slots",
            )
        return sequence.text_to_image_row(
            self._vocab(),
            self.model.template,
            record.caption,
            image=tokenizer.num_tokens,
            **lengths,
        )

    def images_of(self, record: Record) -> list[tuple[int, Views]]:
        """Return both views of a record's images with their slots: 0 is the target image, the
        references follow. All have the size that is nearest to the first's.
        """
        found = [(0, record.image)] if record.task != "understand" else []
        found += enumerate(record.references[: self.model.editing.reference_slots], 1)
        pixels = [images.decode(data, max_pixels=self.data.max_pixels) for _, data in found]
        size = self.model.nearest_size(*pixels[0].shape[:2])
        return [
            (slot, self._views(image, size)) for (slot, _), image in zip(found, pixels, strict=True)
        ]

    def _views_of(self, record: Record) -> dict[str, np.ndarray]:
        """Return the views of the target image and, with reference slots, of the references."""
        found = dict(self.images_of(record))
        blank = tuple(np.zeros_like(view) for view in next(iter(found.values())))
        views = [found.get(slot, blank) for slot in range(1 + self.model.editing.reference_slots)]
        named = {
            "pixels": [view for view, _ in views],
            "tokenizer_pixels": [view for _, view in views],
        }
        named = {name: column for name, column in named.items() if name in self.fields}
        references = {
            f"reference_{name}": np.stack(column[1:])
            for name, column in named.items()
            if "row" in self.fields and column[1:]
        }
        return {name: column[0] for name, column in named.items()} | references

    def _views(self, image_HWC: np.ndarray, size: tuple[int, int]) -> Views:
        return images.views(image_HWC, size, self.model.tokenizer.image_size, self.data.crop)
