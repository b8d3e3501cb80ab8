"""The demo model's shape, its tokenizer and the files of its folder. Knows nothing of training.

Layout and keys are those of HuggingFaceTB/SmolVLM-256M-Instruct, made small.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from demo_data import BOS, END, IMAGE, Mix, Row, make_row, row_seed, to_messages
from demo_words import single_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

IMAGE_SIDE, PATCH, SCALE = 64, 8, 2
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2 // SCALE**2
VOCAB = 512
PAD, FAKE, GLOBAL, UNKNOWN = "<|im_end|>", "<fake_token_around_image>", "<global-img>", "<|endoftext|>"
SPECIALS = (UNKNOWN, BOS, PAD, FAKE, GLOBAL, IMAGE, END)
IMAGE_TEXT = FAKE + GLOBAL + IMAGE * IMAGE_TOKENS + FAKE  # what one <image> of a prompt becomes

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PREPROCESSOR: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_image_splitting": False,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Idefics3ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": IMAGE_SIDE},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 4 * IMAGE_SIDE},
}


def build_model(tokenizer: Tokenizer) -> Idefics3ForConditionalGeneration:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    text = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD],
        "initializer_range": 0.03,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": IMAGE_SIDE, "patch_size": PATCH, "initializer_range": 0.03,
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=SCALE, image_token_id=ids[IMAGE],
        tie_word_embeddings=False, pad_token_id=ids[PAD],
    )  # fmt: skip
    # Eager: on a CPU the backward pass of fused attention is slower at these sizes.
    config._attn_implementation = "eager"
    return Idefics3ForConditionalGeneration(config)


def row_text(row: Row, branch: int = 0) -> str:
    """The whole conversation as the chat template writes it, images unexpanded."""
    messages, answer = to_messages(row, branch)
    text = BOS
    for message in messages:
        colon = ":" if message["content"][0]["type"] == "image" else ": "
        parts = (IMAGE if part["type"] == "image" else part["text"] for part in message["content"])
        text += message["role"].capitalize() + colon + "".join(parts) + END + "\n"
    return text + f"Assistant: {answer}{END}\n"


def build_tokenizer(seed: int, num_rows: int = 1500) -> Tokenizer:
    """Byte-level BPE over the corpus: any input can be encoded; a word for what is seen is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = []
    for index in range(num_rows):
        row = make_row(random.Random(row_seed(seed, index, phase=5)), Mix(num_branches=4))
        for branch in range(len(row.branches)):
            corpus += re.split("|".join(map(re.escape, SPECIALS)), row_text(row, branch))
    corpus += [" ".join(("", *single_words()))] * (num_rows // 3)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for token in SPECIALS
    }  # fmt: skip
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [FAKE, IMAGE, END],
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 2048,
        "pad_token": PAD,
        "processor_class": "Idefics3Processor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }


def export(model: Idefics3ForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the whole folder: weights in float16, everything else in the hub's layout."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    half = Idefics3ForConditionalGeneration(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_attn_implementation", None)
    config["vocab_size"] = VOCAB
    _write_json(folder / "config.json", config)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    generation = {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    tokens = {"bos_token": BOS, "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": [FAKE, IMAGE, END], **tokens})
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    _write_json(
        folder / "processor_config.json",
        {"image_seq_len": IMAGE_TOKENS, "processor_class": "Idefics3Processor"},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
