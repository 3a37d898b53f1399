"""Build the vocabulary of a run: from the files that its configuration names, or trained on its
captions.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from blip3o_jax.config import Config, UserError
from blip3o_jax.data.record import BadRecord, Source, read_record
from blip3o_jax.text.tokenizers import SENTENCEPIECE_FILE, load_tokenizer, train_sentencepiece
from blip3o_jax.text.vocabulary import NUM_SCALES, Vocabulary
from blip3o_jax.train.stages import STAGES

MAX_CAPTIONS = 100_000  # of each source; more add nothing to the pieces


def with_vocabulary(
    config: Config, sources: Sequence[tuple[Source, float]], workdir: pathlib.Path
) -> tuple[Config, Vocabulary | None]:
    """Return the configuration with the tokenizer's path and the vocabulary's size filled in, and
    the vocabulary (None for a stage that reads no text). A trained tokenizer is stored in
    `workdir`/text. Raises UserError if files and sizes do not agree.
    """
    if not {"caption", "row"} & set(STAGES[config.stage].fields):
        return config, None
    text = config.model.text
    model = config.model
    if text.train_size and not text.path:
        path = workdir / "text" / SENTENCEPIECE_FILE
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            train_sentencepiece(_captions(sources), path, text.train_size, model.template)
        text = dataclasses.replace(text, path=str(path))
    vocabulary = Vocabulary(load_tokenizer(text), model.tokenizer.codebook_size)
    if text.train_size:
        ar: Any = model.ar  # every family's settings are a dataclass, the common base is none
        model = dataclasses.replace(
            model, text=text, ar=dataclasses.replace(ar, vocab_size=vocabulary.size)
        )
    vocabulary.check_model(model.ar, model.tokenizer)
    return dataclasses.replace(config, model=model), vocabulary


def expected_vocabulary(config: Config) -> tuple[Config, str]:
    """Return the configuration with the vocabulary's size as far as it is known without captions,
    and a line on where the size comes from ("" for a stage that reads no text).

    Raises UserError where the tokenizer's file and the configured sizes do not agree.
    """
    model = config.model
    text = model.text
    if not {"caption", "row"} & set(STAGES[config.stage].fields):
        return config, ""
    if text.path:
        config, vocabulary = with_vocabulary(config, [], pathlib.Path())
        assert vocabulary is not None, "the stage reads text"
        return config, f"vocabulary: {vocabulary.size:,} ids, by the tokenizer {text.path}"
    if not text.train_size:
        return config, (
            f"vocabulary: {model.ar.vocab_size:,} ids assumed, as model.ar.vocab_size says; "
            "--config.model.text.path=FILE compares a tokenizer"
        )
    # Two tags around the image and the scales stand between the pieces and the image tokens.
    size = text.train_size + 2 + NUM_SCALES + model.tokenizer.codebook_size
    settings: Any = model.ar  # every family's settings are a dataclass, the common base is none
    ar = dataclasses.replace(settings, vocab_size=size)
    return dataclasses.replace(config, model=dataclasses.replace(model, ar=ar)), (
        f"vocabulary: {size:,} ids assumed, the most that model.text.train_size={text.train_size} "
        "allows; a run trains its tokenizer on its captions: --checkpoint=DIR counts that run's"
    )


def _captions(sources: Sequence[tuple[Source, float]]) -> Iterator[str]:
    """Yield the captions of the records that can be read. Raises UserError if there is none, with
    the last reason.
    """
    read, last = 0, None
    for source, _ in sources:
        for index in itertools.islice(range(len(source)), MAX_CAPTIONS):
            try:
                caption = read_record(source, index, lambda record: record.caption)
            except BadRecord as error:
                last = error  # counted when the loader meets it
                continue
            read += 1
            yield caption
    if last is not None and not read:
        raise UserError(f"cannot train a text tokenizer: no caption can be read, the last {last}")
