"""Qwen2-VL's model: positions, rotations, batching of pictures, layouts, configs. Logits: tests/test_parity.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.models.base import RowState
from mlxvlm.models.qwen2_vl import Config, Model, PatchEmbed, VisionConfig, build, mrope_positions, patch_coordinates
from mlxvlm.models.rope import MRoPE
from mlxvlm.processors.base import PreparedImage, Prompt
from tests.checkpoint.layouts import Tensors, config_of, dequantised, logits, quantised, tensors_of, write, write_mlx
from tests.golden import GOLDENS, Case

TIED, WINDOW = GOLDENS / "qwen2_vl_tied", GOLDENS / "qwen2_vl_window"
KERNEL = "patch_embed.proj.weight"
SAME = 1e-6
MERGE = 2


def prompt_of(layout: list[Any]) -> Prompt:
    """Runs of text tokens and (rows, columns) of merged patches."""
    ids: list[int] = []
    images = []
    for run in layout:
        if isinstance(run, int):
            ids += [0] * run
            continue
        rows, columns = run
        span = (len(ids), len(ids) + rows * columns)
        images.append(PreparedImage(np.zeros(0, np.float32), (MERGE * rows, MERGE * columns), span, b""))
        ids += [1] * (rows * columns)
    return Prompt(tuple(ids), tuple(images))


def slow_positions(layout: list[Any]) -> tuple[list[list[int]], int]:
    axes: list[list[int]] = [[], [], []]
    start = 0
    for run in layout:
        cells = [(i, i, i) for i in range(run)] if isinstance(run, int) else []
        if not isinstance(run, int):
            cells = [(0, row, column) for row in range(run[0]) for column in range(run[1])]
        for cell in cells:
            for axis, value in zip(axes, cell, strict=True):
                axis.append(start + value)
        start += run if isinstance(run, int) else max(run)
    return axes, start - len(axes[0])


@pytest.mark.parametrize("entry", json.loads((GOLDENS / "mrope_positions.json").read_text()))
def test_positions_are_the_references(entry: dict[str, Any]) -> None:
    positions, delta = mrope_positions(prompt_of(entry["layout"]), MERGE)
    assert positions.tolist() == entry["positions"]
    assert delta == entry["delta"]


TEXTS = st.integers(1, 9)
GRIDS = st.tuples(st.integers(1, 30), st.integers(1, 30)) | st.sampled_from([(1, 180), (180, 1)])


@given(st.lists(TEXTS | GRIDS, min_size=1, max_size=9))
def test_positions_equal_the_slow_twin(layout: list[Any]) -> None:
    positions, delta = mrope_positions(prompt_of(layout), MERGE)
    assert (positions.tolist(), delta) == slow_positions(layout)
    assert positions.dtype == np.int32


def test_text_rotates_as_plain_rope() -> None:
    rope = MRoPE(12, {"rope_type": "mrope", "rope_theta": 10000.0}, (1, 3, 2))
    x = mx.random.normal((2, 3, 5, 12), key=mx.random.key(0))
    counted = rope.at(mx.array([7, 900]))(x)
    positions = mx.broadcast_to(mx.array([[7], [900]]) + mx.arange(5), (3, 2, 5))
    assert mx.abs(rope.at_positions(positions)(x) - counted).max().item() < 1e-4  # angles of 900 in float32


def test_each_frequency_reads_its_own_axis() -> None:
    rope = MRoPE(12, {"rope_type": "default", "rope_theta": 100.0}, (1, 3, 2))
    x = np.array(mx.random.normal((1, 1, 4, 12), key=mx.random.key(1)))
    positions = np.array([[[0, 1, 2, 3]], [[0, 5, 6, 7]], [[0, 9, 8, 4]]], np.int32)
    expected = np.empty_like(x)
    for token in range(4):
        for pair, axis in enumerate([0, 1, 1, 1, 2, 2]):
            angle = positions[axis, 0, token] * 100.0 ** (-2 * pair / 12)
            first, second = x[0, 0, token, pair], x[0, 0, token, pair + 6]
            expected[0, 0, token, pair] = first * np.cos(angle) - second * np.sin(angle)
            expected[0, 0, token, pair + 6] = second * np.cos(angle) + first * np.sin(angle)
    found = np.array(rope.at_positions(mx.array(positions))(mx.array(x)))
    assert np.abs(found - expected).max() < 1e-5


def test_sections_must_cover_the_head() -> None:
    with pytest.raises(ValueError, match="does not cover 6 frequencies"):
        MRoPE(12, {"rope_type": "default", "rope_theta": 100.0}, (2, 2, 3))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_coordinates_follow_the_order_of_the_patches(rows: int, columns: int, merge: int) -> None:
    expected = [
        (row * merge + y, column * merge + x)
        for row in range(rows)
        for column in range(columns)
        for y in range(merge)
        for x in range(merge)
    ]
    assert patch_coordinates(rows * merge, columns * merge, merge).tolist() == [list(cell) for cell in expected]


def test_patch_projection_is_the_convolution() -> None:
    embed = PatchEmbed(VisionConfig(embed_dim=16, num_heads=2, patch_size=5, temporal_patch_size=3))
    embed.proj.weight = mx.random.normal(embed.proj.weight.shape, key=mx.random.key(2))
    patches = mx.random.normal((2, 4, 3, 5, 5), key=mx.random.key(3))
    film = mx.repeat(patches.reshape(8, 3, 1, 5, 5), 3, axis=2).transpose(0, 2, 3, 4, 1)
    expected = mx.conv3d(film, embed.proj.weight.transpose(0, 2, 3, 4, 1), stride=(3, 5, 5)).reshape(2, 4, 16)
    assert mx.abs(embed(patches) - expected).max().item() < 1e-4


@pytest.fixture(scope="module")
def tied() -> tuple[Case, Model]:
    case = Case(TIED)
    model = case.build()
    assert isinstance(model, Model)
    return case, model


def test_pictures_of_any_grids_together_equal_each_alone(tied: tuple[Case, Model]) -> None:
    case, model = tied
    processor = case.open().processor
    images = [
        image
        for scenario in ("one_wide", "one_rgba", "one_tall", "one_wide", "one_tiny", "one_rgba")
        for image in processor(case.messages(scenario)).images
    ]
    together = model.encode_images(images)
    for image, features in zip(images, together, strict=True):
        assert features.shape == (image.span[1] - image.span[0], 16)
        assert mx.abs(features - model.encode_images([image])[0]).max().item() < SAME


def test_a_batch_calls_the_tower_once_a_grid(tied: tuple[Case, Model]) -> None:
    case, model = tied
    calls: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.merger = inner.merger
            self._inner = inner

        def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
            calls.append((patches.shape[0], *grid))
            return self._inner(patches, grid)

    processor = case.open().processor
    wide, tall = (processor(case.messages(name)).images[0] for name in ("one_wide", "one_tall"))
    original, model.visual = model.visual, Spy(model.visual)
    try:
        model.encode_images([wide, tall, wide])
    finally:
        model.visual = original
    assert calls == [(2, *wide.layout), (1, *tall.layout)]


def test_decoding_counts_on_from_each_rows_pictures(tied: tuple[Case, Model]) -> None:
    """A token after a picture, read by decode, is where prefill would have put it."""
    case, model = tied
    prompt = case.open().processor(case.messages("multi_turn"))
    inputs = model.embed_prompt(prompt, model.encode_images(prompt.images))
    assert inputs.rows[0].position_delta < 0

    def last(step: Any) -> mx.array:
        group = KVGroup.single(model.kv_specs, 0)
        forward = KVPass([group], len(prompt.token_ids) - 1)
        model(inputs[: len(prompt.token_ids) - 1], forward.layers)
        forward.commit()
        return model(step, KVPass([group], 1).layers)

    token = mx.array([[prompt.token_ids[-1]]])
    whole = last(inputs[len(prompt.token_ids) - 1 :])
    assert mx.abs(last(model.embed_tokens(token, inputs.rows)) - whole).max().item() < 1e-5
    assert mx.abs(last(model.embed_tokens(token, [RowState()])) - whole).max().item() > 1e-2


def test_text_needs_neither_positions_nor_state(tied: tuple[Case, Model]) -> None:
    inputs = tied[1].embed_prompt(Prompt((1, 2, 3)), [])
    assert inputs.positions is None
    assert inputs.rows == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_stays_in_the_weights_dtype(dtype: str) -> None:
    case = Case(TIED)
    source = case.open()
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    prompt = source.processor(case.messages("one_wide"))
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    group = KVGroup.single(model.kv_specs, 0)
    forward = KVPass([group], len(prompt.token_ids))
    hidden = model(inputs, forward.layers)
    arrays = [*features, inputs.embeds, hidden, *group.arrays]
    assert {str(array.dtype) for array in arrays} == {f"mlx.core.{dtype}"}
    assert inputs.positions.dtype == mx.int32


class TestConfig:
    FLAT = config_of(TIED)

    def test_nested_is_flat(self) -> None:
        nested, flat = Config.from_dict(config_of(GOLDENS / "qwen2_vl_resaved")), Config.from_dict(self.FLAT)
        assert (nested.vision, nested.mrope_section, nested.windows) == (flat.vision, flat.mrope_section, flat.windows)
        assert nested.tie_word_embeddings
        assert nested.text.rope["rope_theta"] == flat.text.rope["rope_theta"] == 20000.0

    def test_a_tie_that_only_the_text_config_names(self) -> None:
        config = config_of(GOLDENS / "qwen2_vl_resaved")
        del config["tie_word_embeddings"]
        for tie in (True, False):
            config["text_config"]["tie_word_embeddings"] = tie
            assert Config.from_dict(config).tie_word_embeddings == tie

    def test_nested_text_wins_over_leftovers_at_the_root(self) -> None:
        config = config_of(GOLDENS / "qwen2_vl_resaved")
        assert Config.from_dict({**config, "hidden_size": 999, "vocab_size": 7}).text.hidden_size == 16

    def test_defaults_are_the_references(self) -> None:
        config = Config.from_dict({"vision_config": {"hidden_size": 8192}})
        text, vision = config.text, config.vision
        assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (8192, 80, 8)
        assert (text.rms_norm_eps, text.rope["rope_theta"], text.vocab_size) == (1e-5, 1e6, 152064)
        assert (text.attention_bias, text.output_bias, text.mlp_bias) == (True, False, False)
        assert (config.mrope_section, config.image_token_id) == ((16, 24, 24), 151655)
        assert (vision.depth, vision.embed_dim, vision.hidden_act, vision.rope_theta) == (32, 1280, "quick_gelu", 1e4)
        assert not config.tie_word_embeddings

    @pytest.mark.parametrize(
        ("changes", "windows"),
        [
            ({}, (None, None)),  # use_sliding_window is false
            ({"use_sliding_window": True}, (None, 8)),
            ({"use_sliding_window": True, "max_window_layers": 0}, (8, 8)),
            ({"use_sliding_window": True, "max_window_layers": 2}, (None, None)),
            ({"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
            ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None)),
        ],
    )
    def test_windows(self, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
        model = build({**self.FLAT, **changes})
        assert tuple(spec.window for spec in model.kv_specs) == windows

    @pytest.mark.parametrize("kind", [{"type": "mrope"}, {"rope_type": "mrope"}, {"type": "default"}, {}])
    def test_the_section_counts_not_the_type(self, kind: dict[str, str]) -> None:
        config = Config.from_dict({**self.FLAT, "rope_scaling": {**kind, "mrope_section": [1, 2, 1]}})
        build({**self.FLAT, "rope_scaling": {**kind, "mrope_section": [1, 2, 1]}})
        assert config.mrope_section == (1, 2, 1)

    @pytest.mark.parametrize(
        "changes",
        [
            {"vision_config": {**FLAT["vision_config"], "hidden_size": 17}},
            {"vision_config": {**FLAT["vision_config"], "num_heads": 3}},
            {"layer_types": ["full_attention"]},
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}},
            {"num_hidden_layers": 0},
        ],
    )
    def test_nonsense_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"."):
            build({**self.FLAT, **changes})


def hub_to_memory(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def hub_to_mlx(name: str) -> str:
    if name.startswith("visual."):
        return name.replace("visual.", "vision_tower.", 1)
    return f"language_model.{name}"


def mlx_layout(tensors: Tensors) -> Tensors:
    return {
        hub_to_mlx(name): array.transpose(0, 2, 3, 4, 1) if name.endswith(KERNEL) else array
        for name, array in tensors.items()
    }


@pytest.mark.parametrize("golden", [TIED, WINDOW], ids=lambda golden: golden.name)
class TestLayouts:
    def test_in_memory_names(self, golden: Path, tmp_path: Path) -> None:
        tensors = {hub_to_memory(name): array for name, array in tensors_of(golden).items()}
        assert np.array_equal(logits(write(tmp_path / "m", golden, tensors), golden), logits(golden, golden))

    def test_mlx_names(self, golden: Path, tmp_path: Path) -> None:
        folder = write_mlx(tmp_path / "m", golden, mlx_layout(tensors_of(golden)))
        assert np.array_equal(logits(folder, golden), logits(golden, golden))

    def test_tied_ignores_a_stored_head_and_all_ignore_buffers(self, golden: Path, tmp_path: Path) -> None:
        tensors = tensors_of(golden)
        tensors["model.rotary_emb.inv_freq"] = mx.ones((4,))
        if golden == TIED:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
        assert np.array_equal(logits(write(tmp_path / "m", golden, tensors), golden), logits(golden, golden))

    @pytest.mark.parametrize("layout", ["hub", "memory", "mlx"])
    def test_sanitize_twice_is_once(self, golden: Path, layout: str) -> None:
        tensors = tensors_of(golden)
        if layout == "memory":
            tensors = {hub_to_memory(name): array for name, array in tensors.items()}
        if layout == "mlx":
            tensors = mlx_layout(tensors)
        model = build(config_of(golden))
        once = model.sanitize(dict(tensors))
        twice = model.sanitize(dict(once))
        assert {name: array.shape for name, array in once.items()} == {
            name: array.shape for name, array in tree_flatten(model.parameters())
        }
        assert list(twice) == list(once)
        assert all(mx.array_equal(twice[name], array) for name, array in once.items())


def wide_model() -> tuple[dict[str, Any], Tensors]:
    """A checkpoint whose layers can all be quantised in groups of 32: config, tensors in MLX-community's layout."""
    config = {
        **config_of(TIED),
        "hidden_size": 64,
        "intermediate_size": 32,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
    }
    config["vision_config"] = {**config["vision_config"], "embed_dim": 32, "hidden_size": 64}
    key = mx.random.key(5)
    tensors = {
        name: mx.random.normal(array.shape, key=mx.random.split(key, index + 2)[index]) * 0.2
        for index, (name, array) in enumerate(tree_flatten(build(config).parameters()))
    }
    return config, mlx_layout(tensors)


