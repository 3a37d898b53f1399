"""The joint vocabulary of text and images, and the one place where ids and codebook indices are
turned into each other.

    0 .. T-1     text ids, of the text tokenizer (T = 151669 for Qwen3)
    T, T+1       <im_start>, <im_end>: around the image tokens (not Qwen's <|im_start|>, which starts a turn)
    T+2 .. T+4   <S0>, <S1>, <S2>: scale tokens; pool scale s of the vision tokenizer is announced by <S{s-1}>
    T+5 ..       <I0>, <I1>, ...: image token <I{c}> is codebook index c

Rows are counted as they are in use; the embedding table pads them
(`Qwen3Config.padded_vocab_size`).
"""

from collections.abc import Sequence
from typing import Any

from blip3o_jax.config import ConfigError, Qwen3Config, TaTokConfig, check
from blip3o_jax.text.tokenizers import END_OF_TEXT, END_OF_TURN, START_OF_TURN, TextTokenizer

IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
NUM_SCALES = 3


class Vocabulary:
    """Text ids of `tokenizer`, then tags, scale tokens and `codebook_size` image tokens.

    Where the tokenizer's own files already hold the latter (as those published with BLIP3o-NEXT do)
    they are found there instead of appended; ConfigError if they are incomplete or not in the order
    above.
    """

    def __init__(self, tokenizer: TextTokenizer, codebook_size: int):
        self.tokenizer = tokenizer
        self.codebook_size = codebook_size
        self.image_start = _find_or_append(tokenizer, codebook_size)
        self.size = max(tokenizer.size, self.image_token_end)
        self.start_of_turn = tokenizer.special(START_OF_TURN)
        self.end_of_turn = tokenizer.special(END_OF_TURN)
        self.pad_id = tokenizer.special(END_OF_TEXT)

    @property
    def image_end(self) -> int:
        return self.image_start + 1

    def scale(self, pool_scale: int) -> int:
        """The scale token that announces an image pooled by `pool_scale` (1, 2 or 3)."""
        if not 1 <= pool_scale <= NUM_SCALES:
            raise ValueError(f"pool_scale={pool_scale} has no scale token: use 1 to {NUM_SCALES}")
        return self.image_start + 2 + pool_scale - 1

    @property
    def image_token_offset(self) -> int:
        """The id of <I0>."""
        return self.image_start + 2 + NUM_SCALES

    @property
    def image_token_end(self) -> int:
        """One past the id of the last image token."""
        return self.image_token_offset + self.codebook_size

    def image_ids_from_codes(self, codes: Any) -> Any:
        """Codebook indices -> ids, int32, for numpy and jax arrays alike (cached codes may be
        uint16, too short for ids).
        """
        return image_ids_from_codes(codes, self.image_token_offset)

    def codes_from_image_ids(self, ids: Any) -> Any:
        """The inverse of `image_ids_from_codes`."""
        return codes_from_image_ids(ids, self.image_token_offset)

    def encode(self, text: str) -> list[int]:
        """Text ids only, whatever tags `text` spells."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with tags, scale and image tokens by their names; ValueError for an id
        outside.
        """
        names = {self.image_start: IMAGE_START, self.image_end: IMAGE_END}
        names |= {self.scale(s): f"<S{s - 1}>" for s in range(1, NUM_SCALES + 1)}
        parts, run = [], []
        for i in map(int, ids):
            if self.image_start <= i < self.image_token_end:
                parts += [
                    self.tokenizer.decode(run),
                    names.get(i) or f"<I{i - self.image_token_offset}>",
                ]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self.tokenizer.decode(run)])

    def check_model(self, ar: Qwen3Config, tokenizer: TaTokConfig) -> None:
        """ConfigError unless the AR's table and the vision tokenizer's codebook have this
        vocabulary's sizes.
        """
        check(
            tokenizer.codebook_size == self.codebook_size,
            f"model.tokenizer.codebook_size={tokenizer.codebook_size}, but the vocabulary has {self.codebook_size} image "
            f"tokens: set model.tokenizer.codebook_size={self.codebook_size}, or build the vocabulary anew",
        )
        used = ar.vocab_size - ar.spare_rows
        check(
            used == self.size,
            f"model.ar.vocab_size={ar.vocab_size}, but the vocabulary (text tokenizer and image tokens) has {self.size} ids: "
            f"set model.ar.vocab_size={self.size + ar.spare_rows}, or model.text.path to the tokenizer the model was made with",
        )


def image_ids_from_codes(codes: Any, image_token_offset: int) -> Any:
    """The same where only the id of <I0> is at hand, as within a traced loss."""
    return codes.astype("int32") + image_token_offset


def codes_from_image_ids(ids: Any, image_token_offset: int) -> Any:
    return ids.astype("int32") - image_token_offset


def _find_or_append(tokenizer: TextTokenizer, codebook_size: int) -> int:
    """The id of <im_start>, checked to be followed by all the others in order."""
    present = tokenizer.specials
    names = (
        [IMAGE_START, IMAGE_END]
        + [f"<S{i}>" for i in range(NUM_SCALES)]
        + [f"<I{i}>" for i in range(codebook_size)]
    )
    missing = [name for name in names if name not in present]
    beyond = f"<I{codebook_size}>"
    if beyond in present:
        raise ConfigError(
            f"the text tokenizer's files hold {beyond}, but the codebook has {codebook_size} entries: raise it"
        )
    if len(missing) == len(names):
        return tokenizer.size
    if missing:
        raise ConfigError(
            f"the text tokenizer's files hold only some of the image tokens: {missing[0]} and {len(missing) - 1} more are "
            f"missing; use files with all of {names[0]} .. {names[-1]} (model.tokenizer.codebook_size={codebook_size}) or none"
        )
    first = present[IMAGE_START]
    for i, name in enumerate(names):
        if present[name] != first + i:
            raise ConfigError(
                f"the text tokenizer's files have {name} at id {present[name]}, expected {first + i}: "
                f"{names[0]}, {names[1]}, <S..>, <I..> must follow each other in this order"
            )
    return first
