"""The exported text tokenizer: Hugging Face's AutoTokenizer, and this package reading it back, give
the ids of the original.
"""

import json
import random
import re
import sys

import pytest
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2

from blip3o_jax.config import TemplateConfig, TextConfig
from blip3o_jax.convert.text_files import write_text_files
from blip3o_jax.data.sequence import text_to_image_prompt
from blip3o_jax.text.tokenizers import (
    CHAT_TAGS,
    END_OF_TEXT,
    BpeTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from blip3o_jax.text.vocabulary import Vocabulary
from tests.text.test_tokenizers import CAPTIONS, TEXTS, write_bpe

IMAGE_TOKENS = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>", *(f"<I{i}>" for i in range(6))]
MODEL_TYPES = ["qwen3", "blip3o_qwen"]  # what the config.json of the directory says
FRAGMENTS = [
    "a",
    "red",
    " cube",
    "blue",
    "x",
    "9",
    "24",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u2581",
    "e\u0301",
    "\u65e5",
    "\U0001f600",
    "<",
    "|>",
]


def vocabulary(kind, directory):
    directory.mkdir()
    if kind == "bpe":
        return Vocabulary(BpeTokenizer.from_path(write_bpe(directory)), 6)
    return Vocabulary(train_sentencepiece(CAPTIONS, directory / "tokenizer.model", 2000), 6)


@pytest.fixture(params=["bpe", "sentencepiece"])
def vocab(request, tmp_path):
    return vocabulary(request.param, tmp_path / "original")


def export(vocab, directory, model_type="qwen3", **options):
    """Return (notes, what AutoTokenizer reads)."""
    notes = write_text_files(vocab, directory, **{"image_tokens": True} | options)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return notes, transformers.AutoTokenizer.from_pretrained(directory)


def texts():
    draw = random.Random(7)
    return (
        TEXTS[:-1]
        + CAPTIONS
        + ["".join(draw.choices(FRAGMENTS, k=draw.randint(1, 20))) for _ in range(300)]
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hugging_face_gives_the_same_ids(vocab, model_type, tmp_path):
    notes, theirs = export(vocab, tmp_path / "out", model_type)
    assert len(notes) == 1 and "encode a special token" in notes[0]
    for text in texts():
        ids = vocab.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == vocab.decode(ids)
    assert len(theirs) == vocab.size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (vocab.end_of_turn, vocab.pad_id)


def test_image_tokens_have_the_ids_of_the_vocabulary(vocab, tmp_path):
    _, theirs = export(vocab, tmp_path / "out")
    ids = [*range(vocab.image_start, vocab.image_token_end)]
    assert theirs.convert_tokens_to_ids(IMAGE_TOKENS) == ids
    assert theirs("".join(IMAGE_TOKENS))["input_ids"] == ids
    # As the reference adds them: the tags are special, scale and image tokens are not.
    assert theirs.decode(ids, skip_special_tokens=True) == "".join(IMAGE_TOKENS[2:])
    special = {END_OF_TEXT, *CHAT_TAGS, "<im_start>", "<im_end>"}
    assert set(theirs.all_special_tokens) == special


def test_without_image_tokens_there_are_only_the_tokenizers_own(vocab, tmp_path):
    _, theirs = export(vocab, tmp_path / "out", image_tokens=False)
    assert len(theirs) == vocab.tokenizer.size
    assert theirs("<I0>")["input_ids"] == vocab.encode("<I0>")


def test_special_tokens_in_a_text_are_where_the_two_differ(vocab, tmp_path):
    _, theirs = export(vocab, tmp_path / "out")
    for tag in (END_OF_TEXT, *CHAT_TAGS):
        assert theirs(f"a{tag}")["input_ids"] == [*vocab.encode("a"), vocab.tokenizer.special(tag)]
        assert theirs(f"a{tag}")["input_ids"] != vocab.encode(f"a{tag}")


@pytest.mark.parametrize("image_tokens", [True, False])
def test_read_back(vocab, image_tokens, tmp_path):
    export(vocab, tmp_path / "out", image_tokens=image_tokens)
    kind = "bpe" if isinstance(vocab.tokenizer, BpeTokenizer) else "sentencepiece"
    again = Vocabulary(load_tokenizer(TextConfig(kind, str(tmp_path / "out"))), 6)
    assert (again.image_token_offset, again.size, again.pad_id) == (
        vocab.image_token_offset,
        vocab.size,
        vocab.pad_id,
    )
    assert [again.encode(text) for text in [*texts(), "<I0>"]] == [
        vocab.encode(text) for text in [*texts(), "<I0>"]
    ]
    # Exported once more from what came back, where the file has them already: nothing is added
    # twice.
    write_text_files(again, tmp_path / "second", image_tokens=image_tokens)
    first, second = (
        json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("out", "second")
    )
    assert second == first


@pytest.mark.parametrize("system", ['Say "{{hi}}" \\ \U0001f600\n', ""])
def test_chat_template_is_the_prompt(vocab, system, tmp_path):
    template = TemplateConfig(system=system, generate="Draw {caption}, I say: '{caption}' %}\n")
    _, theirs = export(vocab, tmp_path / "out", template=template)
    caption = 'two {{ blue }} spheres "x" \\n\n  {caption}'
    turn = {"role": "user", "content": caption}
    ids = theirs.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
    assert ids == text_to_image_prompt(vocab, template, caption)
    other = theirs.apply_chat_template([{"role": "system", "content": "Hm."}, turn], tokenize=False)
    assert other.startswith("<|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\nDraw two ")
    assert other.endswith("<|im_end|>\n") and "hi" not in other


def test_no_chat_template_where_its_tokens_are_missing(vocab, tmp_path):
    assert (
        export(vocab, tmp_path / "out", template=TemplateConfig(), image_tokens=False)[
            1
        ].chat_template
        is None
    )


PLAIN = {
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "unigram"}, "type unigram, not bpe"),
        ({"model_type": "char"}, "type char, not bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalises characters \(rule nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"byte_fallback": False}, r"ids \[.*\] are .*\u2047.* here and .*<unk>.* there"),
        ({"user_defined_symbols": ["cube", "red"]}, "2 user_defined pieces, 'cube' first"),
    ],
)
def test_models_that_are_no_list_of_merges(changes, why, tmp_path):
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 330,
        "hard_vocab_limit": False,
        **PLAIN,
        **changes,
    }
    if options["model_type"] == "char":
        options |= {"byte_fallback": False, "vocab_size": 40}
    tags = [END_OF_TEXT, *CHAT_TAGS]
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS),
            model_writer=file,
            control_symbols=tags,
            minloglevel=2,
            **options,
        )
    check_only_its_own_file(SentencePieceTokenizer.from_path(tmp_path), tmp_path / "out", why)


