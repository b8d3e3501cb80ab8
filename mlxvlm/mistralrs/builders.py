"""mistral.rs's Rust builders with Python's manners: what is set comes back, build() loads, send_chat_request() asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

from mlxvlm.errors import UsageError
from mlxvlm.mistralrs.architectures import Architecture, VisionArchitecture
from mlxvlm.mistralrs.choices import IsqType, ModelDType, TextMessageRole, ToolChoice, value_of
from mlxvlm.mistralrs.options import RunnerOptions, SearchCallback, ToolCallback
from mlxvlm.mistralrs.requests import ChatCompletionRequest, WebSearchOptions
from mlxvlm.mistralrs.which import Plain, VisionPlain

if TYPE_CHECKING:
    from mlxvlm.api.answers import ChatCompletion, ChatCompletionChunk
    from mlxvlm.mistralrs.answers import ChatAnswer
    from mlxvlm.mistralrs.runner import Runner

Role: TypeAlias = TextMessageRole | str


class RequestBuilder:
    """Messages, and how they are answered; what is not set is as the checkpoint says."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.fields: dict[str, Any] = {}

    def add_message(self, role: Role, text: str) -> Self:
        """A turn of text."""
        self.messages.append({"role": value_of(role), "content": text})
        return self

    def add_image_message(self, role: Role, text: str, images: Any, model: Any = None) -> Self:
        """A turn with a picture or a list of them before its text; `model` is not looked at."""
        pictures = images if isinstance(images, (list, tuple)) else [images]
        parts = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
        self.messages.append({"role": value_of(role), "content": [*parts, {"type": "text", "text": text}]})
        return self

    def _set(self, **fields: Any) -> Self:
        self.fields |= fields
        return self

    def set_deterministic_sampler(self) -> Self:
        return self._set(temperature=0.0)

    def set_sampler_temperature(self, temperature: float) -> Self:
        return self._set(temperature=temperature)

    def set_sampler_topk(self, top_k: int) -> Self:
        return self._set(top_k=top_k)

    def set_sampler_topp(self, top_p: float) -> Self:
        return self._set(top_p=top_p)

    def set_sampler_minp(self, min_p: float) -> Self:
        return self._set(min_p=min_p)

    def set_sampler_max_len(self, max_tokens: int) -> Self:
        return self._set(max_tokens=max_tokens)

    def set_sampler_frequency_penalty(self, penalty: float) -> Self:
        return self._set(frequency_penalty=penalty)

    def set_sampler_presence_penalty(self, penalty: float) -> Self:
        return self._set(presence_penalty=penalty)

    def set_sampler_stop_toks(self, stop: list[str]) -> Self:
        return self._set(stop_seqs=stop)

    def set_sampler_n_choices(self, n_choices: int) -> Self:
        return self._set(n_choices=n_choices)

    def set_sampler_logits_bias(self, bias: Mapping[int, float]) -> Self:
        return self._set(logit_bias=bias)

    def return_logprobs(self, return_logprobs: bool = True) -> Self:
        return self._set(logprobs=return_logprobs)

    def set_tools(self, tools: Sequence[Mapping[str, Any]]) -> Self:
        """OpenAI's shape."""
        return self._set(tools=tools)

    def set_tool_choice(self, choice: ToolChoice | str | Mapping[str, Any]) -> Self:
        return self._set(tool_choice=choice)

    def set_constraint(self, kind: str, grammar: str | Mapping[str, Any]) -> Self:
        """kind: regex, lark, json_schema or llguidance."""
        return self._set(grammar_type=kind, grammar=grammar)

    def with_web_search_options(self, options: WebSearchOptions | Mapping[str, Any]) -> Self:
        return self._set(web_search_options=options)

    def with_truncate_sequence(self, truncate: bool = True) -> Self:
        return self._set(truncate_sequence=truncate)

    def enable_thinking(self, enable: bool) -> Self:
        return self._set(enable_thinking=enable)

    def request(self, *, stream: bool = False) -> ChatCompletionRequest:
        """What a Runner takes."""
        return ChatCompletionRequest(list(self.messages), stream=stream, **self.fields)


class TextMessages(RequestBuilder):
    """A chat; as in mistral.rs it is answered greedily unless something else is set."""

    def __init__(self) -> None:
        super().__init__()
        self.set_deterministic_sampler()


class VisionMessages(TextMessages):
    """A chat with pictures.

    >>> messages = VisionMessages().add_image_message(
    ...     TextMessageRole.User, "What is this?", ["examples/pictures/pink-heart.png"]
    ... )
    >>> with VisionModelBuilder("demo").build() as model:
    ...     response = model.send_chat_request(messages)
    >>> response.choices[0].message.content
    ' A pink heart on a gray background.'
    """

    # Names of earlier releases, whose models wanted their image tokens written in different ways.
    add_vllama_image_message = RequestBuilder.add_image_message
    add_llava_image_message = RequestBuilder.add_image_message
    add_qwen2vl_image_message = RequestBuilder.add_image_message
    add_idefics_image_message = RequestBuilder.add_image_message


