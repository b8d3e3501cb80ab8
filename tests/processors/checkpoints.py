"""A checkpoint's small files, made by hand: a tokenizer that spells bytes, and its configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

BOS, EOS = "<s>", "</s>"
CONFIG = {
    "model_type": "idefics3",
    "vision_config": {"image_size": 8, "patch_size": 2},
    "scale_factor": 2,
    "image_token_id": 258,  # of byte_tokenizer's <image>
}
IMAGE_SETTINGS = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 8}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def byte_tokenizer(special: Sequence[str] = (BOS, EOS, "<image>"), *, adds_bos: bool = False) -> tokenizers.Tokenizer:
    """One id a byte (0 to 255), then the special tokens in order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    if adds_bos:
        template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
        tokenizer.post_processor = template
    return tokenizer


def write_checkpoint(
    folder: Path, tokenizer: tokenizers.Tokenizer | None = None, files: Mapping[str, Any] | None = None
) -> Path:
    """Writes tokenizer.json and `files`: text as it is, all else as JSON; a value None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_tokenizer()).save(str(folder / "tokenizer.json"))
    defaults = {
        "tokenizer_config.json": {"bos_token": BOS, "eos_token": EOS},
        "preprocessor_config.json": IMAGE_SETTINGS,
        "processor_config.json": {"image_seq_len": 4},
        "chat_template.jinja": TEMPLATE,
    }
    for name, content in {**defaults, **(files or {})}.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder
