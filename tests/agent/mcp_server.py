"""A tiny MCP server over pipes, of the standard library only: it starts fast."""

import json
import os
import sys
import time
from typing import Any

NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
TOOLS = [
    {"name": "add", "description": "Adds two numbers.", "inputSchema": NUMBERS},
    *({"name": name, "inputSchema": NOTHING} for name in ("who.am/I", "fail", "die", "hang", "picture", "data")),
]
PAGES = {None: {"tools": TOOLS[:2], "nextCursor": "2"}, "2": {"tools": TOOLS[2:]}}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": content}], **more}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if name == "add":
        return text(str(arguments["a"] + arguments["b"]))
    if name == "who.am/I":
        return text(os.environ.get("WHO", "nobody"))
    if name == "picture":
        return {"content": [{"type": "image", "data": "AAAA", "mimeType": "image/png"}]}
    if name == "data":
        return {"content": [], "structuredContent": {"é": 1}}
    if name == "die":
        os._exit(3)
    if name == "hang":
        time.sleep(60)
    return text("on purpose", isError=True)


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "initialize":
        info = {"name": "tiny", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return PAGES[params.get("cursor")]
    return call(params["name"], params["arguments"]) if method == "tools/call" else None


for line in sys.stdin:
    message = json.loads(line)
    if "id" in message:
        result = answer(message["method"], message.get("params", {}))
        reply = {"result": result} if result is not None else {"error": {"code": -32601, "message": "no such method"}}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **reply}), flush=True)
