"""Serve rewards over HTTP to rollouts on other machines: `blip3o rl serve-rewards`. The reward
`http` is its client.

    POST /score     scores of images (`wire`)
    GET  /info      names of the rewards, and limits; needs the token, so that a client can test it
    GET  /health    {"status": "ok" | "degraded" | "unavailable"}, 503 if unavailable; no token
    GET  /metrics   Prometheus' text format, unless it has its own port

Images are decoded and scored in separate processes (`scorers`), which are replaced when they hang
or die. This process holds only encoded files, so the memory that a request needs follows from its
Content-Length. The upper bound of the memory:

    max_memory = (2 + scorers) PROCESS_BYTES                        without the rewards' own models
               + max_connections CONNECTION_BYTES
               + PARSE_BYTES max_body + VALUE_BYTES MAX_VALUES      one large body is parsed at once
               + scorers (max_body + DECODED_BYTES max_pixels)
               + room for the current requests, each as long as its body
"""

import asyncio
import dataclasses
import signal
from collections.abc import Sequence

import prometheus_client
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import png, requests, server_metrics, wire
from blip3o_jax.rl.rewards.batcher import Batcher, Job
from blip3o_jax.rl.rewards.reward import Scores
from blip3o_jax.rl.rewards.server_processes import RequestParser, ScorerProcesses, Scorers
from blip3o_jax.serving import bodies
from blip3o_jax.serving.bodies import MemoryBudget
from blip3o_jax.serving.connections import CONNECTION_BYTES, ConnectionLimits
from blip3o_jax.serving.refused import Refused
from blip3o_jax.serving.service import (
    LOOPBACK,
    BackgroundServer,
    Service,
    metrics_route,
    run_until_signal,
)

