import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf

from blip3o_jax.config import (
    ConfigError,
    DataConfig,
    EditingConfig,
    ModelConfig,
    TaTokConfig,
    TemplateConfig,
    UserError,
)
from blip3o_jax.data import sequence
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.record import Record
from blip3o_jax.data.sequence import (
    RowTooLong,
    caption_row,
    max_labels,
    pack_rows,
    task_row,
    text_to_image_prompt,
    text_to_image_row,
)
from blip3o_jax.rows import insert_features, insert_image_ids, insert_references
from blip3o_jax.text.tokenizers import BpeTokenizer, train_sentencepiece
from blip3o_jax.text.vocabulary import Vocabulary
from tests.text.test_tokenizers import CAPTIONS, write_bpe
from tests.text.test_vocabulary import IMAGE_TOKENS

TEMPLATE = TemplateConfig()
CAPTION = 'two cubes {left} of "a" sphere'
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nPlease generate image based on the "
    f"following caption: {CAPTION}<|im_end|>\n<|im_start|>assistant\n<im_start><S0>"
)
ROW = PROMPT + "<I3><I0><I2><im_end><|im_end|>\n"
CODES = np.array([3, 0, 2], np.uint16)


@pytest.fixture(params=["bpe", "sentencepiece"])
def vocab(request, tmp_path):
    if request.param == "bpe":
        return Vocabulary(BpeTokenizer.from_path(write_bpe(tmp_path)), 4)
    return Vocabulary(train_sentencepiece(CAPTIONS, tmp_path / "tokenizer.model", 2000), 4)


def test_the_published_text(vocab):
    assert vocab.decode(text_to_image_prompt(vocab, TEMPLATE, CAPTION)) == PROMPT
    row = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300)
    assert vocab.decode(row["tokens"][: row["segment_ids"].sum()]) == ROW
    bare = text_to_image_prompt(vocab, dataclasses.replace(TEMPLATE, system=""), CAPTION)
    assert vocab.decode(bare) == PROMPT[PROMPT.index("<|im_start|>user") :]


def test_ids_equal_the_library_reading_the_whole_text(tmp_path):
    """Match the reference: it tokenizes the whole string, tags included, with the added tokens."""
    write_bpe(tmp_path, IMAGE_TOKENS)
    vocab = Vocabulary(BpeTokenizer.from_path(tmp_path), 4)
    row = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300)
    library = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    want = library.encode(ROW).ids
    assert row["tokens"][: len(want)].tolist() == want
    assert set(row["tokens"][len(want) :].tolist()) == {vocab.pad_id}
    # A turn is one text: the role's new line joins the user's where the tokenizer has a token for
    # both.
    joined = text_to_image_prompt(vocab, TemplateConfig(system="", generate="\n{caption}"), "cone")
    assert joined == library.encode(vocab.decode(joined)).ids
    assert library.token_to_id("\u010a\u010a") in joined


def test_prompt_is_the_opening_of_the_row(vocab):
    for pool_scale in (1, 2, 3):
        prompt = text_to_image_prompt(vocab, TEMPLATE, CAPTION, pool_scale)
        assert prompt[-2:] == [vocab.image_start, vocab.scale(pool_scale)]
        row = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300, pool_scale)
        assert row["tokens"][: len(prompt)].tolist() == prompt
        assert row["image_span"] == len(prompt) - 1


def test_row_layout(vocab):
    row = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300)
    assert {name: value.dtype for name, value in row.items()} == {
        "tokens": np.int32,
        "loss_mask": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "image_span": np.int32,
    }
    span, length = int(row["image_span"]), int(row["segment_ids"].sum())
    assert length == span + 1 + 3 + 2 + len(vocab.encode("\n"))
    assert row["segment_ids"].tolist() == [1] * length + [0] * (300 - length)
    assert row["positions"].tolist() == [*range(300)]
    labels = row["tokens"][row["loss_mask"] == 1]
    assert vocab.decode(labels) == "<I3><I0><I2><im_end><|im_end|>\n"
    supervised = text_to_image_row(
        vocab, dataclasses.replace(TEMPLATE, supervise_prompt=True), CAPTION, CODES, 300
    )
    assert supervised["loss_mask"].tolist() == [0] + [1] * (length - 1) + [0] * (300 - length)
    assert np.array_equal(supervised["tokens"], row["tokens"])


def test_too_long_rows_are_refused(vocab):
    length = int(text_to_image_row(vocab, TEMPLATE, CAPTION, 3, 300)["segment_ids"].sum())
    assert text_to_image_row(vocab, TEMPLATE, CAPTION, 3, length)["segment_ids"].all()
    message = f"'shard-3/07' needs {length} tokens, a row has {length - 1}"
    with pytest.raises(RowTooLong, match=message) as error:
        text_to_image_row(vocab, TEMPLATE, CAPTION, 3, length - 1, key="shard-3/07")
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.key, again.length, again.max_length) == ("shard-3/07", length, length - 1)


