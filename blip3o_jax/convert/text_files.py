"""Write the text tokenizer's files of an export, for this package and for `AutoTokenizer`.

tokenizer.json             byte-level BPE: read by this package and Hugging Face. SentencePiece:
                           for Hugging Face, rebuilt from the model if that is exact
tokenizer.model            SentencePiece: read by this package
tokenizer_config.json,     the class, the end and pad tokens; only with a tokenizer.json
special_tokens_map.json

Hugging Face's ids equal those of this package with one difference: it encodes special tokens such
as `<|im_end|>` in any text as such, and `TextTokenizer.encode` never does.

A SentencePiece model of type bpe is rebuilt as a list of merges. SentencePiece joins the two
neighbours whose union is the piece with the highest score, so the merges are all splits of all
pieces into two, ordered by the piece's score. Splits of one piece have equal scores: SentencePiece
then takes the leftmost in the text, which no order of the list expresses. So the result is compared
with the original and not written if it differs.
"""

import json
import pathlib
import random
from typing import Any

from blip3o_jax.config import TemplateConfig
from blip3o_jax.text.tokenizers import (
    BPE_FILE,
    END_OF_TEXT,
    END_OF_TURN,
    SENTENCEPIECE_FILE,
    START_OF_TURN,
    BpeTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
)
from blip3o_jax.text.vocabulary import IMAGE_END, IMAGE_START, Vocabulary

SPACE = "\u2581"  # how SentencePiece writes a blank


def write_text_files(
    vocabulary: Vocabulary,
    directory: pathlib.Path,
    *,
    image_tokens: bool,
    template: TemplateConfig | None = None,
) -> list[str]:
    """Write the files to `directory` and return notes for the user, a line each.

    With `image_tokens`, tokenizer.json also has `<im_start>`, `<im_end>`, `<S0>` .., `<I0>` .. at
    the ids of `vocabulary` (those in the tokenizer's file stay in either case). With `template` and
    image tokens, tokenizer_config.json has a chat template that formats a user's message, the
    caption, as `text_to_image_prompt` does at pool scale 1.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(directory)
        contents, problems = _sentencepiece_contents(tokenizer)
    else:
        assert isinstance(tokenizer, BpeTokenizer), type(tokenizer)
        contents, problems = tokenizer.contents(), []
    if not problems:
        if image_tokens:
            contents["added_tokens"] = contents["added_tokens"] + _image_tokens(vocabulary)
        problems = _differences(tokenizer, contents)
    if problems:
        why = "; ".join(problems)
        if isinstance(tokenizer, SentencePieceTokenizer):
            return [
                f"{BPE_FILE} was not written, since Hugging Face's tokenizers would return other "
                f"ids ({why}): use {SENTENCEPIECE_FILE} with the sentencepiece library instead of "
                "AutoTokenizer"
            ]
        notes = [
            f"Hugging Face's tokenizers return other ids with {BPE_FILE} than blip3o_jax: {why}"
        ]
    else:
        notes = [
            f"Hugging Face's tokenizers encode a special token ({END_OF_TURN}) in a text as its "
            "id, blip3o_jax as its characters"
        ]
    (directory / BPE_FILE).write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    _write_config(directory, contents["added_tokens"], template if image_tokens else None)
    return notes


def _write_config(
    directory: pathlib.Path, added: list[dict[str, Any]], template: TemplateConfig | None
) -> None:
    ends = {"eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}
    others = [
        token["content"]
        for token in added
        if token["special"] and token["content"] not in ends.values()
    ]
    special = ends | {"additional_special_tokens": others}
    # Qwen2TokenizerFast would replace the file's normaliser and pre-tokenizer by its own.
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template:
        settings["chat_template"] = _chat_template(template)
    for name, values in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (directory / name).write_text(
            json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _added_token(name: str, token_id: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, **flags, "special": special}


def _image_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Return the image tokens that the tokenizer lacks: all or none."""
    if IMAGE_START in vocabulary.tokenizer.specials:
        return []
    names = {
        i: vocabulary.decode([i]) for i in range(vocabulary.image_start, vocabulary.image_token_end)
    }
    return [
        _added_token(name, i, special=name in (IMAGE_START, IMAGE_END)) for i, name in names.items()
    ]


