"""Llama 3.2 Vision's clever paths against slow obvious twins, and what each known mistake would change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions, ModelSource
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.models import mllama
from mlxvlm.models.base import Inputs, RowState
from mlxvlm.models.layers import join_heads, split_heads
from mlxvlm.models.mllama import Config, Model, VisionAttention, VisionConfig, build, visible_images
from mlxvlm.processors.base import Prompt
from tests.golden import GOLDENS, Case

TABLE: dict[str, Any] = json.loads((GOLDENS / "tiles.json").read_text())
CASE = Case(GOLDENS / "mllama_tiles")
CLOSE = 2e-5
IMAGE_CASES = ("one_wide", "two_images", "text_first", "multi_turn")


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return CASE.open()


@pytest.fixture(scope="module")
def model() -> Model:
    built = CASE.build()
    assert isinstance(built, Model)
    return built


def prompt_of(source: ModelSource, scenario: str) -> Prompt:
    return source.processor(CASE.messages(scenario), CASE.template)


def side_by_side(source: ModelSource) -> Prompt:
    """Text, two pictures next to each other, text, a third one, text."""
    images = [ImagePart(GOLDENS / "images" / f"{name}.png") for name in ("wide", "tiny", "tall")]
    parts = (TextPart("Look:"), *images[:2], TextPart(" and "), images[2], TextPart(" so?"))
    return source.processor([Message("user", parts)], CASE.template)


def whole(model: Model, inputs: Inputs) -> mx.array:
    return model(inputs, KVPass([KVGroup.single(model.kv_specs, 0)], inputs.embeds.shape[1]).layers)


def embedded(model: Model, prompt: Prompt) -> Inputs:
    return model.embed_prompt(prompt, model.encode_images(prompt.images) if prompt.images else [])


# What tokens see


def test_visible_images_equal_the_reference() -> None:
    for ids, seen in zip(TABLE["prompts"], TABLE["seen"], strict=True):
        starts = [index for index, token in enumerate(ids) if token == 9]
        assert [np.flatnonzero(row).tolist() for row in visible_images(starts, len(ids))] == seen, ids


@pytest.mark.parametrize("scenario", IMAGE_CASES)
def test_sees_equals_the_references_mask(source: ModelSource, model: Model, scenario: str) -> None:
    sees = np.array(embedded(model, prompt_of(source, scenario)).sees)
    assert np.array_equal(sees, CASE.arrays[f"{scenario}/cross_attention_mask"].any(-1))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_token_sees_the_last_group_of_pictures_before_it(is_image: list[bool]) -> None:
    starts = [index for index, image in enumerate(is_image) if image]
    sees = visible_images(starts, len(is_image))
    for place in range(len(is_image)):
        before = [start for start in starts if start <= place]
        group = before[-1:]
        while group and group[0] - 1 in before:
            group.insert(0, group[0] - 1)
        assert [starts[image] for image in np.flatnonzero(sees[place])] == group


# The tower


class DenseAttention:
    """The reference's way: patches in their own order, and a mask of all pairs."""

    def __init__(self, is_padding: np.ndarray) -> None:
        order = np.argsort(is_padding, kind="stable")
        self.order, self.back = mx.array(order), mx.array(np.argsort(order))
        self.mask = mx.array(~(is_padding[:, None] & is_padding[None, :]))

    def __call__(self, attention: VisionAttention, x: mx.array, real: int) -> mx.array:
        x = x[:, self.back]
        queries, keys, values = (split_heads(getattr(attention, f"{name}_proj")(x), attention._heads) for name in "qkv")
        scores = attention._scale * queries @ keys.transpose(0, 1, 3, 2)
        weights = mx.softmax(mx.where(self.mask, scores, -mx.inf), axis=-1)
        return attention.o_proj(join_heads(weights @ values))[:, self.order]


