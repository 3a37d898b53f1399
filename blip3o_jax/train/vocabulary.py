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
from blip3o_jax.text.vocabulary import Vocabulary
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