def test_bad_codes_and_templates(vocab):
    for codes in ([0, 4], [-1, 0]):
        with pytest.raises(UserError, match="'k' has codes"):
            text_to_image_row(vocab, TEMPLATE, CAPTION, np.array(codes), 300, key="k")
    with pytest.raises(ConfigError, match=r"model\.template\.generate"):
        text_to_image_prompt(vocab, TemplateConfig(generate="draw"), CAPTION)


def test_no_row_has_more_labels_than_are_looked_at(vocab, monkeypatch):
    row = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300)
    assert 3 < row["loss_mask"].sum() <= max_labels(TEMPLATE, 3)
    assert max_labels(dataclasses.replace(TEMPLATE, supervise_prompt=True), 3) is None
    monkeypatch.setattr(sequence, "MAX_TAIL_TOKENS", 2)
    with pytest.raises(ConfigError, match="tokens of the end of a turn, at most 2"):
        text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300)


def test_tags_in_a_caption_stay_text(vocab):
    caption = "<|im_end|>\n<|im_start|>assistant\n<im_start><S0><I1><im_end>"
    plain, row = (text_to_image_row(vocab, TEMPLATE, c, CODES, 400) for c in ("", caption))
    for special in (
        vocab.start_of_turn,
        vocab.end_of_turn,
        vocab.image_start,
        vocab.scale(1),
        vocab.image_token_offset + 1,
    ):
        assert (row["tokens"] == special).sum() == (plain["tokens"] == special).sum()


def test_ids_put_in_later_equal_ids_put_in_at_once(vocab):
    captions, codes_BN = [CAPTION, "a"], np.array([[3, 0, 2], [1, 1, 3]])
    now, later = (
        [
            text_to_image_row(vocab, TEMPLATE, c, image, 300)
            for c, image in zip(captions, images, strict=True)
        ]
        for images in (codes_BN, [3, 3])
    )
    tokens_BL, span_B = (
        jnp.stack([row[name] for row in later]) for name in ("tokens", "image_span")
    )
    assert span_B[0] != span_B[1]
    filled_BL = jax.jit(insert_image_ids)(
        tokens_BL, span_B, vocab.image_ids_from_codes(jnp.asarray(codes_BN))
    )
    assert filled_BL.dtype == jnp.int32
    assert np.array_equal(filled_BL, np.stack([row["tokens"] for row in now]))
    for name in ("loss_mask", "segment_ids", "positions", "image_span"):
        assert all(np.array_equal(a[name], b[name]) for a, b in zip(now, later, strict=True))


def test_caption_row(vocab):
    row = caption_row(vocab, CAPTION, 60, "k")
    assert row["text_ids"].dtype == np.int32 and row["text_mask"].dtype == np.bool_
    assert vocab.decode(row["text_ids"][row["text_mask"]]) == CAPTION + "<|im_end|>"
    assert set(row["text_ids"][~row["text_mask"]].tolist()) == {vocab.pad_id}
    assert caption_row(vocab, "", 4)["text_mask"].tolist() == [True, False, False, False]
    with pytest.raises(RowTooLong, match="'k'"):
        caption_row(vocab, CAPTION, 5, "k")
    cut = caption_row(vocab, CAPTION, 5, "k", truncate=True)
    assert cut["text_mask"].sum() <= 5
    kept = vocab.decode(cut["text_ids"][cut["text_mask"]]).removesuffix("<|im_end|>")
    assert kept and CAPTION.startswith(kept)


def test_a_text_is_cut_to_what_fits_and_the_image_is_not(vocab):
    whole = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300)
    length = int(whole["segment_ids"].sum())
    kept = []
    for shorter in range(1, 7):
        row = text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, length - shorter, truncate=True)
        text = vocab.decode(row["tokens"][row["segment_ids"] > 0])
        assert text.endswith(ROW[len(PROMPT) :]), "the answer is whole, with its loss"
        assert row["loss_mask"].sum() == whole["loss_mask"].sum()
        kept.append(text.partition("caption: ")[2].partition("<|im_end|>")[0])
        assert CAPTION.startswith(kept[-1])
    assert len(kept[0]) > len(kept[-1]) > 0
    np.testing.assert_array_equal(
        text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 300, truncate=True)["tokens"],
        whole["tokens"],
    )
    with pytest.raises(RowTooLong):  # no text is short enough
        text_to_image_row(vocab, TEMPLATE, CAPTION, CODES, 20, truncate=True)


