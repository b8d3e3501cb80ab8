"""Templates that print a turn's content as it is: pictures get the family's marker in the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxvlm.checkpoint.load import open_model
from mlxvlm.messages import ImagePart, Message, TextPart, assistant, system, user
from mlxvlm.processors.base import Prompt
from tests.golden import GOLDENS

# What each family's own templates write for a picture.
MARKERS = {
    "idefics3_split": "<image>",
    "smolvlm_grid27": "<image>",
    "llava_clip": "<image>",
    "llava_next_tiles": "<image>",
    "mllama_tiles": "<|image|>",
    "qwen2_vl_tied": "<|vision_start|><|image_pad|><|vision_end|>",
    "llama4_dense": "<|image|>",
}
STRINGS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
)
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}MARKER{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}"  # a bare newline after a tag is dropped
)
WIDE, TALL = (ImagePart(GOLDENS / "images" / name) for name in ("wide.png", "tall.png"))
CHATS = {
    "text": [user("Hello")],
    "turns": [system("Be brief"), user("Hello"), assistant("Hi"), user("And now?")],
    "picture": [Message("user", (WIDE, TextPart("What is it?")))],
    "between": [
        Message("user", (TextPart("This, "), WIDE, TextPart(" or that, "), TALL)),
        assistant("That"),
        user("?"),
    ],
}


def prompt(golden: str, source: str, chat: list[Message], tmp_path: Path) -> Prompt:
    file = tmp_path / "chat_template.jinja"
    file.write_text(source)
    return open_model(str(GOLDENS / golden), chat_template=file).processor(chat)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", STRINGS, ids=["printed", "joined"])
@pytest.mark.parametrize("golden", MARKERS)
def test_same_ids_as_with_parts(golden: str, source: str, chat: str, tmp_path: Path) -> None:
    found = prompt(golden, source, CHATS[chat], tmp_path)
    expected = prompt(golden, PARTS.replace("MARKER", MARKERS[golden]), CHATS[chat], tmp_path)
    assert found.token_ids == expected.token_ids
    assert len(found.images) == sum(len(message.images) for message in CHATS[chat])
    for image, other in zip(found.images, expected.images, strict=True):
        assert (image.span, image.digest) == (other.span, other.digest)
        assert np.array_equal(image.pixels, other.pixels)
