import json
import pickle

import pytest
import tokenizers as hf

from blip3o_jax.config import ConfigError, TemplateConfig, TextConfig, UserError
from blip3o_jax.text import tokenizers
from blip3o_jax.text.tokenizers import (
    BpeTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

CAPTIONS = ["a red cube", "two blue spheres left of a green cone", 'a sign that says "OPEN 24"'] * 5
# "<think>" stands for Qwen's added tokens that are not special: a text must not produce them
# either.
ADDED = [tokenizers.END_OF_TEXT, *tokenizers.CHAT_TAGS, "<think>"]
TEXTS = [
    "",
    "  two  blanks, a tab\tand\nnew lines\n\n ",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 never seen",
    "nul \0 and \r\n",
    "<0x41> <unk> </s> <pad> <s>",
    "".join(ADDED) + "<im_start><S0><I5>",
]


def write_bpe(directory, added=()):
    """Write a byte-level BPE tokenizer.json built as Qwen's is: tags added after the vocabulary,
    Qwen's splitting into words.
    """
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.normalizer = hf.normalizers.NFC()
    words = hf.pre_tokenizers.Split(hf.Regex(tokenizers._QWEN_WORDS), "isolated")
    bytes_ = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = hf.pre_tokenizers.Sequence([words, bytes_])
    bpe.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(
        [*CAPTIONS, *["\n\n"] * 9, TemplateConfig().system, TemplateConfig().generate], trainer
    )
    bpe.add_special_tokens([hf.AddedToken(t, special=True, normalized=False) for t in ADDED[:-1]])
    bpe.add_tokens([hf.AddedToken(t, normalized=False) for t in [*ADDED[-1:], *added]])
    bpe.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def bpe_dir(tmp_path):
    return write_bpe(tmp_path)


@pytest.fixture(params=["bpe", "sentencepiece"])
def text_cfg(request, tmp_path):
    if request.param == "bpe":
        write_bpe(tmp_path)
    else:
        train_sentencepiece(CAPTIONS, tmp_path / "tokenizer.model", 2000)
    return TextConfig(request.param, str(tmp_path))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips_without_special_ids(text_cfg, text):
    tokenizer = load_tokenizer(text_cfg)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.size for i in ids)
    assert not set(ids) & set(tokenizer.specials.values())


def test_special_tokens_by_name_only(text_cfg):
    tokenizer = load_tokenizer(text_cfg)
    for tag in [tokenizers.END_OF_TEXT, *tokenizers.CHAT_TAGS]:
        assert (
            tokenizer.decode(
                [*tokenizer.encode(" a"), tokenizer.special(tag), *tokenizer.encode("\n")]
            )
            == f" a{tag}\n"
        )
    with pytest.raises(UserError, match="no special token '<S0>'"):
        tokenizer.special("<S0>")
    with pytest.raises(ValueError, match=f"cannot decode id {tokenizer.size}"):
        tokenizer.decode([tokenizer.size])


def test_save_load_and_pickle_keep_everything(text_cfg, tmp_path):
    tokenizer = load_tokenizer(text_cfg)
    tokenizer.save(tmp_path / "checkpoint" / "text")
    loaded = load_tokenizer(TextConfig(text_cfg.kind, "text"), base_dir=tmp_path / "checkpoint")
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other.size == tokenizer.size and other.specials == tokenizer.specials
        assert [other.encode(t) for t in TEXTS + CAPTIONS] == [
            tokenizer.encode(t) for t in TEXTS + CAPTIONS
        ]


def test_bpe_matches_the_library_on_plain_text(bpe_dir):
    ours, library = (
        load_tokenizer(TextConfig("bpe", str(bpe_dir))),
        hf.Tokenizer.from_file(str(bpe_dir / "tokenizer.json")),
    )
    assert ours.size == library.get_vocab_size(with_added_tokens=True)
    for text in TEXTS[:-1] + CAPTIONS:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert library.encode("<think>").ids == [ours.special("<think>")]  # what encode must not do


def test_bpe_ignores_truncation_and_padding_of_the_file(bpe_dir):
    file = bpe_dir / "tokenizer.json"
    before = load_tokenizer(TextConfig("bpe", str(file))).encode(CAPTIONS[1])
    library = hf.Tokenizer.from_file(str(file))
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.save(str(file))
    assert load_tokenizer(TextConfig("bpe", str(file))).encode(CAPTIONS[1]) == before


