"""The order of examples depends on the seed alone; bad records are skipped, counted and limited."""

import json
import logging
import os
import re

import numpy as np
import pytest

from blip3o_jax.config import ConfigError, DataConfig, UserError
from blip3o_jax.data import reader, skipped_record_log
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.reader import BadRecordLimit
from blip3o_jax.data.record import BadRecord, Record, RowTooLong, Source


class Numbers(Source):
    """Provide records whose caption is their index; those in `bad` cannot be read."""

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


def to_row(record: Record) -> dict[str, np.ndarray]:
    if (record.shard, record.key) == ("c.tar", "k3"):
        raise BadRecord(
            "", "", "the image has zero bytes"
        )  # as images.decode does: it knows neither shard nor key
    if (record.shard, record.key) == ("c.tar", "k6"):
        raise RowTooLong(record.key, 9, 8)
    return {
        "number": np.int64(record.caption),
        "shard": np.int64(ord(record.shard[0])),
        "pid": np.int64(os.getpid()),
    }


def make(
    sources=None, *, seed=7, hosts=(0, 1), rows=None, transform=to_row, join=None, **data
) -> Loader:
    data = {"batch_size": 8, "workers": 0, "max_bad_fraction": 1.0} | data
    sources = [(Numbers("a", 50), 3.0), (Numbers("b", 30), 1.0)] if sources is None else sources
    settings = DataConfig(**data)
    share = settings.batch_size // hosts[1]
    rows = rows or range(hosts[0] * share, (hosts[0] + 1) * share)
    return Loader(sources, transform, settings, seed, rows=rows, join=join)


def take(loader: Loader, steps: int) -> list[tuple[int, int]]:
    batches = [next(loader) for _ in range(steps)]
    return [(int(s), int(n)) for b in batches for s, n in zip(b["shard"], b["number"], strict=True)]


def test_order_is_that_of_the_seed_on_any_number_of_hosts_and_workers_and_after_resuming() -> None:
    whole = make()
    expected = take(whole, 6)
    hosts = [
        make(hosts=(h, 2), workers=2 * h) for h in range(2)
    ]  # the second host has worker processes
    halves = [[take(host, 1) for _ in range(3)] for host in hosts]
    assert [example for k in range(3) for half in halves for example in half[k]] == expected[:24]
    pids = {int(pid) for pid in next(hosts[1])["pid"]}
    assert os.getpid() not in pids

    state = hosts[1].state()
    assert state == {"next_example": 32, "order": whole.state()["order"], "skipped": {}}
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
    assert [n for _, n in take(make([(Numbers("a", 12), 1.0)], shuffle=False), 2)] == [
        *range(12),
        *range(4),
    ]


def test_weights_are_honoured() -> None:
    shards = [chr(s) for s, _ in take(make(), 20)]
    assert shards.count("a") == 120
    assert shards[:40].count("b") == 10


def test_restore_refuses_another_mixture_and_says_what_changed() -> None:
    state = make().state()
    a, b = (Numbers("a", 50), 3.0), (Numbers("b", 30), 1.0)
    for sources, change in (
        (
            [(Numbers("a", 51), 3.0), b],
            "source a: its content is another, 50 records then, 51 now: resuming",
        ),
        (
            [(Numbers("a2", 50), 3.0), b],
            "source a2: its content is another (a then), 50 records then, 50 now: resuming",
        ),
        ([(Numbers("a", 50), 2.0), b], "source a: its weight was 3.0, now it is 2.0: resuming"),
        ([b, a], "the sources are in another order (a, b became b, a): resuming"),
        ([a], "there were 2 sources, now there are 1: resuming"),
    ):
        with pytest.raises(
            UserError, match=re.escape(f"the data changed since the checkpoint: {change}")
        ):
            make(sources).restore(state)
    with pytest.raises(UserError, match=r"checkpoint: seed was 7, now it is 8; source b"):
        make([a, (Numbers("b", 9), 1.0)], seed=8).restore(state)


