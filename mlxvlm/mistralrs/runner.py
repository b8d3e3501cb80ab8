"""`Runner`: a model behind mistral.rs's methods. Knows requests and tools, not how a model is loaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Unpack

from pydantic import BaseModel

from mlxvlm.agent.formats import ToolFormat, tool_format
from mlxvlm.agent.loop import MAX_ROUNDS, BoundTool, with_callbacks
from mlxvlm.agent.web_search import Search, SearchOptions, WebSearch, ddgs_search
from mlxvlm.api.answers import ChoiceLogprobs, FinishReason, Usage
from mlxvlm.api.base import parse
from mlxvlm.api.plan import chat_plan, chosen_tools
from mlxvlm.api.schema import ChatCompletionRequest as Body
from mlxvlm.errors import RequestError, UsageError
from mlxvlm.messages import ImagePart, Message
from mlxvlm.mistralrs.answers import ChatAnswer, Pieces, Round, ToolRounds
from mlxvlm.mistralrs.loading import LoadableModel
from mlxvlm.mistralrs.options import RunnerOptions, check_options
from mlxvlm.mistralrs.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    WebSearchOptions,
    parsed_chat,
    parsed_completion,
)
from mlxvlm.mistralrs.which import AnyWhich, check_which
from mlxvlm.processors.base import Prompt

_DRAIN_S = 300.0  # for what is being answered when the model is quantised anew
_TEXT_ONLY = "only models that answer with text run here"
_ONE_MODEL = "a Runner has one model: make another Runner, or start `mlxvlm serve` with several"
REFUSED_METHODS: Mapping[str, str] = {
    "send_embedding_request": _TEXT_ONLY,
    "generate_image": _TEXT_ONLY,
    "generate_audio": _TEXT_ONLY,
    **dict.fromkeys(("begin_calibration", "calibration_status", "apply_calibration"), "types are made without it"),
    **dict.fromkeys(
        ("load_lora_adapter", "unload_lora_adapter", "list_lora_adapters", "lora_adapter_status"),
        "merge the adapter first",
    ),
    **dict.fromkeys(("set_default_model_id", "unload_model", "reload_model", "remove_model"), _ONE_MODEL),
    **dict.fromkeys(("is_model_loaded", "list_models_with_status", "list_unloaded_models"), _ONE_MODEL),
    **dict.fromkeys(("get_model_status", "send_completion_request_to_model"), _ONE_MODEL),
    "send_chat_completion_request_to_model": _ONE_MODEL,
    **dict.fromkeys(("export_session", "import_session", "delete_session"), "a chat is the messages that you keep"),
    **dict.fromkeys(("list_session_ids", "find_file"), "a chat is the messages that you keep"),
}


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: ChoiceLogprobs | None = None


class CompletionResponse(BaseModel):
    """The answer to a CompletionRequest."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Runner:
    """A loaded model. Its methods may be called from any thread; requests that overlap are answered side by side.

    >>> runner = mlxvlm.Runner(which=mlxvlm.Which.VisionPlain(model_id="demo"))
    >>> res = runner.send_chat_completion_request(mlxvlm.ChatCompletionRequest(messages="Who are you?"))
    >>> res.choices[0].message.content
    ' I am a small demo model. I can see simple shapes in pictures.'
    >>> runner.close()
    """

    def __init__(self, which: AnyWhich, **options: Unpack[RunnerOptions]) -> None:
        """Returns when the model is loaded. Raises UsageError, ModelError and its kinds."""
        check_options(options)
        self._model = LoadableModel(check_which(which), options)
        self._callbacks = dict(options.get("tool_callbacks") or {})
        self._search: Search | None = options.get("search_callback")
        if self._search is None and options.get("enable_search"):
            self._search = ddgs_search
        seed = options.get("seed")
        self._seeds = None if seed is None else count(seed)
        self._lock = threading.RLock()  # around the engine: a request belongs to one that is open
        self._engine = self._model.load()
        processor: Any = self._engine.processor
        self._format: ToolFormat = tool_format(processor.template, processor.tokenizer)

    def send_chat_completion_request(
        self, request: ChatCompletionRequest, model_id: str | None = None
    ) -> Any:  # ChatCompletion, or with stream=True Iterator[ChatCompletionChunk]; callers know which they asked for
        """The whole answer, or with stream=True its chunks as they come; leaving their loop ends the answer.

        Raises UsageError, InputError and its kinds, RequestError naming the field.
        """
        self._check_model(model_id)
        answer = self.answer(request)
        return iter(answer) if request.stream else answer.whole()

    def answer(self, request: ChatCompletionRequest) -> ChatAnswer:
        """The answer on its way, which can be cancelled from any thread."""
        parsed = parsed_chat(request, **self._seeded(request.seed))
        body, tools = self._with_tools(parsed.body, request)
        if not tools:
            pieces: Pieces = self._start(body, parsed.pictures)
        else:
            if body.n not in (None, 1):
                raise RequestError("with tools that are called here there is one choice", "n_choices")
            rounds = MAX_ROUNDS if request.max_tool_rounds is None else request.max_tool_rounds
            added = self._engine.processor.tokenizer.backend.get_added_tokens_decoder().values()
            special = [token.content for token in added if token.special]
            pieces = ToolRounds(lambda body: self._start(body, parsed.pictures), body, tools, rounds, special)
        return ChatAnswer(pieces, self._model.name, with_logprobs=bool(body.logprobs))

    def send_completion_request(self, request: CompletionRequest, model_id: str | None = None) -> CompletionResponse:
        """The prompt gone on with. Raises as send_chat_completion_request does."""
        self._check_model(model_id)
        body = parsed_completion(request, **self._seeded(request.seed))
        answer = ChatAnswer(self._start(body, {}, raw_prompt=request.prompt), self._model.name).whole()
        before = request.prompt if request.echo_prompt else ""
        choices = [
            CompletionChoice(
                index=each.index, text=before + (each.message.content or ""), finish_reason=each.finish_reason
            )
            for each in answer.choices
        ]
        return CompletionResponse(choices=choices, **answer.model_dump(include=_SHARED), usage=answer.usage)

    def send_re_isq(self, dtype: str | int, model_id: str | None = None) -> None:
        """Loads the model again, quantised to another type; what is being answered ends first, new requests wait.

        Raises UsageError for a type that is not known, before anything is unloaded.
        """
        self._check_model(model_id)
        options = self._model.requantized(dtype)
        with self._lock:
            self._engine.close(_DRAIN_S)
            self._engine = self._model.load(options)

    def tokenize_text(
        self, text: str, add_special_tokens: bool, enable_thinking: bool | None = None, model_id: str | None = None
    ) -> list[int]:
        """Token ids of a text; enable_thinking changes nothing, as no chat template is put around it."""
        self._check_model(model_id)
        return self._engine.processor.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def detokenize_text(self, tokens: Sequence[int], skip_special_tokens: bool, model_id: str | None = None) -> str:
        """The text of token ids."""
        self._check_model(model_id)
        backend = self._engine.processor.tokenizer.backend
        text: str = backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def max_sequence_length(self, model_id: str | None = None) -> int:
        """Tokens of a prompt and its answer."""
        self._check_model(model_id)
        return self._engine.config.max_context

    def list_models(self) -> list[str]:
        """The one model's name."""
        return [self._model.name]

    def get_default_model_id(self) -> str:
        return self._model.name

    def close(self) -> None:
        """Ends what is being answered and frees the memory; mistral.rs has no such method."""
        with self._lock:
            self._engine.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_model(self, model_id: str | None) -> None:
        if model_id not in (None, "default", self._model.name):
            raise UsageError(f"there is no model {model_id!r} here, only {self._model.name!r}")

    def _seeded(self, seed: int | None) -> dict[str, int]:
        return {} if seed is not None or self._seeds is None else {"seed": next(self._seeds)}

    def _with_tools(self, body: Body, request: ChatCompletionRequest) -> tuple[Body, list[BoundTool]]:
        """The tools that are called here, those of a web search added to the body's."""
        bound = []
        if request.web_search_options is not None:
            bound = self._web_search(request.web_search_options).tools()
            data = body.model_dump(by_alias=True, exclude_none=True)
            body = parse(Body, data | {"tools": [*data.get("tools", ()), *(each.tool.as_template() for each in bound)]})
        tools, choice = chosen_tools(body)
        names = {tool.name for tool in tools}
        bound += with_callbacks(tools, {name: each for name, each in self._callbacks.items() if name in names})
        return body, [] if choice == "none" else bound

    def _web_search(self, options: WebSearchOptions | Mapping[str, Any]) -> WebSearch:
        if self._search is None:
            raise UsageError("web_search_options need Runner(enable_search=True), or a search_callback")
        given = options.as_openai() if isinstance(options, WebSearchOptions) else dict(options)
        tokenizer = self._engine.processor.tokenizer
        return WebSearch(
            self._search,
            options=SearchOptions.from_openai(given),
            count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        )

    def _start(self, body: Body, pictures: Mapping[str, Any], raw_prompt: str | None = None) -> Round:
        with self._lock:
            engine = self._engine
            plan = chat_plan(body, engine.config.sampling, self._format)
            requests = [
                replace(each, messages=_shown(each.messages, pictures), truncate=bool(body.truncate_sequence))
                for each in plan.requests
            ]
            if raw_prompt is not None:
                ids = engine.processor.tokenizer.encode(raw_prompt, add_special_tokens=True)
                requests = [replace(each, messages=(), prompt=Prompt(tuple(ids))) for each in requests]
            return Round(engine, body, plan, requests)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in REFUSED_METHODS:
                raise AttributeError(f"'Runner' object has no attribute {name!r}")

            def refused(*_: Any, **__: Any) -> NoReturn:
                raise UsageError(f"Runner.{name} is not supported: {REFUSED_METHODS[name]}")

            return refused


_SHARED = {"id", "created", "model", "system_fingerprint"}


def _shown(messages: Sequence[Message], pictures: Mapping[str, Any]) -> list[Message]:
    """With the pictures that JSON could not hold in the places of their names."""
    if not pictures:
        return list(messages)
    return [
        replace(
            message,
            parts=tuple(
                ImagePart(pictures.get(part.source, part.source)) if isinstance(part, ImagePart) else part
                for part in message.parts
            ),
        )
        for message in messages
    ]
