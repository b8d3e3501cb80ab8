"""Qwen2-VL's processor: sizes, patches, settings of every age, markers. Pixels and ids: tests/test_parity.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.errors import ImageError, InputError, ModelError
from mlxvlm.messages import ImagePart, Message, TextPart, user
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.qwen2_vl import (
    IMAGE,
    WRAPPED_IMAGE,
    ImageSettings,
    Qwen2VLProcessor,
    build,
    fitted_size,
    to_patches,
)
from tests.golden import GOLDENS, Case
from tests.processors.pictures import noise

TABLE = json.loads((GOLDENS / "fitted_sizes.json").read_text())
TIED = GOLDENS / "qwen2_vl_tied"


def files(folder: Path = TIED, **changes: Any) -> ProcessorFiles:
    config = json.loads((folder / "config.json").read_text())
    return replace(ProcessorFiles.read(folder, config), **changes)


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return build(files())


def picture(width: int, height: int) -> Image.Image:
    values = np.arange(height * width * 3) * 37 % 256
    return Image.fromarray(values.reshape(height, width, 3).astype(np.uint8))


@pytest.mark.parametrize("budget", list(TABLE["budgets"]))
def test_sizes_are_the_references(budget: str) -> None:
    step, least, most = map(int, budget.split())
    settings = ImageSettings(min_pixels=least, max_pixels=most, patch=step // 2, merge=2)
    for (width, height), expected in zip(TABLE["sizes"], TABLE["budgets"][budget], strict=True):
        if expected is None:
            with pytest.raises(ImageError, match="too long"):
                fitted_size(height, width, settings)
        else:
            assert list(fitted_size(height, width, settings)) == expected, (width, height)


def test_halves_are_rounded_to_even() -> None:
    settings = ImageSettings()
    assert fitted_size(70, 98, settings) == (56, 112)  # 2.5 and 3.5 steps


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 6), st.integers(1, 3))
def test_fitted_sizes_are_whole_steps_within_the_budget(height: int, width: int, patch: int, merge: int) -> None:
    step = patch * merge
    settings = ImageSettings(min_pixels=4 * step * step, max_pixels=400 * step * step, patch=patch, merge=merge)
    if max(height, width) > 200 * min(height, width):
        return
    fitted = fitted_size(height, width, settings)
    assert all(side >= step and side % step == 0 for side in fitted)
    assert fitted[0] * fitted[1] >= settings.min_pixels
    assert fitted[0] * fitted[1] <= settings.max_pixels or step in fitted


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_patches_equal_the_slow_twin(rows: int, columns: int, patch: int, merge: int) -> None:
    height, width = rows * merge * patch, columns * merge * patch
    image = Image.fromarray(noise(height, width, 3))
    pixels = np.asarray(image).transpose(2, 0, 1)
    expected = []
    for row in range(rows):
        for column in range(columns):
            for y in range(row * merge, (row + 1) * merge):
                for x in range(column * merge, (column + 1) * merge):
                    expected.append(pixels[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch])
    assert np.array_equal(to_patches(image, patch, merge), np.stack(expected))


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 100, "max_pixels": 900},
        {"size": {"shortest_edge": 100, "longest_edge": 900}},
        {"size": {"min_pixels": 100, "max_pixels": 900}},
        {"min_pixels": 100, "max_pixels": 900, "size": {"shortest_edge": 7, "longest_edge": 8}},
        {"min_pixels": None, "max_pixels": 900, "size": {"min_pixels": 100, "max_pixels": 7}},
    ],
)
def test_the_pixel_budget_of_every_age_of_config(config: dict[str, Any]) -> None:
    settings = ImageSettings.from_config(config)
    assert (settings.min_pixels, settings.max_pixels) == (100, 900)


def test_a_config_without_a_budget_has_the_references() -> None:
    settings = ImageSettings.from_config({})
    assert (settings.min_pixels, settings.max_pixels, settings.patch, settings.merge) == (3136, 1003520, 14, 2)


def test_left_out_settings_are_the_references(processor: Qwen2VLProcessor) -> None:
    image = json.loads((TIED / "preprocessor_config.json").read_text())
    assert image["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    sizes = {name: image[name] for name in ("min_pixels", "max_pixels", "patch_size", "merge_size")}
    pixels = build(files(image_processor=sizes)).prepare_image(picture(33, 20))[0]
    assert np.array_equal(pixels, processor.prepare_image(picture(33, 20))[0])


def test_layout_and_span_count_merged_patches(processor: Qwen2VLProcessor) -> None:
    prompt = processor([user("Look.", [picture(90, 19), picture(5, 4)])])
    for image in prompt.images:
        start, end = image.span
        assert len(image.pixels) == image.layout[0] * image.layout[1] == 4 * (end - start)
        assert set(prompt.token_ids[start:end]) == {processor.image_token_id}
    assert prompt.token_ids.count(processor.image_token_id) == sum(len(image.pixels) // 4 for image in prompt.images)


@pytest.mark.parametrize("name", ["qwen2_vl_tied", "qwen2_vl_window"])
def test_grids_are_the_references(name: str) -> None:
    case = Case(GOLDENS / name)
    processor = case.open().processor
    for scenario in case.scenarios:
        images = processor(case.messages(scenario)).images
        expected = case.arrays[f"{scenario}/image_grid_thw"].tolist() if images else []
        assert [[1, *image.layout] for image in images] == expected, scenario


@pytest.mark.parametrize("marker", [IMAGE, WRAPPED_IMAGE])
def test_a_typed_marker_is_the_pictures_place(processor: Qwen2VLProcessor, marker: str) -> None:
    typed = Message("user", (ImagePart(picture(9, 9)), TextPart(f"Before {marker} after")))
    placed = Message("user", (TextPart("Before "), ImagePart(picture(9, 9)), TextPart(" after")))
    assert processor([typed]).token_ids == processor([placed]).token_ids


def test_another_count_of_markers_is_an_error(processor: Qwen2VLProcessor) -> None:
    with pytest.raises(InputError, match=r"message 1 \(user\) has 1 image marker.* and 0 image"):
        processor([user(IMAGE), user("", [picture(9, 9)])])


def test_an_extreme_shape_is_an_error_of_the_input(processor: Qwen2VLProcessor) -> None:
    with pytest.raises(ImageError, match="201 x 1 pixels"):
        processor([user("", [picture(201, 1)])])


def test_without_resizing_only_whole_steps_pass() -> None:
    image = json.loads((TIED / "preprocessor_config.json").read_text())
    fixed = build(files(image_processor={**image, "do_resize": False}))
    assert fixed.prepare_image(picture(24, 16))[1] == (4, 6)
    with pytest.raises(ImageError, match="multiples of 8"):
        fixed.prepare_image(picture(25, 16))


def test_the_digest_covers_pixels_shape_and_settings(processor: Qwen2VLProcessor) -> None:
    image = json.loads((TIED / "preprocessor_config.json").read_text())
    other = build(files(image_processor={**image, "max_pixels": 512}))
    turned = Image.frombytes("RGB", (16, 9), picture(9, 16).tobytes())
    digests = [processor.prepare_image(each)[2] for each in (picture(9, 16), picture(9, 17), turned)]
    digests.append(other.prepare_image(picture(9, 16))[2])
    assert len(set(digests)) == 4
    assert processor.prepare_image(picture(9, 16))[2] == digests[0]


@pytest.mark.parametrize("change", [{"patch_size": 8}, {"merge_size": 1}])
def test_patches_that_are_not_the_towers_are_refused(change: dict[str, int]) -> None:
    image = json.loads((TIED / "preprocessor_config.json").read_text())
    with pytest.raises(ModelError, match="vision tower has 4 and 2"):
        build(files(image_processor={**image, **change}))


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "patch_size", "merge_size"])
@pytest.mark.parametrize("value", [0, -1, "many"])
def test_senseless_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match="no positive number"):
        ImageSettings.from_config({name: value})


def test_a_placeholder_of_another_id_is_refused() -> None:
    config = json.loads((TIED / "config.json").read_text())
    with pytest.raises(ModelError, match=r"config.json says 3"):
        build(replace(files(), config={**config, "image_token_id": 3}))