def test_bpe_from_vocab_and_merges(bpe_dir, tmp_path):
    """Check that the three older files give what tokenizer.json gives, and what transformers'
    Qwen2Tokenizer makes of them.
    """
    contents = json.loads((bpe_dir / "tokenizer.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(contents["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in contents["model"]["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    added = {str(t.pop("id")): t for t in contents["added_tokens"]}
    (old / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    ours, want = BpeTokenizer.from_path(old), BpeTokenizer.from_path(bpe_dir)
    assert ours.size == want.size and ours.specials == want.specials
    texts = TEXTS + CAPTIONS + ["It's 2024: don't  STOP\n\n  now", "e\u0301"]
    assert [ours.encode(t) for t in texts] == [want.encode(t) for t in texts]

    transformers = pytest.importorskip("transformers")
    qwen = transformers.Qwen2Tokenizer.from_pretrained(str(old))
    texts = [t for t in texts if "<" not in t]
    assert [ours.encode(t) for t in texts] == [
        qwen.encode(t, add_special_tokens=False) for t in texts
    ]


def test_sentencepiece_training_is_deterministic_and_makes_the_template_cheap(tmp_path):
    first = train_sentencepiece(CAPTIONS, tmp_path / "a" / "text.model", 500)
    train_sentencepiece(iter(CAPTIONS), tmp_path / "b.model", 500)
    assert (tmp_path / "a" / "text.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.special(tokenizers.END_OF_TEXT) == 0
    template = TemplateConfig()
    for text in ("system", "user", "assistant"):
        assert len(first.encode(text)) == 1
    for text in (template.system, template.generate.replace("{caption}", "")):
        assert len(first.encode(text)) <= len(text.split()) + 3  # a piece a word, and punctuation


def test_sentencepiece_small_corpus_and_small_vocabulary(tmp_path):
    assert train_sentencepiece(["x"], tmp_path / "tiny.model", 32000).size < 1000
    with pytest.raises(UserError, match=r"text tokenizer of 100 pieces.*Increase vocab_size"):
        train_sentencepiece(["x"], tmp_path / "never.model", 100)
    with pytest.raises(UserError, match="no captions"):
        train_sentencepiece([], tmp_path / "never.model", 1000)
    assert not (tmp_path / "never.model").exists()


def test_a_sentencepiece_caption_cannot_reach_user_defined_symbols_as_tags(tmp_path):
    """Refuse them as tags: user-defined pieces are matched in text: they are no special tokens, and
    asking for one is an error.
    """
    import sentencepiece

    path = tmp_path / "other.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            user_defined_symbols=[tokenizers.END_OF_TURN],
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer.from_path(path)
    with pytest.raises(UserError, match="no special token"):
        tokenizer.special(tokenizers.END_OF_TURN)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_errors_name_the_path(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"text\.path is empty"):
        load_tokenizer(TextConfig(kind, ""))
    with pytest.raises(ConfigError, match=f"no text tokenizer at {tmp_path}"):
        load_tokenizer(TextConfig(kind, "nowhere"), base_dir=tmp_path)
    with pytest.raises(ConfigError, match=f"no text tokenizer at {tmp_path}/tokenizer"):
        load_tokenizer(TextConfig(kind, str(tmp_path)))
    garbage = tmp_path / "garbage"
    for contents in (b"", b"{", b"[]", b'{"model": {"type": "Unigram", "vocab": []}}', b"\xff\x00"):
        garbage.write_bytes(contents)
        with pytest.raises(ConfigError, match=str(garbage)):
            load_tokenizer(TextConfig(kind, str(garbage)))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("merges.txt", b"\xff"),
        ("merges.txt", b"a b c d\n"),
        ("vocab.json", b"[]"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "<a>"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"-5": {"content": "<a>"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {"content": "<a>"}}}'),
    ],
)
def test_bpe_files_of_another_structure_are_an_error_of_one_line(bpe_dir, name, contents):
    stored = json.loads((bpe_dir / "tokenizer.json").read_text())
    (bpe_dir / "tokenizer.json").unlink()
    (bpe_dir / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    (bpe_dir / "merges.txt").write_text("")
    (bpe_dir / "tokenizer_config.json").write_text("{}")
    assert BpeTokenizer.from_path(bpe_dir).size == len(stored["model"]["vocab"])
    (bpe_dir / name).write_bytes(contents)
    with pytest.raises(ConfigError, match=str(bpe_dir)) as caught:
        BpeTokenizer.from_path(bpe_dir)
    assert "\n" not in str(caught.value)


def test_bpe_without_all_bytes_is_refused(bpe_dir):
    contents = json.loads((bpe_dir / "tokenizer.json").read_text())
    contents["model"]["vocab"].pop("\u0100")  # the byte 0
    (bpe_dir / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(ConfigError, match="not byte-level, 1 of 256"):
        load_tokenizer(TextConfig("bpe", str(bpe_dir)))
