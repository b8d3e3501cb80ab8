"""Writes the Llama 4 checkpoints, in the layout of model repositories, and loads them.

The reference's image processor needs torchvision, which the other families' do not.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from goldens_json import write_json
from goldens_reference import fill_parameters
from goldens_tokens import TokenizerSpec, token_id, train
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

__all__ = ["CASES", "build", "load_processor", "resave", "share_weights"]

Json = dict[str, Any]

BOS, PAD, EOS = "<|begin_of_text|>", "<|finetune_right_pad|>", ("<|end_of_text|>", "<|eom|>", "<|eot|>")
IMAGE_TOKENS = (
    "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>",
)  # fmt: skip
TOKENS = TokenizerSpec(
    style="llama3",
    merges=10,
    leading=(),
    trailing=(BOS, *EOS, "<|header_start|>", "<|header_end|>", PAD, *IMAGE_TOKENS),
    bos=BOS,
    phrases=("user", "assistant", "\n\n"),
)
TEMPLATE = (
    BOS + "{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """`config` holds no token ids: they come from the tokenizer when the files are written."""

    name: str
    seed: int  # the first one tried, and today the one that is taken; see `make_goldens.py`
    text: Json
    vision: Json
    max_tiles: int
    fill_canvas: bool
    dtype: torch.dtype
    full_logits: tuple[str, ...]
    pixels: tuple[str, ...]  # of every scenario that is left: another resampling gives slightly other logits
    skipped: tuple[str, ...]
    resaved: str | None = None


def build(case: Case, seed: int, folder: Path) -> None:
    """Writes the whole checkpoint as model repositories of 2025 have it."""
    tokenizer = train(TOKENS)
    write_tokenizer(tokenizer, folder)
    write_config(case, tokenizer, folder)
    write_processor(case, folder)
    write_weights(case, seed, tokenizer, folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    named = {"bos_token": BOS, "eos_token": EOS[-1], "pad_token": PAD}
    settings = {
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "processor_class": "Llama4Processor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_config(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    dtype, ends = str(case.dtype).removeprefix("torch."), [token_id(tokenizer, token) for token in EOS]
    ids = {"bos_token_id": token_id(tokenizer, BOS), "eos_token_id": ends, "pad_token_id": token_id(tokenizer, PAD)}
    text = {
        "model_type": "llama4_text",
        "num_experts_per_tok": 1,
        "max_position_embeddings": 4096,
        "torch_dtype": dtype,
        "vocab_size": tokenizer.get_vocab_size(),
        **ids,
        **case.text,
    }
    root = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": token_id(tokenizer, "<|image_start|>"),
        "eoi_token_index": token_id(tokenizer, "<|image_end|>"),
        "image_token_index": token_id(tokenizer, "<|patch|>"),
        "model_type": "llama4",
        "text_config": dict(sorted(text.items())),
        "torch_dtype": dtype,
        "transformers_version": "4.51.0.dev0",
        "vision_config": {"model_type": "llama4_vision_model", **case.vision},
    }
    write_json(folder / "config.json", root, compact_below=2)
    write_json(folder / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9})


def write_processor(case: Case, folder: Path) -> None:
    side = case.vision["image_size"]
    image = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Llama4ImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": case.max_tiles,
        "processor_class": "Llama4Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "resize_to_max_canvas": case.fill_canvas,
        "size": {"height": side, "width": side},
    }
    write_json(folder / "preprocessor_config.json", image)
    whole = {
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
        "patch_size": case.vision["patch_size"],
        "processor_class": "Llama4Processor",
    }
    write_json(folder / "processor_config.json", whole)


def scale(name: str, shape: torch.Size) -> float:
    """Deviations that give logits a spread of 3 to 5 and make every part matter for them."""
    if "norm" in name or name.endswith("bias"):
        return 0.1
    if "embed" in name and "patch" not in name:
        return 1.0 if "embed_tokens" in name else 0.7
    gains = {"lm_head": 1.4, "q_proj": 1.5, "k_proj": 1.5, "router": 2.0, "vision_adapter": 2.0, "linear_1": 2.5}
    gain = next((gain for part, gain in gains.items() if part in name), 1.2)
    # Stacks of experts are [E, in, out], linear layers [out, in].
    return gain / math.sqrt(shape[1])


def write_weights(case: Case, seed: int, tokenizer: Tokenizer, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    fill_parameters(model, seed, scale)
    never = [token_id(tokenizer, token) for token in (*IMAGE_TOKENS, PAD)]
    with torch.no_grad():
        model.language_model.lm_head.weight[never] = 0.0  # a logit of 0 is never the largest: not generated
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary, "first"), Path(temporary, "second")
        model.to(case.dtype).save_pretrained(first)
        # A loaded model writes its tensors in another order than a new one.
        save_loaded(case, first, second)
        shutil.copyfile(second / "model.safetensors", folder / "model.safetensors")


def save_loaded(case: Case, source: Path, folder: Path) -> None:
    AutoModelForImageTextToText.from_pretrained(source, dtype=case.dtype).save_pretrained(folder)


def load_processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def resave(case: Case, source: Path, folder: Path) -> None:
    """The same model and processor as transformers 5 writes them today."""
    save_loaded(case, source, folder)
    load_processor(source).save_pretrained(folder)


def share_weights(source: Path, folder: Path) -> None:
    """A weight file with the very bytes of another case becomes a link to it, as in a hub cache."""
    path = folder / "model.safetensors"
    if path.read_bytes() == (source / path.name).read_bytes():
        path.unlink()
        path.symlink_to(os.path.join("..", source.name, path.name))


CASES = (
    Case(
        name="llama4_norms",
        seed=2,
        text={
            "attention_chunk_size": 11,
            "attn_scale": 0.3,
            "floor_scale": 6,
            "head_dim": 6,
            "hidden_size": 8,
            "intermediate_size": 8,
            "intermediate_size_mlp": 16,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [],
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "num_local_experts": 3,
            "rope_scaling": {
                "factor": 4.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 32,
                "rope_type": "llama3",
            },
            "rope_theta": 90000.0,
            "use_qk_norm": True,
        },
        vision={
            "hidden_size": 8,
            "image_size": 20,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 5,
            "projector_input_dim": 12,
            "projector_output_dim": 12,
            "vision_output_dim": 12,
        },
        max_tiles=6,
        fill_canvas=False,
        dtype=torch.bfloat16,
        full_logits=(),
        pixels=("wide", "tall", "tiny", "rgba"),
        skipped=("one_palette", "one_gray", "one_exif", "text_first", "system_turn"),
        resaved="llama4_resaved",
    ),
    Case(
        name="llama4_dense",
        seed=1,
        text={
            "attention_chunk_size": 17,
            "floor_scale": 9,
            "head_dim": 8,
            "hidden_size": 8,
            "intermediate_size": 6,
            "intermediate_size_mlp": 10,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "num_attention_heads": 2,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "use_qk_norm": False,
        },
        vision={
            "hidden_act": "quick_gelu",  # as ignored as norm_eps
            "hidden_size": 8,
            "image_size": 26,  # two rows and columns of pixels beyond the last patch
            "intermediate_size": 32,
            "norm_eps": 0.1,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 6,
            "projector_input_dim": 8,
            "projector_output_dim": 8,
            "rope_theta": 500,
            "vision_output_dim": 8,
        },
        max_tiles=3,
        fill_canvas=True,
        dtype=torch.float16,
        full_logits=(),
        pixels=("wide", "tall", "rgba"),
        skipped=("one_tiny", "one_palette", "one_gray", "one_exif", "text_first", "multi_turn", "system_turn"),
    ),
)