WHAT = "serve-rewards"
PROCESS_BYTES = 256 << 20  # of a process and its libraries, without images and models
SMALL_BODY = 1 << 20  # a body up to this size is parsed in parallel with a larger one
REQUEST_BYTES = 1 << 16  # of a request, without its body


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bound the requests and the resources of a reward server.

    batch              images scored in one call of the reward
    scorers            processes that score
    max_body           bytes of a body
    max_pixels         of all images of a request together
    max_waiting        requests that have sent their body and wait for scores
    max_memory         bytes of all processes together, as above
    score_seconds      for one call of the reward
    request_seconds    from the end of a request's body to its scores

    Raises UserError if a bound is not positive, or `max_memory` is too small for the others.
    """

    batch: int = 16
    scorers: int = 2
    max_body: int = 64 << 20
    max_pixels: int = 1 << 25
    max_waiting: int = 128
    max_memory: int = 4 << 30
    score_seconds: float = 120.0
    request_seconds: float = 600.0
    connections: ConnectionLimits = ConnectionLimits()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "connections" and not 0 < value < float("inf"):
                raise UserError(f"{WHAT}: {field.name}={value} must be positive")
        if self.room < self.max_body + REQUEST_BYTES:
            least = self.max_memory - self.room + self.max_body + REQUEST_BYTES
            raise UserError(
                f"{WHAT}: --max_memory_mb={self.max_memory >> 20} is too little for"
                f" --scorers={self.scorers}, --max_body_mb={self.max_body >> 20} and"
                f" --max_pixels={self.max_pixels}: raise it to {-(-least >> 20)}, or lower one of"
                " these"
            )

    @property
    def room(self) -> int:
        """Return the bytes left for current requests."""
        processes = (2 + self.scorers) * PROCESS_BYTES
        connections = self.connections.max_connections * CONNECTION_BYTES
        parsing = requests.PARSE_BYTES * self.max_body + requests.VALUE_BYTES * requests.MAX_VALUES
        scoring = self.scorers * (self.max_body + png.DECODED_BYTES * self.max_pixels)
        return self.max_memory - processes - connections - parsing - scoring


def serve(
    rewards: Sequence[RewardConfig],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token_env: str = "",
    metrics_host: str = "127.0.0.1",
    metrics_port: int | None = None,
    limits: Limits = Limits(),
) -> None:
    """Serve `rewards` until SIGTERM, or until Ctrl-C, which raises KeyboardInterrupt.

    `token_env` names the environment variable with the token; without a token, `host` must be a
    loopback address. Raises UserError if a reward cannot be created, the token is missing, or an
    address cannot be bound.
    """
    token = wire.read_token(token_env) if token_env else ""
    if not token and host not in LOOPBACK:
        raise UserError(
            f"{WHAT}: --host={host} is open to other machines: "
            "name a variable with a token by --token_env"
        )
    metrics = (metrics_host, metrics_port) if metrics_port is not None else None
    with RewardServer(rewards, host, port, token=token, metrics=metrics, limits=limits) as server:
        caught = run_until_signal(server.services, lambda: print(server.described, flush=True))
        print(f"stopped by {caught.name}; {server.scored:.0f} images were scored", flush=True)
    if caught is signal.SIGINT:
        raise KeyboardInterrupt


class RewardServer:
    """Run the HTTP services and the scorers of rewards; leaving the `with` block closes them."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str = "",
        metrics: tuple[str, int] | None = None,
        limits: Limits = Limits(),
        scorers: Scorers | None = None,
    ):
        self._limits = limits
        self._registry = prometheus_client.CollectorRegistry()
        routes = [
            Route("/score", self._score, methods=["POST"]),
            Route("/info", self._info, methods=["GET"]),
            (health := Route("/health", self._health, methods=["GET"])),
        ]
        if metrics is None:
            routes.append(metrics_route(self._registry))
        open_paths = ("/health",)
        self.services = [
            Service(
                WHAT,
                routes,
                host=host,
                port=port,
                token=token,
                limits=limits.connections,
                open_paths=open_paths,
                registry=self._registry,
                prefix=f"{server_metrics.PREFIX}_http",
            )
        ]
        try:
            if metrics is not None:
                metrics_routes = [metrics_route(self._registry), health]
                self.services.append(
                    Service(
                        f"{WHAT}: metrics",
                        metrics_routes,
                        host=metrics[0],
                        port=metrics[1],
                        limits=limits.connections,
                        open_paths=open_paths,
                    )
                )
            self._scorers: Scorers = scorers or ScorerProcesses(
                tuple(rewards), limits.scorers, limits.score_seconds
            )
        except BaseException:
            self._close_services()
            raise
        self._budget = MemoryBudget(limits.room, SMALL_BODY + REQUEST_BYTES)
        scored = server_metrics.Scored(self._registry)
        self._batcher = Batcher(
            self._scorers,
            batch=limits.batch,
            pixels=max(1, limits.max_pixels // 8),
            file_bytes=limits.max_body,
            on_batch=scored,
        )
        self._registry.register(server_metrics.State(self._batcher, self._scorers, self._budget))
        self._parser = RequestParser(limits.max_pixels, small=SMALL_BODY)
        self._waiting = 0

    @property
    def url(self) -> str:
        """Return the address of /score and the other routes."""
        return self.services[0].url

    @property
    def described(self) -> str:
        """Return one line with the addresses."""
        metrics = f", metrics at {self.services[1].url}" if len(self.services) > 1 else ""
        return f"rewards are served at {self.url}{metrics}"

    @property
    def scored(self) -> float:
        """Return the number of images scored so far."""
        return self._registry.get_sample_value(f"{server_metrics.PREFIX}_images_total") or 0.0

    def __enter__(self) -> "RewardServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._scorers.close()
        self._parser.close()
        self._close_services()

    def in_background(self) -> BackgroundServer:
        """Return a context manager that serves in a thread."""
        return BackgroundServer(self.services)

    def _close_services(self) -> None:
        for service in self.services:
            service.close()

    async def _health(self, request: Request) -> Response:
        ready = self._scorers.ready()
        status = "ok" if ready >= self._scorers.count else "degraded" if ready else "unavailable"
        fields = {"status": status, "scorers": self._scorers.count, "scorers_ready": ready}
        return JSONResponse(fields, 200 if ready else 503)

    async def _info(self, request: Request) -> Response:
        limits = {name: getattr(self._limits, name) for name in ("batch", "max_body", "max_pixels")}
        return JSONResponse({"rewards": self._scorers.names, **limits})

    async def _score(self, request: Request) -> Response:
        length = bodies.content_length(request, self._limits.max_body)
        with self._budget.reserve(length + REQUEST_BYTES):
            body = await bodies.read_body(request, self._limits.connections)
            if self._waiting >= self._limits.max_waiting:
                raise Refused(503, "too many requests are waiting: try again later")
            self._waiting += 1
            try:
                scores = await bodies.unless_disconnected(request, self._scores(body))
            finally:
                self._waiting -= 1
        return Response(wire.encode_scores(scores), media_type="application/json")

    async def _scores(self, body: bytearray) -> Scores:
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                found = await self._parser.parse(body)
                return await self._batcher.score(Job(found.images, found.prompts, found.metadata))
        except TimeoutError:
            raise Refused(
                503, f"no scores within {self._limits.request_seconds:g} s: try again later"
            ) from None
