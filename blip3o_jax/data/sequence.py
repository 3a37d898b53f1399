r"""Lay out rows of tokens for the transformer: a prompt and its answer, an image's tokens or text.
rows.py has the operations on batches of rows.

One row of 15, for an image of n = 2 tokens (codes 7 and 4), without the system turn; "caption"
stands for the ids of the filled-in user turn, u and a for those of "user\n" and "assistant\n":

    index   token          loss mask   position   segment id
      0     <|im_start|>       0           0           1
      1     u                  0           1           1
      2     caption            0           2           1
      3     <|im_end|>         0           3           1
      4     \n                 0           4           1
      5     <|im_start|>       0           5           1
      6     a                  0           6           1
      7     <im_start>         0           7           1
      8     <S0>               0           8           1     (image span = 8)
      9     <I7>               1           9           1
     10     <I4>               1          10           1
     11     <im_end>           1          11           1
     12     <|im_end|>         1          12           1
     13     \n                 1          13           1
     14     pad                0          14           0

- The loss mask marks labels: loss_mask[i] = 1 means that the hidden state of i - 1 predicts token
  i. A loss over hidden[:-1] and tokens[1:] takes loss_mask[1:]; loss_mask[0] is always 0, since
  nothing comes before token 0.
- The image span is the index of the scale token; the n image tokens follow. The diffusion head is
  conditioned on the hidden states of <S0>, <I7>, <I4>.
- Segment ids separate the examples of a packed row, 0 is padding; positions restart at each
  example and run on through the padding (packed rows: 0 there).

With `data.pack` E above 1 a row holds up to E examples, one after the other (`pack_rows`). Arrays
of ROW_FIELDS have the leading dimension [rows], all others [rows, E] until `rows.flatten_packed`
merges the two; the slots of absent examples come last and have `target` 0.

Legend: B examples of a batch, or its rows; L row length, D width, N image tokens, E examples of a
row.
"""

from collections.abc import Callable, Sequence

import numpy as np

from blip3o_jax.config import TemplateConfig, UserError, check
from blip3o_jax.data.record import RowTooLong
from blip3o_jax.data.template import PromptTokens, make_prompt
from blip3o_jax.text.vocabulary import Vocabulary

# Prompts are padded to a multiple of this number of tokens, so that few lengths are compiled.
LENGTH_BUCKET = 32
# Tokens after an image's own; three for most tokenizers, more where a line break is several.
MAX_TAIL_TOKENS = 8
ROW_FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")


def max_labels(template: TemplateConfig, num_image_tokens: int, pack: int = 1) -> int | None:
    """Return the maximum number of labels in a row of `pack` examples; None: as many as its
    tokens.
    """
    return None if template.supervise_prompt else pack * (num_image_tokens + MAX_TAIL_TOKENS)


