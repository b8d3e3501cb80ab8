"""What the server counts, as Prometheus reads it. Knows engines' figures, not where they come from.

Labels have few values: routes as they are declared, models as they are served.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import TypeAlias, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxvlm.engine.request import Delta, Usage
from mlxvlm.engine.stats import EngineStats
from mlxvlm.server.answering import Deltas

Figures: TypeAlias = Callable[[], Mapping[str, EngineStats]]  # of the loaded models, by name
MemoryFigures: TypeAlias = Callable[[], Mapping[str, int]]  # bytes by kind: active, peak, cached

_REQUEST_S = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_NO_ROUTE = "none"  # a path that nobody serves; refused before a route was looked for
_NO_ANSWER = "499"
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, figures: Figures = dict, memory: MemoryFigures = dict) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("mlxvlm_requests", "Requests that were answered", labels, registry=registry)
        self.in_flight = Gauge("mlxvlm_requests_in_flight", "Requests being answered", registry=registry)
        self.request_s = Histogram(
            "mlxvlm_request_seconds", "From head to last byte", ["route"], buckets=_REQUEST_S, registry=registry
        )
        model = ["model"]
        self.prompt_tokens = Counter("mlxvlm_prompt_tokens", "Tokens of prompts", model, registry=registry)
        self.cached_tokens = Counter(
            "mlxvlm_cached_prompt_tokens", "Of these, taken from the prefix cache", model, registry=registry
        )
        self.image_tokens = Counter("mlxvlm_image_tokens", "Of these, pictures'", model, registry=registry)
        self.completion_tokens = Counter("mlxvlm_completion_tokens", "Tokens of answers", model, registry=registry)
        self.first_token_s = Histogram(
            "mlxvlm_time_to_first_token_seconds",
            "From the request to its first token",
            model,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.token_s = Histogram(
            "mlxvlm_inter_token_seconds",
            "From one piece of an answer to the next",
            model,
            buckets=_TOKEN_S,
            registry=registry,
        )
        registry.register(_EngineFigures(figures, memory))

    def render(self) -> tuple[bytes, str]:
        """The text of GET /metrics, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def count_usage(self, model: str, usage: Usage) -> None:
        """Of an answer that has ended."""
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model).inc(usage.cached_tokens)
        self.image_tokens.labels(model).inc(usage.image_tokens)
        self.completion_tokens.labels(model).inc(usage.completion_tokens)
        if usage.completion_tokens:
            self.first_token_s.labels(model).observe(usage.time_to_first_token_s)

    async def timed(self, model: str, stream: Deltas) -> AsyncGenerator[Delta, None]:
        """The stream's Deltas, with the time between those that bring tokens observed and the usage counted.

        Closing it cancels the stream, as leaving `async for` over the stream itself does.
        """
        gaps, last = self.token_s.labels(model), None
        async with aclosing(cast("AsyncGenerator[Delta]", aiter(stream))) as deltas:
            async for delta in deltas:
                if delta.token_ids:
                    now = time.perf_counter()
                    if last is not None:
                        gaps.observe(now - last)
                    last = now
                if delta.usage is not None:
                    self.count_usage(model, delta.usage)
                yield delta


class RequestMetrics:
    """ASGI middleware: counts answers and times them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = _NO_ANSWER

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        begun = time.perf_counter()
        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, sending)
            finally:
                route = getattr(scope.get("route"), "path", _NO_ROUTE)
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self.metrics.requests.labels(method, route, status).inc()
                self.metrics.request_s.labels(route).observe(time.perf_counter() - begun)


class _EngineFigures(Collector):
    """Read when they are asked for."""

    def __init__(self, figures: Figures, memory: MemoryFigures) -> None:
        self._figures, self._memory = figures, memory

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are checked against others without asking the engines."""
        return ()

    def collect(self) -> Iterable[Metric]:
        stats = self._figures()
        for name, about, read in _GAUGES:
            gauge = GaugeMetricFamily(f"mlxvlm_{name}", about, labels=["model"])
            for model, each in stats.items():
                gauge.add_metric([model], read(each))
            yield gauge
        for name, about, read in _COUNTERS:
            counter = CounterMetricFamily(f"mlxvlm_{name}", about, labels=["model"])
            for model, each in stats.items():
                counter.add_metric([model], read(each))
            yield counter
        memory = GaugeMetricFamily("mlxvlm_memory_bytes", "MLX's memory of this process", labels=["kind"])
        for kind, size in self._memory().items():
            memory.add_metric([kind], size)
        yield memory


_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("running_requests", "Requests with a row", lambda stats: stats.running),
    ("waiting_requests", "Requests that are prepared or wait for a row", lambda stats: stats.waiting),
    ("budget_bytes", "Memory that the engine may use", lambda stats: stats.budget_bytes),
    ("reserved_bytes", "Of the budget: the worst case of all rows", lambda stats: stats.reserved_bytes),
    ("prefix_cache_bytes", "Held keys and values", lambda stats: stats.prefix_cache.nbytes),
    ("feature_cache_bytes", "Held features of pictures", lambda stats: stats.feature_cache.nbytes),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("decode_steps", "Decode steps", lambda stats: stats.steps),
    ("generated_tokens", "Tokens that were sampled", lambda stats: stats.generated_tokens),
    ("drafted_tokens", "Tokens that were guessed", lambda stats: stats.drafted_tokens),
    ("accepted_tokens", "Of the generated ones, those that were guessed", lambda stats: stats.accepted_tokens),
    ("encoded_images", "Pictures that went through the vision tower", lambda stats: stats.encoded_images),
    ("prefix_cache_hits", "Prompts with a known beginning", lambda stats: stats.prefix_cache.hits),
    ("prefix_cache_misses", "Prompts without", lambda stats: stats.prefix_cache.misses),
    ("feature_cache_hits", "Pictures whose features were held", lambda stats: stats.feature_cache.hits),
    ("feature_cache_misses", "Pictures whose features were not", lambda stats: stats.feature_cache.misses),
)