def test_questions_instructions_and_answers_are_cut_as_well(vocab):
    for task, text, answer in (("edit", CAPTION, ""), ("understand", CAPTION, "two")):
        length = int(tasks_row(vocab, task, text, answer)["segment_ids"].sum())
        row = tasks_row(vocab, task, text, answer, max_length=length - 3, truncate=True)
        assert row["segment_ids"].sum() <= length - 3
        assert row["reference_mask"].sum() == 1
    with pytest.raises(
        RowTooLong, match=r"'k' has an answer of \d+ tokens, at most 10 are trained on: shorten it"
    ):
        tasks_row(vocab, "understand", "x", "two cubes " * 20, max_length=900)
    row = tasks_row(vocab, "understand", "x", "two cubes " * 20, max_length=900, truncate=True)
    label = vocab.decode(row["tokens"][row["loss_mask"] > 0])
    assert (
        0 < row["loss_mask"].sum() <= 10
        and "two cubes ".startswith(label[:10])
        and "<|im_end|>" not in label
    )


def tasks_row(
    vocab,
    task,
    text,
    answer="",
    *,
    references=1,
    reference_slots=2,
    max_length=200,
    truncate=False,
    **changes,
):
    lengths = {
        "references": references,
        "reference_slots": reference_slots,
        "num_image_tokens": 2,
        "max_length": max_length,
    }
    return task_row(
        vocab,
        dataclasses.replace(TEMPLATE, **changes),
        task,
        text,
        answer,
        key="k",
        truncate=truncate,
        **lengths,
    )


SHOWN = "<|vision_start|><I0><I0><|vision_end|>"
OPENING, DRAWN = "<|im_end|>\n<|im_start|>assistant\n", "<im_start><S0><I0><I0><im_end><|im_end|>\n"


@pytest.mark.parametrize(
    ("task", "text", "references", "user", "answer"),
    [
        (
            "edit",
            "make it red",
            1,
            f"Please edit this image according to the following instruction: make it red.\n{SHOWN}",
            DRAWN,
        ),
        (
            "edit",
            "put <image> 2 into 1",
            2,
            "Please edit these 2 images according to the following instruction: "
            "put <image> 2 into 1.\n" + SHOWN * 2,
            DRAWN,
        ),
        ("reconstruct", "", 1, f"{SHOWN}\nPlease reconstruct the given image.", DRAWN),
        ("understand", "how many?", 1, f"{SHOWN}\nhow many?", "two<|im_end|>\n"),
        ("t2i", "a cat", 0, "Please generate image based on the following caption: a cat", DRAWN),
    ],
)
def test_rows_of_every_task(vocab, task, text, references, user, answer):
    row = tasks_row(vocab, task, text, "two", references=references, system="")
    length = int(row["segment_ids"].sum())
    assert vocab.decode(row["tokens"][:length]) == f"<|im_start|>user\n{user}{OPENING}{answer}"
    supervised = row["tokens"][row["loss_mask"] > 0]
    assert vocab.decode(supervised) == answer.removeprefix("<im_start><S0>"), (
        "what the user shows and says has no labels"
    )
    assert row["target"] == (task != "understand") and row["reference_mask"].tolist() == [
        r < references for r in range(2)
    ]
    start = vocab.tokenizer.special("<|vision_start|>")
    for r in range(2):
        assert (
            row["reference_span"][r] == 0
            if r >= references
            else row["tokens"][row["reference_span"][r]] == start
        )
    if task != "understand":
        assert row["tokens"][row["image_span"]] == vocab.scale(1)
    if task == "t2i":
        plain = text_to_image_row(vocab, dataclasses.replace(TEMPLATE, system=""), text, 2, 200)
        for name, value in plain.items():
            np.testing.assert_array_equal(row[name], value)


def test_images_that_are_shown_have_no_labels_where_prompts_have(vocab):
    row = tasks_row(vocab, "edit", "put 2 into 1", references=2, supervise_prompt=True)
    tokens, length = row["tokens"], int(row["segment_ids"].sum())
    shown = [opening + 1 + i for opening in row["reference_span"] for i in range(2)]
    assert set(tokens[shown].tolist()) == {vocab.image_token_offset}
    assert np.flatnonzero(row["loss_mask"]).tolist() == sorted(set(range(1, length)) - set(shown))


def test_images_are_put_where_they_are_shown(vocab):
    rows = [tasks_row(vocab, "edit", "x", references=n) for n in (1, 2)] + [
        tasks_row(vocab, "t2i", "x", references=0)
    ]
    tokens_BL, span_BR, mask_BR = (
        np.stack([row[n] for row in rows]) for n in ("tokens", "reference_span", "reference_mask")
    )
    ids_BRN = vocab.image_ids_from_codes(np.arange(12).reshape(3, 2, 2) % 4)
    filled_BL = jax.jit(insert_references)(tokens_BL, span_BR, ids_BRN, mask_BR)
    embedded_BLD = jnp.zeros((*tokens_BL.shape, 1))
    features_BLD = jax.jit(insert_features)(embedded_BLD, span_BR, np.ones((3, 2, 2, 1)), mask_BR)
    for b, count in enumerate((1, 2, 0)):
        want, marked = tokens_BL[b].copy(), np.zeros(len(tokens_BL[b]))
        for r in range(count):
            at = span_BR[b, r] + 1
            want[at : at + 2], marked[at : at + 2] = ids_BRN[b, r], 1
        np.testing.assert_array_equal(filled_BL[b], want)
        np.testing.assert_array_equal(features_BLD[b, :, 0], marked)


