"""Lengths of examples are read once and shared by hosts; the row length follows from them."""

import dataclasses
import re
import threading

import numpy as np
import pytest

from blip3o_jax.config import EditingConfig, ModelConfig, UserError
from blip3o_jax.data import token_lengths as lib
from blip3o_jax.data.packing import pack_window
from blip3o_jax.data.record import BadRecord, Record, Source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Sized(Source):
    """Provide records of known lengths; those of length 0 cannot be read."""

    def __init__(self, name, lengths):
        super().__init__(name, [])
        self.lengths = lengths
        self.read = []

    @property
    def fingerprint(self):
        return self.name

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        self.read.append(index)
        if not self.lengths[index]:
            raise BadRecord(self.name, str(index), "broken")
        return Record(b"", str(self.lengths[index]), str(index), self.name)


@dataclasses.dataclass(frozen=True)
class Builder:
    """Imitate an ExampleBuilder: the caption is the number of tokens."""

    settings: str = ""
    model: ModelConfig = ModelConfig()

    def length(self, record):
        return int(record.caption)

    def length_settings(self):
        return [self.settings]


def test_lengths_are_read_once_in_parts_and_the_same_on_all_hosts(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 99, 1000)
    lengths[7] = 0
    one = Sized("one", lengths)
    found = lib.token_lengths(one, Builder())
    assert found.dtype == np.uint32 and found.tolist() == lengths.tolist()
    lib.token_lengths(one, Builder())
    assert len(one.read) == 1000
    lib.token_lengths(one, Builder("another vocabulary"))
    assert len(one.read) == 2000

    monkeypatch.setattr(lib, "_CHUNK", 300)
    hosts = [Sized("shared", lengths) for _ in range(3)]
    waiting = threading.Barrier(3)
    given = {}
    results = {}

    def run(host):
        def gather(own):
            given[host] = own
            waiting.wait()
            found = np.stack([given[other] for other in range(3)])
            waiting.wait()
            return found

        results[host] = lib.token_lengths(hosts[host], Builder(), host, 3, gather)

    threads = [threading.Thread(target=run, args=(host,)) for host in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(results[host].tolist() == lengths.tolist() for host in range(3))
    assert sorted(index for host in hosts for index in host.read) == list(range(1000))
    # Another number of hosts takes the parts from the cache.
    alone = Sized("shared", lengths)
    assert lib.token_lengths(alone, Builder()).tolist() == lengths.tolist() and not alone.read


def test_the_row_length_has_room_for_all_but_a_thousandth_by_the_weights():
    short = Sized("short", [900] * 5000)
    few = Sized("few", [1000] * 999 + [1500])
    choose = lambda *weights: lib.choose_row_length(
        list(zip((short, few), weights, strict=True)), Builder(), 1
    )
    assert choose(1.0, 0.001).length == 1024
    assert choose(0.001, 1.0).length == 1024
    assert choose(1.0, 3.0).reason == "room for 99.9 % of 6,000 examples of 975 tokens on average"
    many = Sized("many", [1000] * 990 + [1500] * 10)
    assert lib.choose_row_length([(many, 1.0)], Builder(), 1).length == 1536
    with pytest.raises(UserError, match=r"^none: no example can be made of the records"):
        lib.choose_row_length([(Sized("none", [0, 0, 0]), 1.0)], Builder(), 1)


def test_packed_rows_have_the_length_at_which_examples_cost_least(monkeypatch):
    rng = np.random.default_rng(3)
    lengths = np.concatenate([rng.integers(800, 1100, 3000), rng.integers(1480, 1560, 3000)])
    source = Sized("both", lengths)
    chosen = lib.choose_row_length([(source, 1.0)], Builder(), 2)
    # A long one and a short one: rows for two long ones would be a fifth longer.
    assert chosen.length == 2560
    assert "up to 2 of 6,000 examples of" in chosen.reason
    assert re.search(r"fill 9[67]\.\d % of the slots, 9\d\.\d % of the tokens", chosen.reason)
    window = rng.permutation(lengths)[:1024].tolist()
    cost = lambda length: len(pack_window(window, length, 2)) * (length + 2 * 729)
    assert cost(2560) < min(cost(2304), cost(3072))
    # More examples than a window divides into.
    assert lib.choose_row_length([(source, 1.0)], Builder(), 7).length < 7 * 1536
    # A sample of a large set, spread over it.
    monkeypatch.setattr(lib, "SAMPLE", 600)
    large = Sized("large", lengths)
    sampled = lib.choose_row_length([(large, 1.0)], Builder(), 2)
    assert sampled.length == chosen.length and len(large.read) == 600


def test_without_data_rows_have_room_for_long_captions_and_the_images():
    model = ModelConfig()
    assert model.tokenizer.num_tokens == 729 and lib.assumed_row_length(model) == 1152
    edits = dataclasses.replace(model, editing=EditingConfig(reference_slots=1))
    assert lib.assumed_row_length(edits) == 1920
