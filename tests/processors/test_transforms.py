"""Pixel arithmetic against slow, obvious twins, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.processors import transforms
from mlxvlm.processors.transforms import (
    RESCALE_FACTOR,
    Normalizer,
    cut,
    floats,
    positive,
    resample_of,
    resize,
    resize_both,
)
from tests.processors.pictures import noise

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
ODD = ((0.1, -3.0, 1e-7), (1e3, 0.3, 7.0))


def slow_normalize(pixels: np.ndarray, settings: Normalizer) -> np.ndarray:
    """[H, W, C] uint8 -> [C, H, W]: the reference's own order and precision of each operation."""
    values = pixels
    if settings.do_rescale:
        values = values.astype(np.float64) * settings.rescale_factor
    values = values.astype(np.float32)
    if settings.do_normalize:
        values = (values - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return values.transpose(2, 0, 1)


@pytest.mark.parametrize(("mean", "std"), [HALF, CLIP, ODD], ids=["half", "clip", "odd"])
@pytest.mark.parametrize("factor", [RESCALE_FACTOR, 1 / 256, 0.3])
@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_normalizer(
    mean: tuple[float, ...], std: tuple[float, ...], factor: float, do_rescale: bool, do_normalize: bool
) -> None:
    settings = Normalizer(mean, std, factor, do_rescale, do_normalize)
    pixels = np.concatenate([np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, 2), noise(256, 1, 3)], axis=1)
    result = settings(pixels.transpose(2, 0, 1)[None])
    assert result.dtype == np.float32
    assert result.shape == (1, 3, 256, 2)
    assert result.flags.c_contiguous
    assert np.array_equal(result[0], slow_normalize(pixels, settings))


def test_half_spans_minus_one_to_one() -> None:
    result = Normalizer(*HALF)(np.array([0, 255, 0], np.uint8).reshape(1, 3, 1, 1))
    assert result.reshape(-1).tolist() == [-1.0, 1.0, -1.0]


def test_the_key_tells_settings_apart() -> None:
    base = Normalizer(*CLIP)
    assert base.key == Normalizer(*CLIP).key
    others = [
        Normalizer(HALF[0], CLIP[1]),
        Normalizer(CLIP[0], HALF[1]),
        Normalizer(*CLIP, rescale_factor=0.5),
        Normalizer(*CLIP, do_rescale=False),
        Normalizer(*CLIP, do_normalize=False),
    ]
    assert len({settings.key for settings in [base, *others]}) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.mean = (0.0,)  # type: ignore[misc]


@given(*[st.integers(1, 4) for _ in range(4)])
def test_tiles_are_the_picture_cut(rows: int, columns: int, height: int, width: int) -> None:
    pixels = noise(rows * height, columns * width, 3)
    tiles = np.full((rows * columns + 1, 3, height, width), 7, np.uint8)
    assert np.shares_memory(cut(Image.fromarray(pixels), rows, columns, tiles[:-1]), tiles)
    for index, tile in enumerate(tiles[:-1]):
        top, left = index // columns * height, index % columns * width
        assert np.array_equal(tile, pixels[top : top + height, left : left + width].transpose(2, 0, 1))
    assert (tiles[-1] == 7).all()
    assert np.array_equal(cut(Image.fromarray(pixels), rows, columns), tiles[:-1])


@pytest.mark.parametrize("at_once", [1, 24, 60, 1 << 18])
def test_frames_are_normalised_some_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "CACHED", at_once)
    settings = Normalizer(*CLIP)
    frames = noise(5 * 3, 2, 4).reshape(5, 3, 2, 4)
    out = np.full((6, 3, 2, 4), 7, np.float32)
    assert np.shares_memory(settings(frames, out[:-1]), out)
    expected = [slow_normalize(frame.transpose(1, 2, 0), settings) for frame in frames]
    assert np.array_equal(out[:-1], np.stack(expected))
    assert (out[-1] == 7).all()


def test_two_sizes_of_a_picture() -> None:
    image = Image.fromarray(noise(40, 30, 3))
    expected = [resize(image, 7, 9, 3), resize(image, 31, 20, 3)]
    for result, alone in zip(resize_both(image, (7, 9), (31, 20), 3), expected, strict=True):
        assert np.array_equal(np.asarray(result), np.asarray(alone))


def test_resize_leaves_a_picture_of_that_size_alone() -> None:
    image = Image.fromarray(noise(4, 6, 3))
    assert resize(image, 4, 6, 1) is image
    assert resize(image, 6, 4, 1) is not image
    assert resize(image, 6, 4, 1).size == (4, 6)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_resize_filter(resample: int) -> None:
    image = Image.fromarray(noise(9, 7, 3))
    expected = np.asarray(image.resize((12, 5), resample))
    assert np.array_equal(np.asarray(resize(image, 5, 12, resample)), expected)


def test_floats() -> None:
    assert floats(0.5) == (0.5, 0.5, 0.5)
    assert floats(1, 2) == (1.0, 1.0)
    assert floats([1, 2.5]) == (1.0, 2.5)


@pytest.mark.parametrize("values", ["0.5", None, True, ["0.5"] * 3, [0.5, None, 0.5], {"r": 1}, float("nan")])
def test_floats_that_are_none(values: Any) -> None:
    with pytest.raises(ValueError, match="given for the colour channels, not 3 numbers"):
        floats(values)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5,)}, "image_mean is .*, not 3 numbers"),
        ({"mean": (0.5, 0.5, "x")}, "image_mean"),
        ({"std": (0.5,) * 4}, "image_std is .*, not 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "image_std is .*divided by it"),
        ({"std": (0.5, float("inf"), 0.5)}, "image_std"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', not a number"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"rescale_factor": True}, "rescale_factor"),
    ],
)
def test_normalizer_that_can_not_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Normalizer(**{"mean": HALF[0], "std": HALF[1]} | settings)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None, True, [8], float("nan")])
def test_positive(value: Any) -> None:
    assert positive(8, "size") == 8
    with pytest.raises(ValueError, match=r"the image processor's size is .*, no positive whole number"):
        positive(value, "size")


@pytest.mark.parametrize("value", [99, -1, 1.0, "1", None, True, [1]])
def test_resample_of(value: Any) -> None:
    assert [resample_of({"resample": number}, 3) for number in range(6)] == list(range(6))
    assert type(resample_of({}, Image.Resampling.BICUBIC)) is int
    with pytest.raises(ValueError, match=r"resample is .*, no number of a Pillow filter"):
        resample_of({"resample": value}, 3)


@pytest.mark.parametrize("cached", [1, 5, 36, 100, 108, 250, 1 << 13])
def test_pieces_are_the_whole(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames smaller and larger than what is looked up at once."""
    monkeypatch.setattr(transforms, "CACHED", cached)
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 6)).astype(np.uint8)
    normalizer = transforms.Normalizer((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), rescale_factor=0.01)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalizer.mean, normalizer.std))
    expected = ((frames * 0.01).astype(np.float32) - mean) / std
    into = np.empty(frames.shape, np.float32)
    assert np.array_equal(normalizer(frames), expected)
    assert np.array_equal(normalizer(frames, into), expected)
    assert np.array_equal(into, expected)
