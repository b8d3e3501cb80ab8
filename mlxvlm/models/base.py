"""What the engine may ask of a model, and a model of the engine. Knows no family and no scheduling."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from mlxvlm.processors.base import PreparedImage, Prompt


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one self-attention layer keeps for each position, and which positions it may look back to.

    window: only the last `window` positions are visible (Mistral). chunk: only positions of the same chunk (Llama 4).
    bits, group_size: how the engine holds keys and values, as mx.quantize's; None, which models say: as they are.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    bits: int | None = None
    group_size: int = 64

    def bytes_per_token(self, dtype: mx.Dtype) -> int:
        """Keys and values of one position; quantised, with a scale and a bias of `dtype` for each group."""
        values = 2 * self.num_kv_heads * self.head_dim
        if self.bits is None:
            return values * int(dtype.size)
        return values * self.bits // 8 + 2 * values // self.group_size * int(dtype.size)


@dataclass(frozen=True, slots=True)
class QuantPaths:
    """Where in a model in-situ quantisation works, as module paths; what lies elsewhere stays as it is.

    decoder: has `layers` and `embed_tokens`. tower: the vision tower's layers, quantised on request only; "" for none.
    """

    decoder: str
    head: str
    tower: str


_MAX_NUMBER = 2**31 - 1  # MLX's own for sizes


def check_numbers(config: Any) -> None:
    """Raises ValueError naming each int or float field of a config dataclass that is no positive number, or too large.

    Token ids may be 0. Layers take some wrong values without a word and fail, or answer nonsense, on the first request.
    """
    wrong = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.type not in ("int", "float"):
            continue
        is_number = isinstance(value, int | float) if entry.type == "float" else isinstance(value, int)
        is_token = entry.name.endswith("_id")
        is_in_range = 0 < value <= _MAX_NUMBER if isinstance(value, int) else is_number and 0 < value < math.inf
        if not is_number or isinstance(value, bool) or not (is_in_range or (is_token and value == 0)):
            wrong.append(f"{entry.name} {value!r}")
    if wrong:
        raise ValueError(f"no positive number: {', '.join(wrong)}")


class Cache(Protocol):
    """One layer's keys and values of all rows in a forward pass. How they are laid out is the engine's secret."""

    @property
    def offset(self) -> int | mx.array:
        """Positions each row held before this pass: an int for one row, else int32 [B]."""
        ...

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Appends keys and values [B, K, L, Dh], then causal attention of queries [B, H, L, Dh] over all held."""
        ...


@dataclass(frozen=True, slots=True)
class RowState:
    """What decoding needs of one row beside its KV. Made with the prompt, kept on the sequence, never changed."""

    position_delta: int = 0  # M-RoPE: position minus number of tokens before
    vision: Any | None = None  # cross-attention families: the pictures' keys and values


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the decoder reads. Sliceable along the sequence: chunked prefill is model(inputs[a:b], cache)."""

    embeds: mx.array  # [B, L, D]
    positions: mx.array | None = None  # [3, B, L] for M-RoPE; None: count from cache.offset + position_delta
    # bool [B, L, images]: which pictures a token of a prompt attends to, cross-attention families. None: see `rows`.
    sees: mx.array | None = None
    rows: Sequence[RowState] = ()  # B of them, where the family has any state of rows

    def __getitem__(self, chunk: slice) -> Inputs:
        positions = None if self.positions is None else self.positions[..., chunk]
        sees = None if self.sees is None else self.sees[:, chunk]
        return Inputs(self.embeds[:, chunk], positions, sees, self.rows)


# Of each image of a prompt; None where nothing that is run needs it.
Features: TypeAlias = Sequence[mx.array | None]


class VisionLanguageModel(Protocol):
    """A family's model. Holds weights only: everything of a request lives on its Sequence.

    One whose RowState holds arrays also has `state_bytes(prompt) -> int`, what they take and what they are made from,
    and `row_state(states, sizes, tail)`, which makes them; see mllama.
    """

    kv_specs: Sequence[KVSpec]
    vocab_size: int
    quant_paths: QuantPaths

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """Features [N, D] of each image, N its number of placeholders."""
        ...

    def needed_images(self, prompt: Prompt, start: int) -> Sequence[int]:
        """Which of a prompt's images must have features if only the tokens from `start` on are run."""
        ...

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        """Inputs of a whole prompt, B = 1, with features in the places of the placeholders."""
        ...

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        """Inputs of a decode step from token ids [B, L], the next L of each row, and each row's state."""
        ...

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        """Hidden states [B, L, D] after the last norm."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., D] -> [..., V]."""
        ...

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Any known checkpoint layout -> this model's names and shapes, each tensor on its own.

        A second call changes nothing. Of a decoder's layers and head, some rows, columns or experts become what they
        become in the whole tensor.
        """
        ...

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        """One of this model's tensors under the name and in the shape of MLX-community checkpoints."""
        ...


def images_from(prompt: Prompt, start: int) -> list[int]:
    """The images with placeholders at `start` or later: those that are needed where features replace embeddings."""
    return [index for index, image in enumerate(prompt.images) if image.span[1] > start]


def merge_features(embeds: mx.array, prompt: Prompt, image_token_id: int, features: Features) -> mx.array:
    """Writes each image's features [N, D] over its placeholders in embeds [1, L, D], but for those that are None.

    Counts are checked: MLX reads and writes out of bounds without an error.
    """
    given = [(image, rows) for image, rows in zip(prompt.images, features, strict=True) if rows is not None]
    if not given:
        return embeds
    ids = np.array(prompt.token_ids)
    places = []
    for image, rows in given:
        start, end = image.span
        places.append(start + np.flatnonzero(ids[start:end] == image_token_id))
        if len(places[-1]) != rows.shape[0]:
            raise ValueError(f"{rows.shape[0]} image features for {len(places[-1])} placeholders")
    rows = mx.concatenate([rows for _, rows in given]).astype(embeds.dtype)
    embeds[:, mx.array(np.concatenate(places).astype(np.int32))] = rows[None]
    return embeds


def renamed(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """A tensor's name by the first (pattern, replacement) that matches; as it is when none does."""
    for pattern, replacement in rules:
        new, count = pattern.subn(replacement, name)
        if count:
            return new
    return name


def is_buffer(name: str) -> bool:
    """Values that old releases stored and every release recomputes."""
    return name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))
