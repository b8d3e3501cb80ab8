"""Requests that nobody means well: strategies of bodies, heads, pictures and grammars."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.server.openapi import OPERATIONS, document

Json = Any
FIELDS = sorted(ChatCompletionRequest.model_fields)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO")
HELLO = [{"role": "user", "content": "hi"}]
HUGE = (10**9, 2**31, 2**63, 2**64, 10**39, -1, -(2**63) - 1, 0, 1e308, -0.0, 1.5, True, "5", None, [], {})

_texts = st.text(max_size=12) | st.sampled_from(
    ["", "\0", "\u202e", "{{7*7}}", "<image>", "../../etc/passwd", "é" * 300]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=8,
)
_roles = st.sampled_from(["user", "system", "developer", "assistant", "tool", "function", "", "USER"])
_parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_audio", "file", "refusal", ""])},
    optional={"text": _texts, "image_url": _values | st.fixed_dictionaries({"url": _texts}), "refusal": _values},
)
_messages = st.lists(
    st.fixed_dictionaries(
        {"role": _roles},
        optional={
            "content": _texts | st.lists(_parts, max_size=4) | _values,
            "tool_calls": st.lists(_values, max_size=2),
            "tool_call_id": _values,
            "name": _values,
        },
    ),
    max_size=4,
)


@st.composite
def wrong_fields(draw: st.DrawFn) -> bytes:
    """A good request with up to three fields of any value, known or unknown."""
    body: dict[str, Json] = {"messages": HELLO, "max_tokens": 2}
    for name in draw(st.lists(st.sampled_from(FIELDS) | _texts, min_size=1, max_size=3)):
        body[name] = draw(_values | st.sampled_from(HUGE))
    if draw(st.booleans()):
        body["messages"] = draw(_messages)
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] > 2:
        body["max_completion_tokens"] = 2
    return json.dumps(body).encode()


@st.composite
def wrong_json(draw: st.DrawFn) -> bytes:
    """Text that is almost JSON, and JSON that no two readers agree on."""
    good = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
    place = draw(st.integers(0, len(good)))
    piece = draw(
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"NaN", b"-Infinity", b"\\ud800", b"\xed\xa0\x80", b"1e999", b"\0", b"/*", b"9" * 5000])
        | st.sampled_from([b"[" * 10_000, b'{"a":' * 10_000, b'"messages":1,', b"\xef\xbb\xbf"])
    )
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return good[:place] + piece + good[place:]
    return good[:place] + piece if kind == 1 else b'{"top_p":' + piece + b"," + good[1:]


# Of answers that a document's fields don't keep short.
_LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
# Those that take bodies, but for those that end what runs beside.
PATHS = tuple(
    each.path for each in OPERATIONS if each.request and each.path != "/re_isq" and not each.path.endswith("load")
)


def of_document(path: str, *, valid: bool) -> st.SearchStrategy[bytes]:
    """Bodies that the OpenAPI document allows, or forbids."""
    import schemathesis

    mode = schemathesis.GenerationMode.POSITIVE if valid else schemathesis.GenerationMode.NEGATIVE
    operation = schemathesis.openapi.from_dict(document(has_key=False))[path]["POST"]

    def encoded(case: Any) -> bytes:
        if not isinstance(case.body, Mapping):
            return case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
        limits = dict.fromkeys(_LIMITS.get(path, ()) if valid else (), 2)
        return json.dumps({**case.body, **limits}).encode()

    # What it leaves out altogether is no body.
    return (
        operation.as_strategy(generation_mode=mode)
        .filter(lambda case: type(case.body).__name__ != "NotSet")
        .map(encoded)
    )


def grammar_bodies() -> list[Json]:
    """Forms, tools and template variables made to explode."""
    nested: Json = {"type": "string"}
    for _ in range(55):
        nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
    wide = {f"k{i}": {"anyOf": [{"type": "string", "pattern": f"(a|b{i})*c"}, {"$ref": "#"}]} for i in range(300)}
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    schemas: list[Json] = [nested, loop, {"type": "object", "properties": wide}, {"$ref": "#"}, {"$ref": "file:///x"}]
    schemas += [{"$ref": "http://127.0.0.1:1/"}, {"type": "array", "minItems": 10**9}, {"enum": ["x" * 50] * 2000}]
    schemas += [{"allOf": [{"type": "string", "pattern": f".*{c}.{{12}}"} for c in "abcdef"]}, {"type": 5}, {"x": 1}]
    schemas += [{"type": "integer", "multipleOf": 10**30}, {"type": "string", "pattern": "(?=a)b"}, {"const": None}]
    texts = ["(a|a)*" * 100, "(((a{1,100}){1,100}){1,100}){1,100}", "a{1,1000000000}", "[a-z]*" * 5000, "(" * 3000]
    texts += [".{0,1000}" * 50, "(a*)*b", "\\", "", "\0", "(?<=a)", "a" * 131_073]
    larks = ['start: start start | "a"', "start: A\nA: /.*a.{14}/ & ~/.*b.{14}/ & /.*c.{14}/", "start: %json {}"]
    larks += ["start: " + '( "a"? )' * 3000, 'start: "a"{1,100000000}', "start: start", "%import x", "%%%", ""]
    found: list[Json] = [{"grammar": {"type": "regex", "value": value}} for value in texts]
    found += [{"grammar": {"type": "lark", "value": value}} for value in larks]
    found += [{"grammar": {"type": "llguidance", "value": value}} for value in ("", "{}", '{"grammars":[]}', "[" * 900)]
    for schema in schemas:
        found.append({"grammar": {"type": "json_schema", "value": schema}})
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        found.append({"response_format": form})
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
        found += [{"tools": [tool], "tool_choice": choice} for choice in ("auto", "required")]
        found.append({"tools": [tool] * 128})
    evil = ["{{ ''.__class__.__mro__ }}", {"__class__": 1}, ["x"] * 10_000, "x" * 100_000, {"append": "x"}, 10**30]
    names = ("add_generation_prompt", "bos_token", "raise_exception", "messages", "self", "range", "__class__", "loop")
    found += [{"chat_template_kwargs": {name: value}} for name in names for value in evil]
    return [{"messages": HELLO, "max_tokens": 2, **fields} for fields in found]


def large_bodies() -> list[Json]:
    """Long lists and texts, and numbers beyond all bounds."""
    many = [{"role": "user", "content": "a"}] * 5000
    fields: list[Json] = [
        *({"stop": stop} for stop in (["a" * 1_000_000], ["a"] * 1_000_000, "a" * 1_000_000, [""], [[]], [None] * 65)),
        *(
            {"messages": [{"role": "user", "content": text}]}
            for text in ("a" * 1_000_000, "a " * 9_000_000, "", "\0" * 9)
        ),
        {"messages": many},
        {"messages": []},
        {"top_k": 10**9},
        *({"logit_bias": {token: 1}} for token in ("512", "999999999", "-1", "01", "1e3", "", "x", "9" * 400)),
        {"logit_bias": {str(i): 0 for i in range(5000)}},
        *({"seed": 2**64 + offset} for offset in (0, 10**30)),
        *({"n": n} for n in (0, 17, 10**9)),
        *({"max_tokens": n} for n in (0, -1, 2**31 + 1)),
        *({"chat_template_kwargs": {str(i): i for i in range(count)}} for count in (65,)),
        {"dry_sequence_breakers": ["a"] * 100_000, "dry_multiplier": 1},
        {"tools": [{}] * 129},
        {"metadata": {str(i): "x" for i in range(17)}},
        {"user": "x" * 1_000_000},
        {"model": "../" * 300},
        {"timeout": 1e-9},
        {"timeout": 0},
        {"top_logprobs": 21, "logprobs": True},
    ]
    return [{"messages": HELLO, "max_tokens": 2, **each} for each in fields]


def picture(format: str, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, format)
    return buffer.getvalue()


PICTURES = {format: picture(format) for format in FORMATS}


@st.composite
def damaged_pictures(draw: st.DrawFn) -> bytes:
    """Of every format, cut off or with some bytes changed."""
    data = bytearray(PICTURES[draw(st.sampled_from(FORMATS))])
    if draw(st.booleans()):
        del data[draw(st.integers(1, len(data) - 1)) :]
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(side: int, *extra: bytes) -> bytes:
    """A picture of side x side pixels in a few bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(min(side, 2000) * (3 * min(side, 2000) + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bombs() -> list[bytes]:
    """Pictures that declare more than they may, or unpack to it."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20), 9))
    gif = bytearray(PICTURES["GIF"])
    gif[6:10] = struct.pack("<HH", 30_000, 30_000)
    bmp = bytearray(PICTURES["BMP"])
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, 10**5, 22) + bomb_png(30_000)
    found = [bomb_png(30_000), bomb_png(2**31 - 1), bomb_png(0), bomb_png(8, text), bomb_png(8, profile)]
    return [*found, b"P6 30000 30000 255\n", b"P6 99999999999 1 255\n", bytes(gif), bytes(bmp), icon]


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def sources(secret: str) -> list[Json]:
    """Where a picture can't be, or must not be looked for; `secret` is a file that is none of the server's."""
    here = (
        "127.0.0.1 localhost 0x7f000001 2130706433 017700000001 127.1 [::1] [::ffff:127.0.0.1] 0.0.0.0 169.254.169.254"
    )
    urls = [f"http://{host}/x.png" for host in here.split()] + ["http://10.0.0.1/", "http://a:b@127.0.0.1/", "http://"]
    urls += ["https://", "http://\0", "http://[", "http://127.0.0.1:99999/", "ftp://x/y", "gopher://x", "javascript:1"]
    files = [
        secret,
        f"file://{secret}",
        f"file://localhost{secret}",
        f"file://evil.example{secret}",
        "file:",
        "file://",
    ]
    files += ["/etc/passwd", "file:///etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/kmsg", "~root/x"]
    files += ["../" * 20 + "etc/passwd", "link.png", "folder-link/secret.png", "pipe", ".", "", " ", "\0", "a" * 300]
    lies = [
        "data:",
        "data:,",
        "data:image/png;base64,",
        "data:image/png;base64,%",
        "data:text/html,<b>",
        "data:;base64,AAAA",
    ]
    lies += [data_url(b"<svg/>", "image/svg+xml"), data_url(b"%!PS\n", "image/png"), data_url(b"PK\3\4" * 99)]
    odd: list[Json] = [5, None, [], {}, {"url": None}, {"url": "x", "detail": "best"}, {"uri": "x"}]
    return [*urls, *files, *lies, *odd]


def asks_of(source: Json, **fields: Json) -> bytes:
    parts = [{"type": "image_url", "image_url": source}, {"type": "text", "text": "?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 1, **fields}).encode()


_lines = st.sampled_from(
    [
        *("Host: evil.example", "Host: 127.0.0.1", "Host:", "Host: 127.0.0.1:PORT@evil", "Origin: http://evil.example"),
        *("Origin: null", "Origin: file://", "Sec-Fetch-Site: cross-site", "Content-Length: -1", "Content-Length: 2"),
        *("Content-Length: 99999999999999999999", "Content-Length: 0x10", "Content-Length: 2, 3", "Content-Length: 5"),
        *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity"),
        *("Transfer-Encoding : chunked", "Content-Encoding: gzip", "Content-Type: text/plain", "Expect: 100-continue"),
        *("Content-Type: multipart/form-data; boundary=a", "Content-Type: application/json", "Upgrade: websocket"),
        *(
            "Connection: Upgrade",
            "Upgrade: h2c",
            " folded",
            "X\0: y",
            "no colon",
            "X: " + "a" * 40_000,
            "X-Request-Id: \x07",
        ),
        *("Authorization: Bearer \xff", "Cookie: a=b", "Range: bytes=0-1"),
    ]
)
_targets = st.sampled_from(
    [
        *("/v1/chat/completions", "/v1/models", "/v1/models/../../etc", "/%00", "/%ff", "//x", "/v1//models", "*", "x"),
        *("http://evil.example/v1/models", "/v1/models/%2e%2e%2f", "/" + "a" * 40_000, "/metrics/x", "/?\xff", "/ x"),
        *("/v1/chat/completions/", "/docs/../health", "/health/..", "/none"),
    ]
)
_methods = st.sampled_from(
    ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "PRI", "get", "", "\0"]
)
_bodies = st.sampled_from(
    [b"", b"{}", b"[]", b"0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n"]
)


@st.composite
def heads(draw: st.DrawFn, port: int) -> bytes:
    """A head that no client sends, or two requests where there should be one."""
    lines = draw(st.lists(_lines, max_size=4))
    if draw(st.booleans()):
        lines.insert(0, f"Host: 127.0.0.1:{port}")
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.1 x", ""]))
    end = draw(st.sampled_from(["\r\n", "\r\n", "\n", "\r"]))
    head = end.join([f"{draw(_methods)} {draw(_targets)} {version}", *lines, "", ""]).replace("PORT", str(port))
    request = head.encode("latin-1") + draw(_bodies)
    return request * draw(st.integers(1, 3)) if draw(st.integers(0, 3)) == 0 else request
