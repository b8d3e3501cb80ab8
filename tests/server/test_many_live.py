"""32 clients at once on the whole server, and others that leave: each gets what it gets alone; nothing is left."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.golden import GOLDENS
from tests.server.hostile import data_url
from tests.server.live import Answer, Live, held, is_back, live

CLIENTS = 32
QUESTIONS = ("What do you see?", "What color is the star?", "How many shapes are there?", "Describe as JSON.")
TOOL = {"name": "paint", "parameters": {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
FORMS: list[dict[str, Any]] = [
    {"grammar": {"type": "regex", "value": "[a-z ]{5,20}"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"tools": [{"type": "function", "function": TOOL}]},
    {"logprobs": True, "top_logprobs": 3},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as server:
        yield server


def request_of(number: int) -> dict[str, Any]:
    """Pictures for two of three, forms for half, streamed for half; sampled all."""
    rng = random.Random(number)
    parts: list[dict[str, Any]] = [{"type": "text", "text": rng.choice(QUESTIONS)}]
    if number % 3:
        path = rng.choice(sorted((GOLDENS / "demo").glob("*.png"))[:8])
        url = str(path) if rng.random() < 0.5 else data_url(path.read_bytes())
        parts.insert(rng.randint(0, 1), {"type": "image_url", "image_url": {"url": url}})
    form = FORMS[number // 2 % len(FORMS)] if number % 4 < 2 else {}
    return {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 2.0,
        "seed": number,
        "max_tokens": rng.randint(5, 30),
        "stream": number % 2 == 0,
        "n": 1 + (number % 5 == 0),
        "return_token_ids": True,
        "presence_penalty": rng.choice([0, 1.5]),
        **form,
    }


def said(answer: Answer) -> Any:
    """The status, and of each choice its tokens, text, calls and end, however they were sent; ids and times aside."""
    if answer.status != 200:
        return answer.status, answer.body
    if "event-stream" not in answer.headers["content-type"]:
        events = [json.loads(answer.body)]
    else:
        lines = answer.body.replace(b"\r\n", b"\n").split(b"\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    found: dict[int, list[Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        ids, text, calls, ends = found.setdefault(choice["index"], [[], "", "", []])
        piece = choice["delta"] if "delta" in choice else choice["message"]
        ids += choice.get("token_ids") or ()
        made = [call["function"] for call in piece.get("tool_calls") or ()]
        new = [text + (piece.get("content") or ""), calls + json.dumps(made) * bool(made)]
        found[choice["index"]] = [ids, *new, ends + [choice["finish_reason"]] * bool(choice["finish_reason"])]
    return answer.status, found


def leave(server: Live, rng: random.Random) -> None:
    """One request whose client is gone before its end."""
    body = json.dumps({**request_of(rng.randrange(1000)), "max_tokens": 300}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with server.connect() as connection:
        connection.sendall(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        connection.settimeout(rng.random() * 0.2 + 0.001)
        with suppress(TimeoutError):
            connection.recv(rng.randint(1, 4000))


def test_every_answer_is_the_one_given_alone_whoever_leaves(server: Live) -> None:
    requests = [request_of(number) for number in range(CLIENTS)]
    alone = [said(server.chat(**request)) for request in requests]
    before, over, rng = held(), threading.Event(), random.Random(1)
    left = [0]

    def storm() -> None:
        while not over.is_set():
            leave(server, rng)
            left[0] += 1

    leaving = threading.Thread(target=storm)
    with ThreadPoolExecutor(CLIENTS) as pool:
        leaving.start()
        together = list(pool.map(lambda request: said(server.chat(**request)), requests))
        over.set()
    leaving.join()
    assert [one for one, two in zip(alone, together, strict=True) if one != two] == []
    assert sum(status == 200 for status, _ in alone) >= CLIENTS - 8, "few are refused"
    assert left[0] > 0
    # Pools keep the threads that they have started; MLX keeps what a row of one length class needs.
    floor = type(before)(before.threads + 8, before.files, before.mlx_bytes + (64 << 10))
    assert is_back(server, floor), (floor, held())
