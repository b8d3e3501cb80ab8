"""Writes golden checkpoints as llama.cpp's converters do: a text model and an mmproj. Names come from its own tables.

Follows `conversion/{base,llama,llama4,qwenvl,smolvlm}.py`, and for LLaVA, which only has that one,
`tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py` with its swapped names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.models.rope import inverse_frequencies, rope_parameters

Arrays = dict[str, np.ndarray]
Kind = gguf.GGMLQuantizationType

TEXT, MMPROJ = "model.gguf", "mmproj-model.gguf"
_TEXT_NAME = re.compile(
    r"^(?:model\.text_model\.|language_model\.model\.|model\.(?=layers|embed|norm))|^lm_head|\.lm_head"
)
_ARCHITECTURES = {
    "qwen2_vl": gguf.MODEL_ARCH.QWEN2VL,
    "llama4": gguf.MODEL_ARCH.LLAMA4,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}
# tokenizer.ggml.pre of the goldens' tokenizers.
PRE = {"qwen2_vl_tied": "qwen2", "qwen2_vl_window": "qwen2", "smolvlm_grid27": "smollm", "smolvlm2_tied": "smollm"}


def floats(case: Path) -> Arrays:
    return {name: np.array(array.astype(mx.float32)) for name, array in read_weights(case).items()}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute`."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_arrays(writer: gguf.GGUFWriter, arrays: Arrays, kind: Kind) -> None:
    """In `kind` where it can be: matrices whose rows are whole blocks."""
    for name, array in arrays.items():
        fits = array.ndim in (2, 3) and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        if kind is Kind.F32 or not fits:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, case: Path, rows: int, pre: str) -> None:
    """As `_set_vocab_gpt2`: byte-level BPE, filled up to the embedding's rows."""
    tokenizer = read(case / "tokenizer.json")
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    ids = {entry["content"]: entry["id"] for entry in added.values()}
    names, types = [], []
    for index in range(rows):
        kind = gguf.TokenType.NORMAL if index in tokens else gguf.TokenType.UNUSED
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        names.append(added[index]["content"] if index in added else tokens.get(index, f"[PAD{index}]"))
        types.append(kind)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    config = read(case / "tokenizer_config.json") | read(case / "special_tokens_map.json")
    for key in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            getattr(writer, f"add_{key}_token_id")(ids[token])
    jinja = case / "chat_template.jinja"
    template = (
        read(case / "chat_template.json").get("chat_template")
        or (jinja.read_text() if jinja.is_file() else None)
        or config.get("chat_template")
    )
    if template:
        writer.add_chat_template(template)


def text_arrays(case: Path, text: dict[str, Any], arch: gguf.MODEL_ARCH) -> Arrays:
    """The text half by llama.cpp's names, q and k permuted where it does so."""
    found: Arrays = {}
    table = gguf.get_tensor_name_map(arch, text["num_hidden_layers"])
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    for name, array in floats(case).items():
        if not _TEXT_NAME.search(name) or "vision" in name or "connector" in name:
            continue
        name = re.sub(r"^language_model\.", "", name).replace("text_model.", "")
        parts = {name: array}
        if name.endswith("gate_up_proj"):
            gate, up = np.split(array.swapaxes(-1, -2), 2, axis=-2)
            parts = {
                name.replace("gate_up_proj", f"{part}_proj.weight"): half for part, half in (("gate", gate), ("up", up))
            }
        elif name.endswith("experts.down_proj"):
            parts = {f"{name}.weight": array.swapaxes(-1, -2)}
        for part, value in parts.items():
            if arch is gguf.MODEL_ARCH.LLAMA and re.search(r"[qk]_proj\.(weight|bias)$", part):
                value = permute(value, heads if "q_proj" in part else kv_heads)
            key = table.get_name(part, try_suffixes=(".weight", ".bias"))
            assert key, part
            found[key] = value
    return found


