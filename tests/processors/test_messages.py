"""What a user sends: order, and the short forms."""

from __future__ import annotations

from mlxvlm.messages import ImagePart, Message, TextPart, assistant, system, user


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
