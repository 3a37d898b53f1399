"""Rows are full, hold every example once, and are the same on any number of hosts and workers and
after any resume.
"""

import functools
import itertools
import pickle

import numpy as np
import pytest

from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data import packing
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.packing import PackedRows, Position, pack_window, window_size
from blip3o_jax.data.record import BadRecord, Record, RowTooLong, Source

MAX_LENGTH = 2432
UNREADABLE = 17  # index of a record that can never be read
UNDECODABLE = 40  # index of a record that has a length, and an image that does not decode


def mixture(rng, count):
    """Return the tokens of captions of 60 to 350 tokens with an image of 729, of edits with a
    second one, and of questions, a third each.
    """
    kind = rng.integers(0, 3, count)
    captions = 751 + rng.integers(60, 351, count)
    edits = 1485 + rng.integers(10, 60, count)
    questions = 756 + np.clip(rng.gamma(2, 40, count).astype(int), 5, 700)
    return np.choose(kind, [captions, edits, questions])


@pytest.mark.parametrize("seed", range(8))
def test_every_example_is_in_one_row_and_no_row_has_too_many(seed):
    rng = np.random.default_rng(seed)
    pack = int(rng.integers(1, 9))
    max_length = int(rng.integers(50, 400))
    lengths = rng.integers(1, max_length + 1, rng.integers(1, 400)).tolist()
    rows = pack_window(lengths, max_length, pack)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(rows) and max(map(len, rows)) <= pack
    assert max(sum(lengths[n] for n in row) for row in rows) <= max_length
    # One row fewer cannot hold them by this rule.
    longest_first = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    assert (
        packing._place_longest_first(lengths, longest_first, len(rows) - 1, max_length, pack)
        is None
    )


@pytest.mark.parametrize(
    ("pack", "max_length", "slots", "tokens"),
    [(2, 2432, 0.99, 0.9), (3, 3456, 0.99, 0.94), (4, 4736, 0.99, 0.92), (8, 9088, 0.99, 0.96)],
)
def test_few_slots_stay_empty(pack, max_length, slots, tokens):
    rng = np.random.default_rng(1)
    windows = [mixture(rng, window_size(pack)).tolist() for _ in range(2)]
    rows = sum(len(pack_window(window, max_length, pack)) for window in windows)
    assert sum(map(len, windows)) / (rows * pack) > slots
    assert sum(map(sum, windows)) / (rows * max_length) > tokens


class Texts(Source):
    """Provide records whose caption is their index, but for the unreadable one."""

    fingerprint = "texts"

    def __init__(self, name, size, shape=None):
        super().__init__(name, [])
        self.size = size
        self.shape = shape

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == UNREADABLE:
            raise BadRecord(self.name, f"k{index}", "broken")
        return Record(b"", str(index), f"k{index}", self.name)


@functools.cache
def lengths_of(size):
    lengths_N = mixture(np.random.default_rng(size), size)
    lengths_N[5] = MAX_LENGTH + 1
    lengths_N[UNREADABLE] = 0
    return lengths_N.astype(np.uint32)


def to_row(record):
    if record.caption == "5":
        raise RowTooLong(record.key, MAX_LENGTH + 1, MAX_LENGTH)
    if record.caption == str(UNDECODABLE):
        raise ValueError("the image cannot be decoded")
    return {"number": np.int64(record.caption), "source": np.int64(ord(record.shard[0]))}


def join(rows, records):
    """Stack up to two examples; the slot of an absent one has number -1."""
    lengths = [lengths_of(SOURCES[record.shard].size)[int(record.caption)] for record in records]
    if sum(lengths) > MAX_LENGTH:
        raise RowTooLong("k", sum(lengths), MAX_LENGTH)
    return {
        name: np.array([row[name] for row in rows] + [-1] * (2 - len(rows))) for name in rows[0]
    }


SOURCES = {"a": Texts("a", 3000), "b": Texts("b", 1100)}


def make(hosts=(0, 1), shapes=(None, None), seed=7, **data):
    settings = DataConfig(
        **{"batch_size": 64, "pack": 2, "max_length": MAX_LENGTH, "workers": 0} | data
    )
    sized = zip(SOURCES.items(), shapes, strict=False)
    sources = [Texts(name, lengths_N.size, shape) for (name, lengths_N), shape in sized]
    share = settings.batch_size // settings.pack // hosts[1]
    return Loader(
        list(zip(sources, (3.0, 1.0), strict=True)),
        to_row,
        settings,
        seed,
        rows=range(hosts[0] * share, (hosts[0] + 1) * share),
        join=join,
        lengths=[lengths_of(source.size) for source in sources],
    )


