"""A caption and an image's tokens as one row of the transformer: the chat template, its layout, and the way back.

One row, for an image of n = 2 tokens (codes 7 and 4), in a row of 15 with the system turn left out; "caption" stands for the
ids of the filled-in user turn, u and a for those of "user\\n" and "assistant\\n":

    tokens       <|im_start|> u caption <|im_end|> \\n <|im_start|> a <im_start> <S0> <I7> <I4> <im_end> <|im_end|> \\n | pad
    index             0       1    2        3      4       5       6      7       8    9   10      11        12     13 | 14
    loss mask         0       0    0        0      0       0       0      0       0    1    1       1         1      1 |  0
    positions         0       1    2        3      4       5       6      7       8    9   10      11        12     13 | 14
    segment ids       1       1    1        1      1       1       1      1       1    1    1       1         1      1 |  0
    image span                                                                    8

- The loss mask is on the label: loss_mask[i] = 1 means that token i is to be predicted, from the hidden state of i - 1. A
  loss over hidden[:-1] and tokens[1:] takes loss_mask[1:]; loss_mask[0] is always 0, nothing comes before token 0.
- The image span is the index of the scale token; the n image tokens follow. The diffusion head is conditioned on the hidden
  states of <S0>, <I7>, <I4>.
- Segment ids tell examples apart where rows are packed, 0 is padding; positions restart at each example and run on
  through the padding.

Legend: B batch, L row length, D width, N image tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import TemplateConfig, UserError, check, check_choice
from blip3o_jax.text.vocabulary import Vocabulary


class RowTooLong(UserError):
    """An example that does not fit in its row. It is refused and never cut: a cut row would lose its image."""

    def __init__(self, key: str, length: int, max_length: int):
        super().__init__(
            f"example {key!r} needs {length} tokens, a row has {max_length}: shorten its caption or raise data.max_length"
        )
        self.key, self.length, self.max_length = key, length, max_length

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from the data workers
        return RowTooLong, (self.key, self.length, self.max_length)


LONGEST_TAIL = 8  # tokens after an image's; three for most tokenizers, more where a line break is several


def most_labels(template: TemplateConfig, num_image_tokens: int) -> int | None:
    """How many labels a row has at most; None: as many as it has tokens."""
    return None if template.supervise_prompt else num_image_tokens + LONGEST_TAIL


def text_to_image_prompt(vocab: Vocabulary, template: TemplateConfig, caption: str, pool_scale: int = 1) -> list[int]:
    """All ids up to and with the scale token: what sampling starts from and what a training row opens with."""
    check(
        "{caption}" in template.generate,
        f"model.template.generate={template.generate!r} has no place for the caption: write {{caption}} into it",
    )
    user = template.generate.replace("{caption}", caption)
    system = _turn(vocab, "system", template.system) if template.system else []
    opening = [vocab.start_of_turn, *vocab.encode("assistant\n"), vocab.image_start, vocab.scale(pool_scale)]
    return [*system, *_turn(vocab, "user", user), *opening]


def _turn(vocab: Vocabulary, role: str, text: str) -> list[int]:
    return [vocab.start_of_turn, *vocab.encode(f"{role}\n{text}"), vocab.end_of_turn, *vocab.encode("\n")]


def text_to_image_row(
    vocab: Vocabulary,
    template: TemplateConfig,
    caption: str,
    image: np.ndarray | int,
    max_length: int,
    pool_scale: int = 1,
    key: str = "",
) -> dict[str, np.ndarray]:
    """One training row.

    image: the codebook indices [N] of the image, or only N: then <I0> holds the places for `insert_image_ids`. key: what
    errors call the example.

    Returns tokens_L int32, loss_mask_L float32, segment_ids_L int32, positions_L int32 and image_span (int32, no
    dimensions) under the keys "tokens", "loss_mask", "segment_ids", "positions" and "image_span".
    Raises RowTooLong, and UserError for codes outside the codebook.
    """
    codes_N = np.zeros(image, np.int32) if np.ndim(image) == 0 else np.asarray(image)
    if codes_N.size and not 0 <= codes_N.min() <= codes_N.max() < vocab.codebook_size:
        raise UserError(
            f"example {key!r} has codes from {codes_N.min()} to {codes_N.max()}, the codebook has {vocab.codebook_size} "
            "entries: were they cached with another vision tokenizer?"
        )
    prompt = text_to_image_prompt(vocab, template, caption, pool_scale)
    tail = [vocab.image_end, vocab.end_of_turn, *vocab.encode("\n")]
    check(
        len(tail) <= LONGEST_TAIL, f"the tokenizer makes {len(tail)} tokens of the end of a turn, at most {LONGEST_TAIL} can be"
    )
    answer = [*vocab.image_ids_from_codes(codes_N), *tail]
    length = len(prompt) + len(answer)
    if length > max_length:
        raise RowTooLong(key, length, max_length)

    index_L = np.arange(max_length, dtype=np.int32)
    real_L = index_L < length
    first_label = 1 if template.supervise_prompt else len(prompt)
    tokens_L = np.full(max_length, vocab.pad_id, np.int32)
    tokens_L[:length] = prompt + answer
    return {
        "tokens": tokens_L,
        "loss_mask": (real_L & (index_L >= first_label)).astype(np.float32),
        "segment_ids": real_L.astype(np.int32),
        "positions": index_L,
        "image_span": np.int32(len(prompt) - 1),
    }


def caption_row(vocab: Vocabulary, caption: str, max_length: int, key: str = "") -> dict[str, np.ndarray]:
    """A caption alone, for the contrastive stage: the end-of-turn token closes it, so that an empty one is not an empty row.

    Returns text_ids_L int32 and text_mask_L bool under the keys "text_ids" and "text_mask". Raises RowTooLong.
    """
    ids = [*vocab.encode(caption), vocab.end_of_turn]
    if len(ids) > max_length:
        raise RowTooLong(key, len(ids), max_length)
    text_ids_L = np.full(max_length, vocab.pad_id, np.int32)
    text_ids_L[: len(ids)] = ids
    return {"text_ids": text_ids_L, "text_mask": np.arange(max_length) < len(ids)}


def hide_prompts(segment_ids_BL: jax.Array, image_span_B: jax.Array, hidden_B: jax.Array) -> jax.Array:
    """`segment_ids_BL` with all before the scale token turned to padding in the hidden rows, of one example each: the image
    tokens then see no caption."""
    before_BL = jnp.arange(segment_ids_BL.shape[1]) < image_span_B[:, None]
    return jnp.where(before_BL & hidden_B[:, None], 0, segment_ids_BL)


def insert_image_ids(tokens_BL: jax.Array, image_span_B: jax.Array, image_ids_BN: jax.Array) -> jax.Array:
    """`tokens_BL` with each row's image ids in the N places after its scale token; the rows must have these places."""

    def row(tokens_L: jax.Array, span: jax.Array, image_ids_N: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(tokens_L, image_ids_N.astype(tokens_L.dtype), span + 1, axis=0)

    return jax.vmap(row)(tokens_BL, image_span_B, image_ids_BN)


def condition_positions(image_span_B: jax.Array, n: int) -> jax.Array:
    """Indices [B, n + 1] of the scale token and the n image tokens after it."""
    return image_span_B[:, None] + jnp.arange(n + 1, dtype=image_span_B.dtype)


def take_span(hidden_BLD: jax.Array, image_span_B: jax.Array, n: int, mode: str = "exact") -> jax.Array:
    """The hidden states [B, n + 1, D] that condition the diffusion head.

    mode "exact": those at `condition_positions`, the scale token and the n image tokens, as sampling has them. "last": the
    last n + 1 of the row, end tokens and padding among them: what the published weights were trained with.
    """
    check_choice("loss.condition_span", mode, ("exact", "last"))
    if mode == "last":
        return hidden_BLD[:, -(n + 1) :]
    return jax.vmap(lambda hidden_LD, span: jax.lax.dynamic_slice_in_dim(hidden_LD, span, n + 1, axis=0))(
        hidden_BLD, image_span_B
    )
