"""What /metrics says after what has happened."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from mlxvlm.engine.request import Usage
from mlxvlm.engine.stats import CacheStats, EngineStats
from mlxvlm.server.assembly import metrics_route, protected
from mlxvlm.server.metrics import Metrics, RequestMetrics
from mlxvlm.server.settings import ServerSettings
from tests.fakes import answer, ask, eventually, fake_engine, is_empty
from tests.server.asgi import fetch

HOST = {"Host": "localhost:1234"}
USAGE = Usage(7, 5, 3, 0.1, 0.2, 0.3, 0.25, 0.6, cached_tokens=2)


def figures(metrics: Metrics) -> dict[str, float]:
    """name{label values} -> value."""
    text = metrics.render()[0].decode()
    return {
        f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def one(request: Request) -> Response:
    return PlainTextResponse("one")


async def crash(request: Request) -> Response:
    raise ZeroDivisionError("a defect")


def test_requests_by_route() -> None:
    metrics = Metrics()
    routes = [Route("/v1/models/{id:path}", one), Route("/crash", crash), Mount("/ui", Starlette())]
    app = RequestMetrics(Starlette(routes=routes), metrics)
    for path in ("/v1/models/a", "/v1/models/b/c", "/nothing", "/else"):
        fetch(app, "GET", path, HOST)
    fetch(app, "BREW", "/nothing", HOST)
    with pytest.raises(ZeroDivisionError):
        fetch(app, "GET", "/crash", HOST)
    found = figures(metrics)
    assert found["mlxvlm_requests_total{GET,/v1/models/{id:path},200}"] == 2
    assert found["mlxvlm_requests_total{GET,none,404}"] == 2
    assert found["mlxvlm_requests_total{other,none,404}"] == 1
    assert found["mlxvlm_requests_total{GET,/crash,500}"] == 1
    assert found["mlxvlm_requests_in_flight{}"] == 0
    assert found["mlxvlm_request_seconds_count{/v1/models/{id:path}}"] == 2


def test_in_flight() -> None:
    metrics = Metrics()

    async def look(request: Request) -> Response:
        return PlainTextResponse(str(figures(metrics)["mlxvlm_requests_in_flight{}"]))

    assert fetch(RequestMetrics(Starlette(routes=[Route("/", look)]), metrics), "GET", "/", HOST).body == b"1.0"


def test_engines() -> None:
    stats = EngineStats(2, 3, 100, 50, 25, 9, 11, 6, 4, CacheStats(4, 5, 6, 70), CacheStats(1, 2, 3, 40), 8)
    metrics = Metrics(lambda: {"a": stats, 'odd"\n': EngineStats()}, lambda: {"active": 10, "peak": 20})
    found = figures(metrics)
    assert found["mlxvlm_running_requests{a}"] == 2
    assert (found["mlxvlm_drafted_tokens_total{a}"], found["mlxvlm_accepted_tokens_total{a}"]) == (6, 4)
    assert found["mlxvlm_waiting_requests{a}"] == 3
    assert found["mlxvlm_reserved_bytes{a}"] == 25
    assert found["mlxvlm_prefix_cache_bytes{a}"] == 70
    assert found["mlxvlm_prefix_cache_hits_total{a}"] == 4
    assert found["mlxvlm_feature_cache_misses_total{a}"] == 2
    assert found["mlxvlm_generated_tokens_total{a}"] == 11
    assert found["mlxvlm_encoded_images_total{a}"] == 8
    assert found["mlxvlm_memory_bytes{peak}"] == 20
    assert found['mlxvlm_running_requests{odd"\n}'] == 0


def test_usage() -> None:
    metrics = Metrics()
    metrics.count_usage("a", USAGE)
    metrics.count_usage("a", USAGE)
    found = figures(metrics)
    assert found["mlxvlm_prompt_tokens_total{a}"] == 14
    assert found["mlxvlm_cached_prompt_tokens_total{a}"] == 4
    assert found["mlxvlm_image_tokens_total{a}"] == 6
    assert found["mlxvlm_completion_tokens_total{a}"] == 10
    assert found["mlxvlm_time_to_first_token_seconds_sum{a}"] == 0.5
    assert found["mlxvlm_time_to_first_token_seconds_bucket{0.2,a}"] == 0
    assert found["mlxvlm_time_to_first_token_seconds_bucket{0.5,a}"] == 2


def test_streams() -> None:
    metrics = Metrics()
    with fake_engine() as engine:

        async def read(count: int) -> list[int]:
            deltas = metrics.timed("a", engine.submit(ask([1, 2], 12)))
            found: list[int] = []
            async for delta in deltas:
                found += delta.token_ids
                if len(found) >= count:
                    break
            await deltas.aclose()  # type: ignore[attr-defined]
            return found

        assert asyncio.run(read(99)) == answer([1, 2], 12)
        found = figures(metrics)
        assert found["mlxvlm_inter_token_seconds_count{a}"] == 11
        assert found["mlxvlm_completion_tokens_total{a}"] == 12

        # Closing it ends the request.
        async def leave() -> None:
            deltas = metrics.timed("a", engine.submit(ask([1], None)))
            await anext(deltas)
            await deltas.aclose()  # type: ignore[attr-defined]

        asyncio.run(leave())
        assert eventually(lambda: is_empty(engine))


def test_the_endpoint_behind_all_that_protects_it() -> None:
    metrics = Metrics()
    app: Any = Starlette(routes=[metrics_route(metrics)])
    app = protected(app, ServerSettings(api_key="key"), metrics)
    assert fetch(app, "GET", "/metrics", HOST).status == 401
    reply = fetch(app, "GET", "/metrics", {**HOST, "Authorization": "Bearer key"})
    assert reply.status == 200
    assert reply["content-type"].startswith("text/plain; version=")
    assert reply["x-request-id"]
    found = figures(metrics)
    assert found["mlxvlm_requests_total{GET,none,401}"] == 1
    assert found["mlxvlm_requests_total{GET,/metrics,200}"] == 1


def test_two_servers_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.count_usage("a", USAGE)
    assert "mlxvlm_prompt_tokens_total{a}" not in figures(second)
