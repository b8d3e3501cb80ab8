"""Writes the Llama 3.2 Vision checkpoint, in the layouts of model repositories, and loads it.

Importing this module changes transformers in one place: see `AuthorsMasking`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goldens_json import write_json
from goldens_reference import fill_parameters, save_loaded, share_weights
from goldens_tables import image_sizes
from goldens_tokens import TokenizerSpec, token_id, train
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.models.mllama import image_processing_pil_mllama as images
from transformers.models.mllama import modeling_mllama as modeling
from transformers.models.mllama import processing_mllama as processing

__all__ = ["CASES", "build", "load_processor", "resave", "share_weights", "write_tables"]

Json = dict[str, Any]


class AuthorsMasking(modeling.MllamaCrossAttentionDecoderLayer):
    """Text before the first picture passes a cross layer unchanged, as in the authors' own code.

    llama-models multiplies what attention and MLP give such a token by 0. transformers does so to the MLP alone: for
    attention it multiplies the mask instead, which lets the token see every picture and all padding.
    """

    authentic = modeling.MllamaCrossAttentionDecoderLayer.forward

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, full_text_row_masked_out_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        mask = full_text_row_masked_out_mask
        changed = AuthorsMasking.authentic(self, hidden_states, *args, full_text_row_masked_out_mask=mask, **kwargs)
        return changed if mask is None else torch.where(mask[:, 0] != 0, changed, hidden_states)


modeling.MllamaCrossAttentionDecoderLayer.forward = AuthorsMasking.forward

# Like the published one in what it asks for: a string for a system turn, a date, one marker for a picture.
TEMPLATE = (
    "{{- bos_token -}}{%- set said = namespace(pictures=false) -%}"
    "{%- set rules = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
    "{%- for turn in turns -%}{%- for part in turn['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set said.pictures = true -%}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if rules or not said.pictures -%}"
    "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' + rules + '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- for turn in turns -%}{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' -}}"
    "{%- if turn['content'] is string -%}{{- turn['content'] -}}{%- else -%}"
    "{%- for part in turn['content'] -%}"
    "{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}{{- '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)

IMAGE, PAD = "<|image|>", "<|finetune_right_pad_id|>"
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
TOKENS = TokenizerSpec(
    style="llama3",
    merges=30,
    leading=(),
    # The picture's token comes last: it is the first that the head has no row for.
    trailing=("<|begin_of_text|>", PAD, "<|start_header_id|>", "<|end_header_id|>", *ENDS, IMAGE),
    bos="<|begin_of_text|>",
    phrases=("system", "user", "assistant", "\n\n"),
)
TEXT: Json = {
    "cross_attention_layers": [1, 3],
    "dropout": 0,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 4096,
    "model_type": "mllama_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
    },
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
# supported_aspect_ratios, max_num_tiles and num_channels are left to the reference's defaults.
VISION: Json = {
    "attention_heads": 2,
    "hidden_act": "gelu",
    "hidden_size": 8,
    "image_size": 24,
    "intermediate_layers_indices": [0, 2],
    "intermediate_size": 12,
    "model_type": "mllama_vision_model",
    "norm_eps": 1e-05,
    "num_global_layers": 1,
    "num_hidden_layers": 3,
    "patch_size": 8,
    "tie_word_embeddings": True,  # as published: a leftover that means nothing
    "vision_output_dim": 24,
}


@dataclass(frozen=True)
class Case:
    """`text` and `vision` hold no token ids: they come from the tokenizer when the files are written."""

    name: str
    seed: int  # the first one tried
    text: Json
    vision: Json
    dtype: torch.dtype
    full_logits: tuple[str, ...] = ("one_wide",)
    pixels: tuple[str, ...] = ("wide", "rgba")
    skipped: tuple[str, ...] = ("one_palette", "one_gray", "one_exif")
    resaved: str | None = None
    template_variables: Json = field(default_factory=lambda: {"date_string": "05 Mar 2025"})
    plain_system: bool = True  # the template takes a system turn as a string
    blank_tiles: bool = True  # tiles that a picture does not fill are exactly 0


CASES = (Case("mllama_tiles", 1, TEXT, VISION, torch.bfloat16, resaved="mllama_resaved"),)


def build(case: Case, seed: int, folder: Path) -> None:
    """Writes the whole checkpoint as the model repositories of 2024 have it."""
    tokenizer = train(TOKENS)
    write_tokenizer(case, tokenizer, folder)
    write_config(case, tokenizer, folder)
    write_processor(case, folder)
    write_weights(case, seed, tokenizer, folder)


def write_tokenizer(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    named = {"bos_token": TOKENS.bos, "eos_token": ENDS[-1], "pad_token": PAD}
    settings = {
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": case.text["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings, compact_below=1)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {key: {"content": token, **plain} for key, token in named.items()}
    write_json(folder / "special_tokens_map.json", special, compact_below=0)


def write_config(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = str(case.dtype).removeprefix("torch.")
    ids = {
        "bos_token_id": token_id(tokenizer, TOKENS.bos),
        "eos_token_id": [token_id(tokenizer, token) for token in ENDS],
        "pad_token_id": token_id(tokenizer, PAD),
    }
    image = token_id(tokenizer, IMAGE)
    text = {**case.text, **ids, "torch_dtype": dtype, "vocab_size": image}
    root = {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": image,
        "model_type": "mllama",
        "text_config": dict(sorted(text.items())),
        "torch_dtype": dtype,
        "transformers_version": "4.45.0.dev0",
        "vision_config": {**case.vision, "torch_dtype": dtype},
    }
    write_json(folder / "config.json", root, compact_below=2)
    generation = {"_from_model_config": True, **ids, "transformers_version": "4.45.0.dev0"}
    write_json(folder / "generation_config.json", generation)


def write_processor(case: Case, folder: Path) -> None:
    side = case.vision["image_size"]
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": 4,
        "processor_class": "MllamaProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": side, "width": side},
    }
    write_json(folder / "preprocessor_config.json", settings)
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})


def parameter_scale(name: str, shape: torch.Size) -> float:
    """Deviations that make every part matter for the logits; transformers itself starts the gates at 0."""
    if "gate" in name and "proj" not in name:
        return 1.5
    if "norm" in name or name.endswith("bias"):
        return 0.1
    if "embed_tokens" in name:
        return 1.0
    if "embedding" in name and "patch" not in name:
        return 0.7
    gains = {"lm_head": 1.6, "q_proj": 1.5, "k_proj": 1.5, "patch_embedding": 2.0, "cross_attn.o_proj": 2.0}
    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
    return gain / math.sqrt(math.prod(shape[1:]))


def write_weights(case: Case, seed: int, tokenizer: Tokenizer, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    fill_parameters(model, seed, parameter_scale)
    with torch.no_grad():
        model.lm_head.weight[token_id(tokenizer, PAD)] = 0.0  # never the largest logit, so never generated
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary, "first"), Path(temporary, "second")
        model.to(case.dtype).save_pretrained(first)
        # A loaded model spreads its tensors over shards in another order than a new one.
        save_loaded(case, first, second)
        for path in second.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)


def load_processor(folder: Path) -> Any:
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def resave(case: Case, source: Path, folder: Path) -> None:
    """The same model and processor as transformers 5 writes them today."""
    save_loaded(case, source, folder)
    load_processor(source).save_pretrained(folder)


# (side of a tile, most tiles): both published sizes, and an odd one.
SETTINGS = ((560, 4), (448, 4), (333, 7))
# Token ids where 9 is a picture.
PROMPTS = (
    (9,), (9, 1), (1, 9, 1), (9, 9, 1), (1, 9, 9, 9, 1, 1), (9, 1, 9, 1), (1, 9, 1, 9, 9, 1), (9, 9, 1, 1, 9, 1, 9, 9),
    (1, 1, 9, 1, 9), (1, 9, 9), (9, 1, 9, 9, 1, 9, 1, 1),
)  # fmt: skip


def tile_sizes(width: int, height: int, tile: int, most: int) -> list[int]:
    """[rows, columns, height, width]: the tiles, and the picture inside them."""
    canvas = tuple(map(int, images.get_optimal_tiled_canvas(height, width, most, tile)))
    fitted = images.get_image_size_fit_to_canvas(height, width, *canvas, tile)
    return [canvas[0] // tile, canvas[1] // tile, *map(int, fitted)]


def seen_images(ids: tuple[int, ...]) -> list[list[int]]:
    """For each token the pictures it may look at."""
    sparse = processing.get_cross_attention_token_mask(list(ids), 9)
    tiles = [[1] * len(sparse)]
    dense = processing.convert_sparse_cross_attention_mask_to_dense([sparse], tiles, 1, len(ids))
    return [np.flatnonzero(row[:, 0]).tolist() for row in dense[0]]


def write_tables(out: Path) -> None:
    sizes = image_sizes(110)
    table = {
        "sizes": sizes,
        "settings": {f"{tile} {most}": [tile_sizes(*size, tile, most) for size in sizes] for tile, most in SETTINGS},
        "arrangements": {str(most): images.get_all_supported_aspect_ratios(most) for most in (1, 2, 3, 4, 7)},
        "prompts": PROMPTS,
        "seen": [seen_images(ids) for ids in PROMPTS],
    }
    write_json(out / "tiles.json", table, compact_below=1)
