"""A chat's turns, from APIs that order texts, calls and results otherwise. Knows chat messages, not those APIs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mlxvlm.api.messages import (
    MAX_PARTS,
    AssistantMessage,
    AssistantToolCall,
    ChatMessage,
    DeveloperMessage,
    FunctionCall,
    ImageContent,
    SystemMessage,
    TextContent,
    ToolMessage,
    UserMessage,
)
from mlxvlm.errors import RequestError

Shown: TypeAlias = TextContent | ImageContent

_SILENT = AssistantMessage.model_validate({"role": "assistant"})


@dataclass(slots=True)
class _Asked:
    """A turn of the user that may go on."""

    parts: list[Shown] = field(default_factory=list)

    def message(self) -> UserMessage:
        """Raises RequestError for more than a turn may have, which only several together come to."""
        if len(self.parts) > MAX_PARTS:
            raise RequestError(f"what the user says and shows in one turn has more than {MAX_PARTS} parts")
        return UserMessage(role="user", content=list(self.parts))


@dataclass(slots=True)
class _Answered:
    """A turn of the model that may go on."""

    texts: list[str] = field(default_factory=list)
    calls: list[AssistantToolCall] = field(default_factory=list)

    def message(self) -> AssistantMessage:
        said = {"content": "".join(self.texts) if self.texts else None, "tool_calls": self.calls or None}
        return _SILENT.model_copy(update=said)


class Turns:
    """Gathers messages, in time linear in what they hold.

    What a model says and calls before it is answered is one turn. Pictures that a tool returns are shown by the user's
    next turn, or one of their own: no template has a place for them in a tool's.
    """

    def __init__(self, earlier: Iterable[ChatMessage] = (), *, joins_users: bool = False) -> None:
        """earlier: of another Turns. joins_users: turns of the user that follow each other are one."""
        self._messages = list(earlier)
        self._open: _Asked | _Answered | None = None
        self._joins_users = joins_users
        self._waiting: list[ImageContent] = []
        self._calls = {
            call.id
            for message in self._messages
            if isinstance(message, AssistantMessage)
            for call in message.tool_calls or ()
        }
        last = self._messages[-1] if self._messages else None
        if isinstance(last, AssistantMessage):
            self._messages.pop()
            self._open = _Answered([last.content] if isinstance(last.content, str) else [], [*(last.tool_calls or ())])

    def instruct(self, text: str, role: Literal["system", "developer"] = "system") -> None:
        self._end()
        kind = SystemMessage if role == "system" else DeveloperMessage
        self._messages.append(kind.model_validate({"role": role, "content": text}))

    def ask(self, parts: Sequence[Shown]) -> None:
        """What the user says and shows."""
        shown: list[Shown] = [*self._waiting, *parts]
        self._waiting = []
        if not (self._joins_users and isinstance(self._open, _Asked)):
            self._close()
            self._open = _Asked()
        assert isinstance(self._open, _Asked)
        self._open.parts += shown

    def answer(self, text: str) -> None:
        """What the model said."""
        self._models_turn().texts.append(text)

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """What the model called."""
        call = AssistantToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments), index=None)
        self._calls.add(call_id)
        self._models_turn().calls.append(call)

    def is_called(self, call_id: str) -> bool:
        return call_id in self._calls

    def result(self, call_id: str, parts: str | Sequence[Shown]) -> None:
        """What a tool returned."""
        self._close()
        if not isinstance(parts, str):
            self._waiting += [part for part in parts if isinstance(part, ImageContent)]
            parts = "\n".join(part.text for part in parts if isinstance(part, TextContent))
        self._messages.append(ToolMessage(role="tool", content=parts, tool_call_id=call_id))

    def messages(self) -> list[ChatMessage]:
        """All of them, once everything is said."""
        self._end()
        return self._messages

    def _models_turn(self) -> _Answered:
        """The turn that is open, where it is the model's, or a new one."""
        if self._waiting or not isinstance(self._open, _Answered):
            self._end()
            self._open = _Answered()
        return self._open

    def _end(self) -> None:
        """No turn goes on, and all pictures are shown."""
        if self._waiting:
            self.ask(())
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._messages.append(self._open.message())
            self._open = None


def picture(url: str) -> ImageContent:
    return ImageContent(type="image_url", image_url=url)


def with_sources(messages: Iterable[ChatMessage], names: Mapping[str, str]) -> tuple[ChatMessage, ...]:
    """The same messages, with pictures under other names where there are any."""
    return tuple(_renamed(message, names) for message in messages)


def _renamed(message: ChatMessage, names: Mapping[str, str]) -> ChatMessage:
    if not isinstance(message, UserMessage) or isinstance(message.content, str):
        return message
    if not any(isinstance(part, ImageContent) for part in message.content):
        return message
    parts = [
        picture(names.get(part.url, part.url)) if isinstance(part, ImageContent) else part for part in message.content
    ]
    return message.model_copy(update={"content": parts})
