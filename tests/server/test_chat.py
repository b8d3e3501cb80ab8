"""The official openai client against the demo model over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pydantic
import pytest

from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.messages import user
from tests.golden import GOLDENS

ITEMS: list[dict[str, Any]] = json.loads((GOLDENS / "demo" / "golden.json").read_text())["items"]
SHOWN = next(item for item in ITEMS if item["images"] and len(item["messages"]) == 1)
PICTURE = GOLDENS / "demo" / SHOWN["images"][0]
HELLO = [{"role": "user", "content": "Hello!"}]


def look(url: str, question: str = "What do you see?") -> list[dict[str, Any]]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": schema}}


def create(client: openai.OpenAI, messages: Sequence[Any] = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model="default", messages=messages, **fields)


def streamed(client: openai.OpenAI, messages: Sequence[Any] = HELLO, n: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """What each choice came to."""
    wholes: list[dict[str, Any]] = [{"text": "", "reason": None, "tokens": [], "ids": []} for _ in range(n)]
    for chunk in create(client, messages, n=n, stream=True, **fields):
        for choice in chunk.choices:
            whole = wholes[choice.index]
            whole["text"] += choice.delta.content or ""
            whole["reason"] = choice.finish_reason or whole["reason"]
            whole["tokens"] += choice.logprobs.content if choice.logprobs else []
            whole["ids"] += getattr(choice, "token_ids", None) or []
    return wholes


def wholes_of(completion: Any) -> list[dict[str, Any]]:
    return [
        {
            "text": choice.message.content,
            "reason": choice.finish_reason,
            "tokens": choice.logprobs.content if choice.logprobs else [],
            "ids": getattr(choice, "token_ids", None) or [],
        }
        for choice in completion.choices
    ]


def test_the_demo_answers_as_the_engine_does(client: openai.OpenAI, demo_engine: Engine) -> None:
    for item in [item for item in ITEMS if len(item["messages"]) == 1 and len(item["images"]) == 1][:6]:
        parts = item["messages"][0]["content"]
        question = "".join(part["text"] for part in parts if part["type"] == "text")
        path = str(GOLDENS / "demo" / item["images"][0])
        completion = create(client, look(path, question), max_tokens=48)
        assert completion.choices[0].message.content == item["text"]
        assert completion.usage.prompt_tokens == item["seq_len"]
        assert completion.usage.prompt_tokens_details.image_tokens == 16
        assert completion.model == "demo"


@pytest.mark.parametrize("form", ["path", "file", "data", "base64"])
def test_pictures_of_all_forms(client: openai.OpenAI, form: str) -> None:
    text = base64.b64encode(PICTURE.read_bytes()).decode()
    forms = {"path": str(PICTURE), "file": PICTURE.as_uri(), "data": f"data:image/png;base64,{text}", "base64": text}
    plain = create(client, look(str(PICTURE)))
    assert create(client, look(forms[form])).choices[0].message.content == plain.choices[0].message.content


def test_the_request_of_the_pages(client: openai.OpenAI) -> None:
    completion = create(client, look(str(PICTURE)), max_tokens=256, frequency_penalty=1.0, top_p=0.1, temperature=0)
    assert completion.choices[0].message.content
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    for name in ("avg_tok_per_sec", "avg_prompt_tok_per_sec", "avg_compl_tok_per_sec", "total_time_sec"):
        assert getattr(usage, name) > 0
    assert usage.total_prompt_time_sec + usage.total_completion_time_sec <= usage.total_time_sec
    assert 0 < usage.time_to_first_token_sec <= usage.total_time_sec


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.2, "seed": 5, "n": 3, "max_tokens": 12},
        {"logprobs": True, "top_logprobs": 2, "extra_body": {"return_token_ids": True}},
        {"stop": ["show"], "extra_body": {"ignore_eos": True}, "max_tokens": 20},
        {"response_format": {"type": "json_object"}, "max_tokens": 20},
    ],
)
def test_streamed_is_whole(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = create(client, look(str(PICTURE)), **fields)
    assert streamed(client, look(str(PICTURE)), **fields) == wholes_of(whole)


def test_seeds(client: openai.OpenAI) -> None:
    def texts(**fields: Any) -> list[str]:
        return [each.message.content for each in create(client, temperature=3.0, max_tokens=16, **fields).choices]

    three = texts(seed=7, n=3)
    assert three == texts(seed=7, n=3)
    assert len(set(three)) == 3
    assert three == [texts(seed=seed)[0] for seed in (7, 8, 9)]


def test_token_ids_are_those_of_the_engine(client: openai.OpenAI, demo_engine: Engine) -> None:
    prompt = demo_engine.processor([user("Hello!")])
    answer = demo_engine.generate(Request([user("Hello!")], SamplingParams(max_tokens=48)))
    fields = {"max_tokens": 48, "extra_body": {"return_token_ids": True}}
    whole = create(client, **fields)
    assert whole.prompt_token_ids == list(prompt.token_ids)
    assert whole.choices[0].token_ids == list(answer.token_ids)
    first = next(iter(create(client, stream=True, **fields)))
    assert first.prompt_token_ids == list(prompt.token_ids)


def test_logprobs(client: openai.OpenAI, demo_engine: Engine) -> None:
    completion = create(client, logprobs=True, top_logprobs=3)
    content = completion.choices[0].logprobs.content
    assert (
        b"".join(bytes(each.bytes) for each in content).decode().strip()
        == completion.choices[0].message.content.strip()
    )
    assert "".join(each.token for each in content).strip() == completion.choices[0].message.content.strip()
    assert len(content) == completion.usage.completion_tokens - 1, "all but the end token"
    for each in content:
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (t.logprob for t in each.top_logprobs), reverse=True
        )
        assert (each.token, each.logprob) == (each.top_logprobs[0].token, each.top_logprobs[0].logprob), "greedy"
    assert create(client).choices[0].logprobs is None


def test_stop_and_limits(client: openai.OpenAI) -> None:
    whole = create(client).choices[0].message.content
    cut = create(client, stop="picture").choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole.split("picture")[0], "stop")
    short = create(client, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    with pytest.raises(openai.InternalServerError) as caught:
        create(client, extra_body={"timeout": 1e-6})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")


class Shape(pydantic.BaseModel):
    shape: str
    count: int


def test_structured_output(client: openai.OpenAI) -> None:
    # Weak models make long strings of nothing.
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    answer = create(client, look(str(PICTURE)), response_format=form, max_tokens=40).choices[0].message.content
    assert isinstance(json.loads(answer)["ok"], bool)
    grammar = {"type": "regex", "value": "yes|no"}
    assert create(client, extra_body={"grammar": grammar}).choices[0].message.content in ("yes", "no")


def test_the_clients_parse(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        is_star: bool
        color: str = pydantic.Field(pattern="^(red|orange|blue)$")

    parsed = client.chat.completions.parse(
        model="default",
        messages=look(str(PICTURE)),
        response_format=Answer,
        max_tokens=60,  # type: ignore[arg-type]
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="default",
            messages=HELLO,
            response_format=Shape,
            max_tokens=2,  # type: ignore[arg-type]
        )


def test_usage_comes_last_if_asked(client: openai.OpenAI) -> None:
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == create(client).usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in create(client, stream=True))


def test_frames(demo_url: str) -> None:
    body = {"messages": HELLO, "stream": True}
    answer = httpx2.post(f"{demo_url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_long_chats_are_truncated_if_asked(client: openai.OpenAI) -> None:
    chat = [{"role": role, "content": "la " * 250} for _ in range(4) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "Be brief."}, *chat, *HELLO]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, messages)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    completion = create(client, messages, max_tokens=5, extra_body={"truncate_sequence": True})
    assert 500 < completion.usage.prompt_tokens < 2048


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"extra_body": {"surprise": 1}}, openai.BadRequestError, "surprise"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"messages": look("nowhere.png")}, openai.BadRequestError, "messages"),
        ({"messages": look("data:image/png;base64,AAAA")}, openai.BadRequestError, "messages"),
        ({"extra_body": {"min_pixels": 100}}, openai.BadRequestError, "min_pixels"),
        ({"extra_body": {"grammar": {"type": "regex", "value": "("}}}, openai.BadRequestError, "grammar"),
        (
            {"extra_body": {"grammar": {"type": "regex", "value": "a"}, "ignore_eos": True}},
            openai.BadRequestError,
            "ignore_eos",
        ),
        ({"response_format": form({"type": "nothing"})}, openai.BadRequestError, "response_format"),
        (
            {"response_format": form({"type": "object", "minProperties": "x"})},
            openai.BadRequestError,
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "Hello! " * 9999}]}, openai.BadRequestError, "messages"),
        ({"model": "other"}, openai.NotFoundError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients(
    client: openai.OpenAI, fields: dict[str, Any], kind: Any, param: Any, stream: bool
) -> None:
    asked = {"model": "default", "messages": HELLO, "stream": stream, **fields}
    if "min_pixels" in str(fields):
        asked["messages"] = look(str(PICTURE))
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_models(client: openai.OpenAI, demo_url: str) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == ["demo"]
    assert client.models.retrieve("demo") == client.models.retrieve("default") == cards[0]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")
    assert httpx2.get(f"{demo_url}/health").status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)])
def test_other_paths_have_openais_errors(demo_url: str, method: str, path: str, status: int) -> None:
    answer = httpx2.request(method, demo_url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
