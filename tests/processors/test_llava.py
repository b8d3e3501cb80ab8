"""LLaVA's pictures and prompts: sizes against transformers' numbers, tiles against a slow twin, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.checkpoint.load import open_model
from mlxvlm.errors import InputError, ModelError
from mlxvlm.messages import ImagePart, Message, TextPart, assistant, system, user
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.llava import (
    AnyRes,
    LlavaProcessor,
    SingleView,
    Tower,
    best_canvas,
    build,
    fitted_size,
    padding_patches,
    short_edge_size,
)
from mlxvlm.processors.transforms import cut
from tests.golden import GOLDENS

CLIP, SIGLIP, TILES = (GOLDENS / f"llava_{name}" for name in ("clip", "siglip", "next_tiles"))
TABLE = json.loads((GOLDENS / "llava_sizes.json").read_text())
SIDES = st.integers(1, 3000)


def processor_of(folder: Path, image: dict[str, Any] | None = None, **config: Any) -> LlavaProcessor:
    """With some keys of preprocessor_config.json and config.json replaced; None removes one."""
    files = ProcessorFiles.read(folder, json.loads((folder / "config.json").read_text()))
    merged = {**files.image_processor, **(image or {})}
    chosen = {key: value for key, value in merged.items() if value is not None}
    return build(replace(files, image_processor=chosen, config={**files.config, **config}))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", list(TABLE["settings"]))
def test_sizes_are_the_references(name: str) -> None:
    side, patch = map(int, name.split())
    canvases = tuple(map(tuple, TABLE["canvases"][name]))
    tower = Tower(side, patch, has_class_token=True, drops_first=True)
    for (width, height), expected in zip(TABLE["sizes"], TABLE["settings"][name], strict=True):
        canvas = best_canvas(height, width, canvases)
        grid = canvas[0] // patch, canvas[1] // patch
        layout = (canvas[0] // side, canvas[1] // side, *padding_patches(height, width, *grid))
        tokens = AnyRes(tower, canvases, 3).num_tokens(layout)
        assert [*canvas, *fitted_size(height, width, *canvas), tokens] == expected, (width, height)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(640, 480, 2340), (336, 336, 1176), (1500, 900, 1948), (2000, 2000, 2928), (20, 15, 1368), (61, 173, 792)],
)
def test_published_token_counts(width: int, height: int, tokens: int) -> None:
    view = AnyRes(Tower(336, 14, True, True), tuple(map(tuple, TABLE["canvases"]["336 14"])), 3)
    canvas = best_canvas(height, width, view.pinpoints)
    layout = (canvas[0] // 336, canvas[1] // 336, *padding_patches(height, width, canvas[0] // 14, canvas[1] // 14))
    assert view.num_tokens(layout) == tokens


def test_rounding_before_truncation() -> None:
    """47 * (24 / 47) is 23.999...; a plain floor would trim differently from the reference."""
    found = [
        (height, width, 24 * rows)
        for height in range(1, 200)
        for width in range(height, 200)
        for rows in (1, 2)
        if int(height * (24 / width)) != int(round(height * (24 / width), 7))
    ]
    assert found
    for height, width, grid_height in found:
        if width / height <= 24 / grid_height:
            continue
        trim_y, trim_x = padding_patches(height, width, grid_height, 24)
        assert (trim_y, trim_x) == ((grid_height - height * 24 // width) // 2, 0)
        assert padding_patches(width, height, 24, grid_height) == (0, trim_y)  # turned by 90 degrees


@given(SIDES, SIDES)
def test_every_size_has_a_canvas_and_fits_it(height: int, width: int) -> None:
    canvases = tuple(map(tuple, TABLE["canvases"]["336 14"]))
    canvas = best_canvas(height, width, canvases)
    fitted = fitted_size(height, width, *canvas)
    assert canvas in canvases
    assert all(1 <= side <= limit for side, limit in zip(fitted, canvas, strict=True))
    assert any(side == limit for side, limit in zip(fitted, canvas, strict=True))
    grid = canvas[0] // 14, canvas[1] // 14
    trims = padding_patches(height, width, *grid)
    assert 0 in trims
    assert all(0 <= 2 * trim <= patches for trim, patches in zip(trims, grid, strict=True))


@given(SIDES, SIDES, st.sampled_from([18, 336]))
def test_short_edge(height: int, width: int, edge: int) -> None:
    found = short_edge_size(height, width, edge)
    assert min(found) == edge
    assert max(found) == math.floor(edge * max(height, width) / min(height, width))


def test_tiles_are_the_padded_canvas_row_by_row() -> None:
    processor = processor_of(TILES)
    image = picture(31, 23)
    pixels, layout, _ = processor.prepare_image(image)
    rows, columns, _, _ = layout
    canvas = np.zeros((rows * 12, columns * 12, 3), np.uint8)
    height, width = fitted_size(31, 23, *canvas.shape[:2])
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), Image.Resampling.BICUBIC)
    )
    assert len(pixels) == 1 + rows * columns
    whole = image.resize((12, 12), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[:1], processor.normalize(cut(whole, 1, 1)))
    for row in range(rows):
        for column in range(columns):
            tile = canvas[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12]
            expected = processor.normalize(tile.transpose(2, 0, 1)[None])[0]
            assert np.array_equal(pixels[1 + row * columns + column], expected)


def test_a_strip_may_leave_no_row_of_its_tiles() -> None:
    view = AnyRes(Tower(4, 2, True, True), ((4, 8),), 3)
    frames, layout = view(picture(1, 400))
    assert (len(frames), layout, view.num_tokens(layout)) == (3, (1, 2, 1, 0), 4)


def test_centre_crop() -> None:
    processor = processor_of(CLIP)
    image = picture(18, 41)
    pixels, layout, _ = processor.prepare_image(image)
    assert layout == ()
    assert np.array_equal(pixels, processor.normalize(cut(image.crop((11, 0, 29, 18)), 1, 1)))


def test_padding_to_a_square_is_off_unless_asked_for() -> None:
    image = picture(10, 20)
    kind = {"image_processor_type": "LlavaImageProcessor"}
    plain, padded = processor_of(CLIP, kind), processor_of(CLIP, {**kind, "do_pad": True})
    assert np.array_equal(plain.prepare_image(image)[0], processor_of(CLIP).prepare_image(image)[0])
    square = Image.new("RGB", (20, 20), (122, 116, 104))
    square.paste(image, (0, 5))
    assert np.array_equal(padded.prepare_image(image)[0], plain.prepare_image(square)[0])


def test_old_sizes_are_single_numbers() -> None:
    old = processor_of(CLIP, {"size": 18, "crop_size": 18})
    assert np.array_equal(old.prepare_image(picture(9, 30))[0], processor_of(CLIP).prepare_image(picture(9, 30))[0])


def test_siglip_leaves_out_defaults() -> None:
    keys = ("image_mean", "image_std", "resample", "rescale_factor", "do_resize", "do_rescale", "do_normalize")
    bare = processor_of(SIGLIP, dict.fromkeys(keys))
    assert np.array_equal(bare.prepare_image(picture(9, 30))[0], processor_of(SIGLIP).prepare_image(picture(9, 30))[0])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (336, 14, 576)),
        ({"vision_config": {"model_type": "clip_vision_model"}}, (224, 32, 49)),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, (224, 16, 195)),
        ({"vision_feature_select_strategy": "full"}, (336, 14, 577)),
    ],
)
def test_tower_defaults(config: dict[str, Any], expected: tuple[int, int, int]) -> None:
    tower = Tower.from_config(config)
    assert (tower.image_size, tower.patch_size, tower.tokens_per_frame) == expected


@pytest.mark.parametrize("folder", [CLIP, SIGLIP, TILES], ids=lambda folder: folder.name)
class TestPrompts:
    def test_one_bos(self, folder: Path) -> None:
        processor = processor_of(folder)
        bos = processor.tokenizer.token_id("<s>")
        assert processor([user("Hello")]).token_ids.count(bos) == 1

    def test_each_picture_has_its_own_span(self, folder: Path) -> None:
        processor = processor_of(folder)
        prompt = processor([user("a", [picture(30, 12)]), assistant("b"), user("c", [picture(9, 50), picture(4, 4)])])
        for image in prompt.images:
            start, end = image.span
            assert set(prompt.token_ids[start:end]) == {processor.image_token_id}
            assert end - start == processor.settings.num_tokens(image.layout)
        assert prompt.token_ids.count(processor.image_token_id) == sum(
            b - a for a, b in (i.span for i in prompt.images)
        )

    def test_no_text_is_lost(self, folder: Path) -> None:
        parts = (TextPart("north"), TextPart("south"))
        processor = processor_of(folder)
        prompt = processor([Message("system", parts), Message("user", parts), Message("assistant", parts), user("?")])
        text = processor.tokenizer.decode(prompt.token_ids)
        assert [text.count(part.text) for part in parts] == [3, 3]

    def test_a_typed_marker_without_a_picture_is_an_error(self, folder: Path) -> None:
        with pytest.raises(InputError, match="image marker"):
            processor_of(folder)([user("What is <image>?")])

    def test_a_typed_marker_is_a_pictures_place(self, folder: Path) -> None:
        typed = Message("user", (TextPart("<image>\nWhat?"), ImagePart(picture(9, 9))))
        processor = processor_of(folder)
        assert processor([typed]).token_ids == processor([user("What?", [picture(9, 9)])]).token_ids

    def test_typed_markers_stay_where_they_were_typed(self, folder: Path) -> None:
        """Also where the template puts pictures in front of the text."""
        hoisting = (
            "{% for m in messages %}{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
            "{% for c in m['content'] if c['type'] == 'text' %}[{{ c['text'] }}]{% endfor %}{% endfor %}"
        )
        config = json.loads((folder / "config.json").read_text())
        processor = build(replace(ProcessorFiles.read(folder, config), template_source=hoisting))
        images = [ImagePart(picture(30, 12)), ImagePart(picture(9, 9))]
        parts = (TextPart("a <image> b"), images[0], TextPart("<image>"), images[1])
        prompt = processor([Message("user", parts)])
        markers = ["<image>" * (image.span[1] - image.span[0]) for image in prompt.images]
        expected = processor.tokenizer.encode_prompt("[a {} b][{}]".format(*markers))
        assert list(prompt.token_ids) == expected
        digests = [processor.prepare_image(image.source)[2] for image in images]
        assert [image.digest for image in prompt.images] == digests

    def test_digest_tells_settings_and_pixels_apart(self, folder: Path) -> None:
        image, other = picture(20, 20), picture(20, 20, seed=1)
        digests = [
            processor_of(folder).prepare_image(image)[2],
            processor_of(folder).prepare_image(other)[2],
            processor_of(folder, {"resample": 2}).prepare_image(image)[2],
            processor_of(folder, {"image_mean": [0.4, 0.5, 0.6]}).prepare_image(image)[2],
        ]
        assert len(set(digests)) == 4
        assert processor_of(folder).prepare_image(image)[2] == digests[0]

    def test_another_image_token_is_refused(self, folder: Path) -> None:
        with pytest.raises(ModelError, match="tokenizer's <image>"):
            processor_of(folder, image_token_index=5)

    def test_opens_as_a_model(self, folder: Path) -> None:
        assert isinstance(open_model(str(folder)).processor, LlavaProcessor)


def test_system_turn_is_a_part() -> None:
    processor = processor_of(CLIP)
    text = processor.tokenizer.decode(processor([system("Be brief."), user("Hi")]).token_ids)
    assert text.startswith("Be brief. USER: Hi")


@pytest.mark.parametrize(
    ("folder", "image"),
    [
        (CLIP, {"crop_size": {"height": 24, "width": 24}}),
        (CLIP, {"do_center_crop": False}),
        (SIGLIP, {"size": {"height": 12, "width": 24}}),
        (SIGLIP, {"do_resize": False}),
        (TILES, {"size": {"shortest_edge": 24}}),
        (TILES, {"crop_size": {"height": 24, "width": 12}}),
        (TILES, {"image_grid_pinpoints": [[12, 30]]}),
        (TILES, {"image_grid_pinpoints": [[0, 12]]}),
    ],
)
def test_pictures_that_the_tower_can_not_take(folder: Path, image: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        processor_of(folder, image)


def test_single_view_reads_no_batch_padding() -> None:
    """`do_pad` of a CLIP processor is not LLaVA's padding to a square."""
    tower = Tower(18, 4, True, True)
    config = {"image_processor_type": "CLIPImageProcessor", "do_pad": True, "size": 18, "crop_size": 18}
    assert SingleView.from_config(config, tower).pad_color is None
