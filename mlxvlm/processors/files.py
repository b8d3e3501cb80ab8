"""The small files of a checkpoint that a processor reads. Knows their names and precedence, not their meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvlm.errors import ModelError, ModelNotFoundError
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer

# max_position_embeddings of transformers' config classes, where a partial config leaves it out.
_LLAMA_CONTEXT, _QWEN2_CONTEXT, _LATER_CONTEXT = 2048, 32768, 131072


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file; ModelError names a file that is not one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


def context_length(config: Mapping[str, Any]) -> int:
    """How many positions a model of this config.json was made for."""
    has_part = bool(config.get("text_config"))
    text_config = config["text_config"] if has_part else config
    declared = text_config.get("max_position_embeddings")
    if declared is not None:
        return int(declared)
    kind = str(text_config.get("model_type", "llama") if has_part else config.get("model_type"))
    if kind == "llama":
        return _LLAMA_CONTEXT
    return _QWEN2_CONTEXT if kind.startswith("qwen2") else _LATER_CONTEXT


@dataclass(frozen=True)
class ProcessorFiles:
    """Everything a processor is built from; `config` is the model's config.json."""

    config: dict[str, Any]
    processor: dict[str, Any]
    image_processor: dict[str, Any]
    tokenizer: Tokenizer
    template_source: str | None

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any], chat_template: Path | None = None) -> ProcessorFiles:
        """Reads a checkpoint folder. A `chat_template` file (Jinja, or JSON with that key) goes before its own."""
        processor = read_json(folder / "processor_config.json")
        tokenizer_config = read_json(folder / "tokenizer_config.json")
        special_map = read_json(folder / "special_tokens_map.json")
        tokenizer = Tokenizer.from_files(folder / "tokenizer.json", tokenizer_config, special_map)
        # transformers 5 keeps the image processor inside processor_config.json.
        image_processor = processor.get("image_processor") or read_json(folder / "preprocessor_config.json")
        if chat_template is not None:
            source: str | None = template_file(chat_template)
        else:
            source = _template_of(folder, processor, tokenizer_config)
        return cls(config, processor, image_processor, tokenizer, source)

    def template(self, default: str | None = None) -> ChatTemplate:
        """The chat template; ModelError with the remedy if the checkpoint has none and the family no default."""
        source = self.template_source or default
        if source is None:
            raise ModelError("the checkpoint has no chat template; give one with --chat-template FILE")
        return ChatTemplate(source, self.tokenizer.special_tokens)


def _template_of(folder: Path, processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> str | None:
    """The processor's goes before the tokenizer's, and chat_template.json before .jinja, as in transformers."""
    jinja = folder / "chat_template.jinja"
    candidates = (
        processor.get("chat_template"),
        read_json(folder / "chat_template.json").get("chat_template"),
        _read_text(jinja) if jinja.is_file() else None,
        tokenizer_config.get("chat_template"),
    )
    for candidate in candidates:
        source = _default_of(candidate)
        if source:
            return source
    return None


def _default_of(template: Any) -> str | None:
    """A template is text, or several by name of which "default" is the one for chats."""
    if isinstance(template, str):
        return template
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        chosen = named.get("default")
        return chosen if isinstance(chosen, str) else None
    return None


def template_file(path: Path) -> str:
    """The text of a chat template: Jinja, or JSON with the key `chat_template`. Raises ModelError."""
    if not path.is_file():
        raise ModelNotFoundError(f"no such chat template file: {path}")
    if path.suffix == ".json":
        source = _default_of(read_json(path).get("chat_template"))
        if source is None:
            raise ModelError(f"{path} has no 'chat_template'")
        return source
    return _read_text(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} can't be read as text: {error}") from error
