"""llama.cpp's tensor names -> the hub's, and which rows of which tensors make one. Knows no bytes and no types.

Sources: llama.cpp `gguf-py/gguf/tensor_mapping.py`, `conversion/`, `tools/mtmd/legacy-models/`. Rows are the output
dimension: blocks of quantised values lie within a row, so that rows can be moved without touching them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.llama_cpp.keys import Keys, Shape
from mlxvlm.checkpoint.llama_cpp.text import FREQUENCIES
from mlxvlm.checkpoint.llama_cpp.vision import NEWLINES, is_swapped

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a stored tensor, all of them where `rows` is None."""

    tensor: str
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor of the hub's checkpoint: pieces joined row after row, or stacked on a new third axis."""

    name: str
    pieces: tuple[Piece, ...]
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a family keeps its parts; patterns of the tower's names are tried in order."""

    text: str
    head: str
    tower: tuple[tuple[str, str], ...] = ()
    fuses_qkv: bool = False  # the tower's
    is_mixture: bool = False


_CLIP_BLOCK = (
    (r"ln1\.", "layer_norm1."),
    (r"ln2\.", "layer_norm2."),
    (r"attn_([qkv])\.", r"self_attn.\1_proj."),
    (r"attn_out\.", "self_attn.out_proj."),
    (r"ffn_up\.", "mlp.fc1."),
    (r"ffn_down\.", "mlp.fc2."),
)


def _plain_tower(root: str) -> tuple[tuple[str, str], ...]:
    """CLIP's and SigLIP's tower."""
    blocks = ((rf"v\.blk\.(\d+)\.{old}", rf"{root}encoder.layers.\1.{_shifted(new)}") for old, new in _CLIP_BLOCK)
    return (
        *blocks,
        (r"v\.patch_embd\.", f"{root}embeddings.patch_embedding."),
        (r"v\.position_embd\.", f"{root}embeddings.position_embedding."),
        (r"v\.post_ln\.", f"{root}post_layernorm."),
    )


def _shifted(replacement: str) -> str:
    """The block's number is the pattern's first group."""
    return replacement.replace(r"\1", r"\2")


_LLAVA_TOWER = "vision_tower.vision_model."
_LLAVA = Layout(
    text="language_model.model.",
    head="language_model.lm_head.",
    tower=(
        *_plain_tower(_LLAVA_TOWER),
        (r"v\.class_embd$", f"{_LLAVA_TOWER}embeddings.class_embedding"),
        (r"v\.pre_ln\.", f"{_LLAVA_TOWER}pre_layrnorm."),  # sic
        (r"mm\.0\.", "multi_modal_projector.linear_1."),
        (r"mm\.2\.", "multi_modal_projector.linear_2."),
        *((rf"{re.escape(name)}$", "image_newline") for name in NEWLINES),
    ),
)
_ONLY_TEXT = Layout(text="model.", head="lm_head.")
# By model_type.
LAYOUTS: Mapping[str, Layout] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "idefics3": Layout(
        text="model.text_model.",
        head="lm_head.",
        tower=(*_plain_tower("model.vision_model."), (r"mm\.model\.fc\.", "model.connector.modality_projection.proj.")),
    ),
    "qwen2_vl": Layout(
        text="model.",
        head="lm_head.",
        tower=(
            (r"v\.blk\.(\d+)\.ln([12])\.", r"visual.blocks.\1.norm\2."),
            (r"v\.blk\.(\d+)\.attn_qkv\.", r"visual.blocks.\1.attn.qkv."),
            (r"v\.blk\.(\d+)\.attn_out\.", r"visual.blocks.\1.attn.proj."),
            (r"v\.blk\.(\d+)\.ffn_up\.", r"visual.blocks.\1.mlp.fc1."),
            (r"v\.blk\.(\d+)\.ffn_down\.", r"visual.blocks.\1.mlp.fc2."),
            (r"v\.patch_embd\.weight$", "visual.patch_embed.proj.weight"),
            (r"v\.post_ln\.", "visual.merger.ln_q."),
            (r"mm\.([02])\.", r"visual.merger.mlp.\1."),
        ),
        fuses_qkv=True,
    ),
    "llama4": Layout(
        text="language_model.model.",
        head="language_model.lm_head.",
        tower=(
            (r"v\.blk\.(\d+)\.ln1\.", r"vision_model.model.layers.\1.input_layernorm."),
            # Converters of 2026 give it a name of their own.
            (r"v\.blk\.(\d+)\.(?:ln2|attn_post_norm)\.", r"vision_model.model.layers.\1.post_attention_layernorm."),
            (r"v\.blk\.(\d+)\.attn_([qkv])\.", r"vision_model.model.layers.\1.self_attn.\2_proj."),
            (r"v\.blk\.(\d+)\.attn_out\.", r"vision_model.model.layers.\1.self_attn.o_proj."),
            (r"v\.blk\.(\d+)\.ffn_up\.", r"vision_model.model.layers.\1.mlp.fc1."),
            (r"v\.blk\.(\d+)\.ffn_down\.", r"vision_model.model.layers.\1.mlp.fc2."),
            (r"v\.patch_embd\.", "vision_model.patch_embedding.linear."),
            (r"v\.class_embd$", "vision_model.class_embedding"),
            (r"v\.position_embd\.weight$", "vision_model.positional_embedding_vlm"),
            (r"v\.pre_ln\.", "vision_model.layernorm_pre."),
            (r"v\.post_ln\.", "vision_model.layernorm_post."),
            (r"mm\.model\.mlp\.([12])\.", r"vision_model.vision_adapter.mlp.fc\1."),
            (r"mm\.model\.fc\.", "multi_modal_projector.linear_1."),
        ),
        is_mixture=True,
    ),
}

