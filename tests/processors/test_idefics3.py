"""Idefics3 and SmolVLM: sizes, tiles, digests and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.errors import ModelError
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.idefics3 import (
    MAX_SIDE,
    Idefics3Processor,
    ImageSettings,
    build,
    scaled_size,
    tiled_size,
)
from mlxvlm.processors.images import load_image
from tests.golden import GOLDENS
from tests.processors.checkpoints import CONFIG, IMAGE_SETTINGS, byte_tokenizer, write_checkpoint
from tests.processors.pictures import encode, noise

SIZES = json.loads((GOLDENS / "sizes.json").read_text())
SIDE = st.integers(1, 6000)


def processor(folder: Path, files: dict[str, Any] | None = None, **config: Any) -> Idefics3Processor:
    write_checkpoint(folder, files=files)
    return build(ProcessorFiles.read(folder, CONFIG | config))


def with_settings(folder: Path, **settings: Any) -> Idefics3Processor:
    return processor(folder, {"preprocessor_config.json": IMAGE_SETTINGS | settings})


@pytest.mark.parametrize("setting", SIZES["settings"])
def test_sizes_as_in_transformers(setting: str) -> None:
    longest, tile, mode = setting.split()
    side = int(tile)
    assert len(SIZES["sizes"]) == len(SIZES["settings"][setting]) >= 190
    for (width, height), row in zip(SIZES["sizes"], SIZES["settings"][setting], strict=True):
        first = scaled_size(height, width, int(longest))
        second = tiled_size(*first, side) if mode == "split" else (side, side)
        rows, columns = second[0] // side, second[1] // side
        if rows * columns == 1:
            rows = columns = 0
        assert [*first, *second, rows, columns, rows * columns + 1] == row, (width, height)


@given(SIDE, SIDE, st.sampled_from([(1456, 364), (2048, 512), (1536, 384), (4999, 333), (48, 16), (1, 1), (34, 17)]))
def test_any_size(height: int, width: int, setting: tuple[int, int]) -> None:
    longest, tile = setting
    scaled = scaled_size(height, width, longest)
    assert min(scaled) >= 1
    assert max(scaled) <= min(longest + 1, MAX_SIDE)  # the reference's rounding to even may add one
    assert max(scaled) >= min(longest, MAX_SIDE)
    tiled = tiled_size(*scaled, tile)
    assert min(tiled) >= tile
    assert [side % tile for side in tiled] == [0, 0]
    assert max(tiled) < max(scaled) + tile


def test_tiled_size_drops_the_fraction_first() -> None:
    """Executed with transformers: 4 x 7 pixels, longest_edge 100, tiles of 16."""
    assert tiled_size(*scaled_size(7, 4, 100), 16) == (112, 64)
    assert tiled_size(*scaled_size(4, 7, 100), 16) == (64, 112)


@given(SIDE, SIDE)
def test_any_size_unscaled(height: int, width: int) -> None:
    tiled = tiled_size(height, width, 364)
    assert min(tiled) >= 364
    assert [side % 364 for side in tiled] == [0, 0]


@pytest.mark.parametrize("size", [(24, 24), (24, 10), (10, 24), (100, 7), (8, 8), (1, 1), (3, 500)])
def test_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    """Tiles row by row, then the whole picture, each as the reference would cut them."""
    image = Image.fromarray(noise(*size, 3))
    pixels, layout, _ = processor(tmp_path).prepare_image(image)
    scaled = image.resize(scaled_size(*size, 24)[::-1], Image.Resampling.LANCZOS)
    height, width = tiled_size(scaled.height, scaled.width, 8)
    scaled = scaled.resize((width, height), Image.Resampling.LANCZOS)
    boxes = [(x, y, x + 8, y + 8) for y in range(0, height, 8) for x in range(0, width, 8)]
    frames = [*[scaled.crop(box) for box in boxes], scaled.resize((8, 8), Image.Resampling.LANCZOS)]
    expected = np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in frames]) / 127.5 - 1
    assert layout == (height // 8, width // 8)
    assert pixels.dtype == np.float32
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() < 1e-6


def test_frames_whole(tmp_path: Path) -> None:
    image = Image.fromarray(noise(10, 30, 3))
    pixels, layout, _ = with_settings(tmp_path, do_image_splitting=False).prepare_image(image)
    scaled = image.resize((24, 8), Image.Resampling.LANCZOS).resize((8, 8), Image.Resampling.LANCZOS)
    assert layout == (0, 0)
    assert pixels.shape == (1, 3, 8, 8)
    assert np.abs(pixels[0] - (np.asarray(scaled).transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-6


def test_one_tile_needs_no_overview(tmp_path: Path) -> None:
    settings = {"size": {"longest_edge": 8}}
    pixels, layout, _ = with_settings(tmp_path, **settings).prepare_image(Image.fromarray(noise(8, 8, 3)))
    assert (pixels.shape, layout) == ((1, 3, 8, 8), (0, 0))


def test_size_as_height_and_width(tmp_path: Path) -> None:
    fixed = with_settings(tmp_path, size={"height": 16, "width": 24})
    assert fixed.prepare_image(Image.fromarray(noise(50, 9, 3)))[1] == (2, 3)


def test_no_resize(tmp_path: Path) -> None:
    image = Image.fromarray(noise(9, 16, 3))
    assert with_settings(tmp_path, do_resize=False).prepare_image(image)[1] == (2, 2)


def test_same_digest_from_every_source(tmp_path: Path) -> None:
    prepare = processor(tmp_path).prepare_image
    array = noise(9, 14, 3)
    file = tmp_path / "pic.bmp"
    Image.fromarray(array).save(file)
    sources = [
        array,
        file,
        encode(Image.fromarray(array), "PNG"),
        Image.fromarray(array),
        encode(Image.fromarray(array), "TIFF"),
    ]
    digests = {prepare(load_image(source))[2] for source in sources}
    assert len(digests) == 1
    assert len(digests.pop()) == 32


def test_other_pixels_other_digest(tmp_path: Path) -> None:
    prepare = processor(tmp_path).prepare_image
    array = noise(8, 12, 3)
    touched = array.copy()
    touched[7, 11, 2] ^= 1
    pictures = [array, touched, array[::-1], array.reshape(12, 8, 3), array.reshape(1, 96, 3), array[:7]]
    digests = {prepare(load_image(picture))[2] for picture in pictures}
    assert len(digests) == len(pictures)


OTHER_SETTINGS: list[dict[str, Any]] = [
    {},
    {"size": {"longest_edge": 32}},
    {"size": {"height": 24, "width": 24}},
    {"max_image_size": {"longest_edge": 9}},
    {"do_resize": False},
    {"do_image_splitting": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"resample": 3},
    {"image_mean": [0.5, 0.5, 0.4]},
    {"image_std": 0.25},
    {"rescale_factor": 1 / 256},
]


def test_other_settings_other_digest(tmp_path: Path) -> None:
    image = Image.fromarray(noise(24, 24, 3))
    made = [with_settings(tmp_path / str(i), **settings) for i, settings in enumerate(OTHER_SETTINGS)]
    assert len({each.prepare_image(image)[2] for each in made}) == len(OTHER_SETTINGS)
    again = with_settings(tmp_path / "again", image_mean=[0.5, 0.5, 0.5], image_std=0.5, resample=1)
    assert again.prepare_image(image)[2] == made[0].prepare_image(image)[2]


def test_default_settings() -> None:
    assert ImageSettings.from_config({}) == ImageSettings(1456, None, 364, True, True, 1)
    with pytest.raises(ModelError, match="neither longest_edge nor height and width"):
        ImageSettings.from_config({"size": {"shortest_edge": 3}})


def tiles_of(side: int) -> dict[str, Any]:
    return IMAGE_SETTINGS | {"max_image_size": {"longest_edge": side}}


def test_tokens_per_frame(tmp_path: Path) -> None:
    without = processor(tmp_path / "a", {"processor_config.json": None})
    assert without.tokens_per_frame == processor(tmp_path / "b").tokens_per_frame == 4
    vision = {"image_size": 27, "patch_size": 2}  # 13 x 13 patches
    odd_files = {"processor_config.json": None, "preprocessor_config.json": tiles_of(27)}
    odd = processor(tmp_path / "c", odd_files, vision_config=vision, scale_factor=3)
    assert odd.tokens_per_frame == 18
    bare_files = {"processor_config.json": None, "preprocessor_config.json": tiles_of(224)}
    bare = processor(tmp_path / "d", bare_files, vision_config=None)
    assert bare.tokens_per_frame == (224 // 32) ** 2 // 4


def test_image_seq_len_that_is_not_the_towers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="says image_seq_len 5, but the vision tower gives 4") as caught:
        processor(tmp_path, {"processor_config.json": {"image_seq_len": 5}})
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("side", [8, 9])
def test_tiles_of_the_towers_patches(side: int, tmp_path: Path) -> None:
    assert processor(tmp_path, {"preprocessor_config.json": tiles_of(side)}).settings.tile == side


@pytest.mark.parametrize("side", [7, 10, 12, 364])
def test_tiles_that_are_not_the_towers(side: int, tmp_path: Path) -> None:
    words = f"tiles of {side} pixels are {side // 2} patches a side, but the vision tower takes 4"
    with pytest.raises(ModelError, match=words):
        processor(tmp_path, {"preprocessor_config.json": tiles_of(side)})


def test_image_token_that_is_not_the_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="says image_token_id 7, but the tokenizer's <image> is token 258"):
        processor(tmp_path / "a", image_token_id=7)
    write_checkpoint(tmp_path / "b")
    config = {name: value for name, value in CONFIG.items() if name != "image_token_id"}
    with pytest.raises(ModelError, match="says image_token_id 128257, but the tokenizer's <image> is token 258"):
        build(ProcessorFiles.read(tmp_path / "b", config))


def test_missing_marker_tokens_are_added(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_tokenizer(special=("<s>", "</s>")))
    made = build(ProcessorFiles.read(tmp_path, CONFIG | {"image_token_id": 259}))
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    assert [made.tokenizer.token_id(name) for name in names] == [258, 259, 260]
    assert made.image_token_id == 259
    assert made.tokenizer.decode([259, *made.tokenizer.encode("a", add_special_tokens=False), 260]) == "a"


@pytest.mark.parametrize("side", [4, 200])  # smaller and larger than what the tower sees of it
def test_other_pictures_of_one_size_have_other_digests(tmp_path: Path, side: int) -> None:
    prepare = processor(tmp_path).prepare_image
    digests = [prepare(Image.fromarray(noise(side, side, 3, seed=seed)))[2] for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
