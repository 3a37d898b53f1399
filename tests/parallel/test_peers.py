"""Find the lost host, and how the others end (test_distributed.py does it with real processes)."""

import pathlib
import re
import threading

import pytest
from jax.errors import JaxRuntimeError

from blip3o_jax import exits
from blip3o_jax.parallel import distributed, peers
from blip3o_jax.parallel.peers import LostHost, Peers

LOCAL = pathlib.Path(__file__).parent.parent.parent / "launch" / "local.sh"
AGAIN = "the same command goes on from the last checkpoint"


class Store:
    """Replace the key-value store of jax.distributed."""

    def __init__(self):
        self.values, self.changed, self.gone = {}, threading.Condition(), False

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if self.gone or (key in self.values and not allow_overwrite):
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key):
        if self.gone or key not in self.values:
            raise RuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_dir_get(self, directory):
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        return [(key, value) for key, value in self.values.items() if key.startswith(directory)]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, 5.0):
                raise RuntimeError("UNAVAILABLE")
            return self.values[key]


@pytest.fixture
def hosts(monkeypatch):
    """Return three hosts and their store, and the arguments of `exits.process.end`."""
    ended = []
    for name, value in {"HEARTBEAT_PERIOD": 0.02, "STALE": 0.1, "GRACE_SECONDS": 0.05}.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(Peers, "_catch_abort", lambda self: None)
    monkeypatch.setattr(peers.exits.process, "end", ended.append)
    store = Store()
    made = [Peers(store, host, 3) for host in range(3)]
    for each in made:
        each.start()
    yield made, store, ended
    for each in made:
        each.close()


def test_an_error_ends_a_host_within_half_a_minute_and_a_lost_host_within_the_launchers_wait():
    found = 2 * peers.ANSWER_SECONDS + peers.STALE + exits.NOTIFY_SECONDS
    assert exits.CLOSING_SECONDS + found < 30
    # A collective may wait for the lost host without end, so that jax.distributed notices first.
    (wait,) = re.findall(r"\(sleep (\d+) &", LOCAL.read_text())
    assert peers.RUNTIME_TIMEOUT + found < int(wait)


def test_a_host_that_ends_notifies_the_others(hosts):
    made, _, ended = hosts
    made[1].phase, made[1].step = "data", 12
    made[1].notify_peers(2, "blip3o: error: photos.tar is cut short")
    for _ in range(200):
        if len(ended) == 2:
            break
        threading.Event().wait(0.01)
    expected = f"host 1 ended with status 2 in data at step 12; {AGAIN}"
    assert [str(error) for error in ended] == [expected] * 2
    assert {error.status for error in ended} == {2}
    assert made[0].lost() in ended


def test_a_host_that_was_killed_is_the_one_whose_heartbeat_stops(hosts):
    made, _, ended = hosts
    assert made[0].lost() is None
    made[2].phase, made[2].step = "step", 7
    threading.Event().wait(0.1)
    made[2]._closed.set()
    threading.Event().wait(0.05)
    error = made[0].lost()
    assert (str(error), error.status) == (f"host 2 was lost in step at step 7; {AGAIN}", 137)
    assert not ended


def test_host_0_keeps_the_store_and_is_lost_with_it(hosts):
    made, store, _ = hosts
    made[0].phase, made[0].step = "save", 9
    threading.Event().wait(0.2)
    store.gone = True
    assert str(made[1].lost()).startswith("host 0 was lost in save at step 9;")


def test_host_0_names_the_silent_host_where_its_own_client_is_closed(hosts):
    made, store, _ = hosts
    made[2].phase, made[2].step = "step", 7
    threading.Event().wait(0.1)
    made[2]._closed.set()
    threading.Event().wait(0.3)
    store.gone = True
    assert str(made[0].lost()) == f"host 2 was lost in step at step 7; {AGAIN}"


def test_sigterm_at_one_host_is_known_to_all(hosts):
    made, store, _ = hosts
    assert not any(each.is_stop_announced() for each in made)
    made[1].announce_stop()
    for _ in range(200):
        if made[2].is_stop_announced():
            break
        threading.Event().wait(0.01)
    assert all(each.is_stop_announced() for each in made)
    store.gone = True
    assert not made[2].is_stop_announced()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            JaxRuntimeError(
                "INTERNAL: step:\nGloo all-reduce failed: Connection reset by peer\nat"
            ),
            "the connection between the hosts failed (Gloo all-reduce failed: Connection reset by "
            f"peer); {AGAIN}",
        ),
        (
            distributed.BarrierError("barrier 'end': not all hosts came within 300 s"),
            "the connection between the hosts failed (barrier 'end': not all hosts came within "
            f"300 s); {AGAIN}",
        ),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), None),
        (ValueError("gloo"), None),
    ],
)
def test_a_collective_that_fails_between_living_hosts(hosts, monkeypatch, error, line):
    monkeypatch.setattr(distributed, "_peers", [hosts[0][0]])
    cause = distributed._cause(error)
    if line is None:
        assert cause is error
    else:
        assert (str(cause), cause.status) == (line, exits.LOST_PEER)


def test_a_lost_host_whose_place_is_unknown():
    assert str(LostHost(3, "", 137)) == f"host 3 was lost; {AGAIN}"
