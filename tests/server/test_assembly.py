"""The parts of the server together: what a request leaves in the log and the counters, tools, the page, the end."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from mlxvlm.server.refusals import SHUTTING_DOWN
from mlxvlm.server.registry import ModelSpec
from mlxvlm.server.settings import ServerSettings
from tests.fakes import FakeModel, FakeProcessor, eventually, fake_engine
from tests.server.loaders import FakeLoader, LoadedModel
from tests.server.serving import client_of
from tests.server.whole import Whole, whole

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["it"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
LONG = 3000  # tokens of an answer that does not end by itself soon


@pytest.fixture(scope="module")
def server() -> Iterator[Whole]:
    with whole([ModelSpec("demo", "demo", ("gpt",)), ModelSpec("second", "demo")]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Whole) -> Iterator[openai.OpenAI]:
    with client_of(server.url) as client:
        yield client


def figure(server: Whole, name: str) -> float:
    text = httpx2.get(f"{server.url}/metrics", trust_env=False).text
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_logged_and_counted(
    server: Whole, client: openai.OpenAI, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "mlxvlm.server.requests")
    names = [
        f'mlxvlm_{name}{{model="demo"}}'
        for name in ("completion_tokens_total", "inter_token_seconds_count", "time_to_first_token_seconds_count")
    ]
    before = [figure(server, name) for name in names]
    answer: Any = client.chat.completions.create(model="gpt", messages=HELLO, max_tokens=5, stream=stream)
    if stream:
        list(answer)
    assert [figure(server, name) - old for name, old in zip(names, before, strict=True)] == [5, 4, 1]

    def line() -> Any:
        lines = [getattr(record, "fields", {}) for record in caplog.records]
        return next((each for each in lines if each.get("path") == "/v1/chat/completions"), None)

    assert eventually(lambda: line() is not None)
    assert (line()["model"], line()["completion_tokens"], line()["complete"]) == ("demo", 5, True)
    assert line()["prompt_tokens"] > 0


def test_models_by_all_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "second"], "the default comes first"
    assert {name: client.models.retrieve(name).id for name in ("default", "gpt", "second")} == {
        "default": "demo",
        "gpt": "demo",
        "second": "second",
    }
    for ask in (
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.chat.completions.create(model="gpt-5", messages=HELLO),
    ):
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here") as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_tools_have_the_format_of_the_checkpoint(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, tools=[LOOK], tool_choice="required", parallel_tool_calls=False, max_tokens=300
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert json.loads(call.function.arguments) == {"at": "it"}  # type: ignore[union-attr]


def test_the_page_and_whom_it_is_for(server: Whole) -> None:
    page = httpx2.get(f"{server.url}/", trust_env=False)
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    body = {"messages": HELLO, "max_tokens": 1}
    url = f"{server.url}/v1/chat/completions"
    assert httpx2.post(url, json=body, headers=headers, trust_env=False).status_code == 200
    assert httpx2.post(url, json=body, headers={"Origin": "http://evil"}, trust_env=False).status_code == 403
    assert ServerSettings().shows_ui
    assert not ServerSettings(host="0.0.0.0").shows_ui
    assert ServerSettings(host="0.0.0.0", ui=True).shows_ui
    assert not ServerSettings(ui=False).shows_ui


def fakes() -> FakeLoader:
    return FakeLoader()


def test_the_page_asks_for_the_key_itself() -> None:
    with whole([ModelSpec("a", "a")], ServerSettings(port=0, api_key="key"), fakes()) as server:
        statuses = [httpx2.get(server.url + path, trust_env=False).status_code for path in ("/", "/v1/models")]
        assert statuses == [200, 401]
    with whole([ModelSpec("a", "a")], ServerSettings(port=0, ui=False), fakes()) as server:
        assert httpx2.get(f"{server.url}/", trust_env=False).status_code == 404


class SlowLoader(FakeLoader):
    """Engines that give a token a hundredth of a second."""

    def load(self, spec: Any, progress: Any) -> LoadedModel:
        pause = threading.Event()
        self.engines.append(fake_engine(FakeModel(on_call=lambda x: (pause.wait(0.01), None)[1])))
        return LoadedModel(spec.name, self.engines[-1])


def test_requests_that_the_end_cuts_off_are_told(caplog: pytest.LogCaptureFixture) -> None:
    settings, loader = ServerSettings(port=0, drain_s=0.2), SlowLoader()
    body = {"messages": [{"role": "user", "content": "12"}], "max_tokens": LONG}
    with whole([ModelSpec("a", "a")], settings, loader) as server:
        replies: list[httpx2.Response] = []

        def ask() -> None:
            url = f"{server.url}/v1/chat/completions"
            replies.append(httpx2.post(url, json=body, trust_env=False, timeout=30))

        waiting = threading.Thread(target=ask)
        waiting.start()
        with httpx2.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, trust_env=False
        ) as response:
            pieces = response.iter_lines()
            next(pieces)
            assert eventually(lambda: loader.engines[0].stats().running == 2)
            server.end()
            events = [line for line in pieces if line]
        waiting.join(20)
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert (error["type"], error["message"]) == ("server_error", SHUTTING_DOWN)
    assert events[-1] == "data: [DONE]"
    assert [(reply.status_code, reply.json()["error"]["message"]) for reply in replies] == [(503, error["message"])]
    assert replies[0].headers["retry-after"] == "5"
    assert not [record for record in caplog.records if record.exc_info], "no tracebacks"


def test_a_body_that_never_ends_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with whole([ModelSpec("a", "a")], ServerSettings(port=0, drain_s=0), fakes()) as server:
        entered = threading.Event()

        def pieces() -> Iterator[bytes]:
            yield b"{"
            entered.set()
            threading.Event().wait(4)
            yield b"}"

        statuses: list[int] = []

        def ask() -> None:
            headers = {"Content-Type": "application/json"}
            url = f"{server.url}/v1/chat/completions"
            statuses.append(httpx2.post(url, content=pieces(), headers=headers, trust_env=False).status_code)

        waiting = threading.Thread(target=ask)
        waiting.start()
        assert entered.wait(10)
        threading.Event().wait(0.2)
        server.end()
        waiting.join(20)
    assert statuses == [503]
    assert not [record for record in caplog.records if record.exc_info], "no tracebacks"


class BadTokenizer:
    """Breaks where logprobs are asked for."""

    def __init__(self, genuine: Any) -> None:
        self.decode, self.encode = genuine.decode, genuine.encode

    def token_bytes(self, token_id: int) -> bytes:
        raise ZeroDivisionError("a secret of the server's")


@pytest.mark.parametrize("stream", [True, False])
def test_a_defect_in_the_middle_of_an_answer(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    loader = FakeLoader()
    body = {"messages": [{"role": "user", "content": "12"}], "max_tokens": 3, "logprobs": True, "stream": stream}
    with whole([ModelSpec("a", "a")], None, loader) as server:
        processor = loader.engines[0].processor
        assert isinstance(processor, FakeProcessor)
        processor.tokenizer = BadTokenizer(processor.tokenizer)
        reply = httpx2.post(f"{server.url}/v1/chat/completions", json=body, trust_env=False)
        assert httpx2.get(f"{server.url}/health", trust_env=False).status_code == 200
    if stream:
        *_, failure, done = [line for line in reply.text.splitlines() if line]
        assert done == "data: [DONE]"
        error = json.loads(failure.removeprefix("data: "))["error"]
    else:
        assert reply.status_code == 500
        error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert "secret" not in reply.text
    assert "a secret of the server's" in caplog.text
