"""Positions, pixel shuffle and merging of Idefics3 against slow twins."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.models.base import merge_features
from mlxvlm.models.idefics3 import VISION_DEFAULTS, Config, Connector, VisionEmbeddings, position_buckets
from mlxvlm.models.vit import VisionConfig
from mlxvlm.processors.base import PreparedImage, Prompt
from tests.golden import GOLDENS

POSITIONS = json.loads((GOLDENS / "position_ids.json").read_text())
IMAGE = 9


DEVICE_DEPENDENT = {(grid, count) for grid, count, _ in POSITIONS["differs_from_floor"]}


@pytest.mark.parametrize("grid", [int(side) for side in POSITIONS["full"]])
def test_positions_of_a_full_row(grid: int) -> None:
    found = position_buckets(grid, grid)
    assert found.dtype == np.int32
    assert found.tolist() == list(range(grid))
    if (grid, grid) not in DEVICE_DEPENDENT:
        assert found.tolist() == POSITIONS["full"][str(grid)]


@pytest.mark.parametrize("grid", [16, 24, 26, 27, 32, 36])
def test_published_grids_are_among_the_certain_ones(grid: int) -> None:
    assert not {pair for pair in DEVICE_DEPENDENT if pair[0] == grid}


def test_positions_of_partial_rows() -> None:
    for grid in range(1, 41):
        for count in range(1, grid + 1):
            assert position_buckets(count, grid).tolist() == [int(i * grid / count) for i in range(count)]


def test_embeddings_add_the_position_of_row_and_column() -> None:
    small = {"hidden_size": 4, "num_attention_heads": 2, "image_size": 6, "patch_size": 2}
    embeddings = VisionEmbeddings(VisionConfig.from_dict(small, VISION_DEFAULTS))
    pixels = mx.random.normal((2, 6, 6, 3))
    found = np.array(embeddings(pixels))
    patches, table = np.array(embeddings.patch_embedding(pixels)), np.array(embeddings.position_embedding.weight)
    for row in range(3):
        for column in range(3):
            index = row * 3 + column
            np.testing.assert_allclose(found[:, index], patches[:, row, column] + table[index], atol=1e-6)


@pytest.mark.parametrize(("side", "scale"), [(4, 2), (6, 3), (8, 4), (27, 3), (2, 2)])
def test_pixel_shuffle(side: int, scale: int) -> None:
    vision = {"hidden_size": 2, "num_attention_heads": 1, "image_size": side, "patch_size": 1}
    text = {"hidden_size": 4, "num_attention_heads": 2, "vocab_size": 8}
    connector = Connector(Config.from_dict({"vision_config": vision, "text_config": text, "scale_factor": scale}))
    connector.modality_projection.proj = lambda x: x
    x = np.random.default_rng(0).standard_normal((2, side * side, 2)).astype(np.float32)
    found = np.array(connector(mx.array(x)))
    small = side // scale
    assert found.shape == (2, small * small, scale * scale * 2)
    for row in range(small):
        for column in range(small):
            block = [
                x[:, (scale * row + down) * side + scale * column + right]
                for down in range(scale)
                for right in range(scale)
            ]
            assert np.array_equal(found[:, row * small + column], np.concatenate(block, axis=-1))


def prompt_of(ids: list[int], *spans: tuple[int, int]) -> Prompt:
    pixels = np.zeros((1, 3, 2, 2), np.float32)
    return Prompt(tuple(ids), tuple(PreparedImage(pixels, (1, 1), span, b"digest") for span in spans))


class TestMerging:
    IDS = (1, 7, IMAGE, IMAGE, 8, IMAGE, 2, IMAGE, 3)

    def test_rows_go_to_the_placeholders_in_order(self) -> None:
        """Markers inside a span stay; an image token outside of every span is just a token."""
        embeds = mx.zeros((1, 9, 2))
        first, second = mx.array([[1.0, 1], [2, 2], [3, 3]]), mx.array([[4.0, 4]])
        merged = merge_features(embeds, prompt_of([*self.IDS], (1, 6), (7, 8)), IMAGE, [first, second])
        assert merged[0, :, 0].tolist() == [0, 0, 1, 2, 0, 3, 0, 4, 0]
        outside = merge_features(mx.zeros((1, 9, 2)), prompt_of([*self.IDS], (1, 6)), IMAGE, [first])
        assert outside[0, :, 0].tolist() == [0, 0, 1, 2, 0, 3, 0, 0, 0]

    def test_features_take_the_dtype_of_the_embeddings(self) -> None:
        merged = merge_features(
            mx.zeros((1, 2, 2), mx.bfloat16), prompt_of([IMAGE, 1], (0, 1)), IMAGE, [mx.ones((1, 2))]
        )
        assert merged.dtype == mx.bfloat16

    def test_text_alone(self) -> None:
        embeds = mx.ones((1, 2, 2))
        assert merge_features(embeds, prompt_of([IMAGE, 1]), IMAGE, []) is embeds

    @pytest.mark.parametrize("rows", [0, 2, 4])
    def test_counts_must_match(self, rows: int) -> None:
        with pytest.raises(ValueError, match=f"{rows} image features for 3 placeholders"):
            merge_features(mx.zeros((1, 9, 2)), prompt_of([*self.IDS], (1, 6)), IMAGE, [mx.zeros((rows, 2))])

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_every_image_needs_its_features(self, count: int) -> None:
        features = [mx.zeros((2, 2)), mx.zeros((1, 2)), mx.zeros((1, 2))][:count]
        with pytest.raises(ValueError, match="zip"):
            merge_features(mx.zeros((1, 9, 2)), prompt_of([*self.IDS], (2, 4), (5, 6)), IMAGE, features)
