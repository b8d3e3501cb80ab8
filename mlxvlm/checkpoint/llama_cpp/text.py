"""The text half: metadata -> config.json's text part, tokenizer and ends of an answer. Knows no pictures.

Sources: llama.cpp `gguf-py/gguf/constants.py` (keys), `conversion/` (what is written to them), `src/models/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.llama_cpp.keys import Keys
from mlxvlm.errors import UnsupportedModelError, WeightsError
from mlxvlm.processors.ggml_tokenizer import TokenType, Vocabulary

EMBEDDING, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """general.architecture.

    model_type: of the text part. alone: the model_type without a vision half, None where that half is needed.
    is_permuted: rows of q_proj and k_proj stand in the order of ggml's interleaved RoPE.
    """

    model_type: str
    alone: str | None
    is_permuted: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "llama", is_permuted=True),  # Mistral's, Vicuna's and SmolLM's too
    "qwen2": Architecture("qwen2", "qwen2"),
    # Without pictures its three axes count alike, which is Qwen2.
    "qwen2vl": Architecture("qwen2_vl", "qwen2"),
    "llama4": Architecture("llama4_text", None),
}
_ROPE_THETA = 10000.0  # llama.cpp's, where the file does not say
_NO_QK_NORM_EXPERTS = 128  # of Maverick, which is how llama.cpp tells it from Scout

# Ends of a turn that a chat model writes beside its EOS; llama.cpp looks for them by name too.
_TURN_ENDS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "<end_of_utterance>",
    )
)
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # sic
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


def architecture(keys: Keys) -> Architecture:
    """Raises UnsupportedModelError with what is supported."""
    name = keys.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{keys.file} has the architecture {name!r}, which is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def text_config(keys: Keys, factors: NDArray[np.float32] | None) -> dict[str, Any]:
    """A text_config. `factors`: rope_freqs.weight, by which llama.cpp divides each frequency."""
    kind = architecture(keys)
    arch = keys.text("general.architecture")
    own = keys.within(f"{arch}.")
    vocab_size, width = keys.shape(EMBEDDING, 2)
    heads = own.size("attention.head_count")
    if own.size("embedding_length") != width:
        raise own.wrong("embedding_length", own.size("embedding_length"))
    head_dim = own.size("attention.key_length", own.size("rope.dimension_count", width // heads))
    if own.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{keys.file} turns only a part of each head by RoPE, which is not supported")
    config = {
        "model_type": kind.model_type,
        "hidden_size": width,
        "intermediate_size": own.integer("feed_forward_length"),
        "num_hidden_layers": own.blocks("block_count", "blk."),
        "num_attention_heads": heads,
        "num_key_value_heads": own.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": own.integer("context_length"),
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": own.number("rope.freq_base", _ROPE_THETA),
        "rope_scaling": _rope_scaling(own, factors),
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes or "blk.0.attn_qkv.bias" in keys.shapes,
        "output_bias": "blk.0.attn_output.bias" in keys.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in keys.shapes,
        # Converters leave out a head that is the embedding again.
        "tie_word_embeddings": HEAD not in keys.shapes,
        "eos_token_id": end_ids(keys),
    }
    _check_heads(keys, config)
    return config | _experts(own, config)


def _check_heads(keys: Keys, config: Mapping[str, Any]) -> None:
    """Heads against the rows of their projections: a damaged number must not make us order a billion of them."""
    queries, values = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    due = {"q": queries, "k": values, "v": values, "qkv": queries + 2 * values}
    for tensor, shape in keys.shapes.items():
        match = re.fullmatch(r"blk\.\d+\.attn_(q|k|v|qkv)\.(?:weight|bias)", tensor)
        if match and shape[0] != due[match[1]]:
            raise WeightsError(
                f"{keys.file}: {tensor} has {shape[0]} rows, the heads of the metadata have {due[match[1]]}"
            )


def _experts(own: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    count = own.integer("expert_count", 0)
    if config["model_type"] != ARCHITECTURES["llama4"].model_type:
        if count:
            raise UnsupportedModelError(f"{own.file} is a mixture of {count} experts, which is not supported there")
        return {}
    return {
        "intermediate_size_mlp": config["intermediate_size"],
        "intermediate_size": own.integer("expert_feed_forward_length"),
        "num_local_experts": count,
        "num_experts_per_tok": own.integer("expert_used_count"),
        "interleave_moe_layer_step": own.integer("interleave_moe_layer_step"),
        "use_qk_norm": count != _NO_QK_NORM_EXPERTS,
    }


def _rope_scaling(own: Keys, factors: NDArray[np.float32] | None) -> dict[str, Any] | None:
    """None where nothing is scaled."""
    scaling: dict[str, Any] = {}
    kind = own.text("rope.scaling.type", "none")
    if factors is not None:
        scaling = {"rope_type": "factors", "factors": factors.tolist()}
    elif kind != "none":
        scaling = {"rope_type": kind, "factor": own.number("rope.scaling.factor", 1.0)}
    # Three axes and a fourth of length 0.
    sections = own.integers("rope.dimension_sections", [])
    if sections:
        scaling = {"rope_type": "mrope", **scaling, "mrope_section": sections}
    return scaling or None


def end_ids(keys: Keys) -> list[int]:
    """Tokens that end an answer."""
    own = keys.within("tokenizer.ggml.")
    tokens = own.texts("tokens")
    types = own.integers("token_type", [])
    declared = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {own.integer(name) for name in declared if f"{own.prefix}{name}" in keys.metadata}
    control = (index for index, kind in enumerate(types) if kind == TokenType.CONTROL)
    return sorted(ids | {index for index in control if index < len(tokens) and tokens[index] in _TURN_ENDS})


def vocabulary(keys: Keys) -> Vocabulary:
    """tokenizer.ggml.*, checked for types."""
    own = keys.within("tokenizer.ggml.")

    def flag(name: str) -> bool | None:
        return own.flag(name, False) if f"{own.prefix}{name}" in keys.metadata else None

    special = {name: own.integer(key) for name, key in _SPECIAL_IDS.items() if f"{own.prefix}{key}" in keys.metadata}
    return Vocabulary(
        model=own.text("model"),
        pre=own.text("pre", "default"),
        tokens=own.texts("tokens"),
        types=own.integers("token_type", []),
        merges=own.texts("merges", []),
        scores=own.numbers("scores", []),
        special=special,
        adds_bos=flag("add_bos_token"),
        adds_space=flag("add_space_prefix"),
    )
