"""The order of examples depends on the seed alone; bad records are skipped, counted and limited."""

import logging
import os
import re
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data.loader import BadRecordLimit, DevicePrefetch, Loader, global_batch, host_rows
from blip3o_jax.data.record import BadRecord, Record, Source


class Numbers(Source):
    """Records whose caption is their index; those in `bad` cannot be read."""

    def __init__(self, name: str, size: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__(name, [])
        self.size, self.bad = size, frozenset(bad)

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.size}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise BadRecord(f"{self.name}.tar", f"k{index}", "broken")
        return Record(bytes([index % 256]), str(index), f"k{index}", f"{self.name}.tar")


class TooLong(ValueError):
    pass


def to_row(record: Record) -> dict[str, np.ndarray]:
    if (record.shard, record.key) == ("c.tar", "k3"):
        raise BadRecord("", "", "the image has zero bytes")  # as images.decode does: it knows neither shard nor key
    if (record.shard, record.key) == ("c.tar", "k6"):
        raise TooLong(f"example {record.key!r} needs 9 tokens")
    return {"number": np.int64(record.caption), "shard": np.int64(ord(record.shard[0])), "pid": np.int64(os.getpid())}


def make(sources=None, *, seed=7, hosts=(0, 1), rows=None, **data) -> Loader:
    data = {"batch_size": 8, "workers": 0, "max_bad_share": 1.0} | data
    sources = [(Numbers("a", 50), 3.0), (Numbers("b", 30), 1.0)] if sources is None else sources
    settings = DataConfig(**data)
    share = settings.batch_size // hosts[1]
    rows = rows or range(hosts[0] * share, (hosts[0] + 1) * share)
    return Loader(sources, to_row, settings, seed, rows=rows)


def take(loader: Loader, steps: int) -> list[tuple[int, int]]:
    batches = [next(loader) for _ in range(steps)]
    return [(int(s), int(n)) for b in batches for s, n in zip(b["shard"], b["number"], strict=True)]


def test_order_is_that_of_the_seed_on_any_number_of_hosts_and_workers_and_after_resuming() -> None:
    whole = make()
    expected = take(whole, 6)
    hosts = [make(hosts=(h, 2), workers=2 * h) for h in range(2)]  # the second host has worker processes
    halves = [[take(host, 1) for _ in range(3)] for host in hosts]
    assert [example for k in range(3) for half in halves for example in half[k]] == expected[:24]
    pids = {int(pid) for pid in next(hosts[1])["pid"]}
    assert os.getpid() not in pids

    state = hosts[1].state()
    assert state == {"next_example": 32, "order": whole.state()["order"]}
    for host in hosts:
        host.close()
    for count in (1, 4):  # resumed in the middle of an epoch, on other numbers of hosts
        shares = [make(hosts=(h, count)) for h in range(count)]
        for share in shares:
            share.restore(state)
        assert [example for share in shares for example in take(share, 1)] == expected[32:40]
    bigger = make(batch_size=16)
    bigger.restore(state)
    assert take(bigger, 1) == expected[32:48]


def test_an_epoch_repeats_nothing_and_the_next_one_has_another_order() -> None:
    numbers = [n for _, n in take(make([(Numbers("a", 40), 1.0)]), 10)]
    assert sorted(numbers[:40]) == sorted(numbers[40:]) == list(range(40))
    assert numbers[:40] != numbers[40:]
    assert numbers[:40] != list(range(40))
    assert numbers != [n for _, n in take(make([(Numbers("a", 40), 1.0)], seed=8), 10)]
    assert [n for _, n in take(make([(Numbers("a", 12), 1.0)], shuffle=False), 2)] == [*range(12), *range(4)]


def test_weights_are_honoured() -> None:
    shards = [chr(s) for s, _ in take(make(), 20)]
    assert shards.count("a") == 120
    assert shards[:40].count("b") == 10


def test_restore_refuses_another_mixture_and_says_what_changed() -> None:
    state = make().state()
    a, b = (Numbers("a", 50), 3.0), (Numbers("b", 30), 1.0)
    for sources, change in (
        ([(Numbers("a", 51), 3.0), b], "source a: its content is another, 50 records then, 51 now: resuming"),
        ([(Numbers("a2", 50), 3.0), b], "source a2: its content is another (a then), 50 records then, 50 now: resuming"),
        ([(Numbers("a", 50), 2.0), b], "source a: its weight was 3.0, now it is 2.0: resuming"),
        ([b, a], "the sources are in another order (a, b became b, a): resuming"),
        ([a], "there were 2 sources, now there are 1: resuming"),
    ):
        with pytest.raises(UserError, match=re.escape(f"the data changed since the checkpoint: {change}")):
            make(sources).restore(state)
    with pytest.raises(UserError, match=r"checkpoint: seed was 7, now it is 8; source b"):
        make([a, (Numbers("b", 9), 1.0)], seed=8).restore(state)


