"""Batches on the devices: which rows a host reads, and what is prefetched."""

import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax.data.reader import BadRecordLimit
from blip3o_jax.parallel.batches import DevicePrefetch, global_batch, host_rows
from tests.data.test_loader import Numbers, make, take


class Hosted(jax.sharding.Sharding):
    """Imitate a sharding on one of two hosts, whose devices are `mine`."""

    def __init__(self, sharding: NamedSharding, mine: list[jax.Device]) -> None:
        self.sharding, self.mine = sharding, mine

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        return {
            d: span
            for d, span in self.sharding.devices_indices_map(shape).items()
            if d in self.mine
        }


def test_hosts_read_the_rows_of_their_devices_wherever_the_mesh_has_these() -> None:
    """Cover a torus, where a host's devices are no neighbours in the batch, and an axis along which
    hosts share rows.
    """
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
            assert take(loader, 2) == [
                expected[batch * 8 + row] for batch in range(2) for row in rows
            ]
            loader.close()
        whole = global_batch(
            {"x": np.arange(16).reshape(8, 2)}, sharding, host_rows(sharding, 8), 8
        )["x"]
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
