"""Text-only checkpoints: a vision-language model's text half under the hub's names for it gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.errors import InputError, ModelError
from mlxvlm.messages import ImagePart, Message, TextPart, system, user
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.text_only import build
from mlxvlm.processors.base import Prompt
from tests.checkpoint.layouts import tensors_of, write
from tests.golden import GOLDENS, Case

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
# golden -> what stands before its text half's names
PREFIXES = {
    "llava_clip": "language_model.",
    "llava_next_tiles": "language_model.",
    "llava_siglip": "language_model.",
    "smolvlm2_tied": "model.text_model.",
}


def text_checkpoint(folder: Path, name: str) -> Path:
    """As the text model's own repository has it."""
    case, prefix = GOLDENS / name, PREFIXES[name]
    config = json.loads((case / "config.json").read_text())
    text = {**config["text_config"], "tie_word_embeddings": config["text_config"].get("tie_word_embeddings", False)}
    text["tie_word_embeddings"] |= config.get("tie_word_embeddings", False)
    found = {}
    for tensor, array in tensors_of(case).items():
        short = tensor.removeprefix(prefix)
        if tensor.startswith(prefix) or tensor == "lm_head.weight":
            found[f"model.{short}" if prefix.endswith("text_model.") and tensor.startswith(prefix) else short] = array
    write(folder, case, found, config=text)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def logits(model: VisionLanguageModel, prompt: Prompt) -> np.ndarray:
    forward = KVPass([KVGroup.single(model.kv_specs, 0)], len(prompt.token_ids))
    return np.array(model.logits(model(model.embed_prompt(prompt, []), forward.layers))[0])


@pytest.mark.parametrize("name", PREFIXES)
def test_same_logits_as_the_whole_model(tmp_path: Path, name: str) -> None:
    source, case = open_model(str(text_checkpoint(tmp_path / "text", name))), Case(GOLDENS / name)
    prompt = case.open().processor(case.messages("long_text" if "long_text" in case.scenarios else "text_only"))
    model = source.build(LoadOptions("float32"), lambda done, total: None)
    assert np.array_equal(logits(model, prompt), logits(case.build(), prompt))


def test_chat(tmp_path: Path) -> None:
    processor = open_model(str(text_checkpoint(tmp_path / "text", "smolvlm2_tied"))).processor
    prompt = processor([system("be brief"), user("hello")])
    assert processor.tokenizer.backend.decode(list(prompt.token_ids)) == "<system>be brief<user>hello<answer>"
    assert prompt.images == ()


def test_pictures_are_refused(tmp_path: Path) -> None:
    processor = open_model(str(text_checkpoint(tmp_path / "text", "smolvlm2_tied"))).processor
    with pytest.raises(InputError, match="this model reads text only: leave the image out"):
        processor([Message("user", (TextPart("what is this?"), ImagePart("picture.png")))])


def test_sanitize_drops_buffers_and_tied_heads() -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    names = ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    weights = {name: mx.zeros(1) for name in names}
    for tied in (True, False):
        model = build({"model_type": "llama", "vocab_size": 4, "tie_word_embeddings": tied, **shape})
        first = model.sanitize(dict(weights))
        assert list(first) == list(names[: 1 if tied else 2])
        assert model.sanitize(first) == first


def test_no_images_to_encode(tmp_path: Path) -> None:
    model = open_model(str(text_checkpoint(tmp_path / "text", "smolvlm2_tied"))).build(
        LoadOptions("float32"), lambda a, b: None
    )
    assert model.encode_images([]) == []


def test_an_unknown_text_model(tmp_path: Path) -> None:
    folder = text_checkpoint(tmp_path / "text", "smolvlm2_tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "two"}))
    with pytest.raises(ModelError, match="makes no sense"):
        open_model(str(folder)).build(LoadOptions("float32"), lambda a, b: None)
