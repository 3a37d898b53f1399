"""Encode and decode text with SentencePiece, or byte-level BPE from Qwen's files.

`encode` never returns special tokens (the chat tags and others that the files declare):
`encode("<|im_end|>")` returns the ids of those ten characters, so that a caption cannot end its
turn. `special("<|im_end|>")` returns the id of a special token. `decode` writes special tokens by
their names, so that a row is readable.

Instances pickle by value: a data worker process needs no file.
"""

import abc
import functools
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from blip3o_jax import files
from blip3o_jax.config import ConfigError, TemplateConfig, TextConfig, UserError
from blip3o_jax.config.errors import type_and_line

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
CHAT_TAGS = (START_OF_TURN, END_OF_TURN, VISION_START, VISION_END)

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILE = "tokenizer.json"


class TextTokenizer(abc.ABC):
    """Define the interface of a text tokenizer.

    Ids lie in [0, `size`). `specials` maps the names of special tokens, which no text encodes to,
    to their ids.
    """

    def __init__(self, size: int, specials: dict[str, int]):
        self.size = size
        self.specials = specials
        self._names = {token_id: name for name, token_id in specials.items()}

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special.

        Every text can be encoded: characters outside of the vocabulary become bytes.
        """

    @abc.abstractmethod
    def _decode_text(self, ids: list[int]) -> str:
        """Return the text of ids that are not special."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the contents: tokenizers with the same one encode alike."""

    @abc.abstractmethod
    def save(self, directory: str | pathlib.Path) -> None:
        """Write the file that `load_tokenizer` reads when its path is `directory`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, with special tokens by their names.

        Raises ValueError for an id outside of the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.size), None)
        if wrong is not None:
            raise ValueError(
                f"cannot decode id {wrong}: this tokenizer has ids 0 to {self.size - 1}"
            )
        # Runs of ordinary ids are decoded at once: the bytes of a character may span several ids.
        runs = itertools.groupby(ids, key=lambda i: i in self._names)
        return "".join(
            "".join(self._names[i] for i in run) if special else self._decode_text([*run])
            for special, run in runs
        )

    def special(self, token: str) -> int:
        """Return the id of special token `token`; UserError if the tokenizer lacks it."""
        if token not in self.specials:
            # The first ones only: files with image tokens have 65,536 more.
            known = ", ".join(itertools.islice(self.specials, 12)) or "none"
            raise UserError(
                f"the text tokenizer has no special token {token!r} (it has {known}); "
                "use files that declare it"
            )
        return self.specials[token]


class SentencePieceTokenizer(TextTokenizer):
    """Encode and decode with a SentencePiece model.

    The special tokens are the pieces of type control, which SentencePiece never matches in a text,
    unlike pieces of type user-defined.
    """

    def __init__(self, proto: bytes):
        import sentencepiece

        self.proto = proto
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        size = self._model.get_piece_size()
        super().__init__(
            size, {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        )

    @classmethod
    def from_path(cls, path: pathlib.Path) -> "SentencePieceTokenizer":
        """Read a .model file, or tokenizer.model in a directory; ConfigError if it is neither."""
        file = path / SENTENCEPIECE_FILE if path.is_dir() else path
        _check_file(
            file,
            "prepare the data set again, or point model.text.path at a SentencePiece .model file",
        )
        try:
            proto = file.read_bytes()
            if not proto:  # sentencepiece would make a model without pieces of it
                raise RuntimeError("the file is empty")
            return cls(proto)
        except RuntimeError as error:
            raise ConfigError(
                f"{file}: not a SentencePiece model ({error}); check model.text.kind"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # The bytes of the model are all of the state: `__init__` makes the rest from them.
        return SentencePieceTokenizer, (self.proto,)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode_text(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.proto).hexdigest()

    def save(self, directory: str | pathlib.Path) -> None:
        files.replace_bytes(pathlib.Path(directory) / SENTENCEPIECE_FILE, self.proto)


class BpeTokenizer(TextTokenizer):
    """Encode and decode with byte-level BPE, from the contents of a Hugging Face tokenizer.json.

    `specials` holds the file's added tokens, special or not (Qwen's `<think>` is not). They are
    removed before the tokenizer is built, since the `tokenizers` library matches them in any text.
    """

    def __init__(self, contents: dict[str, Any]):
        import tokenizers

        self._added = contents.get("added_tokens") or []
        # The file's truncation and padding would change rows silently.
        contents = contents | {"added_tokens": [], "truncation": None, "padding": None}
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(contents))
        specials = {token["content"]: token["id"] for token in self._added}
        vocab = contents["model"]["vocab"]
        _check_special_ids(specials, vocab)
        # The greatest id, not the number of entries: ids may have gaps.
        last = max(itertools.chain(vocab.values(), specials.values()))
        super().__init__(last + 1, specials)

    @classmethod
    def from_path(cls, path: pathlib.Path) -> "BpeTokenizer":
        """Read tokenizer.json (`path`, or a file in it), or else vocab.json and merges.txt.

        Raises ConfigError, naming the path, for a file that is missing or not byte-level BPE.
        """
        file = path / BPE_FILE if path.is_dir() else path
        old = not file.is_file() and (path / "vocab.json").is_file()
        if not old:
            _check_file(
                file,
                "point model.text.path at Qwen's tokenizer.json, or at a directory with it or with "
                "vocab.json",
            )
        try:
            contents = _qwen_contents(path) if old else _read_json(file)
            _check_byte_level(path, contents)
            return cls(contents)
        # These name the file already.
        except (ConfigError, OSError):
            raise
        except Exception as error:  # tokenizers raises no narrower kind
            raise ConfigError(
                f"{path}: not the files of a BPE tokenizer ({type_and_line(error)}); copy them "
                "again"
            ) from error

    def encode(self, text: str) -> list[int]:
        # A post-processor of the file may add special tokens at the ends of a text.
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _decode_text(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.contents(), sort_keys=True).encode()).hexdigest()

    def contents(self) -> dict[str, Any]:
        """Return the contents of tokenizer.json, as `save` writes them."""
        return json.loads(self._bpe.to_str()) | {"added_tokens": self._added}

    def save(self, directory: str | pathlib.Path) -> None:
        files.replace_bytes(
            pathlib.Path(directory) / BPE_FILE,
            json.dumps(self.contents(), ensure_ascii=False).encode(),
        )


def load_tokenizer(cfg: TextConfig, base_dir: str | pathlib.Path | None = None) -> TextTokenizer:
    """Load the tokenizer at `cfg.path`, relative to `base_dir` (a checkpoint directory) if given.

    Raises ConfigError, naming the path, when it holds no tokenizer of the kind `cfg.kind`.
    """
    if not cfg.path:
        raise ConfigError("model.text.path is empty: point it at the tokenizer's file or directory")
    path = pathlib.Path(base_dir or ".") / pathlib.Path(cfg.path).expanduser()
    return (SentencePieceTokenizer if cfg.kind == "sentencepiece" else BpeTokenizer).from_path(path)


def train_sentencepiece(
    captions: Iterable[str],
    path: str | pathlib.Path,
    vocab_size: int,
    template: TemplateConfig | None = None,
) -> SentencePieceTokenizer:
    """Train a SentencePiece tokenizer on `captions`, write it to `path` (.model) and return it.

    `decode(encode(text))` returns the text unchanged: no normalisation, no added or removed spaces,
    bytes for unseen characters (the exception is U+2581, SentencePiece's symbol for a space). The
    words of `template` are part of the training text. Training is deterministic. `vocab_size` is an
    upper limit; a small corpus gives fewer pieces. Raises UserError for an empty data set or a
    vocabulary that is too small.
    """
    import sentencepiece

    captions = iter(captions)
    first = next(captions, None)
    if first is None:
        raise UserError("cannot train a text tokenizer: the data set has no captions")
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(
                itertools.chain([first], captions), template or TemplateConfig()
            ),
            model_writer=proto,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            # One piece per digit, as in Qwen's pattern (_QWEN_WORDS).
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Qwen's pad token, so that both kinds of tokenizers have the same special tokens.
            pad_id=0,
            pad_piece=END_OF_TEXT,
            unk_id=1,
            # None of these two: the chat template's tags begin and end a turn.
            bos_id=-1,
            eos_id=-1,
            control_symbols=list(CHAT_TAGS),
            # The trainer skips longer lines, by default those of more than 4192 bytes.
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"cannot train a text tokenizer of {vocab_size} pieces: {error}") from error
    files.replace_bytes(pathlib.Path(path), proto.getvalue())
    return SentencePieceTokenizer(proto.getvalue())


def _training_lines(captions: Iterable[str], template: TemplateConfig) -> Iterator[str]:
    """Yield the lines to train on: the template's, once for each caption, with the caption in it.

    The repetition makes the template's words frequent, so that they become few pieces.
    """
    for caption in captions:
        yield from ("system", "user", "assistant", template.system)
        yield from template.generate.replace("{caption}", caption).splitlines()


# Qwen's splitting of text into words, as its published tokenizer.json has it.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen_contents(directory: pathlib.Path) -> dict[str, Any]:
    """Return the contents of an equivalent tokenizer.json.

    They come from vocab.json, merges.txt and the added tokens of tokenizer_config.json.
    """
    for name in ("merges.txt", "tokenizer_config.json"):
        _check_file(
            directory / name,
            "put it next to vocab.json, or use a directory with tokenizer.json",
        )
    lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [
        line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")
    ]
    added = _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    words = {
        "type": "Split",
        "pattern": {"Regex": _QWEN_WORDS},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": int(i), "content": token["content"]}
            | {flag: bool(token.get(flag)) for flag in flags}
            for i, token in sorted(added.items(), key=lambda item: int(item[0]))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _read_json(directory / "vocab.json"), "merges": merges},
    }


def _check_special_ids(specials: dict[str, Any], vocab: dict[str, int]) -> None:
    """Raise ValueError unless each special token has an id of its own, which no text reaches."""
    names = {token_id: name for name, token_id in vocab.items()}
    for name, token_id in specials.items():
        # Not isinstance: a JSON true is a bool, which is an int.
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"the added token {name!r} has the id {token_id!r}")
        if names.setdefault(token_id, name) != name:
            raise ValueError(
                f"the added token {name!r} has the id {token_id} of {names[token_id]!r}"
            )


def _check_byte_level(path: pathlib.Path, contents: Any) -> None:
    from tokenizers import pre_tokenizers

    model = contents.get("model") if isinstance(contents, dict) else None
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        raise ConfigError(f"{path}: not a BPE tokenizer.json; point model.text.path at Qwen's")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if missing:  # the library would silently drop these bytes from a caption
        raise ConfigError(
            f"{path}: not byte-level, {len(missing)} of 256 bytes are not in its vocabulary; "
            "use Qwen's files"
        )


def _check_file(file: pathlib.Path, advice: str) -> None:
    if not file.is_file():
        raise ConfigError(f"no text tokenizer at {file}: {advice}")


def _read_json(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: not JSON ({error}); check model.text.kind, or copy the file again"
        ) from error
