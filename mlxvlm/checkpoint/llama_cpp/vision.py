"""The picture half: an mmproj file's metadata -> the rest of config.json and of the processor's configs.

Sources: llama.cpp `tools/mtmd/clip.cpp` (what is read), `conversion/` and `tools/mtmd/legacy-models/` (what is
written), the published configs of the models for what is in neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mlxvlm.checkpoint.llama_cpp.keys import Keys
from mlxvlm.errors import ModelError, UnsupportedModelError, WeightsError
from mlxvlm.processors.tokenizer import Tokenizer

NEWLINES = ("model.image_newline", "v.image_newline")  # old converters, new ones
_KERNEL, _POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"
_ANY_SIZE = "qwen2vl_merger"  # the projector of the tower without positions
_CHANNELS = 3
_TILES_A_SIDE = 4  # of Idefics3's and SmolVLM's longest edge, where the file does not say
# Pixels of a picture, from Qwen2-VL's published preprocessor_config.json: 4 to 16,384 tokens.
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 16384
_IMAGE, _IMAGE_PAD, _PATCH = "<image>", "<|image_pad|>", "<|patch|>"

# Vicuna's, on which LLaVA 1.5 was trained; its files have none.
_VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% elif message.role == 'assistant' %}"
    "ASSISTANT: {% endif %}{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Pictures:
    """What a family's processor and model read beside the text part: the hub's files, as dicts."""

    config: dict[str, Any]
    image_processor: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)
    default_template: str | None = None


@dataclass(frozen=True)
class Halves:
    """An mmproj's keys, the text part's config, the tokenizer."""

    keys: Keys
    text: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def own(self) -> Keys:
        return self.keys.within("clip.vision.")

    def token_id(self, token: str) -> int:
        """Of an image token."""
        found = self.tokenizer.token_id(token)
        if found is None:
            raise ModelError(f"the text model has no token {token}: {self.keys.file} is the mmproj of another model")
        return found


def is_mmproj(keys: Keys) -> bool:
    """Whether a file is the picture half."""
    return keys.text("general.architecture", "") == "clip"


def projector(keys: Keys) -> str:
    """clip.projector_type, of which files of 2023 have none."""
    mixed = keys.text("clip.vision.projector_type", "")
    return keys.text("clip.projector_type", mixed or ("mlp" if keys.flag("clip.has_llava_projector", False) else ""))


def pictures(keys: Keys, architecture: str, text: dict[str, Any], tokenizer: Tokenizer) -> Pictures:
    """Raises ModelError if the halves are not of one model, UnsupportedModelError for an unknown projector."""
    name = projector(keys)
    if name not in PROJECTORS:
        raise UnsupportedModelError(
            f"{keys.file} has the projector {name!r}, which is not supported; supported: {', '.join(PROJECTORS)}"
        )
    kind = PROJECTORS[name]
    if architecture not in kind.architectures:
        raise ModelError(
            f"{keys.file} belongs to a text model of architecture {' or '.join(kind.architectures)}, "
            f"this one is {architecture}: give the mmproj that was converted with it"
        )
    width = keys.shape(kind.last, 2)[0]
    if width != text["hidden_size"]:
        raise ModelError(
            f"{keys.file} belongs to a text model of width {width}, this one has {text['hidden_size']}: "
            "give the mmproj that was converted with it"
        )
    return kind.read(Halves(keys, text, tokenizer))


def tower(keys: Keys) -> dict[str, Any]:
    """What all towers have, under the hub's usual names."""
    own = keys.within("clip.vision.")
    width = own.size("embedding_length")
    side, patch = own.size("image_size"), own.size("patch_size")
    _check_patches(keys, side // patch, patch)
    # The length in the metadata is 0 or another one in Qwen2-VL's files.
    sides = keys.shape("v.blk.0.ffn_up.weight", 2)
    return {
        "hidden_size": width,
        "intermediate_size": sides[1] if is_swapped(keys) else sides[0],
        "num_hidden_layers": own.blocks("block_count", "v.blk."),
        "num_attention_heads": own.size("attention.head_count"),
        "image_size": side,
        "patch_size": patch,
        "layer_norm_eps": own.number("attention.layer_norm_epsilon"),
    }


def _check_patches(keys: Keys, grid: int, patch: int) -> None:
    """Sizes against the tensors: from damaged numbers processors would make pictures beyond any memory."""
    stored = keys.shapes.get(_KERNEL, ())
    pixels = math.prod(stored[2:]) if len(stored) == 4 else stored[-1] // _CHANNELS if len(stored) == 2 else 0
    if pixels != patch * patch:
        raise keys.within("clip.vision.").wrong("patch_size", patch)
    positions = keys.shapes.get(_POSITIONS)
    # Qwen2-VL has none, or a dummy from old converters, and takes pictures of any size.
    if projector(keys) != _ANY_SIZE and positions is not None:
        due = grid * grid + ("v.class_embd" in keys.shapes)
        if positions[0] != due:
            raise WeightsError(f"{keys.file}: {_POSITIONS} has {positions[0]} positions, {due} are due")


def is_swapped(keys: Keys) -> bool:
    """Whether ffn_up and ffn_down changed names, as old converters had it; told by their shapes, as in llama.cpp.

    Square ones, which no published tower has, are taken as new converters name them.
    """
    down, width = keys.shape("v.blk.0.ffn_down.weight", 2), keys.size("clip.vision.embedding_length")
    return down[1] == width != down[0]


def _normalisation(own: Keys) -> dict[str, Any]:
    parts = {name: own.numbers(name) for name in ("image_mean", "image_std")}
    for name, values in parts.items():
        if len(values) != 3 or (name == "image_std" and not all(values)):
            raise own.wrong(name, values)
    return parts


def _act(keys: Keys) -> str:
    """CLIP's quick GELU where no key says otherwise."""
    if keys.flag("clip.use_gelu", False):
        return "gelu"
    return "silu" if keys.flag("clip.use_silu", False) else "quick_gelu"


def _llava(halves: Halves) -> Pictures:
    keys, own, text = halves.keys, halves.own, halves.text
    vision = tower(keys)
    is_clip = "v.class_embd" in keys.shapes
    vision |= {"model_type": "clip_vision_model", "hidden_act": _act(keys)} if is_clip else {}
    vision.setdefault("model_type", "siglip_vision_model")
    is_anyres = any(name in keys.shapes for name in NEWLINES)
    # Converters drop the layers after the one that is projected, and with them the last norm.
    is_whole = is_clip and "v.post_ln.weight" in keys.shapes
    image_token = _llava_image_token(halves)
    side = vision["image_size"]
    square = {"height": side, "width": side}
    processor: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": square}
    if is_clip:
        processor = {
            "image_processor_type": "LlavaNextImageProcessor" if is_anyres else "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": square,
        }
    config = {
        "model_type": "llava_next" if is_anyres else "llava",
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": own.integers("feature_layer", []) or (-2 if is_whole else -1),
        "vision_feature_select_strategy": "default" if is_clip else "full",
        "image_token_index": halves.token_id(image_token),
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    if is_anyres:
        flat = own.integers("image_grid_pinpoints", [])
        config["image_grid_pinpoints"] = list(zip(flat[::2], flat[1::2], strict=False)) or None
    template = _VICUNA.replace(_IMAGE, image_token)
    return Pictures(config, processor | _normalisation(own), {"image_token": image_token}, template)


def _llava_image_token(halves: Halves) -> str:
    """<image>, if need be in a row of the embedding that no token has; else the unknown token.

    The authors' own vocabulary has no image token and no free row. Features are written over its embedding, so any
    token serves that no text becomes; with byte tokens for all that is not in the vocabulary that is the unknown one.
    """
    tokenizer = halves.tokenizer
    if tokenizer.token_id(_IMAGE) is not None:
        return _IMAGE
    if tokenizer.backend.get_vocab_size() < halves.text["vocab_size"]:
        tokenizer.add_special(_IMAGE)
        return _IMAGE
    unknown = tokenizer.special_tokens.get("unk_token")
    if unknown is None:
        raise ModelError(f"the text model has no token {_IMAGE} and no place for it: {halves.keys.file} can't be used")
    return unknown


def _qwen2_vl(halves: Halves) -> Pictures:
    keys, own, text = halves.keys, halves.own, halves.text
    vision = tower(keys)
    # No key says it: the first layer reads a block of merge x merge patches.
    merge = math.isqrt(keys.shape("mm.0.weight", 2)[1] // vision["hidden_size"])
    config = {
        "model_type": "qwen2_vl",
        "text_config": text,
        "vision_config": {
            "depth": vision["num_hidden_layers"],
            "embed_dim": vision["hidden_size"],
            "hidden_size": text["hidden_size"],
            "hidden_act": _act(keys),
            # The model takes the whole part of embed_dim * mlp_ratio.
            "mlp_ratio": (vision["intermediate_size"] + 0.5) / vision["hidden_size"],
            "num_heads": vision["num_attention_heads"],
            "patch_size": vision["patch_size"],
            "spatial_merge_size": merge,
        },
        "image_token_id": halves.token_id(_IMAGE_PAD),
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    processor = {
        "patch_size": vision["patch_size"],
        "merge_size": merge,
        "min_pixels": own.size("image_min_pixels", _MIN_PIXELS),
        "max_pixels": own.size("image_max_pixels", _MAX_PIXELS),
    }
    if processor["min_pixels"] > _MAX_PIXELS:
        raise own.wrong("image_min_pixels", processor["min_pixels"])
    return Pictures(config, processor | _normalisation(own))


def _idefics3(halves: Halves) -> Pictures:
    own, text, vision = halves.own, halves.text, tower(halves.keys)
    side = vision["image_size"]
    config = {
        "model_type": "idefics3",
        "text_config": text,
        "vision_config": vision,
        "scale_factor": own.size("projector.scale_factor", 2),
        "image_token_id": halves.token_id(_IMAGE),
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    processor = {
        "size": {"longest_edge": own.integer("preproc_image_size", _TILES_A_SIDE * side)},
        "max_image_size": {"longest_edge": side},
    }
    return Pictures(config, processor | _normalisation(own))


def _llama4(halves: Halves) -> Pictures:
    keys, own, text = halves.keys, halves.own, halves.text
    vision = tower(keys)
    width = keys.shape("mm.model.mlp.2.weight", 2)[0]
    widths = dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), width)
    scale = own.size("projector.scale_factor", 2)
    side = vision["image_size"]
    config = {
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {**vision, **widths, "pixel_shuffle_ratio": 1 / scale},
        "image_token_index": halves.token_id(_PATCH),
    }
    processor = {"size": {"height": side, "width": side}}
    parts = {"patch_size": vision["patch_size"], "pixel_shuffle_ratio": 1 / scale}
    return Pictures(config, processor | _normalisation(own), parts)


Reader: TypeAlias = Callable[[Halves], Pictures]


@dataclass(frozen=True, slots=True)
class Projector:
    """`last`: the tensor whose output is as wide as the text model; `architectures`: of text models it may meet."""

    architectures: tuple[str, ...]
    last: str
    read: Reader


PROJECTORS: Mapping[str, Projector] = {
    "mlp": Projector(("llama", "qwen2"), "mm.2.weight", _llava),
    _ANY_SIZE: Projector(("qwen2vl",), "mm.2.weight", _qwen2_vl),
    "idefics3": Projector(("llama",), "mm.model.fc.weight", _idefics3),
    "llama4": Projector(("llama4",), "mm.model.fc.weight", _llama4),
}
