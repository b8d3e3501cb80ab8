"""mistral.rs's requests -> the bodies of api/, with pictures of any kind. Knows shapes, no engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mlxvlm.errors import RequestError
from mlxvlm.mistralrs.choices import SearchContextSize, ToolChoice, refuse, value_of

if TYPE_CHECKING:
    from mlxvlm.api.schema import ChatCompletionRequest as Body

REFUSED_FIELDS: Mapping[str, str] = {
    "tool_dispatch_url": "give the Runner tool_callbacks",
    "enable_code_execution": "this runtime runs no code that a model writes; give a tool that does",
    "enable_shell": "this runtime runs no commands that a model writes; give a tool that does",
    "shell_skills": "this runtime runs no commands that a model writes; give a tool that does",
    "agent_permission": "ask for permission inside the functions of tool_callbacks",
    "agent_approval_callback": "ask for permission inside the functions of tool_callbacks",
    "code_execution_permission": "this runtime runs no code that a model writes",
    "session_id": "give the whole chat as messages; the prefix cache spares reading it again",
    "files": "give a tool that takes the file's content",
    "input_files": "put the file's text into a message, or its pictures as image_url",
    "adapter": "merge the adapter into the weights first",
    "suffix": "these models do not fill in: put it into the prompt",
}
_RENAMED = {"n_choices": "n", "stop_seqs": "stop"}
_OURS = ("model", "messages", "web_search_options", "max_tool_rounds", *REFUSED_FIELDS)  # not copied into the body
_ELSEWHERE = ("prompt", "best_of", "echo_prompt", "grammar", "grammar_type", "tools", "tool_schemas", "logit_bias")


@dataclass
class ApproximateUserLocation:
    """Roughly where the user is."""

    city: str
    country: str
    region: str
    timezone: str


@dataclass
class WebSearchOptions:
    """Lets the model search the web, on a Runner with enable_search or search_callback."""

    search_context_size: SearchContextSize | str | None = None
    user_location: ApproximateUserLocation | Mapping[str, Any] | None = None
    search_description: str | None = None
    extract_description: str | None = None

    def as_openai(self) -> dict[str, Any]:
        refuse(
            "WebSearchOptions",
            vars(self),
            dict.fromkeys(("search_description", "extract_description"), "say it in a system message"),
        )
        place = self.user_location
        place = asdict(place) if isinstance(place, ApproximateUserLocation) else place
        return {"search_context_size": value_of(self.search_context_size), "user_location": place}


@dataclass(kw_only=True)
class _SamplingFields:
    """What both requests have; None is as the checkpoint says. The last ones mistral.rs does not have."""

    logit_bias: Mapping[int, float] | None = None
    n_choices: int = 1
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_seqs: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    grammar: str | Mapping[str, Any] | None = None
    grammar_type: str | None = None
    tool_schemas: Sequence[str | Mapping[str, Any]] | None = None
    tool_choice: ToolChoice | str | Mapping[str, Any] | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: list[str] | None = None
    truncate_sequence: bool = False
    ignore_eos: bool = False
    adapter: Any = None
    seed: int | None = None
    timeout: float | None = None


@dataclass
class ChatCompletionRequest(_SamplingFields):
    """A chat to go on with: a list of messages in OpenAI's shape, or the user's text alone.

    A picture's url may also be a Pillow image, an array, bytes or a path. tools are OpenAI's, tool_schemas the same as
    JSON texts; grammar_type is regex, lark, json_schema or llguidance. Any `model` is taken: a Runner has one.
    """

    messages: Sequence[Mapping[str, Any]] | str
    model: str = "default"
    _: KW_ONLY
    logprobs: bool = False
    top_logprobs: int | None = None
    stream: bool = False
    web_search_options: WebSearchOptions | Mapping[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    max_tool_rounds: int | None = None
    tool_dispatch_url: str | None = None
    enable_code_execution: bool = False
    enable_shell: bool = False
    shell_skills: Any = None
    agent_permission: Any = None
    agent_approval_callback: Any = None
    code_execution_permission: Any = None
    session_id: str | None = None
    files: Any = None
    input_files: Any = None
    tools: Sequence[Mapping[str, Any]] | None = None
    response_format: Mapping[str, Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass
class CompletionRequest(_SamplingFields):
    """A text to go on with, as it is: no chat template is put around it, but the tokenizer's own beginning."""

    prompt: str
    model: str = "default"
    _: KW_ONLY
    best_of: int = 1
    echo_prompt: bool = False
    suffix: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A body, and the pictures that JSON could not hold by the texts that stand for them in it."""

    body: Body
    pictures: Mapping[str, Any]


def parsed_chat(request: ChatCompletionRequest, **instead: Any) -> ParsedRequest:
    """`instead`: more fields of the body. Raises UsageError or RequestError naming the field."""
    messages = request.messages
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise RequestError("messages must be a list, or one text", "messages", "invalid_type")
    pictures: dict[str, Any] = {}
    shown = [_without_pictures(message, pictures) for message in messages]
    return ParsedRequest(_body(request, {"messages": shown, **instead}), pictures)


def parsed_completion(request: CompletionRequest, **instead: Any) -> Body:
    """The body whose message is the prompt. Raises UsageError or RequestError naming the field."""
    if not isinstance(request.prompt, str) or not request.prompt:
        raise RequestError("prompt must be a text with something in it", "prompt")
    if request.best_of not in (1, request.n_choices):
        raise RequestError("best_of is not supported: ask for n_choices and choose", "best_of")
    if request.tool_schemas:
        raise RequestError("a plain prompt has no place for tools: send a ChatCompletionRequest", "tool_schemas")
    return _body(request, {"messages": [{"role": "user", "content": request.prompt}], **instead})


def _body(request: _SamplingFields, given: dict[str, Any]) -> Body:
    from mlxvlm.api.base import parse
    from mlxvlm.api.schema import ChatCompletionRequest as Body

    values = {each.name: getattr(request, each.name) for each in fields(request)}
    refuse(type(request).__name__, values, REFUSED_FIELDS)
    body = {
        _RENAMED.get(name, name): value_of(value)
        for name, value in values.items()
        if name not in _OURS and name not in _ELSEWHERE
    }
    body["tools"] = _tools(request)
    if request.logit_bias is not None:
        body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
    if request.grammar_type is not None or request.grammar is not None:
        body["grammar"] = {"type": request.grammar_type or "regex", "value": request.grammar}
        if request.grammar_type is None:
            raise RequestError("grammar needs grammar_type: regex, lark, json_schema or llguidance", "grammar_type")
    return parse(Body, body | {name: value for name, value in given.items() if value is not None})


def _tools(request: _SamplingFields) -> list[Any] | None:
    """Those of both names, decoded."""
    tools: list[Any] = list(getattr(request, "tools", None) or ())
    for index, schema in enumerate(request.tool_schemas or ()):
        try:
            tools.append(json.loads(schema) if isinstance(schema, str) else schema)
        except ValueError as error:
            raise RequestError(f"tool_schemas[{index}] is no JSON: {error}", f"tool_schemas[{index}]") from None
    return tools or None


def _without_pictures(message: Any, pictures: dict[str, Any]) -> Any:
    """The message as JSON could be, with a name that no path or URL can have for each picture that is no text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
        return message
    return {**message, "content": [_without_picture(part, pictures) for part in message["content"]]}


def _without_picture(part: Any, pictures: dict[str, Any]) -> Any:
    if not isinstance(part, Mapping) or "image_url" not in part:
        return part
    given = part["image_url"]
    url = given.get("url") if isinstance(given, Mapping) else given
    if url is None or isinstance(url, str):
        return part
    name = f"\0picture {len(pictures)}"
    pictures[name] = url
    return {**part, "image_url": {**(given if isinstance(given, Mapping) else {}), "url": name}}
