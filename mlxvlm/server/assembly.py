"""Registry, policy and guard around the endpoints: the whole ASGI application. Knows every part, and none's inside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlxvlm.agent.loop import BoundTool
from mlxvlm.agent.web_search import check_search, search_by
from mlxvlm.server import docs_page, page
from mlxvlm.server.capacity import Capacity
from mlxvlm.server.fetch import PAGE, PAGE_LIMITS, Fetcher
from mlxvlm.server.guard import OPEN_PATHS, Guard
from mlxvlm.server.json_body import Bodies, BodyLimits, read_json
from mlxvlm.server.metrics import Metrics, RequestMetrics
from mlxvlm.server.operations import switch_routes
from mlxvlm.server.pictures import Pictures
from mlxvlm.server.registry import Registry
from mlxvlm.server.request_log import RequestLog, note_usage
from mlxvlm.server.settings import ServerSettings
from mlxvlm.server.tool_rounds import SearchFor, ServerTools


def protected(
    app: ASGIApp, settings: ServerSettings, metrics: Metrics, open_paths: frozenset[str] = OPEN_PATHS
) -> ASGIApp:
    """The app behind its log, its counters, its limit of requests and its guard, from the outside in.

    open_paths: those without a key.
    """
    guarded = Capacity(Guard(app, settings, open_paths), settings.max_connections)
    return RequestLog(RequestMetrics(guarded, metrics))


def assemble(registry: Registry, settings: ServerSettings, mcp: Sequence[BoundTool] = ()) -> ASGIApp:
    """What `mlxvlm serve` serves. Call it inside the event loop. mcp: tools of running MCP servers."""
    from mlxvlm.server.app import create_app

    metrics = Metrics(registry.figures, registry.memory)
    limits = BodyLimits(settings.max_body_bytes, settings.body_timeout_s)
    bodies = Bodies(max(settings.max_bodies_bytes, settings.max_body_bytes))

    async def read_body(request: Request) -> Any:
        return await read_json(request, limits, bodies)

    described = docs_page.routes(has_key=settings.api_key is not None)
    shown = [*described, *(page.routes() if settings.shows_ui else [])]
    app = create_app(
        registry,
        read_json=read_body,
        fetch_picture=Pictures(settings).read,
        note_usage=note_usage,
        timed=metrics.timed,
        routes=[metrics_route(metrics), *switch_routes(registry, read_body), *shown],
        tools=server_tools(settings, mcp),
    )
    # The page itself asks for the key, and what is described there stands in every copy of this package.
    return protected(app, settings, metrics, OPEN_PATHS.union(route.path for route in shown))


def server_tools(settings: ServerSettings, mcp: Sequence[BoundTool] = ()) -> ServerTools:
    """What these settings let the model call. Raises UsageError for what a search lacks."""
    search: SearchFor | None = None
    if settings.search_url is not None or settings.enable_search:
        check_search(settings.search_url)
        search = partial(search_by, settings.search_url)
    # Private addresses never: it is the model that asks, for what it has read somewhere.
    return ServerTools(search, Fetcher(False, PAGE_LIMITS, wanted=PAGE), tuple(mcp), settings.max_tool_rounds)


def metrics_route(metrics: Metrics) -> Route:
    """GET /metrics."""

    async def answer(request: Request) -> Response:
        text, content_type = metrics.render()
        return Response(text, headers={"Content-Type": content_type})

    return Route("/metrics", answer, methods=["GET"])