def take(loader, batches):
    rows = []
    for _ in range(batches):
        batch = next(loader)
        rows += [tuple(row) for row in (batch["source"] * 10**6 + batch["number"]).tolist()]
    return rows


def test_rows_are_the_same_on_any_number_of_hosts_and_after_any_resume():
    whole = make()
    expected = take(whole, 40)  # of 32 rows: beyond the second window
    workers = make(workers=2)
    assert take(workers, 20) == expected[:640]
    state = workers.state()
    assert state["packed"][0]["window"] == 1 and state["order"]["pack"] == 2
    workers.close()
    for hosts in (1, 2, 4):
        loaders = [make(hosts=(h, hosts)) for h in range(hosts)]
        for loader in loaders:
            loader.restore(state)
        for k in range(20, 24):
            got = list(itertools.chain(*(take(loader, 1) for loader in loaders)))
            assert got == expected[32 * k : 32 * (k + 1)], (hosts, k)
        assert loaders[-1].state()["packed"] == loaders[0].state()["packed"]
    bigger = make(batch_size=320)
    bigger.restore(state)
    assert take(bigger, 4) == expected[640 : 640 + 640]
    # In the very middle of nowhere: a batch that ends with its window.
    again = make()
    again.restore(bigger.state())
    rest = take(again, 1)
    assert rest != expected[:32] and len(set(rest)) == 32
    with pytest.raises(UserError, match=r"max_length was 2432, now it is 2560: resuming"):
        make(max_length=2560).restore(state)
    with pytest.raises(UserError, match=r"pack was None, now it is 2"):
        make().restore(make(pack=1, batch_size=64).state())


def test_an_epoch_has_every_usable_record_once_and_reports_the_others(caplog):
    alone = SOURCES["a"]
    loader = Loader(
        [(alone, 1.0)],
        to_row,
        DataConfig(batch_size=64, pack=2, max_length=MAX_LENGTH, workers=0, max_bad_fraction=0.1),
        0,
        join=join,
        lengths=[lengths_of(alone.size)],
    )
    numbers = []
    bad = 0
    filled = []
    # Three windows of 1,024 have the first epoch.
    while loader.state()["packed"][0]["window"] < 3:
        batch = next(loader)
        numbers += batch["number"][batch["number"] >= 0].tolist()
        bad += batch["bad_records"].sum()
        filled.append((batch["number"] >= 0).mean())
    assert batch["bad_records"].shape == (32, 2)
    assert np.bincount(numbers[:2040]).max() == 1
    seen = np.bincount(numbers, minlength=3000)
    assert np.flatnonzero(seen == 0).tolist() == [5, UNREADABLE, UNDECODABLE]
    assert np.mean(filled) > 0.99
    skipped = loader.state()["skipped"]
    assert {"too long", "broken", "ValueError"} == set(skipped) and bad == (
        skipped["broken"] + skipped["ValueError"]
    )


def test_batches_of_several_shapes_go_on_where_each_of_them_was():
    shapes = ((16, 24), (24, 16))
    whole = make(shapes=shapes)
    expected = take(whole, 30)
    begun = make(shapes=shapes)
    take(begun, 13)
    halves = [make(hosts=(h, 2), shapes=shapes) for h in range(2)]
    for half in halves:
        half.restore(begun.state())
    got = [[take(half, 1) for half in halves] for _ in range(17)]
    assert list(itertools.chain(*(rows for batch in got for rows in batch))) == expected[13 * 32 :]
    assert sum(row[0] // 10**6 == ord("b") for row in expected) in range(6 * 32, 10 * 32)


def test_rows_pickle_and_number_from_any_position():
    lengths = [lengths_of(SOURCES["a"].size)]
    ids = [(0, n % 3000) for n in range(5 * 1024)]
    rows = PackedRows(ids, lengths, MAX_LENGTH, 2, None)
    # Not shuffled: in the order of their first examples.
    assert [rows[n][0][1] for n in range(5)] == sorted(rows[n][0][1] for n in range(5))
    window, done = rows.position(700)
    later = pickle.loads(pickle.dumps(PackedRows(ids, lengths, MAX_LENGTH, 2, None)))
    assert later[701] == rows[701]
    middle = PackedRows(ids, lengths, MAX_LENGTH, 2, None, Position(window, done))
    assert [middle[n] for n in range(900)] == [rows[701 + n] for n in range(900)]
