"""Skipped records are counted over all hosts, without one waiting for another."""

import pytest

from blip3o_jax.parallel import distributed
from blip3o_jax.train.skipped import SkippedRecords
from blip3o_jax.train.supervised import _PrefetchedBatches


@pytest.fixture
def store(monkeypatch):
    """Provide the key-value store of a job of two hosts; host 0 by default."""
    found = {}
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "process_index", lambda: 0)
    monkeypatch.setattr(distributed, "set_key", found.__setitem__)
    monkeypatch.setattr(
        distributed,
        "read_keys",
        lambda directory: {key.removeprefix(f"{directory}/"): v for key, v in found.items()},
    )
    return found


def add_as(host, monkeypatch, records, batch, counts):
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "process_index", lambda: host)
        records.add(batch, counts)


def test_counts_of_a_step_are_those_of_all_hosts_however_far_ahead(store, monkeypatch):
    zero, one = SkippedRecords([0, 1]), SkippedRecords([2, 3])
    add_as(1, monkeypatch, one, 1, {})
    add_as(1, monkeypatch, one, 2, {"too long": 2})
    add_as(1, monkeypatch, one, 3, {"too long": 3, "broken": 1})
    zero.add(1, {"too long": 5})
    zero.add(2, {"too long": 5})
    assert zero.total(1) == {"too long": 5}
    assert zero.total(2) == {"too long": 7}
    assert zero.total(3) == zero.total(9) == {"too long": 8, "broken": 1}


def test_hosts_that_read_the_same_rows_count_once(store, monkeypatch):
    """Count on host 0 for all of them: after a resume it has the counts of the checkpoint."""
    zero, one = SkippedRecords([0, 1]), SkippedRecords([0, 1])
    zero.add(1, {"broken": 5})
    add_as(1, monkeypatch, one, 1, {"broken": 2})
    assert zero.total(1) == {"broken": 5}


def test_counts_that_stay_are_published_once(store, monkeypatch):
    records = SkippedRecords([0])
    records.add(1, {"broken": 1})
    store.clear()
    records.add(2, {"broken": 1})
    assert not store


class Prefetch:
    """Imitate a DevicePrefetch of two batches, each with one more skipped record."""

    wait_seconds = 0.0

    def __init__(self):
        self._count = 0

    def __next__(self):
        self._count += 1
        return {}

    def state(self):
        return {"next_example": self._count, "skipped": {"too long": self._count}}


def test_metrics_and_the_saved_position_have_the_counts_of_all_hosts(store, monkeypatch):
    add_as(1, monkeypatch, SkippedRecords([4]), 1, {"too long": 10})
    batches = _PrefetchedBatches(Prefetch(), {"data/unused_members": 0.0}, [0])
    for step in (1, 2):
        batches.next({})
        position, values = batches.position(), batches.host_metrics()
        batches.check(step, values := dict(values))
        assert position == {"next_example": step, "skipped": {"too long": 10 + step}}
        assert values == {"data/unused_members": 0.0, "data/skipped/too_long": 10.0 + step}
