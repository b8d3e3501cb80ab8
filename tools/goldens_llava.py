"""Writes the LLaVA checkpoints, in the layout of model repositories, and loads them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from goldens_idefics3 import share_weights
from goldens_json import write_json
from goldens_reference import fill_parameters
from goldens_tokens import TokenizerSpec, token_id, train
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

__all__ = ["CASES", "build", "load_processor", "resave", "share_weights"]

Json = dict[str, Any]

IMAGE, PAD, BOS, EOS = "<image>", "<pad>", "<s>", "</s>"
TOKENS = TokenizerSpec(
    style="llama3",
    merges=24,
    leading=(),
    trailing=("<unk>", BOS, EOS, IMAGE, PAD),
    bos=BOS,
    phrases=("USER: ", " ASSISTANT:", "[INST] ", " [/INST]"),
)
# As in the published templates: pictures go first, plain strings are dropped, no BOS.
PARTS = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + PARTS
    + "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INST = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + PARTS + "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}"
    "{% endfor %}"
)
CLIP_IMAGE: Json = {
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass(frozen=True)
class Case:
    """`config` holds no token ids: they come from the tokenizer when the files are written."""

    name: str
    seed: int  # the first one tried; see `make_goldens.py`
    config: Json
    image: Json  # preprocessor_config.json
    template: str
    dtype: torch.dtype
    full_logits: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ("wide", "rgba")  # pictures whose pixel values are stored
    skipped: tuple[str, ...] = ("one_palette", "one_gray", "one_exif", "text_first", "system_turn")
    resaved: str | None = None


CASES = (
    Case(
        name="llava_clip",
        seed=2,
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {
                "hidden_size": 12,
                "intermediate_size": 16,
                "max_position_embeddings": 2048,
                "model_type": "llama",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "rms_norm_eps": 1e-05,
            },
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": 8,
                "image_size": 18,
                "intermediate_size": 12,
                "model_type": "clip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "patch_size": 4,
                "projection_dim": 8,
            },
            "vision_feature_layer": [0, -2],
            "vision_feature_select_strategy": "default",
        },
        image={
            **CLIP_IMAGE,
            "crop_size": {"height": 18, "width": 18},
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 18},
        },
        template=VICUNA,
        dtype=torch.float16,
    ),
    Case(
        name="llava_siglip",
        seed=1,
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "projector_hidden_act": "gelu",
            "text_config": {
                "hidden_size": 12,
                "intermediate_size": 16,
                "max_window_layers": 1,
                "model_type": "qwen2",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "sliding_window": 12,
                "tie_word_embeddings": True,
                "use_sliding_window": True,
            },
            "vision_config": {
                "hidden_size": 8,
                "image_size": 12,
                "intermediate_size": 12,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "patch_size": 4,
                "vision_use_head": True,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        image={"image_processor_type": "SiglipImageProcessor", "size": {"height": 12, "width": 12}},
        template=VICUNA,
        dtype=torch.bfloat16,
    ),
    Case(
        name="llava_next_tiles",
        seed=2,
        config={
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": [[12, 24], [24, 12], [24, 24], [36, 12], [12, 48]],
            "model_type": "llava_next",
            "text_config": {
                "head_dim": 12,
                "hidden_size": 12,
                "intermediate_size": 16,
                "model_type": "mistral",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "rope_theta": 300000.0,
                "sliding_window": 20,
            },
            "use_image_newline_parameter": True,
            "vision_config": {
                "hidden_size": 8,
                "image_size": 12,
                "intermediate_size": 12,
                "model_type": "clip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "patch_size": 4,
            },
        },
        image={
            **CLIP_IMAGE,
            "crop_size": {"height": 12, "width": 12},
            "do_pad": True,
            "image_grid_pinpoints": [[12, 24], [24, 12], [24, 24], [36, 12], [12, 48]],
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 12},
        },
        template=INST,
        dtype=torch.bfloat16,
    ),
)


def build(case: Case, seed: int, folder: Path) -> None:
    """Writes the whole checkpoint as model repositories of 2024 have it."""
    tokenizer = train(TOKENS)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "chat_template.json", {"chat_template": case.template})
    write_config(case, tokenizer, folder)
    write_processor(case, folder)
    write_weights(case, seed, tokenizer, folder)


def write_config(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    rows = tokenizer.get_vocab_size() + 3  # rows beyond the tokenizer, as published
    dtype = str(case.dtype).removeprefix("torch.")
    text = {**case.config["text_config"], "torch_dtype": dtype, "vocab_size": rows}
    whole = {
        **case.config,
        "image_token_index": token_id(tokenizer, IMAGE),
        "text_config": text,
        "torch_dtype": dtype,
        "transformers_version": "4.39.0",
    }
    write_json(folder / "config.json", whole, compact_below=2)
    write_json(folder / "generation_config.json", {"eos_token_id": token_id(tokenizer, EOS)})


def write_processor(case: Case, folder: Path) -> None:
    kind = case.config["architectures"][0].removesuffix("ForConditionalGeneration")
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "processor_class": f"{kind}Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
    }
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    write_json(folder / "preprocessor_config.json", {**shared, **half, **case.image}, compact_below=1)
    vision = case.config["vision_config"]
    settings = {
        "image_token": IMAGE,
        "num_additional_image_tokens": int(vision["model_type"] == "clip_vision_model"),
        "patch_size": vision["patch_size"],
        "processor_class": f"{kind}Processor",
        "vision_feature_select_strategy": case.config.get("vision_feature_select_strategy", "default"),
    }
    write_json(folder / "processor_config.json", settings)


def scale(name: str, shape: torch.Size) -> float:
    """Deviations that give logits a spread of 3 to 5 and make every part matter for them."""
    if "norm" in name or name.endswith("bias"):
        return 0.1
    if "position_embedding" in name or "class_embedding" in name:
        return 0.8
    if "embed_tokens" in name:
        return 1.4 / math.sqrt(shape[1])
    gains = {"lm_head": 1.4, "q_proj": 1.3, "k_proj": 1.3, "patch_embedding": 2.0, "layers.0.mlp.down_proj": 3.0}
    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
    return gain / math.sqrt(math.prod(shape[1:]))


def write_weights(case: Case, seed: int, tokenizer: Tokenizer, folder: Path) -> None:
    """With the `vision_model.` in the tower's names that transformers 5 leaves out."""
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    fill_parameters(model, seed, scale)
    never = [token_id(tokenizer, token) for token in (IMAGE, PAD)]
    never += range(tokenizer.get_vocab_size(), model.lm_head.weight.shape[0])
    with torch.no_grad():
        model.lm_head.weight[never] = 0.0  # a logit of 0 is never the largest: these are not generated
    with tempfile.TemporaryDirectory() as temporary:
        model.to(case.dtype).save_pretrained(temporary)
        saved = load_file(Path(temporary, "model.safetensors"))
    short, long = "vision_tower.", "vision_tower.vision_model."
    tensors = {name if name.startswith(long) else name.replace(short, long, 1): saved[name] for name in saved}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_processor(folder: Path) -> Any:
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def resave(case: Case, source: Path, folder: Path) -> None:
    """The same model and processor as transformers 5 writes them today."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=case.dtype)
    model.save_pretrained(folder)
    load_processor(source).save_pretrained(folder)
