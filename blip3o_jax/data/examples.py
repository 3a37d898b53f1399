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

from blip3o_jax.config import DataConfig, ModelConfig, to_dict
from blip3o_jax.data import images, sequence
from blip3o_jax.data.encoded import EncodedRecord
from blip3o_jax.data.record import BadRecord, Record
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
        # The row first: a text that is too long costs no decoding.
        row = self._row(record) if "row" in self.fields else {}
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
        return example | row

    def join(
        self, examples: Sequence[dict[str, np.ndarray]], records: Sequence[Record]
    ) -> dict[str, np.ndarray]:
        """Pack up to `data.pack` examples, made of `records`, into one row. Raises RowTooLong if
        they do not fit.
        """
        keys = [record.key for record in records]
        return sequence.pack_rows(examples, keys, self.data.max_length, self.data.pack)

    def length(self, record: Record) -> int:
        """Return the tokens of a record's text: of its row, or of its caption alone, in a row
        without limit.
        """
        if "row" not in self.fields:
            return len(self._vocab().encode(record.caption)) + 1  # end-of-turn
        self._check_task(record)
        tokenizer = self.model.tokenizer
        return sequence.example_length(
            self._vocab(),
            self.model.template,
            record.task,
            record.caption,
            record.answer,
            references=len(record.references),
            reference_slots=self.model.editing.reference_slots,
            num_image_tokens=tokenizer.num_tokens,
            pool_scale=tokenizer.pool_scale,
            key=record.key,
            truncate=self.data.too_long == "truncate",
        )

    def length_settings(self) -> list[Any]:
        """Return all that `length` depends on in addition to the record."""
        tokenizer = self.model.tokenizer
        return [
            self._vocab().tokenizer.fingerprint,
            "row" in self.fields,
            to_dict(self.model.template),
            self.model.editing.reference_slots,
            tokenizer.num_tokens,
            self.data.too_long == "truncate",
        ]

    def _check_task(self, record: Record) -> None:
        if record.task != "t2i" and not self.model.editing.reference_slots:
            raise BadRecord(
                record.shard,
                record.key,
                f"task {record.task} shows images: set model.editing.reference_slots",
            )

    def _row(self, record: Record) -> dict[str, np.ndarray]:
        self._check_task(record)
        tokenizer = self.model.tokenizer
        reference_slots = self.model.editing.reference_slots
        lengths: dict[str, Any] = {
            "max_length": self.data.max_length,
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
