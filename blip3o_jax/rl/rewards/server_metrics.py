"""Report the metrics of a reward server, in addition to those of every service (`serving`)."""

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from blip3o_jax.rl.rewards.batcher import Batcher
from blip3o_jax.rl.rewards.server_processes import Scorers
from blip3o_jax.serving.bodies import MemoryBudget

PREFIX = "blip3o_reward"


class Scored:
    """Count scored images and calls: the `Batcher.on_batch` of a server."""

    def __init__(self, registry: prometheus_client.CollectorRegistry):
        self._images = prometheus_client.Counter(
            f"{PREFIX}_images", "images scored", registry=registry
        )
        self._seconds = prometheus_client.Histogram(
            f"{PREFIX}_batch_seconds", "in the reward, a batch of images", registry=registry
        )

    def __call__(self, images: int, seconds: float) -> None:
        self._images.inc(images)
        self._seconds.observe(seconds)


class State:
    """Collect the server's state when the metrics are read."""

    def __init__(self, batcher: Batcher, scorers: Scorers, budget: MemoryBudget):
        self._batcher = batcher
        self._scorers = scorers
        self._budget = budget

    def collect(self) -> list:
        gauges = {
            "waiting": ("requests that wait for a scorer", self._batcher.waiting()),
            "scorers": ("scorer processes that there should be", self._scorers.count),
            "scorers_ready": ("scorer processes that take images", self._scorers.ready()),
            "reserved_bytes": ("memory reserved for current requests", self._budget.reserved),
        }
        ends = CounterMetricFamily(
            f"{PREFIX}_scorer_ends",
            "scorer processes that were replaced, by reason",
            labels=["reason"],
        )
        for reason, count in self._scorers.ends.items():
            ends.add_metric([reason], count)
        return [
            GaugeMetricFamily(f"{PREFIX}_{name}", help, value)
            for name, (help, value) in gauges.items()
        ] + [ends]