def write_text(
    path: Path, case: Path, kind: Kind = Kind.F32, change: Callable[[gguf.GGUFWriter, Arrays], None] | None = None
) -> None:
    """The text half of a golden. `change` may add keys and replace tensors."""
    config = read(case / "config.json")
    text = {**config, **config.get("text_config", {})}
    arch = _ARCHITECTURES.get(text["model_type"].removesuffix("_text"), gguf.MODEL_ARCH.LLAMA)
    if config["model_type"] == "qwen2_vl":
        arch = gguf.MODEL_ARCH.QWEN2VL
    arrays = text_arrays(case, text, arch)
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    heads, head_dim = (
        text["num_attention_heads"],
        text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
    )
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text.get("max_position_embeddings", 2048))
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text.get("intermediate_size_mlp", text["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(
        text.get("rms_norm_eps", 1e-5 if config["model_type"] in ("llama4", "qwen2_vl") else 1e-6)
    )
    default_theta = {"llama4": 500_000.0, "qwen2_vl": 1_000_000.0}.get(config["model_type"], 10000.0)
    rope = rope_parameters(text, default_theta)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "head_dim" in text:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch is gguf.MODEL_ARCH.LLAMA4:
        writer.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])
        writer.add_expert_feed_forward_length(text["intermediate_size"])
        writer.add_expert_count(text["num_local_experts"])
        writer.add_expert_used_count(text["num_experts_per_tok"])
    if arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.LLAMA4):
        writer.add_vocab_size(text["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if rope["rope_type"] == "llama3":
        plain = inverse_frequencies(head_dim, {**rope, "rope_type": "default"})
        arrays["rope_freqs.weight"] = plain / inverse_frequencies(head_dim, rope)
    add_vocabulary(writer, case, len(arrays["token_embd.weight"]), PRE.get(case.name, "llama-bpe"))
    if change:
        change(writer, arrays)
    add_arrays(writer, arrays, kind)
    finish(writer)


def _legacy(name: str) -> str:
    """As the legacy script's `get_tensor_name`: CLIP's up and down have each other's names."""
    if name == "image_newline":
        return "model.image_newline"
    if name.startswith("multi_modal_projector"):
        return name.replace("multi_modal_projector.linear_1", "mm.0").replace("multi_modal_projector.linear_2", "mm.2")
    renames = (
        ("vision_tower.vision_model", "v"), ("encoder.layers", "blk"), ("embeddings.", ""), ("_proj", ""),
        ("self_attn.", "attn_"), ("layer_norm", "ln"), ("layernorm", "ln"), ("mlp.fc1", "ffn_down"),
        ("mlp.fc2", "ffn_up"), ("embedding", "embd"), ("layrnorm", "ln"),
    )  # fmt: skip
    for old, new in renames:
        name = name.replace(old, new)
    return name


def _qwen2_vl_arrays(tensors: Arrays, table: gguf.TensorNameMap) -> Arrays:
    """q, k and v apart, the film's two frames apart."""
    found: Arrays = {}
    for name, array in tensors.items():
        if ".qkv." in name:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                found[table.get_name(name.replace("qkv", part), try_suffixes=(".weight", ".bias"))] = rows
        elif "patch_embed.proj.weight" in name:
            found["v.patch_embd.weight"], found["v.patch_embd.weight.1"] = array[:, :, 0], array[:, :, 1]
        else:
            found[table.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return found


def tower_arrays(case: Path, family: str, feature_layers: list[int]) -> Arrays:
    """The picture half by llama.cpp's names."""
    tensors = {
        name: array
        for name, array in floats(case).items()
        if not _TEXT_NAME.search(name) or "vision" in name or "connector" in name
    }
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)
    if family == "qwen2_vl":
        return _qwen2_vl_arrays(tensors, table)
    found: Arrays = {}
    for name, array in tensors.items():
        if family.startswith("llava"):
            layer = re.search(r"encoder\.layers\.(\d+)\.", name)
            unused = "post_layernorm" in name or ".head." in name or name.endswith("position_ids")
            if not unused and not (layer and int(layer[1]) >= max(feature_layers)):
                found[_legacy(name)] = array
        elif "positional_embedding_vlm" in name:
            found[table.get_name(name) + ".weight"] = array
        elif "multi_modal_projector.linear_1" in name:
            found["mm.model.fc.weight"] = array
        else:
            found[table.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return found


def write_mmproj(
    path: Path, case: Path, kind: Kind = Kind.F32, change: Callable[[gguf.GGUFWriter, Arrays], None] | None = None
) -> None:
    """The picture half of a golden."""
    config, images = read(case / "config.json"), read(case / "preprocessor_config.json")
    family, vision = config["model_type"], config["vision_config"]
    layers = vision.get("depth") or vision["num_hidden_layers"]
    given = config.get("vision_feature_layer", -2)
    features = [layer % (layers + 1) for layer in ([given] if isinstance(given, int) else given)]
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_vision_image_size(vision.get("image_size", 560))
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision.get("embed_dim") or vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision.get("intermediate_size") or vision["hidden_size"])
    writer.add_vision_head_count(vision.get("num_heads") or vision["num_attention_heads"])
    writer.add_vision_block_count(max(features) if family.startswith("llava") else layers)
    writer.add_vision_projection_dim(768)  # what it is, in old files
    writer.add_vision_attention_layernorm_eps({"clip_vision_model": 1e-5}.get(vision.get("model_type", ""), 1e-6))
    writer.add_vision_image_mean(images["image_mean"])
    writer.add_vision_image_std(images["image_std"])
    _PROJECTORS[family.removesuffix("_next")](writer, config, images, features)
    arrays = tower_arrays(case, family, features)
    if change:
        change(writer, arrays)
    add_arrays(writer, arrays, kind)
    finish(writer)


def _llava(writer: gguf.GGUFWriter, config: dict[str, Any], images: dict[str, Any], features: list[int]) -> None:
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", False)
    writer.add_array("clip.vision.feature_layer", features)
    if "image_grid_pinpoints" in config:
        writer.add_array(
            "clip.vision.image_grid_pinpoints", [side for pair in config["image_grid_pinpoints"] for side in pair]
        )


def _qwen2_vl(writer: gguf.GGUFWriter, config: dict[str, Any], images: dict[str, Any], features: list[int]) -> None:
    writer.add_clip_projector_type("qwen2vl_merger")
    size = images.get("size", {})
    # No converter writes these for this family yet; the keys are there.
    writer.add_uint32("clip.vision.image_min_pixels", images.get("min_pixels") or size["min_pixels"])
    writer.add_uint32("clip.vision.image_max_pixels", images.get("max_pixels") or size["max_pixels"])


def _idefics3(writer: gguf.GGUFWriter, config: dict[str, Any], images: dict[str, Any], features: list[int]) -> None:
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_projector_scale_factor(config.get("scale_factor", 2))
    writer.add_vision_use_gelu(True)
    writer.add_vision_preproc_image_size(images["size"]["longest_edge"])


def _llama4(writer: gguf.GGUFWriter, config: dict[str, Any], images: dict[str, Any], features: list[int]) -> None:
    writer.add_clip_projector_type("llama4")
    writer.add_vision_projector_scale_factor(2)
    writer.add_vision_use_gelu(True)


_PROJECTORS = {"llava": _llava, "qwen2_vl": _qwen2_vl, "idefics3": _idefics3, "smolvlm": _idefics3, "llama4": _llama4}


def write_pair(folder: Path, case: Path, kind: Kind = Kind.F32) -> Path:
    """A folder with both halves of a golden."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TEXT, case, kind)
    write_mmproj(folder / MMPROJ, case, kind)
    return folder