def test_bad_records_are_filled_by_the_next_readable_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader = make([(Numbers("a", 8, bad=(2, 3, 7)), 1.0)], shuffle=False)
        first, second = next(loader), next(loader)
    assert first["number"].tolist() == second["number"].tolist() == [0, 1, 4, 4, 4, 5, 6, 0]
    assert first["bad_records"].tolist() == [0, 0, 2, 1, 0, 0, 0, 1]
    assert first["bad_records"].dtype == np.int32
    assert sorted(caplog.messages) == [f"skipped a.tar: k{i}: broken" for i in (2, 3, 7)]
    assert set(first) == {"number", "shard", "pid", "bad_records"}


def test_a_record_that_does_not_decode_is_named(caplog: pytest.LogCaptureFixture) -> None:
    batch = next(make([(Numbers("c", 6), 1.0)], shuffle=False))
    assert batch["number"].tolist() == [0, 1, 2, 4, 4, 5, 0, 1]
    assert caplog.messages == ["skipped c.tar: k3: the image has zero bytes"]


def test_too_many_bad_records_stop_the_run() -> None:
    few = make([(Numbers("a", 10_000, bad=(5,)), 1.0)], shuffle=False, max_bad_share=0.01)
    for _ in range(20):
        next(few)
    many = make([(Numbers("a", 10_000, bad=tuple(range(0, 10_000, 40))), 1.0)], shuffle=False, max_bad_share=0.01)
    with pytest.raises(
        BadRecordLimit, match=r"\(2\.\d%\) cannot be read, .*max_bad_share=1\.0%, the last a\.tar: k\d+: broken"
    ):
        for _ in range(200):
            next(many)
    # A small set is judged after one pass, and none at all may mean none.
    small = make([(Numbers("a", 16, bad=(3,)), 1.0)], max_bad_share=0.01)
    with pytest.raises(BadRecordLimit, match=r"a.tar: k3: broken"):
        for _ in range(3):
            next(small)
    with pytest.raises(BadRecordLimit):
        next(make([(Numbers("a", 10_000, bad=(3,)), 1.0)], shuffle=False, max_bad_share=0.0))


def test_a_source_with_nothing_readable_stops_at_once() -> None:
    with pytest.raises(BadRecordLimit, match=r"b: 5 records in a row cannot be read, the last b.tar: k"):
        next(make([(Numbers("a", 50), 1.0), (Numbers("b", 5, bad=tuple(range(5))), 1.0)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_does_not_fit_is_refused_with_its_key(workers: int) -> None:
    loader = make([(Numbers("c", 8), 1.0)], shuffle=False, workers=workers)
    with pytest.raises(TooLong) as caught:
        next(loader)
    assert str(caught.value) == "example 'k6' needs 9 tokens"
    loader.close()


class Hosted(jax.sharding.Sharding):
    """A sharding as one of two hosts sees it, whose devices are `mine`."""

    def __init__(self, sharding: NamedSharding, mine: list[jax.Device]) -> None:
        self.sharding, self.mine = sharding, mine

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        return {d: span for d, span in self.sharding.devices_indices_map(shape).items() if d in self.mine}


def test_hosts_read_the_rows_of_their_devices_wherever_the_mesh_has_these() -> None:
    """On a torus a host's devices are no neighbours in the batch; along another axis than the batch's, hosts share rows."""
    expected = take(make(), 2)
    devices = jax.devices()
    torus = np.array(devices)[[0, 1, 4, 5, 2, 3, 6, 7]]
    shared = np.array(devices).reshape(2, 4).T
    for mesh, want in (
        (Mesh(torus, "data"), ([0, 1, 4, 5], [2, 3, 6, 7])),
        (Mesh(shared, ("data", "tensor")), (list(range(8)), list(range(8)))),
    ):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        for mine, rows in zip((devices[:4], devices[4:]), want, strict=True):
            assert host_rows(Hosted(sharding, mine), 8) == rows
            loader = make(rows=rows)
            assert take(loader, 2) == [expected[batch * 8 + row] for batch in range(2) for row in rows]
            loader.close()
        whole = global_batch({"x": np.arange(16).reshape(8, 2)}, sharding, host_rows(sharding, 8), 8)["x"]
        np.testing.assert_array_equal(whole, np.arange(16).reshape(8, 2))


def test_device_prefetch_gives_the_same_batches_and_the_state_of_the_last_one() -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    expected = take(make(), 3)
    loader = make()
    batches = DevicePrefetch(loader, sharding)
    while loader.state()["next_example"] < 24:  # it works ahead: two batches ready, one in hand
        time.sleep(0.01)
    assert batches.state()["next_example"] == 0
    got = [next(batches)]
    assert batches.state()["next_example"] == 8
    got += [next(batches) for _ in range(2)]
    assert [int(n) for batch in got for n in batch["number"]] == [n for _, n in expected]
    assert got[0]["number"].sharding == sharding
    assert batches.wait_seconds > 0
    batches.close()
    broken = DevicePrefetch(make([(Numbers("b", 5, bad=tuple(range(5))), 1.0)]), sharding)
    for _ in range(2):  # the error stays
        with pytest.raises(BadRecordLimit):
            next(broken)
    broken.close()
