"""Canvases, pixels and prompts of Llama 4 against the reference's numbers and slow twins."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.errors import InputError, ModelError
from mlxvlm.messages import ImagePart, Message, TextPart, ToolCall
from mlxvlm.processors.files import ProcessorFiles, read_json
from mlxvlm.processors.llama4 import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PATCH,
    TILE_X,
    TILE_Y,
    ImageSettings,
    Llama4Processor,
    best_canvas,
    build,
    fitted_size,
)
from mlxvlm.processors.transforms import BFloat16Normalizer, Normalizer, round_to_bfloat16
from tests.golden import GOLDENS, Case

NORMS = GOLDENS / "llama4_norms"
SIZES = json.loads((GOLDENS / "llama4_sizes.json").read_text())


def files(**changes: Any) -> ProcessorFiles:
    """The golden's own files with some keys of one of them changed."""
    read = ProcessorFiles.read(NORMS, read_json(NORMS / "config.json"))
    merged = {name: {**getattr(read, name), **values} for name, values in changes.items()}
    return dataclasses.replace(read, **merged)


@pytest.fixture(scope="module")
def processor() -> Llama4Processor:
    return build(files())


@pytest.mark.parametrize("setting", SIZES["settings"])
def test_canvas_and_size_are_the_references(setting: str) -> None:
    tile, max_tiles, fill = setting.split()
    settings = ImageSettings(int(tile), int(max_tiles), fill == "fill")
    for (width, height), expected in zip(SIZES["sizes"], SIZES["settings"][setting], strict=True):
        canvas = best_canvas(height, width, settings)
        found = [canvas[0] // settings.tile, canvas[1] // settings.tile, *fitted_size(height, width, canvas, settings)]
        assert found == expected, (width, height)


def test_published_setting_has_all_fifty_canvases() -> None:
    canvases = {tuple(canvas) for canvas in (ImageSettings().canvases // 336).tolist()}
    assert canvases == {(r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16}
    assert len(ImageSettings().canvases) == 50


@given(st.integers(1, 6000), st.integers(1, 6000), st.booleans())
def test_picture_lies_on_its_canvas(width: int, height: int, fill: bool) -> None:
    settings = ImageSettings(fill_canvas=fill)
    canvas = best_canvas(height, width, settings)
    size = fitted_size(height, width, canvas, settings)
    assert all(1 <= side <= limit for side, limit in zip(size, canvas, strict=True))
    assert canvas[0] * canvas[1] <= 16 * 336**2
    if not fill:
        assert all(side <= max(own, 336) for side, own in zip(size, (height, width), strict=True))


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    ties = np.array([1 + 1 / 256, 1 + 3 / 256, 1.00391, 1.0039, 0.0, 255.5], np.float32)
    values = np.concatenate([ties, -ties, np.random.default_rng(0).standard_normal(99).astype(np.float32)])
    assert np.array_equal(round_to_bfloat16(values), np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32)))


def test_steps_round_to_bfloat16() -> None:
    normalize = BFloat16Normalizer((0.48, 0.5, 0.3), (0.27, 0.5, 0.6))
    levels = np.arange(256, dtype=np.uint8)
    found = normalize(np.stack([levels] * 3)[None, :, None])[0, :, 0]  # [C, 256]
    half = mx.array(levels.astype(np.float32)) * np.float32(1 / 255)
    mean, std = (mx.array(values).astype(mx.bfloat16)[:, None] for values in (normalize.mean, normalize.std))
    expected = (half.astype(mx.bfloat16) - mean) / std
    assert expected.dtype == mx.bfloat16
    assert np.array_equal(found, np.array(expected.astype(mx.float32)))


@pytest.mark.parametrize("step", ["do_rescale", "do_normalize"])
def test_only_both_steps_together_go_through_bfloat16(step: str) -> None:
    """As in the reference, whose fused path is the one that rounds."""
    assert type(build(files(image_processor={step: False})).normalize) is Normalizer
    assert type(build(files()).normalize) is BFloat16Normalizer


def test_pixel_values_are_the_references(processor: Llama4Processor) -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=0)
    found = processor.normalize(levels[None])[0, :, :, 0]
    assert np.array_equal(found, np.stack([Case(NORMS).arrays["pixel_table"]] * 3))


def test_tiles_padding_and_overview(processor: Llama4Processor) -> None:
    pixels, layout, _ = processor.prepare_image(Image.new("RGB", (33, 20), (255, 0, 0)))
    assert (layout, pixels.shape, pixels.dtype) == ((1, 2), (3, 3, 20, 20), np.float32)
    red, black = np.array([1.0, -1.0, -1.0]), np.array([-1.0, -1.0, -1.0])
    assert np.array_equal(pixels[0, :, 0, 0], red)
    # The second tile is red up to column 33, then the padding: black, normalised.
    assert np.array_equal(pixels[1, :, 19, 12], red)
    assert np.array_equal(pixels[1, :, 19, 13], black)
    # The overview is stretched, not padded.
    assert np.array_equal(pixels[2], np.broadcast_to(red[:, None, None], (3, 20, 20)))


def test_small_picture_is_one_tile(processor: Llama4Processor) -> None:
    pixels, layout, _ = processor.prepare_image(Image.new("RGB", (3, 7)))
    assert (layout, len(pixels)) == ((1, 1), 1)


def test_prompt_of_tiles(processor: Llama4Processor) -> None:
    wide, small = Image.new("RGB", (60, 40)), Image.new("RGB", (9, 9))
    prompt = processor([Message("user", (ImagePart(wide), TextPart("a"), ImagePart(small)))])
    tile = [PATCH] * 4
    row = [*tile, TILE_X, *tile, TILE_X, *tile, TILE_Y]
    first = [IMAGE_START, *row, *row, IMAGE, *tile, IMAGE_END]
    names = [processor.tokenizer.backend.id_to_token(token) for token in prompt.token_ids]
    start = names.index(IMAGE_START)
    assert names[start : start + len(first)] == first
    after = start + len(first)
    assert names[after : after + 8] == ["a", IMAGE_START, IMAGE, *tile, IMAGE_END]
    assert names.count("<|begin_of_text|>") == 1
    assert [image.layout for image in prompt.images] == [(2, 3), (1, 1)]
    assert [image.span for image in prompt.images] == [(start + 1, after - 1), (after + 3, after + 7)]
    assert prompt.images[0].digest != prompt.images[1].digest


class TestTurns:
    def test_whole_system_turn_is_said(self) -> None:
        # The published template reads the first part of a list only.
        template = "{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}"
        processor = build(dataclasses.replace(files(), template_source=template))
        turn = Message("system", (TextPart("ab"), TextPart("cd")))
        assert processor.tokenizer.decode(processor([turn]).token_ids) == "abcd"

    def test_tools_before_a_question_with_a_picture(self) -> None:
        template = "{{ messages[0].content | trim }}"  # what the published template does with tools
        processor = build(dataclasses.replace(files(), template_source=template))
        prompt = processor([Message("user", (ImagePart(Image.new("RGB", (5, 5))), TextPart("x")))])
        assert len(prompt.images) == 1
        assert processor.tokenizer.decode(prompt.token_ids) == "x"

    def test_tool_calls(self) -> None:
        template = (
            "{% for c in messages[0].tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        )
        processor = build(dataclasses.replace(files(), template_source=template))
        turn = Message("assistant", (), (ToolCall("1", "add", '{"a": 1}'),))
        assert processor.tokenizer.decode(processor([turn]).token_ids) == 'add{"a": 1}'


class TestErrors:
    def test_marker_in_the_text(self, processor: Llama4Processor) -> None:
        with pytest.raises(InputError, match=r"1 image marker\(s\) '<\|image\|>' in its text and 0 image"):
            processor([Message("user", (TextPart("this <|image|> here"),))])

    def test_patch_in_the_text(self, processor: Llama4Processor) -> None:
        with pytest.raises(
            InputError, match=r"5 image tokens where its images fill 4: the text itself holds '<\|patch\|>'"
        ):
            processor([Message("user", (ImagePart(Image.new("RGB", (5, 5))), TextPart(PATCH)))])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"image_processor": {"do_resize": False}}, "do_resize false"),
            ({"image_processor": {"size": {"height": 20, "width": 30}}}, "not square"),
            ({"image_processor": {"size": {"height": 40, "width": 40}}}, "tiles of 40"),
            ({"processor": {"patch_size": 4}}, "patches of 4"),
            ({"config": {"image_token_index": 3}}, "image_token_index 3, but <|patch|> is token"),
        ],
    )
    def test_settings_that_do_not_fit(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ModelError) as caught:
            build(files(**changes))
        assert words in str(caught.value)

    def test_tokenizer_without_the_marks(self) -> None:
        other = ProcessorFiles.read(GOLDENS / "smolvlm_grid27", {}).tokenizer
        with pytest.raises(ModelError, match="the tokenizer has no token"):
            build(dataclasses.replace(files(), tokenizer=other))