@pytest.mark.parametrize("scenario", ["one_wide", "one_tall", "one_tiny", "one_rgba"])
def test_tower_equals_a_dense_mask(
    source: ModelSource, model: Model, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = prompt_of(source, scenario).images[0]
    tiles, patches, padded = image.layout[0] * image.layout[1], 10, 16
    features = model.encode_images([image])[0]
    assert features.shape == (tiles * patches, 16)
    places = np.arange(4 * padded)
    dense = DenseAttention((places // padded >= tiles) | (places % padded >= patches))
    monkeypatch.setattr(VisionAttention, "__call__", lambda self, x, real: dense(self, x, real))
    assert np.abs(np.array(features - model.encode_images([image])[0])).max() < CLOSE


def test_real_patches_see_padding(source: ModelSource, model: Model) -> None:
    """So a tile that is not there still counts inside the tower."""
    image = prompt_of(source, "one_tiny").images[0]
    assert image.layout == (1, 1)
    pixels = mx.array(image.pixels.transpose(0, 2, 3, 1))
    other = mx.concatenate([pixels[:3], pixels[3:] + 1.0])
    shown = model.vision_model(pixels, image.layout)
    assert float(mx.abs(shown - model.vision_model(other, image.layout)).max()) > 1e-3


def test_kept_layers_lie_side_by_side(source: ModelSource, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    image = prompt_of(source, "one_wide").images[0]
    outputs: list[list[mx.array]] = []
    encoder = mllama.Encoder.__call__

    def spy(self: mllama.Encoder, x: mx.array, real: int) -> list[mx.array]:
        outputs.append(encoder(self, x, real))
        return outputs[-1]

    monkeypatch.setattr(mllama.Encoder, "__call__", spy)
    states = model.vision_model(mx.array(image.pixels.transpose(0, 2, 3, 1)), image.layout)
    local, last = outputs
    for channel in range(8):
        assert mx.array_equal(states[:, channel], last[-1][0, :40, channel])
        for place, layer in enumerate((0, 2)):
            assert mx.array_equal(states[:, 8 + 2 * channel + place], local[layer][0, :40, channel])


def test_a_pictures_states_do_not_depend_on_its_company(source: ModelSource, model: Model) -> None:
    images = prompt_of(source, "two_images").images
    for image, states in zip(images, model.encode_images(images), strict=True):
        assert mx.array_equal(states, model.encode_images([image])[0])


# The cross layers


class SlowDecoder:
    """All of a prompt at once, token by token in the cross layers, over the keys of the pictures that each one sees."""

    def __init__(self, model: Model) -> None:
        self.text = model.language_model.model
        self.specs = model.kv_specs

    def __call__(self, embeds: mx.array, features: Sequence[mx.array], sees: np.ndarray) -> mx.array:
        x = embeds
        caches = iter(KVPass([KVGroup.single(self.specs, 0)], x.shape[1]).layers)
        for layer in self.text.layers:
            if not isinstance(layer, mllama.CrossAttentionLayer):
                x = layer(x, self.text._rope.at(0), next(caches))
                continue
            x = mx.stack([self.one(layer, x[0, place], features, row) for place, row in enumerate(sees)])[None]
        return self.text.norm(x)

    def one(
        self, layer: mllama.CrossAttentionLayer, x: mx.array, features: Sequence[mx.array], sees: np.ndarray
    ) -> mx.array:
        if not sees.any():
            return x
        cross = layer.cross_attn
        states = mx.concatenate([features[image] for image in np.flatnonzero(sees)])
        keys = cross.k_norm(cross.k_proj(states).reshape(len(states), 2, 4))
        values = cross.v_proj(states).reshape(len(states), 2, 4)
        queries = cross.q_norm(cross.q_proj(layer.input_layernorm(x)).reshape(4, 4))
        mixed = []
        for head in range(4):
            weights = mx.softmax(keys[:, head // 2] @ queries[head] / 2.0)
            mixed.append(weights @ values[:, head // 2])
        x = x + mx.tanh(layer.cross_attn_attn_gate) * cross.o_proj(mx.concatenate(mixed))
        return x + mx.tanh(layer.cross_attn_mlp_gate) * layer.mlp(layer.post_attention_layernorm(x))


@pytest.mark.parametrize("scenario", [*IMAGE_CASES, "side_by_side"])
def test_decoder_equals_its_slow_twin(source: ModelSource, model: Model, scenario: str) -> None:
    prompt = side_by_side(source) if scenario == "side_by_side" else prompt_of(source, scenario)
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    slow = SlowDecoder(model)(inputs.embeds, features, np.array(inputs.sees[0]))
    assert np.abs(np.array(whole(model, inputs) - slow)).max() < CLOSE


@pytest.mark.parametrize("scenario", [*IMAGE_CASES, "side_by_side"])
def test_decode_sees_what_the_last_prompt_token_saw(source: ModelSource, model: Model, scenario: str) -> None:
    prompt = side_by_side(source) if scenario == "side_by_side" else prompt_of(source, scenario)
    inputs, answer = embedded(model, prompt), [5, 17, 3]
    group, pieces = KVGroup.single(model.kv_specs, 0), []
    for piece in (inputs, *(model.embed_tokens(mx.array([[token]]), inputs.rows) for token in answer)):
        forward = KVPass([group], piece.embeds.shape[1])
        pieces.append(model(piece, forward.layers))
        forward.commit()
    longer = model.embed_prompt(Prompt((*prompt.token_ids, *answer), prompt.images), model.encode_images(prompt.images))
    assert np.abs(np.array(mx.concatenate(pieces, axis=1) - whole(model, longer))).max() < CLOSE


def test_text_before_the_first_picture_does_not_see_it(source: ModelSource, model: Model) -> None:
    prompt = prompt_of(source, "text_first")
    start = prompt.images[0].span[0]
    assert start > 3
    features = model.encode_images(prompt.images)
    hidden = whole(model, model.embed_prompt(prompt, features))
    other = whole(model, model.embed_prompt(prompt, [features[0] * -1.5 + 1]))
    blind = whole(model, Inputs(model.embed_prompt(prompt, features).embeds))
    assert mx.array_equal(hidden[:, :start], other[:, :start])
    assert mx.array_equal(hidden[:, :start], blind[:, :start])
    assert float(mx.abs(hidden[:, start:] - other[:, start:]).max(axis=-1).min()) > 1e-4
    assert float(mx.abs(hidden[:, start:] - blind[:, start:]).max(axis=-1).min()) > 1e-4


def test_text_before_stays_finite_where_attention_over_nothing_is_not(
    source: ModelSource, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend may answer a fully masked row with anything; no such row may reach it."""
    seen: list[mx.array] = []
    attend = mx.fast.scaled_dot_product_attention

    def spy(*args: Any, mask: Any = None, **kwargs: Any) -> mx.array:
        if isinstance(mask, mx.array):
            seen.append(mask)
        return attend(*args, mask=mask, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    whole(model, embedded(model, side_by_side(source)))
    assert len(seen) == 2
    assert all(bool(mask.any(axis=-1).all()) for mask in seen)


def test_rows_with_and_without_pictures_equal_rows_alone(source: ModelSource, model: Model) -> None:
    prompts = [prompt_of(source, name) for name in ("text_only", "one_wide", "two_images", "text_first")]
    prompts.append(side_by_side(source))
    rows, alone, batch = [], [], KVBatch()
    for index, prompt in enumerate(prompts):
        inputs = embedded(model, prompt)
        rows.append(inputs.rows[0] if inputs.rows else RowState())
        for joins in (False, True):
            group = KVGroup.single(model.kv_specs, index)
            forward = KVPass([group], len(prompt.token_ids))
            mx.eval(model(inputs, forward.layers))
            forward.commit()
            if joins:
                batch.join(group)
                continue
            step = model.embed_tokens(mx.array([[index + 1]]), [rows[-1]])
            alone.append(model(step, KVPass([group], 1).layers)[0])
    order = batch.owners
    tokens = mx.array([[index + 1] for index in order])
    together = model(model.embed_tokens(tokens, [rows[index] for index in order]), batch.forward().layers)
    for place, index in enumerate(order):
        assert mx.array_equal(together[place], alone[index]), index


def test_without_pictures_the_cross_layers_are_skipped(
    source: ModelSource, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> mx.array:
        raise AssertionError("a cross layer ran")

    monkeypatch.setattr(mllama.CrossAttentionLayer, "__call__", refuse)
    inputs = embedded(model, prompt_of(source, "text_only"))
    assert inputs.rows == ()
    mx.eval(whole(model, inputs))
    step = model.embed_tokens(mx.array([[1]]), [RowState()])
    mx.eval(whole(model, step))


def test_keys_and_values_are_computed_once(source: ModelSource, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = embedded(model, prompt_of(source, "one_wide"))

    def refuse(*_: Any) -> tuple[mx.array, mx.array]:
        raise AssertionError("keys and values were computed again")

    monkeypatch.setattr(mllama.CrossAttention, "keys_and_values", refuse)
    for piece in (inputs[:7], inputs[7:], model.embed_tokens(mx.array([[1]]), inputs.rows)):
        mx.eval(whole(model, piece))


def test_only_pictures_in_view_are_read_while_decoding(source: ModelSource, model: Model) -> None:
    prompt = side_by_side(source)
    states = embedded(model, prompt).rows[0].vision
    sizes = [image.layout[0] * image.layout[1] * 10 for image in prompt.images]
    assert states.tail == sizes[0] + sizes[1]
    assert states.keys[0].shape == (1, 2, sum(sizes), 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_stays_in_the_weights_dtype(source: ModelSource, dtype: str) -> None:
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    prompt = side_by_side(source)
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    group = KVGroup.single(model.kv_specs, 0)
    forward = KVPass([group], len(prompt.token_ids))
    hidden = model(inputs, forward.layers)
    forward.commit()
    step = model.embed_tokens(mx.array([[1]]), inputs.rows)
    decoded = model(step, KVPass([group], 1).layers)
    vision = inputs.rows[0].vision
    arrays = (inputs.embeds, hidden, model.logits(hidden), step.embeds, decoded)
    for array in (*features, *arrays, *group.arrays, *vision.keys, *vision.values):
        assert array.dtype == getattr(mx, dtype)


def test_a_slot_in_the_cache_for_self_attention_only(model: Model) -> None:
    layers = model.language_model.model.layers
    assert [isinstance(layer, mllama.CrossAttentionLayer) for layer in layers] == [False, True, False, True]
    assert len(model.kv_specs) == 2


# Configs


def test_an_empty_config_is_the_references_default() -> None:
    config = Config.from_dict({})
    assert (config.text.hidden_size, config.text.num_hidden_layers, config.text.vocab_size) == (4096, 40, 128256)
    assert (config.text.num_attention_heads, config.text.num_key_value_heads, config.text.head_dim) == (32, 8, 128)
    assert (config.text.rms_norm_eps, config.text.rope["rope_theta"]) == (1e-5, 500000.0)
    assert sorted(config.cross_attention_layers) == [3, 8, 13, 18, 23, 28, 33, 38]
    assert config.vision == VisionConfig()
    assert (config.vision.num_patches, config.vision.output_size) == (1025, 7680)
    assert len(config.vision.supported_aspect_ratios) == 8


@pytest.mark.parametrize("key", ["attention_heads", "num_attention_heads"])
def test_both_names_of_the_head_count(key: str) -> None:
    assert VisionConfig.from_dict({key: 8}).attention_heads == 8


def test_rope_of_any_age() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    old = Config.from_dict({"text_config": {"rope_theta": 7.0, "rope_scaling": scaling}})
    new = Config.from_dict({"text_config": {"rope_parameters": {**scaling, "rope_theta": 7.0}}})
    assert old.text.rope == new.text.rope


def test_norms_around_the_tower_keep_their_own_eps() -> None:
    config = json.loads((CASE.folder / "config.json").read_text())
    config["vision_config"]["norm_eps"] = 1e-2
    config["text_config"]["rms_norm_eps"] = 1e-3
    model = build(config)
    assert (model.vision_model.layernorm_pre.eps, model.vision_model.layernorm_post.eps) == (1e-5, 1e-5)
    assert model.vision_model.global_transformer.layers[0].input_layernorm.eps == 1e-2
    cross = model.language_model.model.cross_layers[0].cross_attn
    assert (cross.q_norm.eps, cross.k_norm.eps) == (1e-3, 1e-3)


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("vision_config", {"vision_output_dim": 32}, "vision_output_dim 32 is not 24"),
        ("vision_config", {"intermediate_layers_indices": [0, 3], "vision_output_dim": 24}, "no such layers"),
        ("vision_config", {"attention_heads": 3}, "3 heads"),
        ("text_config", {"cross_attention_layers": [1, 4]}, "no such layers"),
        ("text_config", {"cross_attention_layers": []}, "nothing would look"),
        ("text_config", {"num_key_value_heads": 3}, "kv heads"),
    ],
)
def test_configs_that_make_no_sense(part: str, values: dict[str, Any], words: str) -> None:
    config = json.loads((CASE.folder / "config.json").read_text())
    with pytest.raises(ValueError, match=words):
        build({**config, part: {**config[part], **values}})


def test_embeddings_have_rows_that_the_head_has_not() -> None:
    shapes = {name: array.shape for name, array in tree_flatten(build({}).parameters())}
    assert shapes["language_model.model.embed_tokens.weight"] == (128264, 4096)
    assert shapes["language_model.lm_head.weight"] == (128256, 4096)
    assert shapes["vision_model.gated_positional_embedding.tile_embedding.weight"] == (9, 5248000)