def test_bad_records_are_filled_by_the_next_readable_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
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
    few = make([(Numbers("a", 10_000, bad=(5,)), 1.0)], shuffle=False, max_bad_fraction=0.01)
    for _ in range(20):
        next(few)
    many = make(
        [(Numbers("a", 10_000, bad=tuple(range(0, 10_000, 40))), 1.0)],
        shuffle=False,
        max_bad_fraction=0.01,
    )
    with pytest.raises(
        BadRecordLimit,
        match=r"\(2\.\d%\) cannot be read, .*max_bad_fraction=1\.0%, the last a\.tar: k\d+: broken",
    ):
        for _ in range(200):
            next(many)
    # A small set is checked after one pass, and none at all may mean none.
    small = make([(Numbers("a", 16, bad=(3,)), 1.0)], max_bad_fraction=0.01)
    with pytest.raises(BadRecordLimit, match=r"a.tar: k3: broken"):
        for _ in range(3):
            next(small)
    with pytest.raises(BadRecordLimit):
        next(make([(Numbers("a", 10_000, bad=(3,)), 1.0)], shuffle=False, max_bad_fraction=0.0))
    # Neighbours that are skipped for each other count once: an eighth of these is damaged.
    damaged = make([(Numbers("a", 32, bad=(20, 21, 22, 23)), 1.0)], max_bad_fraction=0.13)
    for _ in range(12):
        next(damaged)
    with pytest.raises(BadRecordLimit, match=r"4 of 32 records \(12\.5%\)"):
        take(make([(Numbers("a", 32, bad=(20, 21, 22, 23)), 1.0)], max_bad_fraction=0.12), 4)


def test_a_source_with_nothing_readable_stops_at_once() -> None:
    with pytest.raises(
        BadRecordLimit, match=r"b: 5 records in a row cannot be used, the last b.tar: k"
    ):
        next(make([(Numbers("a", 50), 1.0), (Numbers("b", 5, bad=tuple(range(5))), 1.0)]))


def too_long_at(record: Record) -> dict[str, np.ndarray]:
    number = int(record.caption)
    if number % 4 == 1:
        raise RowTooLong(record.key, number, 0)
    return {"number": np.int64(number)}


def test_a_row_that_is_too_long_is_skipped_and_counted_and_never_ends_the_run(caplog) -> None:
    """Skip a quarter of the records, where none may be bad. The count goes on after a resume."""
    loader = make(
        [(Numbers("a", 400), 1.0)], transform=too_long_at, shuffle=False, max_bad_fraction=0.0
    )
    first = next(loader)
    assert first["number"].tolist() == [0, 2, 2, 3, 4, 6, 6, 7] and not first["bad_records"].any()
    assert caplog.messages[0] == "skipped a.tar: k1: needs 1 tokens, a row has 0"
    assert loader.state()["skipped"] == {"too long": 2}
    for _ in range(20):
        next(loader)
    loader.close()
    assert (
        sum("skipped a.tar: k" in message for message in caplog.messages)
        == skipped_record_log.MAX_LOGGED_TOO_LONG
    )
    assert (
        sum("are longer than a row and were skipped" in message for message in caplog.messages) == 1
    )
    again = make([(Numbers("a", 400), 1.0)], transform=too_long_at, shuffle=False)
    again.restore(loader.state())
    next(again)
    assert again.state()["skipped"] == {"too long": 44}


def test_a_row_that_is_too_long_ends_the_run_where_that_is_asked_for() -> None:
    with pytest.raises(
        UserError, match=r"^c\.tar: k6: needs 9 tokens, a row has 8: .*data\.too_long"
    ):
        next(make([(Numbers("c", 8), 1.0)], shuffle=False, too_long="error"))
    with pytest.raises(
        BadRecordLimit,
        match=r"8 records in a row cannot be used, .*needs 0 tokens.*; raise data.max_length",
    ):
        next(make([(Numbers("a", 8), 1.0)], shuffle=False, transform=never_fits))


def never_fits(record: Record) -> dict[str, np.ndarray]:
    raise RowTooLong(record.key, 0, 0)


class Raising(Source):
    """Provide records of two shards; reading an index raises what `errors` has for it."""

    fingerprint = "raising"

    def __init__(self, size: int, errors: dict[int, BaseException]) -> None:
        super().__init__("set", [])
        self.size, self.errors = size, errors

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if index in self.errors:
            raise self.errors[index]
        return Record(b"", str(index), f"\udc80k{index}\0", f"{index % 2}.tar")


