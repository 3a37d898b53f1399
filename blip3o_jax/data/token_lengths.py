"""Measure the tokens of a data set's examples before it is read, and choose the row length by them.

The text of the records is tokenized by threads, and the lengths are stored in the user's cache
directory, keyed by the content, the vocabulary and the template. Images are not decoded. The row
length is chosen by a sample of a large set, packing reads the lengths of all records.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.packing import pack_window, window_size
from blip3o_jax.data.record import Source
from blip3o_jax.data.scan import scan
from blip3o_jax.data.subset import Subset

LENGTH_MULTIPLE = 128  # of a row: the tiles of attention kernels and of the sharded sequence
FITTING = 0.999  # fraction of the examples that a row has room for
SAMPLE = 20_000  # records of a source whose lengths the row length is chosen by
_WINDOWS = 8  # windows that are packed to choose the length of packed rows
# Records that are scanned together: an interrupted scan goes on with the next ones.
_CHUNK = 2**18

# Tokens of template and text that are assumed where no data are at hand.
ASSUMED_TEXT = 350

# An array of this host -> those of all hosts, [hosts, ...].
Gather = Callable[[np.ndarray], np.ndarray]


def token_lengths(
    source: Source,
    builder: ExampleBuilder,
    host: int = 0,
    hosts: int = 1,
    gather: Gather = np.asarray,
) -> np.ndarray:
    """Return the tokens of each record's example, uint32 [N], 0 for a record that no example can be
    made of (the loader reports it). Hosts call this together: each scans its share, and all get the
    same numbers. Raises OSError for errors of the machine.
    """
    starts = range(0, len(source), _CHUNK)
    if len(starts) <= 1 and hosts == 1:
        return _scan(source, builder)
    found: list[np.ndarray] = []
    for first in range(0, len(starts), hosts):
        own_N = np.zeros(min(_CHUNK, len(source)), np.uint32)
        if first + host < len(starts):
            start = starts[first + host]
            stop = min(start + _CHUNK, len(source))
            own_N[: stop - start] = _scan(_chunk(source, start, stop), builder)
        found += [*gather(own_N)] if hosts > 1 else [own_N]
    return np.concatenate(found)[: len(source)]


def _chunk(source: Source, start: int, stop: int) -> Source:
    """Return the records from `start` to `stop`: the source itself where these are all, so that one
    host and several share the stored lengths.
    """
    if (start, stop) == (0, len(source)):
        return source
    part = Subset(source, np.arange(start, stop))
    part.name = f"{source.name}[{start}:{stop}]"
    return part


def _scan(source: Source, builder: ExampleBuilder) -> np.ndarray:
    settings = builder.length_settings()
    length = builder.length
    return scan(source, "tokens", length, unreadable=0, dtype=np.uint32, settings=settings)


@dataclasses.dataclass(frozen=True)
class RowLength:
    """Hold a chosen row length, tokens, and a line on why."""

    length: int
    reason: str


def choose_row_length(
    sources: Sequence[tuple[Source, float]], builder: ExampleBuilder, pack: int
) -> RowLength:
    """Return the row length for `pack` examples a row: the smallest multiple of LENGTH_MULTIPLE
    that has room for FITTING of the examples, each by itself. With packing it is the one at which
    the examples cost least, in tokens of rows and in slots.

    It follows from up to SAMPLE records of each source, by the mixture's weights, and is the same
    wherever the data are. Raises UserError if no example can be made of them.
    """
    lengths = []
    weights = []
    for source, weight in sources:
        count = min(SAMPLE, len(source))
        chosen = np.linspace(0, len(source) - 1, count).astype(np.int64)
        sample = source if count == len(source) else Subset(source, chosen)
        found_N = _scan(sample, builder)
        found_N = found_N[found_N > 0]
        lengths.append(found_N)
        # Each source has its weight, whatever part of it is sampled.
        weights.append(np.full(len(found_N), weight / max(1, len(found_N))))
    lengths_N = np.concatenate(lengths).astype(np.int64)
    if not len(lengths_N):
        raise UserError(
            f"{', '.join(source.name for source, _ in sources)}: no example can be made of the"
            " records that data.max_length=0 reads: set data.max_length, and the run says what is"
            " wrong with each"
        )
    weights_N = np.concatenate(weights) / sum(map(np.sum, weights))
    order_N = np.argsort(lengths_N, kind="stable")
    below_N = np.cumsum(weights_N[order_N])
    # The sum of the weights may round to less than FITTING.
    last = min(int(np.searchsorted(below_N, FITTING)), len(order_N) - 1)
    length = _rounded_up(int(lengths_N[order_N[last]]))
    mean = float(lengths_N @ weights_N)
    known = f"{len(lengths_N):,} examples of {mean:.0f} tokens on average"
    if pack == 1:
        return RowLength(length, f"room for {100 * FITTING:g} % of {known}")
    # Seeded: the same length on all hosts and at every start.
    rng = np.random.default_rng(0)
    windows = rng.choice(np.minimum(lengths_N, length), (_WINDOWS, window_size(pack)), p=weights_N)
    # Of the AR a slot costs its tokens; the head and the diffusion head cost about as much as the
    # AR's work on the image's tokens again (1.4 times that at the published sizes).
    slots = pack * builder.model.tokenizer.num_tokens
    fewest = _WINDOWS * -(-windows.shape[1] // pack)
    candidate = max(length, LENGTH_MULTIPLE * int(pack * windows.mean() // LENGTH_MULTIPLE))
    choices = []
    rows = fewest + 1
    while rows > fewest:  # longer rows than those that are all full only cost more
        rows = sum(len(pack_window(window.tolist(), candidate, pack)) for window in windows)
        choices.append((rows * (candidate + slots), candidate, rows))
        candidate += LENGTH_MULTIPLE
    _, length, rows = min(choices)
    filled = 100 * windows.size / (rows * pack)
    tokens = 100 * windows.sum() / (rows * length)
    return RowLength(
        length,
        f"up to {pack} of {known} fill {filled:.1f} % of the slots, {tokens:.1f} % of the tokens",
    )


def assumed_row_length(model: ModelConfig) -> int:
    """Return the row length that programs are compiled with where `data.max_length=0` and no data
    are at hand: room for ASSUMED_TEXT tokens of text and template, and the images.
    """
    # The image's tags are a further two tokens.
    images = (1 + model.editing.reference_slots) * (model.tokenizer.num_tokens + 2)
    return _rounded_up(ASSUMED_TEXT + images)


def _rounded_up(tokens: float) -> int:
    return LENGTH_MULTIPLE * int(-(-tokens // LENGTH_MULTIPLE))
