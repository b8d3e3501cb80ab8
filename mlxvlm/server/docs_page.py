"""GET /docs: the OpenAPI document as one page of HTML, without scripts. Knows the document, no endpoint."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlxvlm.api.describing import type_of
from mlxvlm.server.openapi import document

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow: auto; padding: .5rem; border: 1px solid; border-radius: .3rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8886; }
section { border-top: 2px solid #8888; margin-top: 1.5rem; }
summary { cursor: pointer; }
"""
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def routes(*, has_key: bool) -> list[Route]:
    """GET /openapi.json and /docs; both are made now, once."""
    described = document(has_key=has_key)
    data, page = json.dumps(described).encode(), html(described).encode()

    async def as_json(request: Request) -> Response:
        return Response(data, media_type="application/json")

    async def as_page(request: Request) -> Response:
        return Response(page, headers={"Content-Security-Policy": _POLICY}, media_type="text/html; charset=utf-8")

    return [Route("/openapi.json", as_json, methods=["GET"]), Route("/docs", as_page, methods=["GET"])]


def html(described: Mapping[str, Any]) -> str:
    """A page of any OpenAPI document of ours."""
    return "".join(_page(described))


def _page(described: Mapping[str, Any]) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><title>mlxvlm API</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    yield f"<h1>mlxvlm {escape(described['info']['version'])}</h1>"
    yield '<p>This page is made of <a href="/openapi.json">openapi.json</a>.</p><nav><ul>'
    operations = [
        (method, path, each) for path, methods in described["paths"].items() for method, each in methods.items()
    ]
    for method, path, each in operations:
        name = escape(each["operationId"])
        yield f'<li><a href="#{name}"><code>{method.upper()} {escape(path)}</code></a> {_text(each["summary"])}</li>'
    yield "</ul></nav>"
    for method, path, each in operations:
        yield from _section(method, path, each, described["components"]["schemas"])
    yield "<section><h2>Shapes</h2>"
    for name, schema in described["components"]["schemas"].items():
        head = f'<details id="shape-{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        yield f"{head}<pre>{escape(json.dumps(schema, indent=1))}</pre></details>"
    yield "</section></html>"


def _section(method: str, path: str, each: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section id="{escape(each["operationId"])}"><h2><code>{method.upper()} {escape(path)}</code></h2>'
    yield f"<p>{_text(each['summary'])}</p>"
    if query := [given for given in each.get("parameters", ()) if given["in"] == "query"]:
        yield from _fields({"properties": {given["name"]: given["schema"] for given in query}})
    if "requestBody" in each:
        name = _shape(each["requestBody"]["content"]["application/json"]["schema"])
        yield from _fields(schemas[name])
    yield "<table><tr><th>status<th>meaning<th>answer</tr>"
    for status, answer in each["responses"].items():
        shapes = [_link(kind, content["schema"]) for kind, content in answer["content"].items()]
        yield f"<tr><td>{escape(status)}<td>{_text(answer['description'])}<td>{'<br>'.join(shapes)}</tr>"
    yield "</table></section>"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    yield "<table><tr><th>field<th>type<th>meaning</tr>"
    for name, field in sorted(schema["properties"].items(), key=lambda item: (item[0] not in required, item[0])):
        kind, about = _text(type_of(field)), _text(field.get("description", ""))
        needed = ", needed" if name in required else ""
        yield f"<tr><td><code>{escape(name)}</code><td>{kind}{needed}<td>{about}</tr>"
    yield "</table>"


def _link(kind: str, schema: Mapping[str, Any]) -> str:
    inside = schema.get("contentSchema", schema)
    if "$ref" not in inside:
        return f"<code>{escape(kind)}</code>"
    name = escape(_shape(inside))
    return f'<code>{escape(kind)}</code>: <a href="#shape-{name}">{name}</a>'


def _shape(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _text(text: str) -> str:
    """What stands between backticks is code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
