import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ConfigError, Qwen3Config, TaTokConfig, TextConfig
from blip3o_jax.text.tokenizers import (
    BpeTokenizer,
    TextTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from blip3o_jax.text.vocabulary import Vocabulary
from tests.text.test_tokenizers import ADDED, CAPTIONS, write_bpe

IMAGE_TOKENS = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>", "<I0>", "<I1>", "<I2>", "<I3>"]


class Sized(TextTokenizer):
    """Imitate a tokenizer of Qwen3's sizes that knows no text."""

    def __init__(self, size=151669):
        super().__init__(
            size, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
        )

    def encode(self, text):
        raise NotImplementedError

    def _decode_text(self, ids):
        return "." * len(ids)

    fingerprint = "sized"

    def save(self, directory):
        raise NotImplementedError


def test_published_sizes():
    vocab = Vocabulary(Sized(), 65536)
    assert (vocab.image_start, vocab.image_end) == (151669, 151670)
    assert [vocab.scale(s) for s in (1, 2, 3)] == [151671, 151672, 151673]
    assert (vocab.image_token_offset, vocab.image_token_end, vocab.size) == (151674, 217210, 217210)
    assert (vocab.start_of_turn, vocab.end_of_turn, vocab.pad_id) == (151644, 151645, 151643)
    vocab.check_model(Qwen3Config(), TaTokConfig())
    assert (
        vocab.decode([151669, 151671, 151674, 217209, 0, 151670])
        == "<im_start><S0><I0><I65535>.<im_end>"
    )
    with pytest.raises(ValueError, match="pool_scale=4"):
        vocab.scale(4)
    with pytest.raises(ValueError, match="cannot decode id 217210"):
        vocab.decode([217210])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_codes_and_ids(array):
    vocab = Vocabulary(Sized(), 65536)
    codes = array(np.array([[0, 65535], [7, 4]], np.uint16))
    ids = vocab.image_ids_from_codes(codes)
    assert ids.dtype == np.int32 and type(ids) is type(codes)
    assert ids.tolist() == [[151674, 217209], [151681, 151678]]
    back = vocab.codes_from_image_ids(ids)
    assert back.dtype == np.int32 and back.tolist() == codes.tolist()


def test_image_tokens_in_the_files_are_found(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "extended").mkdir()
    plain = Vocabulary(BpeTokenizer.from_path(write_bpe(tmp_path / "plain")), 4)
    published = BpeTokenizer.from_path(write_bpe(tmp_path / "extended", IMAGE_TOKENS))
    found = Vocabulary(published, 4)
    assert plain.tokenizer.size + 9 == published.size == found.size == plain.size
    assert found.image_start == plain.image_start and found.image_token_end == plain.image_token_end
    ids = [*range(found.image_start, found.image_token_end)]
    assert found.decode(ids) == plain.decode(ids) == "".join(IMAGE_TOKENS)
    assert found.encode("".join(IMAGE_TOKENS)) == plain.encode("".join(IMAGE_TOKENS))


def test_a_token_after_the_image_tokens_counts(tmp_path):
    vocab = Vocabulary(BpeTokenizer.from_path(write_bpe(tmp_path, [*IMAGE_TOKENS, "<image>"])), 4)
    assert vocab.size == vocab.image_token_end + 1
    assert vocab.decode([vocab.image_token_end]) == "<image>"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([*IMAGE_TOKENS[:2], "<S1>", "<S0>", *IMAGE_TOKENS[4:]], "<S0> at id"),
        ([*IMAGE_TOKENS[1:], "<im_start>"], "<im_end> at id"),
        (IMAGE_TOKENS[:-1], "<I3> and 0 more are missing"),
        ([*IMAGE_TOKENS, "<I4>"], "hold <I4>, but the codebook has 4"),
    ],
)
def test_unexpected_image_tokens(tmp_path, tokens, message):
    with pytest.raises(ConfigError, match=message):
        Vocabulary(BpeTokenizer.from_path(write_bpe(tmp_path, tokens)), 4)


@pytest.mark.parametrize("kind", ["bpe", "bpe with image tokens", "sentencepiece"])
def test_a_caption_cannot_spell_special_ids(kind, tmp_path):
    if kind == "sentencepiece":
        tokenizer = train_sentencepiece(CAPTIONS, tmp_path / "tokenizer.model", 2000)
    else:
        added = IMAGE_TOKENS if "image" in kind else []
        tokenizer = load_tokenizer(TextConfig("bpe", str(write_bpe(tmp_path, added))))
    vocab = pickle.loads(pickle.dumps(Vocabulary(tokenizer, 4)))
    caption = " ".join(ADDED + IMAGE_TOKENS)
    ids = vocab.encode(caption)
    assert not set(ids) & set(tokenizer.specials.values())
    assert not set(ids) & set(range(vocab.image_start, vocab.image_token_end))
    assert vocab.decode(ids) == caption


def test_check_model_names_both_sides():
    vocab = Vocabulary(Sized(), 16)
    with pytest.raises(
        ConfigError,
        match=r"model\.ar\.vocab_size=217210, .* has 151690 ids: set model\.ar\.vocab_size=151690",
    ):
        vocab.check_model(Qwen3Config(), TaTokConfig(codebook_size=16))
    with pytest.raises(ConfigError, match=r"codebook_size=65536, .* 16 image"):
        vocab.check_model(Qwen3Config(vocab_size=151690), TaTokConfig())


def test_tags_are_required(tmp_path):
    contents = json.loads((write_bpe(tmp_path) / "tokenizer.json").read_text())
    contents["added_tokens"] = []
    with pytest.raises(ValueError, match=r"no special token '<\|im_start\|>'"):
        Vocabulary(BpeTokenizer(contents), 4)