def _sentencepiece_contents(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], list[str]]:
    """Return (tokenizer.json's contents, reasons why it cannot be built)."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as module
    except Exception as error:  # protobuf raises its own error if older than sentencepiece's
        return {}, [f"reading the model needs a newer protobuf: {error}"]
    import tokenizers as hf

    sentencepiece_model_pb2: Any = module  # protobuf adds the classes when it is imported
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    if problems := _unsupported_by_bpe(model):
        return {}, problems
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    # Control, unknown and byte pieces are never the result of a merge.
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unknown = next((piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN), None)
    bpe = hf.models.BPE(
        vocab,
        merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )
    built = hf.Tokenizer(bpe)
    built.normalizer = hf.normalizers.Replace(" ", SPACE)
    built.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace(SPACE, " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    added = [_added_token(name, i, special=True) for name, i in tokenizer.specials.items()]
    return json.loads(built.to_str()) | {"added_tokens": added}, []


def _unsupported_by_bpe(model: Any) -> list[str]:
    """Return the features of a `ModelProto` that a list of merges cannot express."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    problems = []
    if trainer.model_type != trainer.BPE:
        # Unigram is unsupported too: the choice of a split depends on the rounding of score sums.
        problems.append(
            f"it is of type {trainer.ModelType.Name(trainer.model_type).lower()}, not bpe"
        )
    if normalizer.precompiled_charsmap:
        problems.append(f"it normalises characters (rule {normalizer.name or 'unnamed'})")
    if model.denormalizer_spec.precompiled_charsmap:
        problems.append("it changes characters of decoded text (denormalizer_spec)")
    if normalizer.remove_extra_whitespaces:
        problems.append("it removes spaces (remove_extra_whitespaces)")
    if normalizer.add_dummy_prefix:
        # The ids can be reproduced, but not the text: SentencePiece removes the space after every
        # special token.
        problems.append("it adds a space before a text (add_dummy_prefix)")
    if not normalizer.escape_whitespaces:
        problems.append("it does not escape spaces (escape_whitespaces)")
    for kind in (kinds.USER_DEFINED, kinds.UNUSED):
        if pieces := [piece.piece for piece in model.pieces if piece.type == kind]:
            problems.append(
                f"it has {len(pieces)} {kinds.Type.Name(kind).lower()} pieces, {pieces[0]!r} first"
            )
    return problems


def _differences(tokenizer: TextTokenizer, contents: dict[str, Any]) -> list[str]:
    """Return a line on the first text that Hugging Face's tokenizers encode differently."""
    import tokenizers as hf

    built = hf.Tokenizer.from_str(json.dumps(contents))
    # The library numbers added tokens in order and ignores "id".
    for token in contents["added_tokens"]:
        if (token_id := built.token_to_id(token["content"])) != token["id"]:
            return [f"{token['content']} has id {token['id']} here and {token_id} there"]
    pieces = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        hidden = set(tokenizer.specials.values())
        pieces = [
            name.replace(SPACE, " ")
            for name, i in contents["model"]["vocab"].items()
            if i not in hidden
        ]
    texts = [*_test_texts(pieces), *pieces]
    for text, encoding in zip(
        texts, built.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        ids = tokenizer.encode(text)
        if encoding.ids != ids:
            return [f"{text!r} has ids {ids} here and {encoding.ids} there"]
        if (found := built.decode(ids, skip_special_tokens=False)) != tokenizer.decode(ids):
            return [f"ids {ids} are {tokenizer.decode(ids)!r} here and {found!r} there"]
    return []


def _test_texts(pieces: list[str]) -> list[str]:
    """Return a few hundred fixed texts of random characters, words and `pieces`."""
    # A fixed seed: the same model gives the same verdict.
    draw = random.Random(0)
    template = TemplateConfig()
    words = [
        *f"{template.system} {template.generate} system user assistant".split(),
        "It's",
        "OPEN 24",
        "1234.5",
        "(x)",
    ]
    blanks = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", SPACE]
    characters = [*"aaabcdeorstzABZ0123456789.,:;!?'\"-_/\\#@&*+=()[]{}~`^$%\0\x7f"]
    foreign = [
        *"\u00e9\u0301\u00df\u00f1\u0416\u05d0\u0915\u093f\u65e5\u672c\u8a9e\ud55c\U0001f600\u200d\ufb01\ufffd\ufeff\ufe0f"
    ]
    alphabets = (
        words + blanks,
        characters + blanks,
        characters + foreign + blanks,
        words + foreign + blanks * 3,
    )
    texts = ["", " ", "  two  blanks ", "<0x41><0x0A> <unk> a < b", "aaaaaaa", "".join(foreign)]
    texts += [
        "".join(draw.choices(alphabet, k=draw.randint(1, 24)))
        for alphabet in alphabets
        for _ in range(100)
    ]
    if pieces:
        texts += ["".join(draw.choices(pieces, k=draw.randint(2, 8))) for _ in range(400)]
    return texts


def _chat_template(template: TemplateConfig) -> str:
    """Return a Jinja template over messages with a role and a text.

    A first message of role "system" replaces the template's system message.
    """

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    system = quoted(
        f"{START_OF_TURN}system\n{template.system}{END_OF_TURN}\n" if template.system else ""
    )
    opening = quoted(f"{START_OF_TURN}assistant\n{IMAGE_START}<S0>")
    return (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system} }}}}{{% endif %}}"
        "{% for message in messages %}"
        f"{{{{ {quoted(START_OF_TURN)} + message['role'] + {quoted(chr(10))} }}}}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {quoted(template.generate)} | replace('{{caption}}', message['content']) }}}}"
        "{% else %}{{ message['content'] }}{% endif %}"
        f"{{{{ {quoted(END_OF_TURN + chr(10))} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% endif %}}"
    )
