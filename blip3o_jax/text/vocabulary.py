"""Define the joint vocabulary of text and images; convert ids and codebook indices.

    0 .. T-1     text ids, of the text tokenizer (T = 151669 for Qwen3)
    T, T+1       <im_start>, <im_end>: around the image tokens (not Qwen's <|im_start|>, which
                 starts a turn)
    T+2 .. T+4   <S0>, <S1>, <S2>: scale tokens; <S{s-1}> precedes an image of pool scale s of the
                 vision tokenizer
    T+5 ..       <I0>, <I1>, ...: image token <I{c}> is codebook index c

Sizes count the ids; the embedding table has padding rows (`LanguageModelConfig.padded_vocab_size`).
"""

from collections.abc import Sequence
from typing import Any

from blip3o_jax.config import ConfigError, ImageTokenizerConfig, LanguageModelConfig, check
from blip3o_jax.text.tokenizers import END_OF_TEXT, END_OF_TURN, START_OF_TURN, TextTokenizer

IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
NUM_SCALES = 3


class Vocabulary:
    """Hold the text ids of `tokenizer`, then tags, scale tokens and `codebook_size` image tokens.

    The files of a tokenizer may already hold the image tokens (those of BLIP3o-NEXT do); otherwise
    they are appended. Raises ConfigError if the files hold only some of them, or another order.
    """

    def __init__(self, tokenizer: TextTokenizer, codebook_size: int):
        self.tokenizer = tokenizer
        self.codebook_size = codebook_size
        self.image_start = _find_or_append(tokenizer, codebook_size)
        # Where the files hold the image tokens, other ids may follow these.
        self.size = max(tokenizer.size, self.image_token_end)
        self.start_of_turn = tokenizer.special(START_OF_TURN)
        self.end_of_turn = tokenizer.special(END_OF_TURN)
        self.pad_id = tokenizer.special(END_OF_TEXT)

    @property
    def image_end(self) -> int:
        """Return the id of <im_end>."""
        return self.image_start + 1

    def scale(self, pool_scale: int) -> int:
        """Return the scale token of an image pooled by `pool_scale` (1, 2 or 3).

        Raises ValueError for another scale.
        """
        if not 1 <= pool_scale <= NUM_SCALES:
            raise ValueError(f"pool_scale={pool_scale} has no scale token: use 1 to {NUM_SCALES}")
        return self.image_start + 2 + pool_scale - 1

    @property
    def image_token_offset(self) -> int:
        """Return the id of <I0>."""
        return self.image_start + 2 + NUM_SCALES

    @property
    def image_token_end(self) -> int:
        """Return the id after the last image token's."""
        return self.image_token_offset + self.codebook_size

    def image_ids_from_codes(self, codes: Any) -> Any:
        """Convert codebook indices to ids, int32, as NumPy or JAX arrays.

        Cached codes may be uint16, which is too small for ids.
        """
        return image_ids_from_codes(codes, self.image_token_offset)

    def codes_from_image_ids(self, ids: Any) -> Any:
        """Convert ids to codebook indices, int32: the inverse of `image_ids_from_codes`."""
        return codes_from_image_ids(ids, self.image_token_offset)

    def encode(self, text: str) -> list[int]:
        """Return the text ids of `text`; tags in it are encoded as characters."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, with tags, scale and image tokens by their names.

        Raises ValueError for an id outside of the vocabulary.
        """
        names = {self.image_start: IMAGE_START, self.image_end: IMAGE_END}
        names |= {self.scale(s): f"<S{s - 1}>" for s in range(1, NUM_SCALES + 1)}
        parts: list[str] = []
        # Text ids are decoded in runs: the bytes of a character may span several ids.
        run: list[int] = []
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

    def check_model(self, ar: LanguageModelConfig, tokenizer: ImageTokenizerConfig) -> None:
        """Raise ConfigError unless the AR's table and the codebook have the vocabulary's sizes."""
        check(
            tokenizer.codebook_size == self.codebook_size,
            f"model.tokenizer.codebook_size={tokenizer.codebook_size}, but the vocabulary has "
            f"{self.codebook_size} image tokens: set "
            f"model.tokenizer.codebook_size={self.codebook_size}, or build the vocabulary again",
        )
        used = ar.vocab_size - ar.spare_rows
        check(
            used == self.size,
            f"model.ar.vocab_size={ar.vocab_size}, but the vocabulary (text tokenizer and image "
            f"tokens) has {self.size} ids: set model.ar.vocab_size={self.size + ar.spare_rows}, or "
            "model.text.path to the tokenizer that the model was made with",
        )


def image_ids_from_codes(codes: Any, image_token_offset: int) -> Any:
    """Convert codebook indices to ids, int32; `image_token_offset` is the id of <I0>."""
    return codes.astype("int32") + image_token_offset


def codes_from_image_ids(ids: Any, image_token_offset: int) -> Any:
    """Convert ids to codebook indices, int32; `image_token_offset` is the id of <I0>."""
    return ids.astype("int32") - image_token_offset


def _find_or_append(tokenizer: TextTokenizer, codebook_size: int) -> int:
    """Return the id of <im_start>; ConfigError unless all other image tokens follow in order."""
    present = tokenizer.specials
    names = (
        [IMAGE_START, IMAGE_END]
        + [f"<S{i}>" for i in range(NUM_SCALES)]
        + [f"<I{i}>" for i in range(codebook_size)]
    )
    missing = [name for name in names if name not in present]
    beyond = f"<I{codebook_size}>"
    # Files of a larger codebook have all tokens of this one too, in order; only the next token
    # shows the difference.
    if beyond in present:
        raise ConfigError(
            f"the text tokenizer's files hold {beyond}, but the codebook has {codebook_size} "
            "entries: raise model.tokenizer.codebook_size"
        )
    if len(missing) == len(names):
        return tokenizer.size
    if missing:
        raise ConfigError(
            f"the text tokenizer's files hold only some of the image tokens: {missing[0]} and "
            f"{len(missing) - 1} more are missing; use files with all of {names[0]} .. {names[-1]} "
            f"(model.tokenizer.codebook_size={codebook_size}) or none"
        )
    first = present[IMAGE_START]
    for i, name in enumerate(names):
        if present[name] != first + i:
            raise ConfigError(
                f"the text tokenizer's files have {name} at id {present[name]}, expected "
                f"{first + i}: {names[0]}, {names[1]}, <S..>, <I..> must follow in this order"
            )
    return first