class Model:
    """A loaded model. Close it, or use it in a `with` block."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def send_chat_request(self, request: RequestBuilder) -> ChatCompletion:
        """Waits for the whole answer. Raises as Runner.send_chat_completion_request does."""
        return self._answer(request).whole()

    def stream_chat_request(self, request: RequestBuilder) -> Iterator[ChatCompletionChunk]:
        """The answer's chunks as they come."""
        return iter(self._answer(request))

    async def async_send_chat_request(self, request: RequestBuilder) -> ChatCompletion:
        """Awaits the whole answer; cancelling the task ends it."""
        answer = self._answer(request)
        try:
            return await asyncio.to_thread(answer.whole)
        except asyncio.CancelledError:
            answer.cancel()
            raise

    async def async_stream_chat_request(self, request: RequestBuilder) -> AsyncIterator[ChatCompletionChunk]:
        """The chunks for `async for`; cancelling the task ends the answer."""
        answer = self._answer(request)
        chunks = iter(answer)
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            answer.cancel()

    def close(self) -> None:
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _answer(self, request: RequestBuilder) -> ChatAnswer:
        if not isinstance(request, RequestBuilder):
            raise UsageError(f"give VisionMessages, TextMessages or a RequestBuilder, not a {type(request).__name__}")
        return self.runner.answer(request.request())


class VisionModelBuilder:
    """How a vision-language model is loaded. Arguments are checked in build()."""

    _which: type[VisionPlain] | type[Plain] = VisionPlain

    def __init__(self, model_id: str, loader_type: VisionArchitecture | Architecture | None = None) -> None:
        self._model: dict[str, Any] = {"model_id": model_id, "arch": loader_type}
        self._options: dict[str, Any] = {}

    def _with(self, **options: Any) -> Self:
        self._options |= options
        return self

    def _of_model(self, **arguments: Any) -> Self:
        self._model |= arguments
        return self

    def with_isq(self, isq: IsqType | str | int) -> Self:
        return self._with(in_situ_quant=value_of(isq))

    def with_logging(self) -> Self:
        """Shows what the package logs from INFO on, on stderr. It concerns the whole process."""
        logger = logging.getLogger("mlxvlm")
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return self

    def with_topology(self, topology: str) -> Self:
        """The path of a YAML file."""
        return self._of_model(topology=topology)

    def with_loader_type(self, loader_type: VisionArchitecture | Architecture) -> Self:
        return self._of_model(arch=loader_type)

    def with_dtype(self, dtype: ModelDType | str) -> Self:
        return self._of_model(dtype=dtype)

    def from_uqff(self, files: str | list[str]) -> Self:
        return self._of_model(from_uqff=files)

    def with_chat_template(self, path: str) -> Self:
        return self._with(chat_template=path)

    def with_jinja_explicit(self, path: str) -> Self:
        return self._with(jinja_explicit=path)

    def with_hf_revision(self, revision: str) -> Self:
        return self._with(hf_revision=revision)

    def with_token_source(self, source: str) -> Self:
        return self._with(token_source=source)

    def with_max_num_seqs(self, count: int) -> Self:
        return self._with(max_seqs=count)

    def with_prefix_cache_n(self, count: int | None) -> Self:
        return self._with(prefix_cache_n=count)

    def with_search(self, model: Any = None) -> Self:
        """`model` would rank passages; BM25 does."""
        return self._with(enable_search=True)

    def with_search_callback(self, callback: SearchCallback) -> Self:
        return self._with(search_callback=callback)

    def with_tool_callback(self, name: str, callback: ToolCallback) -> Self:
        """Of a tool that requests bring."""
        return self._with(tool_callbacks={**self._options.get("tool_callbacks", {}), name: callback})

    def with_progress(self, progress: Callable[[int, int], None]) -> Self:
        """Called with (bytes done, bytes in all) while weights are read; mistral.rs has no such method."""
        return self._with(progress=progress)

    def build(self) -> Model:
        """Loads the model. Raises UsageError, ModelError and its kinds."""
        from mlxvlm.mistralrs.runner import Runner

        return Model(Runner(self._which(**self._model), **cast(RunnerOptions, self._options)))

    async def async_build(self) -> Model:
        """The same, while the event loop goes on."""
        return await asyncio.to_thread(self.build)


MultimodalModelBuilder, MultimodalMessages = VisionModelBuilder, VisionMessages  # mistral.rs's later names


class TextModelBuilder(VisionModelBuilder):
    """How a text model is loaded."""

    _which = Plain