def unused_piece(model):
    model.pieces[-1].type = model.SentencePiece.UNUSED


def other_blanks(model):
    model.normalizer_spec.escape_whitespaces = False


def denormalised(model):
    rule = sentencepiece.SentencePieceNormalizer(rule_name="nfkc").serialized_normalizer_spec()
    model.denormalizer_spec.ParseFromString(rule)


def letter_of_pieces_only(model):
    """Return a model in which SentencePiece joins "e" and "d" to "ed" without knowing a "d"; a
    merge needs both."""
    next(piece for piece in model.pieces if piece.piece == "d").piece = "\u4e00"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (unused_piece, "1 unused pieces"),
        (other_blanks, "escape_whitespaces"),
        (denormalised, "changes characters of decoded text"),
        (letter_of_pieces_only, "has ids .* here and .* there"),
    ],
)
def test_models_that_only_a_look_inside_or_a_comparison_gives_away(change, why, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(
        train_sentencepiece(CAPTIONS, tmp_path / "t.model", 2000).proto
    )
    change(model)
    check_only_its_own_file(
        SentencePieceTokenizer(model.SerializeToString()), tmp_path / "out", why
    )


def test_protobuf_that_sentencepiece_cannot_use(tmp_path, monkeypatch):
    tokenizer = train_sentencepiece(CAPTIONS, tmp_path / "t.model", 2000)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    check_only_its_own_file(tokenizer, tmp_path / "out", "newer protobuf")


def check_only_its_own_file(tokenizer, out, why):
    (note,) = write_text_files(Vocabulary(tokenizer, 6), out, image_tokens=True)
    assert (
        note.startswith("tokenizer.json was not written")
        and "use tokenizer.model" in note
        and "\n" not in note
    )
    assert re.search(why, note)
    assert [file.name for file in out.iterdir()] == ["tokenizer.model"]
    assert SentencePieceTokenizer.from_path(out).proto == tokenizer.proto


def test_bpe_whose_ids_hugging_face_does_not_keep(tmp_path):
    """Refuse it: the tokenizers library numbers added tokens one after another, whatever the
    file says.
    """
    contents = json.loads((write_bpe(tmp_path) / "tokenizer.json").read_text())
    first = contents["added_tokens"][0]["id"]
    for token in contents["added_tokens"]:
        token["id"] += 3
    tokenizer = BpeTokenizer(contents)
    (note,) = write_text_files(Vocabulary(tokenizer, 6), tmp_path / "out", image_tokens=True)
    assert f"<|endoftext|> has id {first + 3} here and {first} there" in note
    assert tokenizer.specials.items() <= BpeTokenizer.from_path(tmp_path / "out").specials.items()
