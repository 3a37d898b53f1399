"""A prompt and its answer, an image's tokens or text, as one row of the transformer: its layout,
and the way back.

One row, for an image of n = 2 tokens (codes 7 and 4), in a row of 15 with the system turn left out;
"caption" stands for the ids of the filled-in user turn, u and a for those of "user\\n" and
"assistant\\n":

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

With `data.pack` E above 1 a row holds E examples, one after the other (`pack_rows`). Arrays of
ROW_FIELDS lead with the rows, all others with rows and examples until `by_example` makes one
dimension of these.

Legend: B examples of a batch, or its rows; L row length, D width, N image tokens, E examples of a
row.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import TemplateConfig, UserError, check, check_choice
from blip3o_jax.data.record import RowTooLong
from blip3o_jax.data.template import PromptTokens, make_prompt
from blip3o_jax.text.vocabulary import Vocabulary

LONGEST_TAIL = (
    8  # tokens after an image's; three for most tokenizers, more where a line break is several
)


ROW_FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")


def most_labels(template: TemplateConfig, num_image_tokens: int, pack: int = 1) -> int | None:
    """How many labels a row of `pack` examples has at most; None: as many as it has tokens."""
    return None if template.supervise_prompt else pack * (num_image_tokens + LONGEST_TAIL)


def text_to_image_prompt(
    vocab: Vocabulary, template: TemplateConfig, caption: str, pool_scale: int = 1
) -> list[int]:
    """All ids up to and with the scale token: what sampling starts from and what a training row
    opens with.
    """
    return make_prompt(vocab, template, "t2i", caption, pool_scale=pool_scale).ids


def text_to_image_row(
    vocab: Vocabulary,
    template: TemplateConfig,
    caption: str,
    image: np.ndarray | int,
    max_length: int,
    pool_scale: int = 1,
    key: str = "",
    truncate: bool = False,
) -> dict[str, np.ndarray]:
    """One training row.

    image: the codebook indices [N] of the image, or only N: then <I0> holds the places for
    `insert_image_ids`. key: what errors call the example. truncate: cut the caption to what fits.

    Returns tokens_L int32, loss_mask_L float32, segment_ids_L int32, positions_L int32 and
    image_span (int32, no dimensions) under the keys "tokens", "loss_mask", "segment_ids",
    "positions" and "image_span". Raises RowTooLong, and UserError for codes outside the codebook.
    """
    answer = _image_answer(vocab, image, key)
    make = lambda text: make_prompt(vocab, template, "t2i", text, pool_scale=pool_scale)
    prompt = _fitted(make, caption, max_length - len(answer), truncate).ids
    row = _laid_out(vocab, template, prompt, answer, max_length, key)
    return row | {"image_span": np.int32(len(prompt) - 1)}


def task_row(
    vocab: Vocabulary,
    template: TemplateConfig,
    task: str,
    text: str,
    answer: str,
    *,
    references: int,
    places: int,
    num_image_tokens: int,
    max_length: int,
    pool_scale: int = 1,
    key: str = "",
    truncate: bool = False,
) -> dict[str, np.ndarray]:
    """One training row of any task, for a batch that mixes them: what `text_to_image_row` returns,
    and

        target           float32, no dimensions: 1 where an image answers; else `image_span` is 0 and means nothing
        reference_span   int32 [R]: the opening tag of each reference image, its N tokens follow; 0 where there is none
        reference_mask   float32 [R]: 1 where there is a reference; those come first

    of R = `places`. `text` is the caption, instruction or question, `answer` the text that answers
    a question. Raises RowTooLong, for an answer of more labels than an image has as well, and
    UserError for more references than places. With `truncate`, text and answer are cut to what
    fits.
    """
    if references > places:
        raise UserError(
            f"example {key!r} has {references} reference images, a row has places for {places}: "
            "leave some out or raise model.editing.reference_slots"
        )
    drawn = task != "understand"
    if drawn:
        tokens = _image_answer(vocab, num_image_tokens, key)
    else:
        tokens = _text_answer(vocab, answer, num_image_tokens, key, truncate)

    def make(text: str) -> PromptTokens:
        shown = {
            "references": references,
            "num_image_tokens": num_image_tokens,
            "pool_scale": pool_scale,
        }
        return make_prompt(vocab, template, task, text, **shown)

    prompt = _fitted(make, text, max_length - len(tokens), truncate)
    spans_R = np.zeros(places, np.int32)
    spans_R[:references] = prompt.references
    row = _laid_out(vocab, template, prompt.ids, tokens, max_length, key)
    for opening in prompt.references:  # not even where prompts are trained on
        row["loss_mask"][opening + 1 : opening + 1 + num_image_tokens] = 0
    return row | {
        "image_span": np.int32(len(prompt.ids) - 1 if drawn else 0),
        "target": np.float32(drawn),
        "reference_span": spans_R,
        "reference_mask": (np.arange(places) < references).astype(np.float32),
    }


def _image_answer(vocab: Vocabulary, image: np.ndarray | int, key: str) -> list[int]:
    codes_N = np.zeros(image, np.int32) if np.ndim(image) == 0 else np.asarray(image)
    if codes_N.size and not 0 <= codes_N.min() <= codes_N.max() < vocab.codebook_size:
        raise UserError(
            f"example {key!r} has codes from {codes_N.min()} to {codes_N.max()}, the codebook has {vocab.codebook_size} "
            "entries: were they cached with another vision tokenizer?"
        )
    tail = [vocab.image_end, vocab.end_of_turn, *vocab.encode("\n")]
    check(
        len(tail) <= LONGEST_TAIL,
        f"the tokenizer makes {len(tail)} tokens of the end of a turn, at most {LONGEST_TAIL} can be",
    )
    return [*vocab.image_ids_from_codes(codes_N), *tail]


def _text_answer(
    vocab: Vocabulary, answer: str, num_image_tokens: int, key: str, truncate: bool
) -> list[int]:
    if not answer.strip():
        raise UserError(f"example {key!r} has no answer: a question needs one to learn from")
    ids = [*vocab.encode(answer), vocab.end_of_turn, *vocab.encode("\n")]
    most = num_image_tokens + LONGEST_TAIL
    if len(ids) <= most:
        return ids
    if not truncate:
        reason = "has an answer of {length} tokens, at most {max_length} are trained on"
        raise RowTooLong(key, len(ids), most, reason, "shorten it")
    # Without the end of the turn: the model is not to learn to stop in the middle of a sentence.
    return vocab.encode(_longest(answer.strip(), lambda text: len(vocab.encode(text)) <= most))


def _fitted(
    make: Callable[[str], PromptTokens], text: str, most: int, truncate: bool
) -> PromptTokens:
    """Return `make(text)`; with `truncate`, of as much of the text as makes at most `most` ids."""
    prompt = make(text)
    if not truncate or len(prompt.ids) <= most or not text.strip():
        return prompt
    kept = _longest(text.strip(), lambda text: len(make(text).ids) <= most)
    return (
        make(kept) if kept else prompt
    )  # a row too short for images and template alone is refused as it is


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """Return the longest beginning of `text` that fits, without blanks at its end; "" where not one
    character does."""
    fitting, too_long = 0, len(text) + 1
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if fits(text[:middle].rstrip()):
            fitting = middle
        else:
            too_long = middle
    return text[:fitting].rstrip()


def _laid_out(
    vocab: Vocabulary,
    template: TemplateConfig,
    prompt: list[int],
    answer: list[int],
    max_length: int,
    key: str,
) -> dict[str, np.ndarray]:
    """Prompt and answer in a row of `max_length`, with its masks and positions."""
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
    }


def shared_length(rows: Sequence[dict[str, np.ndarray]], max_length: int) -> int:
    """Return how long examples may be so that all of them fit in one row: the shorter ones leave
    their room to the others."""
    lengths = sorted(_lengths(rows))
    left = max_length
    for number, length in enumerate(lengths):
        share = left // (len(lengths) - number)
        if length > share:
            return share
        left -= length
    return max_length


def _lengths(rows: Sequence[dict[str, np.ndarray]]) -> list[int]:
    return [int(np.count_nonzero(row["segment_ids"])) for row in rows]


def pack_rows(
    rows: Sequence[dict[str, np.ndarray]], keys: Sequence[str], max_length: int
) -> dict[str, np.ndarray]:
    """E examples in one row of `max_length`, in their order; what is not of ROW_FIELDS is stacked
    [E, ...]. RowTooLong, with the keys and which is the longest, where they do not fit.
    """
    lengths = _lengths(rows)
    if sum(lengths) > max_length:
        raise RowTooLong(" + ".join(keys), sum(lengths), max_length, which=int(np.argmax(lengths)))
    starts = np.cumsum([0, *lengths[:-1]])
    packed = {name: np.zeros(max_length, rows[0][name].dtype) for name in ROW_FIELDS}
    for number, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True), 1):
        for name in ROW_FIELDS:
            packed[name][start : start + length] = (
                row[name][:length] if name != "segment_ids" else number
            )
    stacked = {
        name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in ROW_FIELDS
    }
    stacked["image_span"] += starts.astype(np.int32)
    if "target" in stacked:  # spans that mean nothing stay 0
        stacked["image_span"] *= stacked["target"].astype(np.int32)
        shown_ER = stacked["reference_mask"].astype(np.int32)
        stacked["reference_span"] = (
            stacked["reference_span"] + starts[:, None].astype(np.int32)
        ) * shown_ER
    return packed | stacked


def by_example(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch whose arrays lead with its examples, but for ROW_FIELDS, which lead with its rows."""
    if batch["image_span"].ndim == 1:
        return batch
    return {
        name: x if name in ROW_FIELDS else x.reshape(-1, *x.shape[2:]) for name, x in batch.items()
    }