def number(record: Record) -> dict[str, np.ndarray]:
    if record.caption == "5":
        raise KeyError("pixels")
    return {"number": np.int64(record.caption)}


def test_whatever_one_record_raises_is_skipped_with_its_place(caplog) -> None:
    """Raise it in a worker process, from which reports cross to the parent."""
    errors = [
        UnicodeEncodeError("utf-8", "\ud83c", 0, 1, "surrogates not allowed"),
        RecursionError("too deep"),
        ValueError("\ud83c" * 5000),
        MemoryError(),
    ]
    source = Raising(8, dict(enumerate(errors)))
    loader = make([(source, 1.0)], shuffle=False, transform=number, workers=1)
    assert next(loader)["number"].tolist() == [4, 4, 4, 4, 4, 6, 6, 7]
    loader.close()
    said = "\n".join(caplog.messages)
    said.encode()
    for part in (
        "set: 0: UnicodeEncodeError at test_loader.py:",
        "set: 1: RecursionError",
        "set: 3: MemoryError at",
    ):
        assert part in said
    assert (
        "skipped 1.tar: \\udc80k5\\x00: KeyError at "
        f"test_loader.py:{number.__code__.co_firstlineno + 2}: 'pixels'"
    ) in said
    counts = loader.state()["skipped"]
    assert (
        counts["MemoryError"] == 4
        and counts["KeyError"] == 1
        and sum(counts.values()) == 4 + 3 + 2 + 1 + 1
    )


def test_what_is_no_fault_of_a_record_ends_the_run() -> None:
    for error in (
        ConfigError("model.template.generate has no place for the text"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)):
            reader._RecordSearch(
                reader.Reader((), to_row, None, "skip"), Raising(3, {0: error}), 0
            ).next()


def test_a_transform_that_fails_on_all_records_ends_the_run_with_its_place() -> None:
    def broken(record: Record) -> dict[str, np.ndarray]:
        return {"number": record.no_such_field}

    with pytest.raises(
        BadRecordLimit,
        match=r"128 records in a row .* AttributeError at test_loader\.py:\d+: 'Record' object",
    ):
        next(make([(Numbers("a", 10_000), 1.0)], transform=broken))


def test_a_damaged_stretch_of_a_large_set_does_not_end_the_search() -> None:
    source = Numbers("a", 20_000, bad=tuple(range(5_000)))
    got = next(make([(source, 1.0)], shuffle=False))
    assert (got["number"] >= 5_000).all() and (got["bad_records"] <= reader.NEIGHBOURS + 2).all()


def test_the_search_comes_to_no_record_twice() -> None:
    """Search 170 records: steps of round(0.618 * 170) = 105 from 0 come to multiples of 5 alone."""
    bad = (*range(16), *range(0, 170, 5))
    loader = make([(Numbers("a", 170, bad=bad), 1.0)], shuffle=False)
    assert next(loader)["number"][0] not in bad


def test_a_shard_of_which_nothing_can_be_read_is_named_at_once(caplog) -> None:
    source = Raising(
        64,
        {
            index: BadRecord("1.tar", str(index), f"cannot be read: {index}")
            for index in range(1, 64, 2)
        },
    )
    loader = make(
        [(source, 1.0)],
        shuffle=False,
        transform=lambda record: {"number": np.int64(record.caption)},
    )
    next(loader)
    said = (
        "each of the first 8 records read of 1.tar was skipped: cannot be read: 15: "
        "look at that file"
    )
    assert said not in caplog.messages
    next(loader)
    assert caplog.messages.count(said) == 1
    next(loader)
    assert sum("each of the first" in message for message in caplog.messages) == 1


def test_a_report_survives_any_name_and_reason() -> None:
    for text in ("\ud83c", "\0", '"\n\\', "\U0001f382" * 4000, "\x1b[2J", ""):
        report = reader.pack_report([BadRecord(text, text, text)] * 3)
        counts, names = json.loads(report.item())
        assert report.dtype == "S4096" and sum(counts.values()) == 3 and names
        assert all(part.isprintable() for name in names for part in name)
