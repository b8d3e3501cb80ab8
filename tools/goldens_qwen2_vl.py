"""Writes the Qwen2-VL checkpoints, in the layouts of model repositories, and loads them."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from goldens_json import read_json, write_json
from goldens_reference import fill_parameters, save_loaded, share_weights
from goldens_tokens import TokenizerSpec, token_id, train
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLProcessor,
)

__all__ = ["CASES", "build", "load_processor", "resave", "share_weights"]

Json = dict[str, Any]

IMAGE, VIDEO, PAD, END = "<|image_pad|>", "<|video_pad|>", "<|endoftext|>", "<|im_end|>"
SPECIAL = (PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE, VIDEO)
TOKENS = TokenizerSpec("qwen2", 14, (), SPECIAL, bos="", phrases=("user", "assistant", "system"))
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# Like the family's own: a system turn where the chat has none, content as text or as parts.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """`config` holds no token ids: they come from the tokenizer when the files are written."""

    name: str
    seed: int  # the first one tried, and today the one that is taken; see `make_goldens.py`
    config: Json
    image: Json  # preprocessor_config.json
    tied: bool
    dtype: torch.dtype
    spare_rows: int  # embedding rows beyond the tokenizer
    shard: str = "50GB"
    full_logits: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ("wide", "rgba")  # pictures whose pixel values are stored
    skipped: tuple[str, ...] = ("one_palette", "one_gray", "one_exif")
    resaved: str | None = None  # the case that holds the same model as transformers 5 saves it
    extra: Json = field(default_factory=dict)  # more keys of config.json


# As published in 2024: the text's keys at the root, an M-RoPE that its type names, a window that is switched off.
TIED: Json = {
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "max_position_embeddings": 4096,
    "max_window_layers": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [2, 1, 1], "type": "mrope"},
    "rope_theta": 20000.0,
    "sliding_window": 8,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "embed_dim": 8,
        "hidden_size": 16,
        "in_chans": 3,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "spatial_patch_size": 4,
        "temporal_patch_size": 2,
    },
}
# As fine-tunes of 4.46 and later have it: defaults left out, `type` says "default"; the second layer slides.
WINDOW: Json = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "max_position_embeddings": 2048,
    "max_window_layers": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [1, 1, 1], "rope_type": "default", "type": "default"},
    "sliding_window": 16,
    "use_sliding_window": True,
    "vision_config": {
        "depth": 1,
        "embed_dim": 4,
        "hidden_size": 12,
        "model_type": "qwen2_vl",
        "num_heads": 1,
        "patch_size": 3,
        "spatial_merge_size": 3,
    },
}
CASES = (
    Case(
        name="qwen2_vl_tied",
        seed=1,
        config=TIED,
        image={"max_pixels": 1024, "merge_size": 2, "min_pixels": 256, "patch_size": 4, "temporal_patch_size": 2},
        tied=True,
        dtype=torch.float16,
        spare_rows=5,
        resaved="qwen2_vl_resaved",
    ),
    Case(
        name="qwen2_vl_window",
        seed=3,
        config=WINDOW,
        image={
            "max_pixels": 1400,
            "merge_size": 3,
            "min_pixels": 500,
            "patch_size": 3,
            "resample": 3,
            "size": {"max_pixels": 1400, "min_pixels": 500},
        },
        tied=False,
        dtype=torch.bfloat16,
        spare_rows=0,
        skipped=("one_tiny", "one_palette", "one_gray", "one_exif", "multi_turn"),
    ),
)


def build(case: Case, seed: int, folder: Path) -> None:
    """Writes the whole checkpoint as model repositories of 2024 have it."""
    tokenizer = train(TOKENS)
    write_tokenizer(tokenizer, folder)
    write_config(case, tokenizer, folder)
    image = {
        **CLIP,
        **case.image,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", dict(sorted(image.items())))
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    write_weights(case, seed, tokenizer, folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(token_id(tokenizer, token)): {"content": token, **plain} for token in SPECIAL},
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": PAD,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings, compact_below=1)


def write_config(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    pad, end = token_id(tokenizer, PAD), token_id(tokenizer, END)
    root = {
        **case.config,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "bos_token_id": pad,
        "eos_token_id": end,  # generation_config.json has both
        "image_token_id": token_id(tokenizer, IMAGE),
        "model_type": "qwen2_vl",
        "tie_word_embeddings": case.tied,
        "torch_dtype": str(case.dtype).removeprefix("torch."),
        "transformers_version": "4.41.2",
        "video_token_id": token_id(tokenizer, VIDEO),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_token_id": token_id(tokenizer, "<|vision_pad|>"),
        "vocab_size": tokenizer.get_vocab_size() + case.spare_rows,
        **case.extra,
    }
    write_json(folder / "config.json", dict(sorted(root.items())), compact_below=2)
    generation = {
        "bos_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
        "transformers_version": "4.37.0",
    }
    write_json(folder / "generation_config.json", generation)


def parameter_scale(tied: bool) -> Any:
    """Deviations that give logits a spread of 3 to 5 and make every part matter for them, M-RoPE before all."""

    def scale(name: str, shape: torch.Size) -> float:
        if "norm" in name or "ln_q" in name or name.endswith("bias"):
            return 0.1
        if "embed_tokens" in name:
            return 1.4 / math.sqrt(shape[1]) if tied else 1.0
        gains = {"lm_head": 1.4, "q_proj": 2.0, "k_proj": 2.0, "qkv": 1.5, "patch_embed": 2.0, "o_proj": 1.5}
        if tied:  # else the stream stays so near to the last token that its row wins again and again
            gains |= {"layers.0.mlp.down_proj": 3.0, "layers.1.self_attn.o_proj": 2.0}
        gain = next((gain for part, gain in reversed(gains.items()) if part in name), 1.0)
        return gain / math.sqrt(math.prod(shape[1:]))

    return scale


def write_weights(case: Case, seed: int, tokenizer: Tokenizer, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    fill_parameters(model, seed, parameter_scale(case.tied))
    with torch.no_grad():
        # The one norm that its name does not show.
        model.model.visual.merger.ln_q.weight += 1.0
        never = [token_id(tokenizer, token) for token in SPECIAL if token != END]
        never += range(tokenizer.get_vocab_size(), model.lm_head.weight.shape[0])
        model.lm_head.weight[never] = 0.0  # a logit of 0 is never the largest: these are not generated
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary, "first"), Path(temporary, "second")
        model.to(case.dtype).save_pretrained(first)
        save_loaded(case, first, second)
        for path in second.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """Without torchvision there is no video processor; pictures need none."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)


def load_processor(folder: Path) -> Any:
    whole, jinja = folder / "chat_template.json", folder / "chat_template.jinja"
    template = read_json(whole)["chat_template"] if whole.exists() else jinja.read_text(encoding="utf-8")
    return ImageOnlyQwen2VLProcessor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        SimpleNamespace(model_input_names=[]),
        chat_template=template,
    )


def resave(case: Case, source: Path, folder: Path) -> None:
    """The same model and processor as transformers 5 writes them today, but for a video processor."""
    save_loaded(case, source, folder)
    processor = load_processor(source)
    processor.tokenizer.save_pretrained(folder)
    image = {key: value for key, value in processor.image_processor.to_dict().items() if value is not None}
    write_json(folder / "processor_config.json", {"image_processor": image, "processor_class": "Qwen2VLProcessor"})
    (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
