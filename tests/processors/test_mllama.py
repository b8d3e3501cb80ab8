"""Tiles, placeholders and prompts of Llama 3.2 Vision against the reference's numbers and against slow twins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.errors import InputError, ModelError, TemplateError
from mlxvlm.messages import ImagePart, Message, TextPart, system, user
from mlxvlm.processors.files import ProcessorFiles, read_json
from mlxvlm.processors.mllama import (
    ImageSettings,
    MllamaProcessor,
    arrangements,
    best_arrangement,
    build,
    fitted_size,
)
from tests.golden import GOLDENS

TABLE: dict[str, Any] = json.loads((GOLDENS / "tiles.json").read_text())
FOLDER = GOLDENS / "mllama_tiles"
TILE = 24
SIDES = st.integers(1, 6000)


@pytest.fixture(scope="module")
def files() -> ProcessorFiles:
    return ProcessorFiles.read(FOLDER, read_json(FOLDER / "config.json"))


@pytest.fixture(scope="module")
def processor(files: ProcessorFiles) -> MllamaProcessor:
    return build(files)


def picture(width: int, height: int) -> Image.Image:
    values = np.arange(width * height * 3) * 37 % 251 + 1
    return Image.fromarray(values.reshape(height, width, 3).astype(np.uint8))


@pytest.mark.parametrize("most", list(TABLE["arrangements"]))
def test_arrangements(most: str) -> None:
    assert [list(shape) for shape in arrangements(int(most))] == TABLE["arrangements"][most]


@pytest.mark.parametrize("setting", list(TABLE["settings"]))
def test_sizes_equal_the_reference(setting: str) -> None:
    tile, most = map(int, setting.split())
    for (width, height), expected in zip(TABLE["sizes"], TABLE["settings"][setting], strict=True):
        rows, columns = best_arrangement(height, width, tile, most)
        fitted = fitted_size(height, width, (rows * tile, columns * tile), tile)
        assert [rows, columns, *fitted] == expected, (width, height)


@given(SIDES, SIDES, st.integers(1, 600), st.integers(1, 9))
def test_a_fitted_picture_fills_one_side_of_its_canvas_or_of_a_tile(
    height: int, width: int, tile: int, most: int
) -> None:
    rows, columns = best_arrangement(height, width, tile, most)
    assert rows * columns <= most
    fitted = fitted_size(height, width, (rows * tile, columns * tile), tile)
    for side, original, count in zip(fitted, (height, width), (rows, columns), strict=True):
        assert 1 <= side <= max(min(original, count * tile), tile)
    assert fitted[0] == min(max(height, tile), rows * tile) or fitted[1] == min(max(width, tile), columns * tile)


@given(SIDES, SIDES, st.integers(1, 600), st.integers(1, 9))
def test_no_other_canvas_changes_a_picture_less(height: int, width: int, tile: int, most: int) -> None:
    def cost(shape: tuple[int, int]) -> tuple[float, ...]:
        scale = min(shape[0] * tile / height, shape[1] * tile / width)
        return (0, scale, math.prod(shape)) if scale >= 1 else (1, -scale, math.prod(shape))

    chosen = best_arrangement(height, width, tile, most)
    assert cost(chosen) == min(map(cost, arrangements(most)))


@pytest.mark.parametrize(
    ("size", "layout"), [((10, 10), (1, 1)), ((90, 19), (1, 4)), ((20, 60), (3, 1)), ((33, 33), (2, 2))]
)
def test_tiles_are_a_canvas_cut_row_by_row(
    processor: MllamaProcessor, size: tuple[int, int], layout: tuple[int, int]
) -> None:
    image = picture(*size)
    pixels, found, _ = processor.prepare_image(image)
    assert found == layout
    rows, columns = layout
    height, width = fitted_size(image.height, image.width, (rows * TILE, columns * TILE), TILE)
    shown = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    canvas = np.zeros((rows * TILE, columns * TILE, 3), np.float32)
    canvas[:height, :width] = shown
    mean, std = np.array(processor.normalize.mean), np.array(processor.normalize.std)
    normal = (canvas / 255 - mean) / std
    for index in range(4):
        row, column = divmod(index, columns)
        if index >= rows * columns:
            assert not pixels[index].any()  # exactly 0, which black is not
            continue
        cut = normal[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        assert np.abs(pixels[index] - cut.transpose(2, 0, 1)).max() < 1e-5
    assert pixels.dtype == np.float32


def test_a_picture_is_one_token(processor: MllamaProcessor) -> None:
    images = [picture(9, 9), picture(90, 20)]
    prompt = processor([user("Which?", images)])
    places = [index for index, token in enumerate(prompt.token_ids) if token == processor.image_token_id]
    assert [image.span for image in prompt.images] == [(place, place + 1) for place in places]
    assert len(places) == 2
    assert places[1] == places[0] + 1


def test_the_pictures_token_has_an_embedding_and_no_logit(files: ProcessorFiles, processor: MllamaProcessor) -> None:
    assert processor.image_token_id == files.config["image_token_index"] == files.config["text_config"]["vocab_size"]


def test_one_bos(processor: MllamaProcessor) -> None:
    bos = processor.tokenizer.token_id("<|begin_of_text|>")
    assert processor([user("Hi")]).token_ids.count(bos) == 1
    assert processor([user("Hi", [picture(9, 9)])]).token_ids[0] == bos


def rendered(processor: MllamaProcessor, messages: list[Message], **variables: Any) -> str:
    ids = processor(messages, variables).token_ids
    text: str = processor.tokenizer.backend.decode(list(ids), skip_special_tokens=False)
    return text


def test_a_system_turn_is_a_string_to_the_template(processor: MllamaProcessor) -> None:
    text = rendered(processor, [system("Be brief."), user("Hi")], date_string="01 Jan 2024")
    assert "Today: 01 Jan 2024\n\nBe brief.<|eot_id|>" in text
    assert "[" not in text


def test_a_first_turn_beside_tools_is_a_string_too(files: ProcessorFiles) -> None:
    source = "{{ bos_token }}{{ messages[0]['content'] | trim }}"
    processor = build(replace(files, template_source=source))
    assert rendered(processor, [user("call it")]) == "<|begin_of_text|>call it"


def test_a_picture_in_the_first_turn_beside_tools_keeps_its_place(files: ProcessorFiles) -> None:
    """Where the published template is given parts, it prints their Python repr without the picture."""
    source = (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
        "{% endif %}{% if tools %}{{ tools[0] }}{{ messages[0]['content'] | trim }}"
        "{% else %}{% for part in messages[0].content %}{{ '<|image|>' if part.type == 'image' else part.text }}"
        "{% endfor %}{% endif %}"
    )
    processor = build(replace(files, template_source=source))
    question = user("What is it?", [picture(9, 9)])
    assert rendered(processor, [question]) == "<|begin_of_text|><|image|>What is it?"
    for turns, start in (([question], ""), ([system("Be brief."), question], "Be brief.")):
        prompt = processor(turns, {"tools": ["T"]})
        assert len(prompt.images) == 1
        text = processor.tokenizer.backend.decode(list(prompt.token_ids), skip_special_tokens=False)
        assert text == f"<|begin_of_text|>{start}T<|image|>What is it?"


def test_the_templates_refusal_is_the_users_error(files: ProcessorFiles) -> None:
    source = "{{ raise_exception('Prompting with images is incompatible with system messages.') }}"
    processor = build(replace(files, template_source=source))
    with pytest.raises(TemplateError, match="incompatible with system messages"):
        processor([system("Be brief."), user("Hi", [picture(9, 9)])])


def test_without_a_template_the_remedy_is_named(files: ProcessorFiles) -> None:
    with pytest.raises(ModelError, match="--chat-template"):
        build(replace(files, template_source=None))


@pytest.mark.parametrize(
    ("text", "count", "found"), [("<|image|>what?", 0, 1), ("<|image|><|image|>", 1, 2), ("a <|image|>", 2, 1)]
)
def test_markers_must_be_as_many_as_pictures(processor: MllamaProcessor, text: str, count: int, found: int) -> None:
    with pytest.raises(
        InputError, match=rf"^message 1 \(user\) has {found} image marker\(s\).* in its text and {count} image"
    ):
        processor([user(text, [picture(9, 9)] * count)])


def test_typed_markers_are_places(processor: MllamaProcessor) -> None:
    typed = processor([user("Here: <|image|> what?", [picture(9, 9)])])
    parts = (TextPart("Here: "), ImagePart(picture(9, 9)), TextPart(" what?"))
    assert typed.token_ids == processor([Message("user", parts)]).token_ids


def test_a_digest_covers_pixels_and_settings(files: ProcessorFiles, processor: MllamaProcessor) -> None:
    digest = processor.prepare_image(picture(9, 9))[2]
    assert digest == processor.prepare_image(picture(9, 9))[2]
    other = build(replace(files, image_processor={**files.image_processor, "image_mean": [0.5, 0.5, 0.5]}))
    assert other.prepare_image(picture(9, 9))[2] != digest
    # The same bytes in another shape.
    assert processor.prepare_image(picture(9, 8))[2] != processor.prepare_image(picture(8, 9))[2]


def test_defaults_are_the_references() -> None:
    assert ImageSettings.from_config({}) == ImageSettings(tile=224, max_tiles=4, resample=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"height": 24, "width": 32}}, "no square"),
        ({"size": {"longest_edge": 24}}, "no square"),
        ({"do_pad": False}, "do_pad"),
        ({"do_resize": False}, "do_resize"),
        ({"max_image_tiles": 3}, "up to 3 tiles of 24 pixels, but the vision tower takes 4 of 24"),
        ({"size": {"height": 48, "width": 48}}, "4 tiles of 48"),
    ],
)
def test_settings_that_the_tower_can_not_take(files: ProcessorFiles, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(replace(files, image_processor={**files.image_processor, **settings}))


def test_arrangements_in_another_order_are_refused(files: ProcessorFiles) -> None:
    shapes = [list(shape) for shape in reversed(arrangements(4))]
    config = {**files.config, "vision_config": {**files.config["vision_config"], "supported_aspect_ratios": shapes}}
    with pytest.raises(ModelError, match="supported_aspect_ratios"):
        build(replace(files, config=config))