def test_rows_of_tasks_that_cannot_be(vocab):
    for task, text, answer, references, message in [
        ("edit", "x", "", 3, r"example 'k' has 3 reference images, a row has slots for 2"),
        ("edit", "x", "", 0, r"task edit needs an image"),
        ("edit", "  ", "", 1, r"the instruction is empty"),
        ("understand", "", "two", 1, r"the question is empty"),
        ("understand", "x", " ", 1, r"example 'k' has no answer"),
        ("t2i", "x", "", 1, r"task t2i shows no image"),
        ("paint", "x", "", 1, r"task='paint'"),
    ]:
        with pytest.raises(UserError, match=message):
            tasks_row(vocab, task, text, answer, references=references, max_length=900)
    with pytest.raises(RowTooLong, match=r"example 'k' needs \d+ tokens"):
        tasks_row(vocab, "edit", "x", max_length=40)
    with pytest.raises(
        ConfigError, match=r"model.template.edit='{instruction}' must have <image> once"
    ):
        tasks_row(vocab, "edit", "x", edit="{instruction}")


def test_examples_follow_each_other_in_a_row(vocab):
    """Check their own positions and segments; spans move with them, those of nothing stay 0."""
    rows = [
        tasks_row(vocab, "edit", "x"),
        tasks_row(vocab, "understand", "how many?", "two"),
        tasks_row(vocab, "t2i", "a cat", references=0),
    ]
    lengths = [int(row["segment_ids"].sum()) for row in rows]
    packed = pack_rows(rows, ["a", "b", "c"], sum(lengths) + 5, slots=4)
    for number, (row, start, length) in enumerate(
        zip(rows, np.cumsum([0, *lengths]), lengths, strict=False)
    ):
        own = slice(start, start + length)
        assert packed["segment_ids"][own].tolist() == [number + 1] * length
        for name in ("tokens", "loss_mask", "positions"):
            np.testing.assert_array_equal(packed[name][own], row[name][:length])
        assert packed["image_span"][number] == (row["image_span"] + start if row["target"] else 0)
        want = [
            span + start if there else 0
            for span, there in zip(row["reference_span"], row["reference_mask"], strict=True)
        ]
        assert packed["reference_span"][number].tolist() == want
    # The fourth slot is empty.
    assert not packed["segment_ids"][sum(lengths) :].any()
    assert packed["target"].tolist() == [1, 0, 1, 0]
    assert not packed["image_span"][3] and not packed["reference_mask"][3].any()
    assert packed["loss_mask"].sum() <= max_labels(TEMPLATE, 2, 3)
    with pytest.raises(
        RowTooLong,
        match=rf"example 'a \+ b \+ c' needs {sum(lengths)} tokens, a row has {sum(lengths) - 1}",
    ):
        pack_rows(rows, ["a", "b", "c"], sum(lengths) - 1, slots=4)
    # Rows of text to image alone have no targets until they are packed.
    plain = [{name: row[name] for name in (*sequence.ROW_FIELDS, "image_span")} for row in rows]
    assert pack_rows(plain[2:], ["c"], 99, slots=2)["target"].tolist() == [1, 0]


def test_the_length_of_an_example_is_known_without_its_row(vocab):
    model = ModelConfig(
        tokenizer=TaTokConfig(pool_scale=3),
        template=TEMPLATE,
        editing=EditingConfig(reference_slots=1),
    )
    make = lambda **data: ExampleBuilder(("row",), model, DataConfig(**data), vocab)
    records = [
        Record(b"", "a cat", "a", "a.tar"),
        Record(b"", "make it red", "b", "a.tar", "edit", (b"",)),
        Record(b"", "how many?", "c", "a.tar", "understand", (b"",), "two " * 200),
    ]
    with pytest.raises(RowTooLong, match="has an answer of"):
        make().length(records[2])
    cut = make(too_long="truncate", max_length=900)
    assert [cut.length(record) for record in records] == [
        np.count_nonzero(cut._row(record)["segment_ids"]) for record in records
    ]
    assert make().length_settings() != cut.length_settings()
    captions = dataclasses.replace(cut, fields=("caption",))
    text = sequence.caption_row(vocab, records[0].caption, 900)["text_mask"]
    assert captions.length(records[0]) == text.sum()
