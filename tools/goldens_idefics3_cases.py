"""The Idefics3 and SmolVLM cases: configs, tokenizers and processor settings of the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from goldens_pictures import PICTURES
from goldens_tokens import TokenizerSpec

Json = dict[str, Any]

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
CHAT = (FAKE, IMAGE, END)


@dataclass(frozen=True)
class Case:
    """`config` holds no token ids: they come from the tokenizer when the files are written."""

    name: str
    seed: int  # the first one tried, and today the one that is taken; see `make_goldens.py`
    config: Json
    tokens: TokenizerSpec
    eos: tuple[str, ...]
    pad: str
    longest_edge: int
    tile: int
    splitting: bool
    dtype: torch.dtype
    tokenizer_class: str = "PreTrainedTokenizerFast"
    unk: str | None = None
    spare_rows: int = 0  # embedding rows beyond the tokenizer
    shard: str = "50GB"
    template_files: tuple[str, ...] = ("chat_template.json",)
    full_logits: tuple[str, ...] = ()  # scenarios; all of these three are chosen to keep the files small
    pixels: tuple[str, ...] = ("wide", "rgba")  # pictures whose pixel values are stored
    skipped: tuple[str, ...] = ("one_palette", "one_gray", "one_exif")
    resaved: str | None = None  # the case that holds the same model as transformers 5 saves it
    extra: Json = field(default_factory=dict)  # more root keys of config.json


ROLES = ("User:", "Assistant:")
LLAMA3 = TokenizerSpec(
    style="llama3",
    merges=36,
    leading=(),
    trailing=("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>", *CHAT),
    bos="<|begin_of_text|>",
    phrases=(*ROLES, "\n\n", "<row_1_col_1>", "<global-img>"),
)
SMOL_LEADING = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
SMOL = TokenizerSpec("smol", 26, SMOL_LEADING, CHAT, "<|im_start|>", phrases=(*ROLES, "\n\n"))
MARKERS = ("<global-img>", *(f"<row_{row}_col_{col}>" for row in (1, 2, 3) for col in (1, 2, 3)))
SMOL2 = TokenizerSpec(
    style="smol",
    merges=24,
    leading=SMOL_LEADING,
    trailing=(*MARKERS, FAKE, IMAGE, "<|reserved_special_token_0|>", END),
    bos="<|im_start|>",
    phrases=ROLES,  # no "\n\n": here these stay two tokens
)

SPLIT_TEXT: Json = {
    "_flash_attn_2_enabled": True,
    "_name_or_path": "",
    "architectures": ["VLlama3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "llama",
    "neftune_noise_alpha": 0.0,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "perceiver_config": {"hidden_act": "silu", "model_type": "vllama3", "resampler_depth": 6},
    "pixel_shuffle_factor": 2,
    "pretraining_tp": 1,
    "qk_layer_norms": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
    },
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_resampler": False,
}
SPLIT_VISION: Json = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "image_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_norm_eps": 1e-06,
    "model_type": "idefics3",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "patch_size": 4,
}
GRID_TEXT: Json = {
    "architectures": ["VLlama3ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pixel_shuffle_factor": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 27000.0,
}
GRID_VISION: Json = {
    "hidden_size": 4,
    "image_size": 54,
    "intermediate_size": 12,
    "max_image_size": {"longest_edge": 54},
    "model_type": "idefics3",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 2,
    "size": {"longest_edge": 108},
}
TIED_TEXT: Json = {
    "architectures": ["VLlama3ForCausalLM"],
    "head_dim": 12,
    "hidden_size": 16,
    "intermediate_size": 28,
    "is_llama_config": True,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pixel_shuffle_factor": 4,
    "qk_layer_norms": False,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "use_resampler": False,
}
TIED_VISION: Json = {
    "hidden_size": 8,
    "image_size": 17,
    "intermediate_size": 20,
    "max_image_size": {"longest_edge": 17},
    "model_type": "smolvlm_vision",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 2,
    "size": {"longest_edge": 34},
    "tie_word_embeddings": False,
    "use_base_siglip": False,
}


def config(model_type: str, scale: int, text: Json, vision: Json, tied: bool = False) -> Json:
    kind = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[model_type]
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": model_type,
        "scale_factor": scale,
        "text_config": text,
        "tie_word_embeddings": tied,
        "transformers_version": "4.46.0",
        "use_cache": True,
        "vision_config": vision,
    }


CASES = (
    Case(
        name="idefics3_split",
        seed=2,
        config=config("idefics3", 2, SPLIT_TEXT, SPLIT_VISION),
        tokens=LLAMA3,
        eos=("<|end_of_text|>", "<|eot_id|>", END),
        pad="<|reserved_special_token_0|>",
        longest_edge=48,
        tile=16,
        splitting=True,
        dtype=torch.float16,
        shard="40KB",
        full_logits=("text_only",),
        pixels=tuple(name for name in PICTURES if name != "exif"),  # JPEG decoders may differ by a level
        skipped=(),
        resaved="idefics3_resaved",
    ),
    Case(
        name="smolvlm_grid27",
        seed=1,
        config=config("idefics3", 3, GRID_TEXT, GRID_VISION),
        tokens=SMOL,
        eos=(END,),
        pad="<|im_end|>",
        longest_edge=108,
        tile=54,
        splitting=False,
        dtype=torch.float16,
        tokenizer_class="GPT2Tokenizer",
        unk="<|endoftext|>",
    ),
    Case(
        name="smolvlm2_tied",
        seed=1,
        config=config("smolvlm", 4, TIED_TEXT, TIED_VISION, tied=True),
        tokens=SMOL2,
        eos=(END,),
        pad="<|im_end|>",
        longest_edge=34,
        tile=17,
        splitting=True,
        dtype=torch.bfloat16,
        tokenizer_class="GPT2Tokenizer",
        unk="<|endoftext|>",
        spare_rows=3,
        template_files=("tokenizer_config.json", "chat_template.jinja"),
        full_logits=("one_wide",),
        extra={"pad_token_id": 128002},  # as the published one: a leftover outside the vocabulary
    ),
)
