"""Llama 3.2 Vision: a tower over tiles, and a Llama decoder that looks at it through gated cross-attention layers.

Sources: Grattafiori et al. 2024 (arXiv 2407.21783, section 7); transformers `MllamaForConditionalGeneration`; for text
before the first picture the authors' llama-models `CrossAttentionTransformerBlock` (see docs/families.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxvlm.models.base import Cache, Features, Inputs, KVSpec, QuantPaths, RowState, check_numbers, renamed
from mlxvlm.models.decoder import DecoderConfig, DecoderLayer
from mlxvlm.models.layers import GatedMLP, join_heads, split_heads, unshared
from mlxvlm.models.rope import RoPE, rope_parameters
from mlxvlm.models.vit import VisionMLP, to_channels_last
from mlxvlm.processors.base import PreparedImage, Prompt

NUM_EXTRA_EMBEDDINGS = 8  # rows after the vocabulary, for <|image|>; the head has none for them
PATCH_MULTIPLE = 8  # patches of a tile are padded to one
TOWER_NORM_EPS = 1e-5  # of the norms around the tower, whatever norm_eps says: torch's default, which is not set there
TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
TEXT_THETA = 500000.0
CROSS_ATTENTION_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)


@dataclass(frozen=True)
class VisionConfig:
    """vision_config with transformers' MllamaVisionConfig defaults."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    max_num_tiles: int = 4
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    # (rows, columns); their place in the list, from 1, is their id in the embedding tables.
    supported_aspect_ratios: tuple[tuple[int, int], ...] = (
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.hidden_size % self.attention_heads:
            raise ValueError(f"vision width {self.hidden_size} can't be split into {self.attention_heads} heads")
        if not all(0 <= index < self.num_hidden_layers for index in self.intermediate_layers_indices):
            raise ValueError(f"intermediate_layers_indices {self.intermediate_layers_indices}: no such layers")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        given = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        given.setdefault("attention_heads", config.get("num_attention_heads") or cls.attention_heads)
        for name in ("intermediate_layers_indices", "supported_aspect_ratios"):
            if name in given:
                given[name] = tuple(tuple(item) if isinstance(item, list) else item for item in given[name])
        return cls(**given)

    @property
    def num_patches(self) -> int:
        """Of a tile, with the class embedding."""
        return int((self.image_size // self.patch_size) ** 2 + 1)

    @property
    def output_size(self) -> int:
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


@dataclass(frozen=True)
class Config:
    """config.json."""

    text: DecoderConfig
    vision: VisionConfig
    cross_attention_layers: frozenset[int]

    def __post_init__(self) -> None:
        if not self.cross_attention_layers <= set(range(self.text.num_hidden_layers)):
            raise ValueError(f"cross_attention_layers {sorted(self.cross_attention_layers)}: no such layers")
        if not self.cross_attention_layers:
            raise ValueError("cross_attention_layers is empty: nothing would look at pictures")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        given = {key: value for key, value in (config.get("text_config") or {}).items() if value is not None}
        given = {**TEXT_DEFAULTS, **given}
        vision_config = config.get("vision_config") or {}
        vision = VisionConfig.from_dict(vision_config)
        if vision_config.get("vision_output_dim", vision.output_size) != vision.output_size:
            raise ValueError(f"vision_output_dim {vision_config['vision_output_dim']} is not {vision.output_size}")
        return cls(
            text=replace(DecoderConfig.from_dict(given), rope=rope_parameters(given, TEXT_THETA)),
            vision=vision,
            cross_attention_layers=frozenset(given.get("cross_attention_layers", CROSS_ATTENTION_LAYERS)),
        )


class TileEmbedding(nn.Module):
    """A vector for each tile of each arrangement, behind a gate. Source: `MllamaPrecomputedAspectRatioEmbedding`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        rows = len(config.supported_aspect_ratios) + 1
        self.embedding = nn.Embedding(rows, config.max_num_tiles * config.hidden_size)
        self.gate = mx.zeros((1,))
        self._tiles = config.max_num_tiles

    def __call__(self, ratio_id: int) -> mx.array:
        """[T, D]."""
        # Quantised embeddings may answer in another dtype.
        row = self.embedding(mx.array([ratio_id])).astype(self.gate.dtype)
        return row.reshape(self._tiles, -1) * mx.tanh(self.gate)


class PositionEmbedding(nn.Module):
    """A position for each patch, and one for each patch of each tile of each arrangement; one gate shares them out.

    Source: `MllamaPrecomputedPositionEmbedding`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        rows = len(config.supported_aspect_ratios) + 1
        self.embedding = mx.zeros((config.num_patches, config.hidden_size))
        self.tile_embedding = nn.Embedding(rows, config.max_num_tiles * config.num_patches * config.hidden_size)
        self.gate = mx.zeros((1,))

    def __call__(self, x: mx.array, ratio_id: int) -> mx.array:
        gate = mx.tanh(self.gate)
        tiles = self.tile_embedding(mx.array([ratio_id])).astype(gate.dtype)
        return x + (1 - gate) * self.embedding + gate * tiles.reshape(x.shape)  # [T, P, D]


class VisionAttention(nn.Module):
    """Attention over all patches of all tiles, where padding does not see padding.

    The reference masks a pair only if both are padding. With the real patches in front that takes no mask: they see
    everything, and padding sees what is in front.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dims = config.hidden_size
        self.q_proj = nn.Linear(dims, dims, bias=False)
        self.k_proj = nn.Linear(dims, dims, bias=False)
        self.v_proj = nn.Linear(dims, dims, bias=False)
        self.o_proj = nn.Linear(dims, dims, bias=False)
        self._heads = config.attention_heads
        self._scale = (dims // config.attention_heads) ** -0.5

    def __call__(self, x: mx.array, real: int) -> mx.array:
        queries, keys, values = (
            split_heads(projection(x), self._heads) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = mx.fast.scaled_dot_product_attention
        front = attend(queries[:, :, :real], keys, values, scale=self._scale)
        padding = attend(queries[:, :, real:], keys[:, :, :real], values[:, :, :real], scale=self._scale)
        return self.o_proj(join_heads(mx.concatenate([front, padding], axis=2)))


class VisionLayer(nn.Module):
    """Pre-norm block; in the global encoder with a gate on what each half adds."""

    def __init__(self, config: VisionConfig, is_gated: bool) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        if is_gated:
            self.gate_attn = mx.zeros((1,))
            self.gate_ffn = mx.zeros((1,))
        self._is_gated = is_gated

    def __call__(self, x: mx.array, real: int) -> mx.array:
        mixed = self.self_attn(self.input_layernorm(x), real)
        x = x + (mx.tanh(self.gate_attn) * mixed if self._is_gated else mixed)
        added = self.mlp(self.post_attention_layernorm(x))
        return x + (mx.tanh(self.gate_ffn) * added if self._is_gated else added)


class Encoder(nn.Module):
    """A stack of layers, named as in the checkpoint."""

    def __init__(self, config: VisionConfig, num_layers: int, is_gated: bool) -> None:
        super().__init__()
        self.layers = [VisionLayer(config, is_gated) for _ in range(num_layers)]

    def __call__(self, x: mx.array, real: int) -> list[mx.array]:
        """What each layer gives."""
        outputs = []
        for layer in self.layers:
            x = layer(x, real)
            outputs.append(x)
        return outputs


class VisionModel(nn.Module):
    """A local and a global encoder over the tiles of one picture. Source: `MllamaVisionModel`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dims, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, dims, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = mx.zeros((dims,))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(dims, eps=TOWER_NORM_EPS)
        self.layernorm_post = nn.LayerNorm(dims, eps=TOWER_NORM_EPS)
        self.transformer = Encoder(config, config.num_hidden_layers, is_gated=False)
        self.global_transformer = Encoder(config, config.num_global_layers, is_gated=True)
        self._config = config

    def __call__(self, pixels: mx.array, layout: tuple[int, ...]) -> mx.array:
        """[T, H, W, C] -> states of the patches of the picture's own tiles, [tiles * P, output size]."""
        rows, columns = layout
        ratio_id = self._config.supported_aspect_ratios.index((rows, columns)) + 1
        x = self._embed(pixels, ratio_id)  # [T, padded P, D]
        order, real = self._real_first(rows * columns, x.shape[1])
        tiles = mx.array(order // x.shape[1])
        x = x.reshape(1, -1, x.shape[-1])[:, mx.array(order)]
        local = self.transformer(x, real)
        kept = [local[index][:, :real] for index in self._config.intermediate_layers_indices]
        x = self.layernorm_post(local[-1]) + self.post_tile_positional_embedding(ratio_id)[tiles]
        x = self.global_transformer(x, real)[-1][:, :real]
        # A channel's values of all kept layers lie side by side.
        return mx.concatenate([x, mx.stack(kept, axis=-1).reshape(1, real, -1)], axis=-1)[0]

    def _embed(self, pixels: mx.array, ratio_id: int) -> mx.array:
        x = self.patch_embedding(pixels)  # [T, h, w, D]
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.pre_tile_positional_embedding(ratio_id)[:, None]
        first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[-1]))
        x = self.gated_positional_embedding(mx.concatenate([first, x], axis=1), ratio_id)  # [T, P, D]
        return mx.pad(self.layernorm_pre(x), [(0, 0), (0, -x.shape[1] % PATCH_MULTIPLE), (0, 0)])

    def _real_first(self, tiles: int, padded: int) -> tuple[np.ndarray[Any, np.dtype[np.int32]], int]:
        """The order of all patches with the padding last, and how many are none."""
        places = np.arange(self._config.max_num_tiles * padded, dtype=np.int32)
        is_padding = (places // padded >= tiles) | (places % padded >= self._config.num_patches)
        return np.argsort(is_padding, kind="stable").astype(np.int32), int((~is_padding).sum())


@dataclass(frozen=True, slots=True)
class VisionStates:
    """One row's pictures as the cross layers read them, made once with its prompt; S states of all its pictures."""

    keys: tuple[mx.array, ...]  # [1, K, S, Dh] for each cross layer
    values: tuple[mx.array, ...]
    sizes: tuple[int, ...]  # states of each picture
    picture: mx.array  # int32 [S]: whose state each is
    tail: int  # the first state that the last prompt token sees, and with it every generated one


@dataclass(frozen=True, slots=True)
class View:
    """What the tokens of one row see in one forward pass."""

    states: VisionStates
    first: int = 0  # state
    mask: mx.array | None = None  # bool [1, 1, L, S]; None: each token sees all from `first` on


@dataclass(frozen=True, slots=True)
class Views:
    """What all rows see in one forward pass."""

    rows: tuple[View | None, ...]
    sighted: mx.array | None  # bool [B, L, 1]: which tokens see anything; None: all do


def views_of(inputs: Inputs) -> Views | None:
    """None where no row has pictures."""
    states: list[VisionStates | None] = [row.vision for row in inputs.rows]
    has_pictures = [state is not None for state in states]
    if not any(has_pictures):
        return None
    if inputs.sees is None:
        rows = tuple(None if state is None else View(state, state.tail) for state in states)
        return Views(rows, None if all(has_pictures) else mx.array(has_pictures)[:, None, None])
    sighted = inputs.sees.any(axis=-1, keepdims=True)
    # Tokens that see nothing are given all, as a softmax over nothing is undefined, and are left unchanged below.
    sees = inputs.sees | ~sighted
    rows = tuple(
        None if state is None else View(state, mask=_key_mask(state, sees[row])) for row, state in enumerate(states)
    )
    return Views(rows, sighted)


def _key_mask(states: VisionStates, sees: mx.array) -> mx.array | None:
    """bool [L, pictures] -> [1, 1, L, S]; a single picture needs none."""
    return None if sees.shape[-1] == 1 else sees[:, states.picture][None, None]


class CrossAttention(nn.Module):
    """Grouped-query attention from text to pictures, without positions. Source: `MllamaTextCrossAttention`."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self._heads, self._kv_heads = heads, kv_heads
        self._scale = head_dim**-0.5
        self._index = index  # among the cross layers
        self._sum = unshared

    def keys_and_values(self, states: mx.array) -> tuple[mx.array, mx.array]:
        """[1, S, D] -> twice [1, K, S, Dh]."""
        keys = self.k_norm(split_heads(self.k_proj(states), self._kv_heads))
        # Laid out as every decode step reads them.
        return mx.contiguous(keys), mx.contiguous(split_heads(self.v_proj(states), self._kv_heads))

    def __call__(self, x: mx.array, views: Views) -> mx.array:
        queries = self.q_norm(split_heads(self.q_proj(x), self._heads))  # [B, H, L, Dh]
        mixed = [self._attend(queries[row : row + 1], view) for row, view in enumerate(views.rows)]
        return self._sum(self.o_proj(join_heads(mx.concatenate(mixed))))

    def _attend(self, queries: mx.array, view: View | None) -> mx.array:
        if view is None:
            return mx.zeros_like(queries)
        keys, values = (held[self._index][:, :, view.first :] for held in (view.states.keys, view.states.values))
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self._scale, mask=view.mask)


class CrossAttentionLayer(nn.Module):
    """A gated look at the pictures, then a gated MLP; tokens that see no picture pass unchanged.

    The linear layers run over all rows at once, only attention row by row.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config, index)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attn_attn_gate = mx.zeros((1,))
        self.cross_attn_mlp_gate = mx.zeros((1,))

    def __call__(self, x: mx.array, views: Views) -> mx.array:
        changed = x + mx.tanh(self.cross_attn_attn_gate) * self.cross_attn(self.input_layernorm(x), views)
        changed = changed + mx.tanh(self.cross_attn_mlp_gate) * self.mlp(self.post_attention_layernorm(changed))
        return changed if views.sighted is None else mx.where(views.sighted, changed, x)


class TextModel(nn.Module):
    """A Llama decoder with cross layers between the others. Source: `MllamaTextModel`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size + NUM_EXTRA_EMBEDDINGS, text.hidden_size)
        self.layers: list[DecoderLayer | CrossAttentionLayer] = []
        for index in range(text.num_hidden_layers):
            is_cross = index in config.cross_attention_layers
            num_cross = len(self.cross_layers)
            self.layers.append(CrossAttentionLayer(text, num_cross) if is_cross else DecoderLayer(text))
        self.norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self._rope = RoPE(text.head_dim, text.rope)

    @property
    def cross_layers(self) -> list[CrossAttentionLayer]:
        return [layer for layer in self.layers if isinstance(layer, CrossAttentionLayer)]

    def embed(self, token_ids: mx.array) -> mx.array:
        """[B, L] -> [B, L, D]."""
        # Embeddings quantised in mxfp4, mxfp8 or nvfp4 answer in bfloat16, whatever the rest computes in.
        return self.embed_tokens(token_ids).astype(self.norm.weight.dtype)

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        x, views = inputs.embeds, views_of(inputs)  # [B, L, D]
        caches, rotate = iter(cache), self._rope.at(cache[0].offset)
        for layer in self.layers:
            if isinstance(layer, DecoderLayer):
                x = layer(x, rotate, next(caches))
            elif views is not None:
                x = layer(x, views)
        return self.norm(x)


class LanguageModel(nn.Module):
    """Trunk and head under the checkpoint's `language_model.` prefix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)


class Model(nn.Module):
    """A VisionLanguageModel."""

    quant_paths = QuantPaths(decoder="language_model.model", head="language_model.lm_head", tower="vision_model")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision_model = VisionModel(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.output_size, config.text.hidden_size)
        self.language_model = LanguageModel(config)
        self._config = config
        self._share = unshared  # of states that only one rank has made

    @property
    def kv_specs(self) -> list[KVSpec]:
        """Of the self-attention layers; what the cross layers keep is the row's own and does not grow."""
        return self._config.text.kv_specs[len(self.language_model.model.cross_layers) :]

    @property
    def vocab_size(self) -> int:
        return self._config.text.vocab_size

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """Pixels [T, 3, side, side] of each image -> states [tiles * P, D] of the tiles that it fills."""
        dtype = self.vision_model.layernorm_post.weight.dtype
        # One by one: a picture alone is thousands of patches.
        return [
            self.multi_modal_projector(
                self.vision_model(mx.array(image.pixels.transpose(0, 2, 3, 1)).astype(dtype), image.layout)
            )
            for image in images
        ]

    def state_bytes(self, prompt: Prompt) -> int:
        """Of a row's VisionStates, and of the states that they are made from."""
        text, language = self._config.text, self.language_model.model
        # Fewer than the config's on a rank of several.
        kv_heads = next((layer.cross_attn._kv_heads for layer in language.cross_layers), 0)
        states = sum(math.prod(image.layout) for image in prompt.images) * self._config.vision.num_patches
        per_layer = 2 * kv_heads * text.head_dim
        values = per_layer * len(language.cross_layers) + text.hidden_size
        return states * values * int(language.norm.weight.dtype.size)

    def needed_images(self, prompt: Prompt, start: int) -> Sequence[int]:
        """Those that the tokens look at: also pictures before `start`, but not all of them."""
        if not prompt.images:
            return []
        sees = visible_images([image.span[0] for image in prompt.images], len(prompt.token_ids))
        return [int(image) for image in np.flatnonzero(sees[start:].any(axis=0))]

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        text = self.language_model.model
        embeds = text.embed(mx.array(prompt.token_ids)[None])
        if not prompt.images:
            return Inputs(embeds)
        sees = visible_images([image.span[0] for image in prompt.images], len(prompt.token_ids))
        sizes = [0 if states is None else len(states) for states in features]
        given = [states for states in features if states is not None]
        states = mx.concatenate(given)[None].astype(embeds.dtype)  # [1, S, D]
        tail = sum(sizes[: int(sees[-1].argmax())])
        return Inputs(embeds, sees=mx.array(sees)[None], rows=(self.row_state(states, sizes, tail),))

    def row_state(self, states: mx.array, sizes: Sequence[int], tail: int) -> RowState:
        """What the cross layers read of pictures with states [1, S, D] in all, `sizes` of each; tail: VisionStates'."""
        states = self._share(states)
        layers = self.language_model.model.cross_layers
        keys, values = zip(*(layer.cross_attn.keys_and_values(states) for layer in layers), strict=True)
        picture = mx.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
        return RowState(vision=VisionStates(keys, values, tuple(sizes), picture, tail))

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        return Inputs(self.language_model.model.embed(token_ids), rows=rows)

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        hidden: mx.array = self.language_model.model(inputs, cache)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        logits: mx.array = self.language_model.lm_head(hidden)
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hub names are ours; transformers 5's own and MLX-community's have other prefixes."""
        ours = {renamed(name, _RENAMES): array for name, array in weights.items()}
        conv = "vision_model.patch_embedding.weight"
        if conv in ours:
            ours[conv] = to_channels_last(ours[conv], self._config.vision.num_channels)
        return ours

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        return renamed(name, _PUBLISHED), array


def visible_images(starts: Sequence[int], length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[length, images]: a token sees the nearest image before it, and those directly in front of that one.

    Source: `get_cross_attention_token_mask`.
    """
    sees = np.zeros((length, len(starts)), np.bool_)
    end = length
    for image in reversed(range(len(starts))):
        following = starts[image + 1] if image + 1 < len(starts) else length
        if following != starts[image] + 1:
            end = following
        sees[starts[image] : end, image] = True
    return sees


_RENAMES = (
    # transformers 5 holds the three parts in a `model` without the head, and no decoder inside a decoder.
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(vision_model|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    # mlx-vlm's word for it.
    (re.compile(r"^vision_tower\."), "vision_model."),
)


_PUBLISHED = ((re.compile(r"^vision_model\."), "vision_tower."),)


def build(config: Mapping[str, Any]) -> Model:
    """The entry that families.py points to."""
    return Model(Config.from_dict(config))
