"""Llama 4's parts against slow twins, its configs' defaults, and the layouts of its checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.kv_cache import KVGroup, KVPass, visible
from mlxvlm.families import family_of
from mlxvlm.models.llama4 import (
    Config,
    MixtureOfExperts,
    Model,
    TextConfig,
    VisionConfig,
    VisionModel,
    rotate_pairs,
    vision_rotations,
)
from mlxvlm.models.vit import attend, fused_padding, pixel_shuffle
from tests.checkpoint.layouts import logits, tensors_of, write_mlx
from tests.golden import GOLDENS, Case

NORMS, DENSE = GOLDENS / "llama4_norms", GOLDENS / "llama4_dense"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


class TestConfig:
    def test_published_defaults(self) -> None:
        text = TextConfig.from_dict({"no_rope_layers": [], "rope_scaling": None})
        assert text.has_rope == (True, True, True, False) * 12
        assert text.is_chunked == text.has_rope
        assert all(text.has_experts)
        assert [spec.chunk for spec in text.kv_specs[:4]] == [8192, 8192, 8192, None]
        assert (text.rope["rope_theta"], text.rms_norm_eps, text.head_dim) == (500000.0, 1e-5, 128)
        assert text.tunes_temperature
        assert text.use_qk_norm

    def test_every_second_layer_has_experts(self) -> None:
        text = TextConfig.from_dict({"interleave_moe_layer_step": 2, "num_hidden_layers": 4})
        assert text.has_experts == (False, True, False, True)

    def test_lists_go_before_intervals(self) -> None:
        lists = {"no_rope_layers": [0, 1, 1], "moe_layers": [0], "layer_types": ["full_attention"] * 3}
        text = TextConfig.from_dict({"num_hidden_layers": 3, **lists})
        assert text.has_rope == (False, True, True)
        assert text.has_experts == (True, False, False)
        assert text.is_chunked == (False, False, False)

    def test_saved_by_transformers_5(self) -> None:
        hub, resaved = (Config.from_dict(config_of(GOLDENS / name)) for name in ("llama4_norms", "llama4_resaved"))
        assert hub == resaved

    @pytest.mark.parametrize(
        ("part", "changes"),
        [
            ("text_config", {"no_rope_layers": [1, 1]}),
            ("text_config", {"attention_chunk_size": None}),
            ("text_config", {"num_experts_per_tok": 9}),
            ("vision_config", {"pixel_shuffle_ratio": 0.3}),
            ("vision_config", {"vision_output_dim": 13}),
            ("vision_config", {"intermediate_size": 48}),
            ("vision_config", {"num_attention_heads": 4}),
        ],
    )
    def test_nonsense_is_refused(self, part: str, changes: dict[str, Any]) -> None:
        config = copy.deepcopy(config_of(NORMS))
        config[part].update(changes)
        with pytest.raises(ValueError, match=r"\w+"):
            Config.from_dict(config)


class TestVision:
    def test_rotations_are_columns_then_rows(self) -> None:
        config = VisionConfig.from_dict(config_of(NORMS)["vision_config"])
        cos, sin = vision_rotations(config)
        pairs, grid = config.head_dim // 2, config.grid
        x = random(1, 1, grid * grid + 1, config.head_dim)
        turned = np.array(rotate_pairs(x, cos, sin))[0, 0]
        for index, row in enumerate(np.array(x)[0, 0]):
            for pair in range(pairs):
                position = index % grid if pair < pairs // 2 else index // grid
                frequency = config.rope_theta ** (-2 * (pair % (pairs // 2)) / (config.head_dim / 2))
                angle = 0.0 if index == grid * grid else (position + 1) * frequency
                expected = complex(row[2 * pair], row[2 * pair + 1]) * np.exp(1j * angle)
                found = complex(turned[index, 2 * pair], turned[index, 2 * pair + 1])
                assert abs(found - expected) < 1e-5, (index, pair)

    @pytest.mark.parametrize("device", [mx.cpu, mx.gpu], ids=["cpu", "gpu"])
    @pytest.mark.parametrize(("dims", "padding"), [(8, 56), (64, 0), (88, 8), (96, 0), (160, 0)])
    def test_padded_heads_change_nothing(
        self, dims: int, padding: int, device: mx.DeviceType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queries, keys, values = (random(2, 3, 17, dims, seed=seed) for seed in range(3))
        scores = mx.softmax(queries @ keys.swapaxes(-1, -2) * dims**-0.5, axis=-1)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
        assert fused_padding(dims) == (padding if device == mx.gpu else 0)
        assert mx.abs(attend(queries, keys, values) - scores @ values).max().item() < 1e-5

    def test_pixel_shuffle(self) -> None:
        x = np.array(random(2, 36, 5))
        found = np.array(pixel_shuffle(mx.array(x), 2))
        for y in range(3):
            for column in range(3):
                corners = [x[:, (2 * y + dy) * 6 + 2 * column + dx] for dy in (0, 1) for dx in (0, 1)]
                assert np.array_equal(found[:, y * 3 + column], np.concatenate(corners, axis=-1))

    def test_hidden_act_and_norm_eps_are_ignored(self) -> None:
        plain = VisionConfig.from_dict(config_of(DENSE)["vision_config"])
        other = VisionConfig.from_dict({**config_of(DENSE)["vision_config"], "hidden_act": "gelu", "norm_eps": 1e-5})
        assert plain == other
        tower = VisionModel(plain)
        assert {layer.eps for _, layer in tower.named_modules() if isinstance(layer, nn.LayerNorm)} == {1e-5}


class TestText:
    def test_temperature_counts_from_each_rows_own_offset(self) -> None:
        trunk = Case(NORMS).build().language_model.model
        batch = np.array(trunk.temperature(mx.array([0, 5, 40]), 3))[:, 0, :, 0]
        for row, offset in zip(batch, (0, 5, 40), strict=True):
            expected = [np.log1p((offset + i + 1) // 6) * 0.3 + 1 for i in range(3)]
            assert row == pytest.approx(expected, abs=1e-6)
            assert np.array_equal(np.array(trunk.temperature(offset, 3)).reshape(-1), row)

    @pytest.mark.parametrize("chosen", [1, 2])
    def test_router_scales_the_experts_input(self, chosen: int) -> None:
        config = {**config_of(NORMS)["text_config"], "num_experts_per_tok": chosen}
        block = MixtureOfExperts(TextConfig.from_dict(config))
        weights = [(k, random(*v.shape, seed=i)) for i, (k, v) in enumerate(tree_flatten(block.parameters()))]
        block.load_weights(weights)
        x = random(2, 3, 8, seed=9)
        found = block(x)
        for index in np.ndindex(2, 3):
            row = x[index]
            scores = np.array(block.router(row))
            total = block.shared_expert(row)
            for expert in np.argsort(-scores)[:chosen].tolist():
                scaled = row * mx.sigmoid(mx.array(scores[expert]))
                gate, up, down = (
                    getattr(block.experts, name).weight[expert] for name in ("gate_proj", "up_proj", "down_proj")
                )
                total = total + down @ (nn.silu(gate @ scaled) * (up @ scaled))
            assert mx.abs(found[index] - total).max().item() < 1e-4

    def test_norm_takes_the_configs_eps_and_only_where_positions_turn(self) -> None:
        layers = Case(NORMS).build().language_model.model.layers
        assert [layer.self_attn._norm_eps for layer in layers] == [1e-5, 1e-5, 1e-5, None]
        assert [layer.self_attn._tunes_temperature for layer in layers] == [False, False, False, True]
        assert {layer.self_attn._norm_eps for layer in Case(DENSE).build().language_model.model.layers} == {None}

    def test_small_queries_feel_the_eps(self) -> None:
        attention = Case(NORMS).build().language_model.model.layers[0].self_attn
        tiny = random(1, 4, 8) * 1e-3

        class Seen:
            offset = 3

            def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
                self.queries, self.keys = queries, keys
                return queries

        seen, rotate = Seen(), Case(NORMS).build().language_model.model._rope.at(Seen.offset)
        attention(tiny, rotate, seen)
        for found, projection in ((seen.queries, attention.q_proj), (seen.keys, attention.k_proj)):
            plain = projection(tiny).reshape(1, 4, -1, 6).swapaxes(1, 2)
            norms = plain.square().mean(axis=-1, keepdims=True)
            # RoPE keeps lengths, so a head's length tells its norm's eps.
            expected = (norms / (norms + 1e-5)).reshape(-1).tolist()
            assert found.square().mean(axis=-1).reshape(-1).tolist() == pytest.approx(expected, rel=1e-4)

    def test_chunks_are_those_of_each_rows_own_positions(self) -> None:
        spec = Config.from_dict(config_of(NORMS)).text.kv_specs[0]
        mask = np.array(visible([3, 12], 1, spec))[:, 0, 0]
        assert np.flatnonzero(mask[0]).tolist() == [0, 1, 2, 3]
        assert np.flatnonzero(mask[1]).tolist() == [11, 12]


def in_half(name: str) -> tuple[Model, Any]:
    source = Case(NORMS).open()
    return source.build(LoadOptions(name), lambda done, total: None), source


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_nothing_leaves_the_weights_dtype(name: str) -> None:
    model, source = in_half(name)
    dtype = getattr(mx, name)
    prompt = source.processor(Case(NORMS).messages("two_images"))
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    group = KVGroup.single(model.kv_specs, 0)
    hidden = model(inputs, KVPass([group], len(prompt.token_ids)).layers)
    found = {array.dtype for array in (*features, inputs.embeds, hidden, model.logits(hidden), *group.arrays)}
    assert found == {dtype}


class TestLayouts:
    def mlx_tensors(self) -> dict[str, mx.array]:
        """As MLX-community conversions store them: gate and up apart, [E, out, in], with `.weight`."""
        stored = {}
        for name, array in tensors_of(NORMS).items():
            path, _, leaf = name.rpartition(".")
            if leaf == "gate_up_proj":
                gate, up = (np.array(part.astype(mx.float32)) for part in mx.split(array, 2, axis=-1))
                stored[f"{path}.gate_proj.weight"] = mx.array(gate.transpose(0, 2, 1))
                stored[f"{path}.up_proj.weight"] = mx.array(up.transpose(0, 2, 1))
            elif leaf == "down_proj" and path.endswith(".experts"):
                down = np.array(array.astype(mx.float32))
                stored[f"{path}.down_proj.weight"] = mx.array(down.transpose(0, 2, 1))
            else:
                stored[name] = array
        return stored

    def test_mlx_names(self, tmp_path: Path) -> None:
        folder = write_mlx(tmp_path / "m", NORMS, self.mlx_tensors())
        assert np.array_equal(logits(folder, NORMS), logits(NORMS, NORMS))

    @pytest.mark.parametrize("folder", [NORMS, DENSE], ids=lambda folder: folder.name)
    def test_sanitize_twice_is_once(self, folder: Path) -> None:
        model = family_of(config_of(folder)).build_model(config_of(folder))
        once = model.sanitize(read_weights(folder))
        twice = model.sanitize(dict(once))
        assert once.keys() == twice.keys() == dict(tree_flatten(model.parameters())).keys()
        assert all(once[name] is twice[name] for name in once)

    def test_old_buffers_are_dropped(self) -> None:
        model = family_of(config_of(NORMS)).build_model(config_of(NORMS))
        names = ("language_model.model.rotary_emb.inv_freq", "vision_model.rotary_embedding.freqs_ci")
        assert model.sanitize({name: mx.zeros(3) for name in names}) == {}
