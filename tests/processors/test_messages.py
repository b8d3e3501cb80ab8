"""What a user sends: order, and the short forms."""

from __future__ import annotations

from typing import Any

import pytest

from mlxvlm.errors import InputError
from mlxvlm.messages import ImagePart, Message, TextPart, assistant, system, user
from mlxvlm.processors.base import check_messages


def test_user_has_its_pictures_first() -> None:
    turn = user("Hi", iter(["a.png", b"b"]))
    assert turn == Message("user", (ImagePart("a.png"), ImagePart(b"b"), TextPart("Hi")))
    assert user() == Message("user")
    assert user("", ["a.png"]).parts == (ImagePart("a.png"),)


def test_parts_in_order() -> None:
    turn = Message("user", (TextPart("a"), ImagePart(1), TextPart("b"), ImagePart(2)))
    assert turn.text == "ab"
    assert [image.source for image in turn.images] == [1, 2]


def test_short_forms() -> None:
    assert system("a") == Message("system", (TextPart("a"),))
    assert assistant("") == Message("assistant", (TextPart(""),))


def test_repr_leaves_pictures_out() -> None:
    assert "secret" not in repr(user("Hi", [b"secret"]))


MISTAKES: list[tuple[Any, str]] = [
    ("hello", "messages are a list of mlxvlm.Message, not a str: give [mlxvlm.user('...')]"),
    (user("hello"), "messages are a list of mlxvlm.Message, not a Message: give [mlxvlm.user('...')]"),
    ({"role": "user"}, "messages are a list of mlxvlm.Message, not a dict: give [mlxvlm.user('...')]"),
    (
        [{"role": "user", "content": "hello"}],
        "message 1 is a dict, not a mlxvlm.Message: give mlxvlm.user('...'), or Message(role, parts)",
    ),
    ([user("a"), "b"], "message 2 is a str, not a mlxvlm.Message: give mlxvlm.user('...'), or Message(role, parts)"),
    (
        [Message("user", "hello")],  # type: ignore[arg-type]
        "message 1 has a str for its parts: give mlxvlm.user('...'), or Message('user', (TextPart('...'),))",
    ),
    (
        [Message("user", None)],  # type: ignore[arg-type]
        "message 1 has a NoneType for its parts: give mlxvlm.user('...'), or Message('user', (TextPart('...'),))",
    ),
    (
        [Message("human", (TextPart("a"),))],  # type: ignore[arg-type]
        "message 1 has the role 'human'; roles are system, developer, user, assistant, tool",
    ),
    ([Message(["user"], ())], "message 1 has the role ['user']; roles are system, developer, user, assistant, tool"),  # type: ignore[arg-type]
    (
        [Message("user", ("hello",))],  # type: ignore[arg-type]
        "message 1 has a str among its parts: they are TextPart('...') or ImagePart(source)",
    ),
    (
        [Message("user", ({"type": "text"},))],  # type: ignore[arg-type]
        "message 1 has a dict among its parts: they are TextPart('...') or ImagePart(source)",
    ),
    (
        [Message("user", (TextPart(None),))],  # type: ignore[arg-type]
        "message 1 has a TextPart without text among its parts: they are TextPart('...') or ImagePart(source)",
    ),
]


@pytest.mark.parametrize(("messages", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_name_what_is_accepted(messages: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_messages(messages)
    assert str(caught.value) == words


def test_parts_may_be_a_list() -> None:
    check_messages([Message("user", [TextPart("a")])])  # type: ignore[arg-type]
