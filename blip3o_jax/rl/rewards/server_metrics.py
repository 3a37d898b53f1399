"""What a reward server counts, in Prometheus' text format."""

import collections
import threading

_PREFIX = "blip3o_reward_"


class Metrics:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[int, int] = collections.defaultdict(int)
        self._request_seconds = self._scoring_seconds = 0.0
        self._images = self._batches = 0

    def answered(self, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[status] += 1
            self._request_seconds += seconds

    def scored(self, images: int, seconds: float) -> None:
        with self._lock:
            self._images += images
            self._batches += 1
            self._scoring_seconds += seconds

    def text(self, waiting: int) -> str:
        """Every metric; `waiting` is the length of the queue now."""
        with self._lock:
            requests = dict(sorted(self._requests.items()))
            values = (
                ("request_seconds_total", "counter", "from accepting requests to answering them", self._request_seconds),
                ("images_total", "counter", "images scored", self._images),
                ("batches_total", "counter", "calls of the reward", self._batches),
                ("scoring_seconds_total", "counter", "in the reward", self._scoring_seconds),
                ("waiting", "gauge", "requests that wait for the reward", waiting),
            )
        lines = [f"# HELP {_PREFIX}requests_total requests by status", f"# TYPE {_PREFIX}requests_total counter"]
        lines += [f'{_PREFIX}requests_total{{status="{status}"}} {n}' for status, n in requests.items()]
        for name, kind, help, value in values:
            lines += [f"# HELP {_PREFIX}{name} {help}", f"# TYPE {_PREFIX}{name} {kind}", f"{_PREFIX}{name} {value}"]
        return "\n".join(lines) + "\n"
