"""Stand-ins for a model and a processor whose answers can be worked out on paper.

The model attends to all it has seen with equal weights, so that the next token is (sum of all ids + 1) mod VOCAB:
a lost, doubled or foreign position in the KV cache changes every later token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import InputError
from mlxvlm.messages import ImageOptions, ImagePart, Message, TextPart
from mlxvlm.models.base import Cache, Features, Inputs, KVSpec, RowState, images_from, merge_features
from mlxvlm.processors.base import AS_THE_CHECKPOINT, PreparedImage, Prompt

VOCAB = 61
IMAGE = VOCAB - 1  # the placeholder
IMAGE_TOKENS = 3


def next_token(ids: Sequence[int]) -> int:
    """What FakeModel says after `ids`, its image tokens standing for what the picture holds."""
    return (sum(ids) + 1) % (VOCAB - 1)


def answer(ids: Sequence[int], count: int) -> list[int]:
    """The slow obvious twin: a whole answer on paper."""
    seen, given = list(ids), []
    for _ in range(count):
        given.append(next_token(seen))
        seen.append(given[-1])
    return given


class FakeTokenizer:
    """Ids are letters."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("0") + token) for token in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) - ord("0") for c in text]


class FakeProcessor:
    """Text to ids letter by letter; a picture is a number, three placeholders and a separator after them."""

    image_token_id = IMAGE

    def __init__(self) -> None:
        self.tokenizer: Any = FakeTokenizer()
        self.opened = 0  # pictures

    def __call__(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        options: ImageOptions = AS_THE_CHECKPOINT,
    ) -> Prompt:
        ids: list[int] = []
        images = []
        for part in (part for message in messages for part in message.parts):
            if isinstance(part, TextPart):
                if part.text == "refuse":
                    raise InputError("refused")
                if part.text == "crash":
                    raise ZeroDivisionError("a defect")
                ids += self.tokenizer.encode(part.text)
            elif isinstance(part, ImagePart):
                span = (len(ids), len(ids) + IMAGE_TOKENS)
                known = isinstance(part.source, PreparedImage)
                picture = int(part.source.pixels[0]) if known else part.source
                self.opened += not known
                images.append(PreparedImage(np.full((1,), picture, np.float32), (1,), span, bytes([picture])))
                ids += [IMAGE] * IMAGE_TOKENS + [0]
        return Prompt(tuple(ids), tuple(images))


class FakeModel:
    """A VisionLanguageModel of one layer. `on_call` runs before each forward pass, for faults and pauses."""

    vocab_size = VOCAB

    def __init__(self, spec: KVSpec | None = None, on_call: Callable[[mx.array], None] | None = None) -> None:
        self.kv_specs = [spec or KVSpec(num_kv_heads=1, head_dim=4)]
        self.width = self.kv_specs[0].head_dim
        self.on_call = on_call
        self.nan_token: int | None = None
        self.encoded: list[int] = []

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        values = [int(image.pixels[0]) for image in images]
        self.encoded += values
        return [mx.full((IMAGE_TOKENS, self.width), value, mx.float32) for value in values]

    def needed_images(self, prompt: Prompt, start: int) -> Sequence[int]:
        return images_from(prompt, start)

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        embeds = self._embed(mx.array(prompt.token_ids)[None])
        return Inputs(merge_features(embeds, prompt, IMAGE, features))

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        return Inputs(self._embed(token_ids))

    def _embed(self, ids: mx.array) -> mx.array:
        return mx.repeat(ids.astype(mx.float32)[..., None], self.width, axis=-1)

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        x = inputs.embeds
        if self.on_call is not None:
            self.on_call(x)
        offset = mx.array(cache[0].offset).reshape(-1, 1, 1)
        held = offset + mx.arange(1, x.shape[1] + 1)[None, :, None]
        mean = cache[0].attend(mx.zeros_like(x)[:, None], x[:, None], x[:, None], 1.0)[:, 0]
        total = mx.round(mean * held)
        return mx.concatenate([total[..., :1], x[..., :1]], axis=-1)

    def logits(self, hidden: mx.array) -> mx.array:
        total, token = hidden[..., :1], hidden[..., 1:]
        chosen = (total.astype(mx.int32) + 1) % (VOCAB - 1)
        logits = mx.where(mx.arange(VOCAB) == chosen, 5.0, 0.0)
        if self.nan_token is not None:
            logits = mx.where(token == self.nan_token, mx.nan, logits)
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return weights


def fake_engine(model: FakeModel | None = None, **settings: Any) -> Engine:
    """An engine over a FakeModel without a stop token."""
    # Nothing is kept between requests unless a test wants it: what is allocated is then what requests hold.
    caches = {"prefix_cache_bytes": 0, "feature_cache_bytes": 0, "speculation": "off"}
    config = EngineConfig(**{"max_context": 4096, "eos_token_ids": frozenset(), **caches, **settings})
    return Engine(lambda progress: model or FakeModel(), FakeProcessor(), config)


def ask(ids: Sequence[int], count: int | None = 10, **sampling: Any) -> Request:
    """A request whose prompt is exactly `ids`."""
    text = FakeTokenizer().decode(ids)
    return Request([Message("user", (TextPart(text),))], SamplingParams(max_tokens=count, **sampling))


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether a condition that another thread brings about comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


class Gate:
    """Holds the model inside its next call until opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, x: mx.array) -> None:
        self.entered.set()
        assert self.opened.wait(30)


def is_empty(engine: Engine) -> bool:
    """Whether nothing of any request is left in an engine."""
    stats = engine.stats()
    held = (engine._open, engine._runner.batch.groups, engine._scheduler._passed, engine._decoding.pending)
    return not any(held) and (stats.running, stats.waiting, stats.reserved_bytes) == (0, 0, 0)


def look_at(picture: int, tail: Sequence[int], count: int) -> Request:
    """A request whose prompt is a picture and `tail`."""
    text = FakeTokenizer().decode(tail)
    return Request([Message("user", (ImagePart(picture), TextPart(text)))], SamplingParams(max_tokens=count))


def looked(picture: int, tail: Sequence[int], count: int) -> list[int]:
    """The answer to look_at on paper."""
    return answer([picture] * IMAGE_TOKENS + [0, *tail], count)
