"""A chat's turns, from APIs that order texts, calls and results otherwise. Knows chat messages, not those APIs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from mlxvlm.api.messages import (
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

Shown: TypeAlias = TextContent | ImageContent


class Turns:
    """Gathers messages.

    What a model says and calls before it is answered is one turn. Pictures that a tool returns are shown by the user's
    next turn, or one of their own: no template has a place for them in a tool's.
    """

    def __init__(self, earlier: Iterable[ChatMessage] = (), *, joins_users: bool = False) -> None:
        """joins_users: turns of the user that follow each other are one."""
        self._messages = list(earlier)
        self._joins_users = joins_users
        self._waiting: list[ImageContent] = []
        self._calls = {
            call.id
            for message in self._messages
            if isinstance(message, AssistantMessage)
            for call in message.tool_calls or ()
        }

    def instruct(self, text: str, role: Literal["system", "developer"] = "system") -> None:
        self._show()
        kind = SystemMessage if role == "system" else DeveloperMessage
        self._messages.append(kind.model_validate({"role": role, "content": text}))

    def ask(self, parts: Sequence[Shown]) -> None:
        """What the user says and shows."""
        shown: list[Shown] = [*self._waiting, *parts]
        self._waiting = []
        last = self._messages[-1] if self._messages else None
        if self._joins_users and isinstance(last, UserMessage) and not isinstance(last.content, str):
            self._messages[-1] = UserMessage(role="user", content=[*last.content, *shown])
        else:
            self._messages.append(UserMessage(role="user", content=shown))

    def answer(self, text: str) -> None:
        """What the model said."""
        turn = self._models_turn()
        said = turn.content if isinstance(turn.content, str) else ""
        self._messages[-1] = turn.model_copy(update={"content": said + text})

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """What the model called."""
        turn = self._models_turn()
        call = AssistantToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments), index=None)
        self._calls.add(call_id)
        self._messages[-1] = turn.model_copy(update={"tool_calls": [*(turn.tool_calls or ()), call]})

    def is_called(self, call_id: str) -> bool:
        return call_id in self._calls

    def result(self, call_id: str, parts: str | Sequence[Shown]) -> None:
        """What a tool returned."""
        if not isinstance(parts, str):
            self._waiting += [part for part in parts if isinstance(part, ImageContent)]
            parts = "\n".join(part.text for part in parts if isinstance(part, TextContent))
        self._messages.append(ToolMessage(role="tool", content=parts, tool_call_id=call_id))

    def messages(self) -> list[ChatMessage]:
        """All of them, once everything is said."""
        self._show()
        return self._messages

    def _show(self) -> None:
        if self._waiting:
            self.ask(())

    def _models_turn(self) -> AssistantMessage:
        """The last turn, where it is the model's, or a new one."""
        self._show()
        last = self._messages[-1] if self._messages else None
        if isinstance(last, AssistantMessage):
            return last
        turn = AssistantMessage.model_validate({"role": "assistant"})
        self._messages.append(turn)
        return turn


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
