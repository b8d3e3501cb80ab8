"""mistral.rs's Python API, against the demo model."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlxvlm
from mlxvlm import ChatCompletionRequest, CompletionRequest, Runner, ToolChoice, VisionArchitecture, Which
from mlxvlm.errors import EngineClosedError, ImageError, MlxvlmError, RequestError, UsageError
from tests.fakes import eventually

PICTURE = Path(__file__).parent.parent.parent / "examples" / "pictures" / "pink-heart.png"
QUESTION, ANSWER = "What color is the heart?", " The heart is pink."
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": ["red"]}},
            "required": ["color"],
            "additionalProperties": False,
        },
    },
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
FETCH = {"type": "function", "function": {"name": "fetch", "parameters": EMPTY}}


def demo(**options: Any) -> Runner:
    return Runner(which=Which.VisionPlain(model_id="demo", arch=VisionArchitecture.Idefics3), **options)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with demo(tool_callbacks={"paint": lambda name, arguments: f"{name}ed it {arguments['color']}"}) as runner:
        yield runner


def asked(picture: Any, text: str = QUESTION, **fields: Any) -> ChatCompletionRequest:
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    return ChatCompletionRequest(model="any", messages=[{"role": "user", "content": content}], **fields)


def test_as_the_documents_write_it(runner: Runner) -> None:
    request = asked(str(PICTURE), max_tokens=256, presence_penalty=1.0, top_p=0.1, temperature=0.1)
    res = runner.send_chat_completion_request(request)
    assert res.choices[0].message.content == ANSWER
    assert res.usage.prompt_tokens > 16
    assert res.usage.avg_prompt_tok_per_sec > 0


SOURCES = {
    "path": PICTURE,
    "text": str(PICTURE),
    "file URL": PICTURE.as_uri(),
    "bytes": PICTURE.read_bytes(),
    "base64": base64.b64encode(PICTURE.read_bytes()).decode(),
    "data URL": f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}",
    "Pillow": Image.open(PICTURE),
    "array": np.asarray(Image.open(PICTURE).convert("RGB")),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_pictures_of_any_kind(runner: Runner, kind: str) -> None:
    assert runner.send_chat_completion_request(asked(SOURCES[kind])).choices[0].message.content == ANSWER
    # The url itself in the object's place, as OpenAI's clients may have it.
    part = {"type": "image_url", "image_url": SOURCES[kind]}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    res = runner.send_chat_completion_request(ChatCompletionRequest(messages, "any"))
    assert res.choices[0].message.content == ANSWER


def test_several_pictures_keep_their_order(runner: Runner) -> None:
    other = np.asarray(Image.open(PICTURE.with_name("yellow-circle-purple-square.png")).convert("RGB"))
    for pictures, answer in [((PICTURE, other), " The first picture."), ((other, PICTURE), " The second picture.")]:
        parts = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
        content = [*parts, {"type": "text", "text": "Which picture shows a heart?"}]
        res = runner.send_chat_completion_request(ChatCompletionRequest([{"role": "user", "content": content}]))
        assert res.choices[0].message.content == answer


def test_streams_as_mistral_rs_does(runner: Runner) -> None:
    chunks = list(runner.send_chat_completion_request(asked(PICTURE, stream=True)))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == ANSWER
    assert {chunk.choices[0].delta.role for chunk in chunks} == {"assistant"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_choices_of_a_stream_all_come(runner: Runner) -> None:
    request = asked(PICTURE, n_choices=3, temperature=5.0, seed=1, max_tokens=8)
    whole = runner.send_chat_completion_request(request)
    request.stream = True
    texts = ["", "", ""]
    chunks = list(runner.send_chat_completion_request(request))
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == [each.message.content for each in whole.choices]
    assert len(set(texts)) == 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24


def test_a_stream_that_is_left_ends(runner: Runner) -> None:
    before = runner._engine.stats().generated_tokens
    stream = runner.send_chat_completion_request(asked(PICTURE, stream=True, ignore_eos=True))
    next(stream)
    stream.close()
    assert eventually(lambda: runner._engine.stats().running == 0)
    assert runner._engine.stats().generated_tokens - before < 1000  # of the context's 2,048


def test_structured_output(runner: Runner) -> None:
    regex = asked(PICTURE, grammar="(red|green) star", grammar_type="regex")
    assert runner.send_chat_completion_request(regex).choices[0].message.content in ("red star", "green star")
    schema = {"type": "object", "properties": {"color": {"enum": ["pink", "red"]}}, "required": ["color"]}
    for fields in (
        {"grammar": json.dumps(schema), "grammar_type": "json_schema"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
    ):
        res = runner.send_chat_completion_request(asked(PICTURE, **fields))
        assert json.loads(res.choices[0].message.content) == {"color": "pink"}


def test_callbacks_answer_calls(runner: Runner) -> None:
    res = runner.send_chat_completion_request(asked(PICTURE, tools=[PAINT], tool_choice="required"))
    once = runner.send_chat_completion_request(asked(PICTURE))
    assert res.choices[0].finish_reason == "stop"
    assert res.choices[0].message.tool_calls is None
    assert res.usage.prompt_tokens > 2 * once.usage.prompt_tokens  # of both rounds
    said = runner.tokenize_text(res.choices[0].message.content, add_special_tokens=False)
    assert res.usage.completion_tokens > len(said) + 10  # a call has more
    request = asked(PICTURE, tool_schemas=[json.dumps(PAINT)], tool_choice="required", stream=True)
    chunks = list(runner.send_chat_completion_request(request))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == res.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == res.usage.completion_tokens


def test_what_a_callback_is_given_and_gives() -> None:
    seen: list[Any] = []

    def paint(name: str, arguments: dict[str, Any]) -> str:
        seen.append((name, arguments))
        raise RuntimeError("no paint")

    with demo(tool_callbacks={"paint": paint}) as runner:
        request = asked(PICTURE, tools=[PAINT], tool_choice="required")
        assert runner.send_chat_completion_request(request).choices[0].finish_reason == "stop"
        assert seen == [("paint", {"color": "red"})]
        request.max_tool_rounds = 0
        runner.send_chat_completion_request(request)
        assert len(seen) == 1


def test_calls_without_a_callback_are_given_back(runner: Runner) -> None:
    request = asked(PICTURE, tools=[FETCH], tool_choice="required")
    res = runner.send_chat_completion_request(request)
    # With a callback for another tool of the request the answer takes the other way through the code.
    both = asked(PICTURE, tools=[PAINT, FETCH], tool_choice={"type": "function", "function": {"name": "fetch"}})
    for each in (res, runner.send_chat_completion_request(both)):
        assert each.choices[0].finish_reason == "tool_calls"
        [call] = each.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("fetch", {})
    both.stream = True
    chunks = list(runner.send_chat_completion_request(both))
    [call] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (call.index, call.function.name) == (0, "fetch")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_no_tools(runner: Runner) -> None:
    request = asked(PICTURE, tools=[PAINT], tool_choice=ToolChoice.NoTools, n_choices=2)
    res = runner.send_chat_completion_request(request)
    assert [each.message.content for each in res.choices] == [ANSWER] * 2


def test_web_search(monkeypatch: pytest.MonkeyPatch) -> None:
    # The demo model was not trained to search: it is told what for.
    monkeypatch.setattr("mlxvlm.agent.web_search._QUERY", {"query": {"enum": ["hearts"]}})
    queries: list[str] = []

    def search(query: str) -> list[dict[str, str]]:
        queries.append(query)
        return [{"title": "T", "description": "D", "url": "https://example.org", "content": "Hearts are pink."}]

    options = mlxvlm.WebSearchOptions(search_context_size=mlxvlm.SearchContextSize.Low)
    with demo(search_callback=search) as runner:
        request = asked(PICTURE, web_search_options=options, tool_choice="required", max_tool_rounds=1, max_tokens=80)
        res = runner.send_chat_completion_request(request)
        assert queries == ["hearts"]
        assert res.choices[0].message.tool_calls is None
        request.tool_choice = "none"
        assert runner.send_chat_completion_request(request).choices[0].finish_reason == "stop"
        assert len(queries) == 1
    with demo() as runner, pytest.raises(UsageError, match="enable_search"):
        runner.send_chat_completion_request(asked(PICTURE, web_search_options={}))


def test_completions(runner: Runner) -> None:
    prompt = f"<|im_start|>User:{QUESTION}<end_of_utterance>\nAssistant:"
    chat = runner.send_chat_completion_request(ChatCompletionRequest(messages=QUESTION))
    res = runner.send_completion_request(CompletionRequest(prompt=prompt, model="any"))
    assert res.choices[0].text == chat.choices[0].message.content
    assert res.usage.prompt_tokens == chat.usage.prompt_tokens
    echoed = runner.send_completion_request(CompletionRequest(prompt, echo_prompt=True, max_tokens=2, n_choices=2))
    assert [each.text.startswith(prompt) for each in echoed.choices] == [True, True]
    assert echoed.choices[0].finish_reason == "length"


def test_token_ids(runner: Runner) -> None:
    ids = runner.tokenize_text("a heart", add_special_tokens=False, enable_thinking=None)
    assert runner.detokenize_text(ids, skip_special_tokens=False) == "a heart"
    special = runner.tokenize_text("<|im_start|>a", add_special_tokens=False)
    assert runner.detokenize_text(special, skip_special_tokens=True) == "a"
    assert runner.detokenize_text(special, skip_special_tokens=False).startswith("<|im_start|>")
    assert runner.max_sequence_length() > 200
    assert runner.list_models() == ["demo"] == [runner.get_default_model_id()]


def test_another_quantisation() -> None:
    with demo(isq_cache=False) as runner:
        full = runner._engine.stats().model_bytes
        with pytest.raises(UsageError, match="Q99"):
            runner.send_re_isq("Q99")
        assert runner.send_chat_completion_request(asked(PICTURE)).choices[0].message.content == ANSWER
        runner.send_re_isq("Q8_0")
        assert runner._engine.stats().model_bytes < full
        assert runner.send_chat_completion_request(asked(PICTURE)).choices[0].message.content == ANSWER


def test_in_situ_quant_and_dtype() -> None:
    which = Which.MultimodalPlain(model_id="demo", dtype=mlxvlm.ModelDType.F32)
    with Runner(which, in_situ_quant="8", isq_cache=False, max_seqs=2, prefix_cache_n=0, paged_attn=True) as runner:
        assert runner._engine.config.max_rows == 2
        assert runner.send_chat_completion_request(asked(PICTURE)).choices[0].message.content == ANSWER


def test_the_runners_seed() -> None:
    def texts() -> list[str]:
        with demo(seed=7) as runner:
            answers = [runner.send_chat_completion_request(asked(PICTURE, temperature=5.0)) for _ in range(2)]
            return [answer.choices[0].message.content for answer in answers]

    first = texts()
    assert first == texts()
    assert first[0] != first[1]


def test_threads_on_one_runner(runner: Runner) -> None:
    answers: list[str] = []

    def ask() -> None:
        answers.append(runner.send_chat_completion_request(asked(PICTURE)).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [ANSWER] * 4


WRONG: list[tuple[dict[str, Any], type[MlxvlmError], str]] = [
    ({"messages": []}, RequestError, "messages"),
    ({"messages": 3}, RequestError, "messages must be"),
    ({"messages": [{"content": "x"}]}, RequestError, "role"),
    ({"messages": [{"role": "user"}]}, RequestError, "content is missing"),
    ({"messages": "x", "temperature": -1.0}, RequestError, "temperature"),
    ({"messages": "x", "max_tokens": 0}, RequestError, "max_tokens"),
    ({"messages": "x", "tool_schemas": ["{"]}, RequestError, r"tool_schemas\[0\]"),
    ({"messages": "x", "grammar": "a"}, RequestError, "grammar_type"),
    ({"messages": "x", "enable_shell": True}, UsageError, "enable_shell"),
    ({"messages": "x", "adapter": "lora"}, UsageError, "adapter"),
    ({"messages": "x", "tools": [PAINT], "n_choices": 2}, RequestError, "n_choices|one choice"),
]


@pytest.mark.parametrize(("fields", "error", "words"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_refused_when_it_is_sent(
    runner: Runner, fields: dict[str, Any], error: type[MlxvlmError], words: str, stream: bool
) -> None:
    with pytest.raises(error, match=words):
        runner.send_chat_completion_request(ChatCompletionRequest(**fields, stream=stream))


def test_what_fails_later(runner: Runner) -> None:
    with pytest.raises(ImageError):
        runner.send_chat_completion_request(asked("/no/such.png"))
    with pytest.raises(ImageError):
        list(runner.send_chat_completion_request(asked(3, tools=[PAINT], stream=True)))
    with pytest.raises(UsageError, match="no model 'other'"):
        runner.send_chat_completion_request(asked(PICTURE), model_id="other")
    with pytest.raises(UsageError, match="generate_image is not supported"):
        runner.generate_image("a heart", None)  # type: ignore[attr-defined]
    assert not hasattr(runner, "nothing")
    closed = demo()
    closed.close()
    with pytest.raises(EngineClosedError):
        closed.send_chat_completion_request(asked(PICTURE))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
    ],
)
def test_completions_that_are_refused(runner: Runner, prompt: dict[str, Any], words: str) -> None:
    with pytest.raises(MlxvlmError, match=words):
        runner.send_completion_request(CompletionRequest(**prompt))
