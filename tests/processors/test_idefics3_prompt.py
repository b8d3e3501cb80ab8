"""Messages to Prompt: texts, spans, markers typed by hand, and conversations that can't be answered."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxvlm.errors import ImageError, InputError, TemplateError
from mlxvlm.messages import ImagePart, Message, TextPart, ToolCall, assistant, system, user
from mlxvlm.processors.base import Prompt, check_markers, expand_placeholders, place_images, placeholder_spans
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.idefics3 import DEFAULT_TEMPLATE, Idefics3Processor, build
from tests.processors.checkpoints import CONFIG, IMAGE_SETTINGS, write_checkpoint
from tests.processors.pictures import noise

S = "<image>" * 4
FAKE = "<fake_token_around_image>"
WHOLE = f"{FAKE}<global-img>{S}{FAKE}"
TWO_BY_THREE = (
    f"{FAKE}<row_1_col_1>{S}{FAKE}<row_1_col_2>{S}{FAKE}<row_1_col_3>{S}\n"
    f"{FAKE}<row_2_col_1>{S}{FAKE}<row_2_col_2>{S}{FAKE}<row_2_col_3>{S}\n"
    f"\n{WHOLE}"
)
ONE_BY_THREE = f"{FAKE}<row_1_col_1>{S}{FAKE}<row_1_col_2>{S}{FAKE}<row_1_col_3>{S}\n\n{WHOLE}"
A = noise(16, 24, 3, seed=1)  # 2 x 3 tiles
B = noise(8, 24, 3, seed=2)  # 1 x 3 tiles
C = noise(24, 8, 3, seed=3)  # 3 x 1 tiles


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Idefics3Processor:
    return build(ProcessorFiles.read(write_checkpoint(tmp_path_factory.mktemp("split")), CONFIG))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Idefics3Processor:
    settings = {"preprocessor_config.json": IMAGE_SETTINGS | {"do_image_splitting": False}}
    return build(ProcessorFiles.read(write_checkpoint(tmp_path_factory.mktemp("whole"), files=settings), CONFIG))


def ids(processor: Idefics3Processor, text: str) -> tuple[int, ...]:
    return tuple(processor.tokenizer.encode(text, add_special_tokens=False))


def check_spans(prompt: Prompt, image_token_id: int) -> None:
    """Each span begins and ends with an image token and holds as many as its frames need; none is left over."""
    left = list(prompt.token_ids)
    last = 0
    for image in prompt.images:
        start, end = image.span
        assert last <= start
        last = end
        assert prompt.token_ids[start] == prompt.token_ids[end - 1] == image_token_id
        assert prompt.token_ids[start:end].count(image_token_id) == 4 * len(image.pixels)
        left[start:end] = [-1] * (end - start)
    assert image_token_id not in left


def test_text_only(processor: Idefics3Processor) -> None:
    prompt = processor([user("Hi")])
    assert prompt == Prompt(ids(processor, "user:Hi\nAssistant:"))


def test_split(processor: Idefics3Processor) -> None:
    prompt = processor([user("Hi", [A])])
    assert prompt.token_ids == ids(processor, f"user:{TWO_BY_THREE}Hi\nAssistant:")
    assert [image.layout for image in prompt.images] == [(2, 3)]
    assert prompt.images[0].pixels.shape == (7, 3, 8, 8)
    check_spans(prompt, processor.image_token_id)


def test_whole(whole: Idefics3Processor) -> None:
    prompt = whole([user("Hi", [A])])
    assert prompt.token_ids == ids(whole, f"user:{WHOLE}Hi\nAssistant:")
    assert prompt.images[0].pixels.shape == (1, 3, 8, 8)
    check_spans(prompt, whole.image_token_id)


def test_images_stay_in_order(processor: Idefics3Processor) -> None:
    turn = Message("user", (TextPart("x"), ImagePart(A), TextPart("y"), ImagePart(B), TextPart("z")))
    prompt = processor([turn, assistant("ok"), user("", [C, A])])
    rows = "".join(f"{FAKE}<row_{row}_col_1>{S}\n" for row in (1, 2, 3)) + f"\n{WHOLE}"  # C stands upright
    text = f"user:x{TWO_BY_THREE}y{ONE_BY_THREE}z\nassistant:ok\nuser:{rows}{TWO_BY_THREE}\nAssistant:"
    assert prompt.token_ids == ids(processor, text)
    assert [image.layout for image in prompt.images] == [(2, 3), (1, 3), (3, 1), (2, 3)]
    alone = [processor([user("", [picture])]).images[0] for picture in (A, B, C, A)]
    for together, single in zip(prompt.images, alone, strict=True):
        assert together.digest == single.digest
        assert np.array_equal(together.pixels, single.pixels)
    check_spans(prompt, processor.image_token_id)


def test_system_turn_and_empty_history(processor: Idefics3Processor) -> None:
    prompt = processor([system("Be brief."), user("a"), assistant(""), Message("assistant"), user("b")])
    text = "system:Be brief.\nuser:a\nassistant:\nassistant:\nuser:b\nAssistant:"
    assert prompt.token_ids == ids(processor, text)


def test_template_variables(processor: Idefics3Processor) -> None:
    assert processor([user("a")], {"add_generation_prompt": False}).token_ids == ids(processor, "user:a\n")


def test_default_template(tmp_path: Path) -> None:
    special = {"chat_template.jinja": None}
    made = build(ProcessorFiles.read(write_checkpoint(tmp_path, files=special), CONFIG))
    assert made.template.source == DEFAULT_TEMPLATE
    prompt = made([system("S"), user("Hi", [A]), assistant("ok"), Message("assistant"), user("b")])
    text = (
        "<|im_start|>System: S<end_of_utterance>\n"
        f"User:{TWO_BY_THREE}Hi<end_of_utterance>\nAssistant: ok<end_of_utterance>\n"
        "Assistant: <end_of_utterance>\n"
        "User: b<end_of_utterance>\nAssistant:"
    )
    assert prompt.token_ids == ids(made, text)


@pytest.mark.parametrize(
    ("parts", "same_as"),
    [
        (["<image>Hi", A], [A, "Hi"]),
        ([A, "Hi<image>"], ["Hi", A]),
        ([A, B, "x<image>y<image>z"], ["x", A, "y", B, "z"]),
        ([A, "x<image>", B, "<image>y"], ["x", A, B, "y"]),
        (["<image>", A], [A]),
    ],
)
def test_markers_typed_by_hand(processor: Idefics3Processor, parts: list[Any], same_as: list[Any]) -> None:
    def turn(sources: list[Any]) -> Message:
        return Message("user", tuple(TextPart(s) if isinstance(s, str) else ImagePart(s) for s in sources))

    typed, placed = processor([turn(parts)]), processor([turn(same_as)])
    assert typed.token_ids == placed.token_ids
    assert [image.span for image in typed.images] == [image.span for image in placed.images]
    assert [image.digest for image in typed.images] == [image.digest for image in placed.images]


@pytest.mark.parametrize(
    ("conversation", "turn", "markers", "images"),
    [
        ([user("<image>")], "1 (user)", 1, 0),
        ([user("a <image> b <image>", [A])], "1 (user)", 2, 1),
        ([user("<image>", [A, B])], "1 (user)", 1, 2),
        ([user("<image>"), assistant("ok"), user("", [A])], "1 (user)", 1, 0),
        ([user("", [A]), assistant("ok <image>"), user("a")], "2 (assistant)", 1, 0),
        ([system("<image>"), user("a")], "1 (system)", 1, 0),
    ],
)
def test_markers_that_are_not_the_images(
    processor: Idefics3Processor, conversation: list[Message], turn: str, markers: int, images: int
) -> None:
    with pytest.raises(InputError) as caught:
        processor(conversation)
    expected = f"message {turn} has {markers} image marker(s) '<image>' in its text and {images} image(s): type one"
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value).splitlines()) == 1


def test_marker_spelled_by_two_parts(processor: Idefics3Processor) -> None:
    turn = Message("user", (TextPart("<ima"), ImagePart(A), TextPart("ge>")))
    assert place_images(turn, "<image>") == turn.parts
    assert processor([turn]).images[0].layout == (2, 3)


def test_template_that_drops_images(tmp_path: Path) -> None:
    files = {"chat_template.jinja": "no images here"}
    made = build(ProcessorFiles.read(write_checkpoint(tmp_path, files=files), CONFIG))
    with pytest.raises(InputError, match=r"template gave 0 of 1 image\(s\) a place .* --chat-template FILE"):
        made([user("Hi", [A])])


EMPTY = {
    "no messages": ([], "there are no messages to answer"),
    "empty user": ([Message("user")], "message 1 (user) is empty: give it text or an image"),
    "white space": ([user("a"), assistant("b"), user(" \n\t")], "message 3 (user) is empty: give it text or an image"),
    "empty system": ([system(""), user("a")], "message 1 (system) is empty: give it text or an image"),
    "empty developer": ([Message("developer")], "message 1 (developer) is empty: give it text or an image"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty(processor: Idefics3Processor, name: str) -> None:
    conversation, words = EMPTY[name]
    with pytest.raises(InputError) as caught:
        processor(conversation)
    assert str(caught.value) == words
    assert caught.value.exit_code == 3


def test_turns_that_may_be_empty(processor: Idefics3Processor) -> None:
    call = Message("assistant", tool_calls=(ToolCall("1", "f", "{}"),))
    processor([user("a"), call, Message("tool", tool_call_id="1"), user("", [B])])


def test_errors_pass_through(processor: Idefics3Processor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such image file"):
        processor([user("Hi", [tmp_path / "no.png"])])
    with pytest.raises(InputError, match="half of a surrogate pair"):
        processor([user("\ud800")])
    files = {"chat_template.jinja": "{{ raise_exception('No system turns') }}"}
    made = build(ProcessorFiles.read(write_checkpoint(tmp_path, files=files), CONFIG))
    with pytest.raises(TemplateError, match="No system turns"):
        made([system("x")])


def test_text_that_looks_like_a_template(processor: Idefics3Processor) -> None:
    text = r"{{ 1 }} {% raw %} \1 \g<0> \n"
    assert processor([user(text, [B])]).token_ids == ids(processor, f"user:{ONE_BY_THREE}{text}\nAssistant:")


def test_threads(tmp_path: Path) -> None:
    """A fresh processor, so that nothing is computed before the threads meet."""
    made = build(ProcessorFiles.read(write_checkpoint(tmp_path), CONFIG))
    conversations = [[user("one", [A])], [user("two", [B, C])], [user("three")]]
    results: list[list[Prompt]] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        results.append([made(conversation) for _ in range(5) for conversation in conversations])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [made(conversation) for conversation in conversations] * 5
    assert len(results) == 8
    for result in results:
        for prompt, right in zip(result, expected, strict=True):
            assert prompt.token_ids == right.token_ids
            assert [image.span for image in prompt.images] == [image.span for image in right.images]
            for image, other in zip(prompt.images, right.images, strict=True):
                assert image.digest == other.digest
                assert np.array_equal(image.pixels, other.pixels)


def test_expand_placeholders() -> None:
    assert expand_placeholders("a<i>b<i>", "<i>", ["<i><i>", r"\1"]) == r"a<i><i>b\1"
    assert expand_placeholders("a", "<i>", []) == "a"
    assert expand_placeholders("a.b", ".", ["x"]) == "axb"


def test_check_markers() -> None:
    check_markers("<i>a<i>", "<i>", 2)
    with pytest.raises(InputError, match=r"template wrote 2 image marker\(s\) '<i>' for 1 image\(s\)"):
        check_markers("<i><i>", "<i>", 1)
    with pytest.raises(InputError, match=r"gave 1 of 2 image\(s\) a place \('<i>'\): put images into user messages"):
        check_markers("<i>", "<i>", 2)


def test_placeholder_spans() -> None:
    assert placeholder_spans([1, 9, 9, 2, 9, 3, 9, 9], 9, [3, 2], "<i>") == [(1, 5), (6, 8)]
    assert placeholder_spans([1, 2], 9, [], "<i>") == []
    with pytest.raises(InputError, match="1 image tokens where its images fill 2"):
        placeholder_spans([9], 9, [2], "<i>")
