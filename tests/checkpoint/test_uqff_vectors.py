"""Real files: `--uqff FOLDER` names folders that mistral.rs wrote from one tiny model, one a type.

Each holds expected.json: what mistral.rs answers, and what float32 weights dequantised by another reader answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from mlxvlm.checkpoint import uqff
from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.conversion import REQUANTIZED, Conversion
from mlxvlm.checkpoint.load import open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.uqff_files import find
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.processors.base import Prompt

LOGPROBS = 1e-3
LOGPROBS_AFQ = 2e-4  # text, against mistral.rs, which computes with the same numbers
# What 8-bit codes add where the type has no exact form in MLX.
LOGPROBS_REQUANTISED = 0.15
FITTED = (84, 196)  # height and width that both programs resize the picture to


def catmull_rom(pixels: np.ndarray, count: int) -> np.ndarray:
    """Resizes axis 0 as Rust's `image` does: in floats, where Pillow rounds to bytes between the two axes."""
    ratio = len(pixels) / count
    support = 2 * max(ratio, 1)
    rows = []
    for row in range(count):
        middle = (row + 0.5) * ratio
        places = np.arange(max(int(middle - support), 0), min(int(np.ceil(middle + support)), len(pixels)))
        x = np.abs(places + 0.5 - middle) / max(ratio, 1)
        weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2)
        rows.append(np.tensordot(weights / weights.sum(), pixels[places], 1))
    return np.stack(rows)


def prompt_of(folder: Path, name: str, text: str, scratch: Path) -> Prompt:
    """The rendered text as it is (the vectors' own templates render the content alone), and mistral.rs's pixels."""
    template = scratch / "template.jinja"
    template.write_text(f"{{{{ {json.dumps(text)} }}}}")
    parts: list[Any] = [TextPart("rendered by the template")]
    if "image_pad" in text:
        pixels = np.asarray(Image.open(folder.parent / f"{name}.png").convert("RGB"), np.float64)
        for count in FITTED:
            pixels = catmull_rom(pixels, count).swapaxes(0, 1)
        fitted = scratch / "fitted.png"
        Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).save(fitted)
        parts.insert(0, ImagePart(fitted))
    return open_model(str(folder), chat_template=template).processor([Message("user", tuple(parts))])


def model_of(folder: Path, requantize: QuantSpec | None) -> Any:
    source = open_model(str(folder))
    conversion = uqff.read(find(folder.name, str(folder)), folder, requantize=requantize)
    model = source.family.build_model(source.config)
    bind(model, conversion.weights, "float32", lambda done, total: None)
    # mistral.rs computes this one with tanh, transformers with erf: 1e-3 in the answers, a token where two are as near.
    model.visual.merger.mlp[1] = nn.GELU(approx="tanh")
    return model


def answer(model: Any, prompt: Prompt, along: list[int]) -> tuple[list[int], np.ndarray]:
    """The likeliest token at each step along the expected ones, and the log-probabilities of those.

    An expected token that is as likely counts: pixels that differ by one level decide such ties.
    """
    inputs = model.embed_prompt(prompt, model.encode_images(prompt.images) if prompt.images else [])
    group, token_ids, logprobs = KVGroup.single(model.kv_specs, 0), [], []
    for token_id in along:
        forward = KVPass([group], inputs.embeds.shape[1])
        logits = np.array(model.logits(model(inputs, forward.layers))[0, -1]).astype(np.float64)
        forward.commit()
        is_tied = logits.max() - logits[token_id] <= LOGPROBS
        token_ids.append(token_id if is_tied else int(logits.argmax()))
        logprobs.append(logits[token_id] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
        inputs = model.embed_tokens(mx.array([[token_id]]), inputs.rows)
    return token_ids, np.array(logprobs)


def check(vector: Path, model: Any, scratch: Path, gate: float) -> None:
    kinds = json.loads((vector / "expected.json").read_text())
    for name, truth in kinds["float32_on_dequantised_weights"].items():
        prompt = prompt_of(vector, name, truth["prompt"], scratch)
        assert len(prompt.token_ids) == truth["prompt_tokens"]
        token_ids, logprobs = answer(model, prompt, truth["toks"])
        distance = np.abs(logprobs - truth["logprobs"]).max()
        print(f"{vector.name} {name}: log-probabilities within {distance:.1e}")
        assert distance <= gate, name
        if gate == LOGPROBS:
            assert token_ids == truth["toks"], name
        if vector.name.startswith("afq"):
            other = kinds["mistralrs_0_9_5"][name]
            assert token_ids == other["toks"], name
            limit = LOGPROBS_AFQ if name == "text" else LOGPROBS
            assert np.abs(logprobs - other["logprobs"]).max() <= limit, name


def test_answers_are_those_of_the_dequantised_weights(
    vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no exact form stays in float32 here, so that the decoders are seen and no quantiser."""

    def keep(self: Conversion, path: str, values: np.ndarray, source: str) -> None:
        self.plain(f"{path}.weight", mx.array(values))

    monkeypatch.setattr(Conversion, "inexact", keep)
    check(vector, model_of(vector, None), tmp_path, LOGPROBS)


def test_answers_of_what_is_quantised_again_are_near(vector: Path, tmp_path: Path) -> None:
    check(vector, model_of(vector, REQUANTIZED), tmp_path, LOGPROBS_REQUANTISED)