def text_to_image_prompt(
    vocab: Vocabulary, template: TemplateConfig, caption: str, pool_scale: int = 1
) -> list[int]:
    """Return all ids up to and including the scale token, which sampling and training rows start
    with.
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
    """Build one training row.

    image: the codebook indices [N] of the image, or only N: then <I0> is a placeholder for
    `rows.insert_image_ids`. key: what errors call the example. truncate: cut the caption to what
    fits.

    Returns tokens_L int32, loss_mask_L float32, segment_ids_L int32, positions_L int32 and
    image_span (int32, no dimensions) under the keys "tokens", "loss_mask", "segment_ids",
    "positions" and "image_span". Raises RowTooLong, and UserError for codes outside the codebook.
    """
    answer = _image_answer(vocab, image, key)
    make = lambda text: make_prompt(vocab, template, "t2i", text, pool_scale=pool_scale)
    prompt = _prompt_within(make, caption, max_length - len(answer), truncate).ids
    row = _build_row(vocab, template, prompt, answer, max_length, key)
    return row | {"image_span": np.array(len(prompt) - 1, np.int32)}


def task_row(
    vocab: Vocabulary,
    template: TemplateConfig,
    task: str,
    text: str,
    answer: str,
    *,
    references: int,
    reference_slots: int,
    num_image_tokens: int,
    max_length: int,
    pool_scale: int = 1,
    key: str = "",
    truncate: bool = False,
) -> dict[str, np.ndarray]:
    """Build one training row of any task, for a batch that mixes them.

    The row holds what `text_to_image_row` returns, and

        target           float32, no dimensions: 1 where an image answers; else `image_span` is 0
                         and means nothing
        reference_span   int32 [R]: the opening tag of each reference image, its N tokens follow; 0
                         where there is none
        reference_mask   float32 [R]: 1 where there is a reference; those come first

    of R = `reference_slots`. `text` is the caption, instruction or question, `answer` the text that
    answers a question. Raises RowTooLong, for an answer of more labels than an image has as well,
    and UserError for more references than slots. With `truncate`, text and answer are cut to what
    fits.
    """
    _check_references(references, reference_slots, key)
    has_target = task != "understand"
    if has_target:
        tokens = _image_answer(vocab, num_image_tokens, key)
    else:
        tokens = _text_answer(vocab, answer, num_image_tokens, key, truncate)

    def make(text: str) -> PromptTokens:
        images = {
            "references": references,
            "num_image_tokens": num_image_tokens,
            "pool_scale": pool_scale,
        }
        return make_prompt(vocab, template, task, text, **images)

    prompt = _prompt_within(make, text, max_length - len(tokens), truncate)
    spans_R = np.zeros(reference_slots, np.int32)
    spans_R[:references] = prompt.references
    row = _build_row(vocab, template, prompt.ids, tokens, max_length, key)
    for opening in prompt.references:  # never labels, even where prompts are supervised
        row["loss_mask"][opening + 1 : opening + 1 + num_image_tokens] = 0
    return row | {
        "image_span": np.array(len(prompt.ids) - 1 if has_target else 0, np.int32),
        "target": np.array(has_target, np.float32),
        "reference_span": spans_R,
        "reference_mask": (np.arange(reference_slots) < references).astype(np.float32),
    }


def example_length(
    vocab: Vocabulary,
    template: TemplateConfig,
    task: str,
    text: str,
    answer: str,
    *,
    references: int,
    reference_slots: int,
    num_image_tokens: int,
    pool_scale: int = 1,
    key: str = "",
    truncate: bool = False,
) -> int:
    """Return the tokens of an example in a row without limit, as `task_row` and
    `text_to_image_row` build it. Raises UserError as they do.
    """
    _check_references(references, reference_slots, key)
    if task == "understand":
        tokens = _text_answer(vocab, answer, num_image_tokens, key, truncate)
    else:
        tokens = _image_answer(vocab, num_image_tokens, key)
    images = {
        "references": references,
        "num_image_tokens": num_image_tokens,
        "pool_scale": pool_scale,
    }
    return len(make_prompt(vocab, template, task, text, **images).ids) + len(tokens)


def _check_references(references: int, reference_slots: int, key: str) -> None:
    if references > reference_slots:
        raise UserError(
            f"example {key!r} has {references} reference images, a row has slots for"
            f" {reference_slots}: leave some out or raise model.editing.reference_slots"
        )


def _image_answer(vocab: Vocabulary, image: np.ndarray | int, key: str) -> list[int]:
    codes_N = np.zeros(image, np.int32) if np.ndim(image) == 0 else np.asarray(image)
    if codes_N.size and not 0 <= codes_N.min() <= codes_N.max() < vocab.codebook_size:
        raise UserError(
            f"example {key!r} has codes from {codes_N.min()} to {codes_N.max()}, the codebook has"
            f" {vocab.codebook_size} entries: were they cached with another vision tokenizer?"
        )
    tail = [vocab.image_end, vocab.end_of_turn, *vocab.encode("\n")]
    check(
        len(tail) <= MAX_TAIL_TOKENS,
        f"the tokenizer makes {len(tail)} tokens of the end of a turn, at most {MAX_TAIL_TOKENS}"
        " can be",
    )
    return [*vocab.image_ids_from_codes(codes_N), *tail]


def _text_answer(
    vocab: Vocabulary, answer: str, num_image_tokens: int, key: str, truncate: bool
) -> list[int]:
    if not answer.strip():
        raise UserError(f"example {key!r} has no answer: a question needs one to learn from")
    ids = [*vocab.encode(answer), vocab.end_of_turn, *vocab.encode("\n")]
    limit = num_image_tokens + MAX_TAIL_TOKENS
    if len(ids) <= limit:
        return ids
    if not truncate:
        reason = "has an answer of {length} tokens, at most {max_length} are trained on"
        raise RowTooLong(key, len(ids), limit, reason, "shorten it")
    # Without the end of the turn: the model must not learn to stop in the middle of a sentence.
    return vocab.encode(
        _longest_prefix(answer.strip(), lambda text: len(vocab.encode(text)) <= limit)
    )


def _prompt_within(
    make: Callable[[str], PromptTokens], text: str, max_tokens: int, truncate: bool
) -> PromptTokens:
    """Return `make(text)`; with `truncate`, of the longest prefix of the text that takes at most
    `max_tokens` ids.
    """
    prompt = make(text)
    if not truncate or len(prompt.ids) <= max_tokens or not text.strip():
        return prompt
    kept = _longest_prefix(text.strip(), lambda text: len(make(text).ids) <= max_tokens)
    # Images and template alone may be too long: the caller then refuses the whole prompt.
    return make(kept) if kept else prompt


def _longest_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """Return the longest beginning of `text` that fits, without blanks at its end; "" where not one
    character does."""
    fitting = 0
    too_long = len(text) + 1
    while too_long - fitting > 1:
        # Binary search: the number of tokens hardly ever falls as the text grows.
        middle = (fitting + too_long) // 2
        if fits(text[:middle].rstrip()):
            fitting = middle
        else:
            too_long = middle
    return text[:fitting].rstrip()


def _build_row(
    vocab: Vocabulary,
    template: TemplateConfig,
    prompt: list[int],
    answer: list[int],
    max_length: int,
    key: str,
) -> dict[str, np.ndarray]:
    """Return a row of `max_length` with prompt, answer, masks and positions."""
    length = len(prompt) + len(answer)
    if length > max_length:
        raise RowTooLong(key, length, max_length)
    index_L = np.arange(max_length, dtype=np.int32)
    real_L = index_L < length
    # Token 0 is never a label: nothing precedes it.
    first_label = 1 if template.supervise_prompt else len(prompt)
    tokens_L = np.full(max_length, vocab.pad_id, np.int32)
    tokens_L[:length] = prompt + answer
    return {
        "tokens": tokens_L,
        "loss_mask": (real_L & (index_L >= first_label)).astype(np.float32),
        "segment_ids": real_L.astype(np.int32),
        "positions": index_L,
    }


def pack_rows(
    rows: Sequence[dict[str, np.ndarray]], keys: Sequence[str], max_length: int, slots: int
) -> dict[str, np.ndarray]:
    """Pack up to E = `slots` examples into one row of `max_length`, in their order; arrays other
    than ROW_FIELDS are stacked [E, ...], zeros in empty slots. `target` is 0 in these, so that no
    loss counts them. Raises RowTooLong, with the keys, if the examples do not fit.
    """
    lengths = [int(np.count_nonzero(row["segment_ids"])) for row in rows]
    if sum(lengths) > max_length:
        raise RowTooLong(" + ".join(keys), sum(lengths), max_length)
    starts = np.cumsum([0, *lengths[:-1]])
    packed = {name: np.zeros(max_length, rows[0][name].dtype) for name in ROW_FIELDS}
    for number, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True), 1):
        for name in ROW_FIELDS:
            packed[name][start : start + length] = (
                row[name][:length] if name != "segment_ids" else number
            )
    targets = [row.get("target", np.ones((), np.float32)) for row in rows]
    stacked = {
        name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in ROW_FIELDS
    } | {"target": np.stack(targets)}
    # Spans count from the beginning of the packed row; unused ones stay 0.
    stacked["image_span"] += starts.astype(np.int32)
    stacked["image_span"] *= stacked["target"].astype(np.int32)
    if "reference_mask" in stacked:
        mask_ER = stacked["reference_mask"].astype(np.int32)
        stacked["reference_span"] = (
            stacked["reference_span"] + starts[:, None].astype(np.int32)
        ) * mask_ER
    empty = slots - len(rows)
    return packed | {
        name: np.concatenate([values, np.zeros((empty, *values.shape[1:]), values.dtype)])
        for name, values in stacked.items()
    }


def padded_length(length: int) -> int:
    """Return `length` rounded up to a multiple of LENGTH_BUCKET."""
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def padded_prompts(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens [B, length], padded on the right with 0, lengths [B]), int32, of ids."""
    tokens_BL = np.zeros((len(prompts), length), np.int32)
    for row_L, ids in zip(tokens_BL, prompts, strict=True):
        row_L[: len(ids)] = ids
    return tokens_BL, np.array([len(ids) for ids in prompts], np.int32)


def caption_row(
    vocab: Vocabulary, caption: str, max_length: int, key: str = "", truncate: bool = False
) -> dict[str, np.ndarray]:
    """Build the row of a caption alone, for the contrastive stage. The end-of-turn token closes it,
    so that an empty caption is not an empty row.

    Returns text_ids_L int32 and text_mask_L bool under the keys "text_ids" and "text_mask". Raises
    RowTooLong, unless it is to `truncate` the caption.
    """
    ids = [*vocab.encode(caption), vocab.end_of_turn]
    if truncate and len(ids) > max_length:
        kept = _longest_prefix(caption, lambda text: len(vocab.encode(text)) < max_length)
        ids = [*vocab.encode(kept), vocab.end_of_turn]
    if len(ids) > max_length:
        raise RowTooLong(key, len(ids), max_length)
    text_ids_L = np.full(max_length, vocab.pad_id, np.int32)
    text_ids_L[: len(ids)] = ids
    return {"text_ids": text_ids_L, "text_mask": np.arange(max_length) < len(ids)}
