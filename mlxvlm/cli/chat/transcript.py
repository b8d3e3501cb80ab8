"""A conversation <-> JSON in OpenAI's shape of messages. Knows that shape, not what is said.

Pictures are kept by reference: a URL as it was given, a file as file://, a data: URL whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxvlm.cli.chat.session import Picture, Turn
from mlxvlm.cli.chat.words import is_url
from mlxvlm.errors import InputError

_MAX_BYTES = 256 << 20  # a few pictures as data: URLs; more is no transcript


def save(path: Path, model: str, system: str, turns: list[Turn]) -> None:
    """Writes a file whole or not at all; replaces none but a transcript. Raises InputError."""
    messages = [*([{"role": "system", "content": system}] if system else []), *map(_as_json, turns)]
    text = json.dumps({"model": model, "messages": messages}, ensure_ascii=False, indent=2)
    try:
        if path.exists():
            _check_replaceable(path)
        _write(path, text + "\n")
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}") from error


def load(path: Path) -> tuple[str, list[Turn]]:
    """The system text and the turns. Raises InputError, or ImageError for a picture that is gone."""
    try:
        messages = _messages(path)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    system = ""
    if messages and isinstance(messages[0], dict) and messages[0].get("role") in ("system", "developer"):
        system = "".join(part for part in _parts(messages.pop(0), path) if isinstance(part, str))
    return system, [_turn(message, path) for message in messages]


def _check_replaceable(path: Path) -> None:
    try:
        _messages(path)
    except InputError as error:
        raise InputError(f"{path} is there and is no transcript, so it is kept: choose another name") from error


def _messages(path: Path) -> list[Any]:
    """Raises OSError, or InputError for what is no transcript."""
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        found = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        found = None
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise InputError(f"{path} is no transcript: it is not JSON with a list of messages")
    return messages


def _write(path: Path, text: str) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


def _as_json(turn: Turn) -> dict[str, Any]:
    """A turn without pictures has plain text as its content."""
    if not turn.pictures:
        return {"role": turn.role, "content": turn.text}
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {
            "type": "image_url",
            "image_url": {"url": part.source if is_url(part.source) else Path(part.source).as_uri()},
        }
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def _turn(message: Any, path: Path) -> Turn:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise InputError(f"{path} has a message of role {role!r}: a chat has one system message first, user, assistant")
    return Turn(role, _parts(message, path))


def _parts(message: dict[str, Any], path: Path) -> tuple[str | Picture, ...]:
    content = message.get("content")
    if isinstance(content, str):
        return (content,)
    parts: list[str | Picture] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(part, dict) and kind in ("text", "image_url") else None
        if kind == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if not isinstance(value, str):
            raise InputError(f"{path} has a message with content other than text and image_url")
        parts.append(value if kind == "text" else Picture.open(value))
    return tuple(parts)
