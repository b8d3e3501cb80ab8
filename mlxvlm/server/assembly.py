"""Registry, policy and guard around the endpoints: the whole ASGI application. Knows every part, and none's inside."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlxvlm.server.capacity import Capacity
from mlxvlm.server.guard import Guard
from mlxvlm.server.json_body import Bodies, BodyLimits, read_json
from mlxvlm.server.metrics import Metrics, RequestMetrics
from mlxvlm.server.pictures import Pictures
from mlxvlm.server.registry import Registry
from mlxvlm.server.request_log import RequestLog
from mlxvlm.server.settings import ServerSettings


def protected(app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> ASGIApp:
    """The app behind its log, its counters, its limit of requests and its guard, from the outside in."""
    return RequestLog(RequestMetrics(Capacity(Guard(app, settings), settings.max_connections), metrics))


def assemble(registry: Registry, settings: ServerSettings) -> ASGIApp:
    """What `mlxvlm serve` serves. Call it inside the event loop."""
    from mlxvlm.server.app import create_app

    metrics = Metrics(registry.figures, registry.memory)
    limits = BodyLimits(settings.max_body_bytes, settings.body_timeout_s)
    bodies = Bodies(max(settings.max_bodies_bytes, settings.max_body_bytes))

    async def read_body(request: Request) -> Any:
        return await read_json(request, limits, bodies)

    app = create_app(
        registry,
        read_json=read_body,
        fetch_picture=Pictures(settings).read,
        routes=[metrics_route(metrics)],
    )
    return protected(app, settings, metrics)


def metrics_route(metrics: Metrics) -> Route:
    """GET /metrics."""

    async def answer(request: Request) -> Response:
        text, content_type = metrics.render()
        return Response(text, headers={"Content-Type": content_type})

    return Route("/metrics", answer, methods=["GET"])