@pytest.mark.parametrize("vision", [False, True], ids=["text", "everything"])
def test_quantised_equals_dequantised(vision: bool, tmp_path: Path) -> None:
    config, plain = wide_model()
    packed, specs = quantised(
        plain, lambda path, _: QuantSpec(4, 32) if vision or path.startswith("language_model.") else None
    )
    assert any("merger.mlp.2" in path for path in specs) == vision
    fast = logits(write_mlx(tmp_path / "fast", TIED, packed, config), TIED)
    slow = logits(write_mlx(tmp_path / "slow", TIED, dequantised(packed, specs), config), TIED)
    assert np.abs(fast - slow).max() <= 1e-4
    assert np.abs(fast - logits(write_mlx(tmp_path / "plain", TIED, plain, config), TIED)).max() > 1e-2


def test_a_hub_kernel_that_could_be_either_layout_stays() -> None:
    """Three frames, patches of three: only the hub's order, which is ours, is taken for granted."""
    config = config_of(TIED)
    config["vision_config"] = {**config["vision_config"], "temporal_patch_size": 3, "patch_size": 3}
    kernel = mx.arange(8 * 81).reshape(8, 3, 3, 3, 3)
    assert mx.array_equal(build(config).sanitize({f"visual.{KERNEL}": kernel})[f"visual.{KERNEL}"], kernel)