_TEXT_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTURE_BLOCK = {
    "ffn_gate_inp": "feed_forward.router",
    **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_exps": f"feed_forward.experts.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_TEXT_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def unpermuted(heads: int, head_dim: int) -> Rows:
    """Which stored row each of q_proj's or k_proj's rows is.

    The converter lays the two halves of a head, which RoPE pairs, side by side: h, t, j -> h, j, t.
    """
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def text_recipes(keys: Keys, layout: Layout, text: Mapping[str, Any], is_permuted: bool) -> list[Recipe]:
    """Of the text half; names that are not known stay, and are refused by name when they are bound."""
    recipes: list[Recipe] = []
    fixed = {
        "token_embd.weight": f"{layout.text}embed_tokens.weight",
        "output_norm.weight": f"{layout.text}norm.weight",
        "output.weight": f"{layout.head}weight",
    }
    for tensor, shape in keys.shapes.items():
        match = _TEXT_NAME.fullmatch(tensor)
        if tensor == FREQUENCIES:
            continue  # part of the config
        if match is None:
            recipes.append(Recipe(fixed.get(tensor, tensor), (Piece(tensor),)))
            continue
        number, stem, leaf = match.groups()
        root = f"{layout.text}layers.{number}."
        for part, piece in _text_pieces(Piece(tensor), stem, shape, text):
            table = {**_TEXT_BLOCK, **(_MIXTURE_BLOCK if layout.is_mixture else {})}
            name = f"{root}{table[part]}.{leaf}" if part in table else tensor
            recipes.append(Recipe(name, (_in_order(piece, part, text) if is_permuted else piece,)))
    return recipes


def _text_pieces(whole: Piece, stem: str, shape: Shape, text: Mapping[str, Any]) -> Iterator[tuple[str, Piece]]:
    """A stored tensor's parts by stem: converters can fuse q with k and v, and all experts' gate with up."""
    if stem == "attn_qkv":
        queries, values = (text[name] * text["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        ends = np.cumsum([queries, values, values])
        for part, rows in zip("qkv", np.split(np.arange(ends[-1]), ends[:-1]), strict=True):
            yield f"attn_{part}", Piece(whole.tensor, rows)
    elif stem == "ffn_gate_up_exps" and len(shape) == 3:
        rows = np.arange(shape[0] * shape[1]).reshape(shape[0], 2, -1)
        for index, part in enumerate(("gate", "up")):
            yield f"ffn_{part}_exps", Piece(whole.tensor, rows[:, index])
    else:
        yield stem, whole


def _in_order(piece: Piece, part: str, text: Mapping[str, Any]) -> Piece:
    if part not in ("attn_q", "attn_k"):
        return piece
    heads = text["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    order = unpermuted(heads, text["head_dim"])
    return Piece(piece.tensor, order if piece.rows is None else piece.rows[order])


def tower_recipes(keys: Keys, layout: Layout) -> list[Recipe]:
    """Of the picture half; names that are not known stay."""
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"} if is_swapped(keys) else {}
    recipes = []
    for tensor in keys.shapes:
        source = re.sub(r"ffn_(?:up|down)", lambda found: swapped.get(found[0], found[0]), tensor)
        pieces: tuple[Piece, ...] = (Piece(tensor),)
        fused = re.fullmatch(r"(v\.blk\.\d+\.attn_)([qkv])(\..*)", tensor) if layout.fuses_qkv else None
        if fused:
            if fused[2] != "q":
                continue
            source = f"{fused[1]}qkv{fused[3]}"
            pieces = tuple(Piece(f"{fused[1]}{part}{fused[3]}") for part in "qkv")
        if tensor.endswith(".weight.1") or _is_dummy(tensor, layout):
            continue
        second = f"{tensor}.1"  # the frame after this one of a film's kernel
        if second in keys.shapes:
            pieces = (*pieces, Piece(second))
        recipes.append(Recipe(_renamed(source, layout), pieces, is_stacked=second in keys.shapes))
    return recipes


def _is_dummy(tensor: str, layout: Layout) -> bool:
    """Old converters gave Qwen2-VL a position embedding, which nothing reads."""
    return layout.fuses_qkv and tensor == "v.position_embd.weight"


def _renamed(tensor: str, layout: Layout) -> str:
    for pattern, replacement in layout.tower:
        name, count = re.subn(f"^{pattern}", replacement, tensor)
        if count:
            return name
    return tensor


def layout_of(model_type: str) -> Layout:
    """A family's, by its model_type; any other model has no picture half."""
    return LAYOUTS.get(model_type, _ONLY_TEXT)