def caption_row(
    vocab: Vocabulary, caption: str, max_length: int, key: str = "", truncate: bool = False
) -> dict[str, np.ndarray]:
    """A caption alone, for the contrastive stage: the end-of-turn token closes it, so that an empty
    one is not an empty row.

    Returns text_ids_L int32 and text_mask_L bool under the keys "text_ids" and "text_mask". Raises
    RowTooLong, unless it is to `truncate` the caption.
    """
    ids = [*vocab.encode(caption), vocab.end_of_turn]
    if truncate and len(ids) > max_length:
        kept = _longest(caption, lambda text: len(vocab.encode(text)) < max_length)
        ids = [*vocab.encode(kept), vocab.end_of_turn]
    if len(ids) > max_length:
        raise RowTooLong(key, len(ids), max_length)
    text_ids_L = np.full(max_length, vocab.pad_id, np.int32)
    text_ids_L[: len(ids)] = ids
    return {"text_ids": text_ids_L, "text_mask": np.arange(max_length) < len(ids)}


def hide_prompts(
    segment_ids_BL: jax.Array, image_span_B: jax.Array, hidden_B: jax.Array
) -> jax.Array:
    """`segment_ids_BL` with all before the scale token turned to padding in the hidden examples:
    the image tokens then see no caption. Spans lead with the examples, E of each row.
    """
    rows, length = segment_ids_BL.shape
    number_E = jnp.arange(1, len(image_span_B) // rows + 1)
    own_BEL = segment_ids_BL[:, None] == number_E[:, None]
    before_BEL = jnp.arange(length) < image_span_B.reshape(rows, -1, 1)
    return jnp.where(
        jnp.any(own_BEL & before_BEL & hidden_B.reshape(rows, -1, 1), axis=1), 0, segment_ids_BL
    )


def insert_image_ids(
    tokens_BL: jax.Array,
    image_span_B: jax.Array,
    image_ids_BN: jax.Array,
    there_B: jax.Array | None = None,
) -> jax.Array:
    """`tokens_BL` with each row's image ids in the N places after its scale token, or an opening
    tag; the rows must have these places. Rows where `there_B` is false stay as they are.
    """

    def row(tokens_L: jax.Array, span: jax.Array, image_ids_N: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            tokens_L, image_ids_N.astype(tokens_L.dtype), span + 1, axis=0
        )

    filled_BL = jax.vmap(row)(tokens_BL, image_span_B, image_ids_BN)
    return filled_BL if there_B is None else jnp.where(there_B[:, None] > 0, filled_BL, tokens_BL)


def insert_references(
    tokens_BL: jax.Array,
    span_BR: jax.Array,
    image_ids_BRN: jax.Array,
    there_BR: jax.Array | None = None,
) -> jax.Array:
    """`tokens_BL` with the ids of several images of each row in the N places after their scale
    tokens or opening tags.
    """
    for r in range(span_BR.shape[1]):
        tokens_BL = insert_image_ids(
            tokens_BL,
            span_BR[:, r],
            image_ids_BRN[:, r],
            None if there_BR is None else there_BR[:, r],
        )
    return tokens_BL


def insert_features(
    embedded_BLD: jax.Array,
    reference_span_BR: jax.Array,
    features_BRND: jax.Array,
    there_BR: jax.Array,
) -> jax.Array:
    """`embedded_BLD` with features in place of the embeddings of the N tokens after each
    reference's opening tag.
    """

    def row(embedded_LD: jax.Array, span: jax.Array, features_ND: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            embedded_LD, features_ND.astype(embedded_LD.dtype), span + 1, axis=0
        )

    for r in range(reference_span_BR.shape[1]):
        filled_BLD = jax.vmap(row)(embedded_BLD, reference_span_BR[:, r], features_BRND[:, r])
        embedded_BLD = jnp.where(there_BR[:, r, None, None] > 0, filled_BLD, embedded_BLD)
    return embedded_BLD


def condition_positions(image_span_B: jax.Array, n: int) -> jax.Array:
    """Indices [B, n + 1] of the scale token and the n image tokens after it."""
    return image_span_B[:, None] + jnp.arange(n + 1, dtype=image_span_B.dtype)


def take_span(
    hidden_BLD: jax.Array, image_span_B: jax.Array, n: int, mode: str = "exact"
) -> jax.Array:
    """The hidden states [B, n + 1, D] that condition the diffusion head, of each example.

    mode "exact": those at `condition_positions`, the scale token and the n image tokens, as
    sampling has them. "last": the last n + 1 of the row, end tokens and padding among them: what
    the published weights were trained with.
    """
    check_choice("loss.condition_span", mode, ("exact", "last"))
    if mode == "last":
        return hidden_BLD[:, -(n + 1) :]
    rows = len(hidden_BLD)
    cut = lambda hidden_LD, span: jax.lax.dynamic_slice_in_dim(hidden_LD, span, n + 1, axis=0)
    if len(image_span_B) == rows:
        return jax.vmap(cut)(hidden_BLD, image_span_B)
    span_BETD = jax.vmap(jax.vmap(cut, in_axes=(None, 0)))(
        hidden_BLD, image_span_B.reshape(rows, -1)
    )
    return span_BETD.reshape(-1, *span_BETD.shape[2:])
