"""For every family: what comes out of the caches equals what a fresh engine computes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.engine import Engine, EngineConfig
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.messages import Message, TextPart, user
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import PreparedImage, Prompt
from tests.golden import GOLDENS, Case
from tests.processors.conftest import Web, web  # noqa: F401

FAMILIES = (
    *("idefics3_split", "llama4_norms", "llava_clip", "llava_next_tiles", "mllama_tiles"),
    *("qwen2_vl_tied", "qwen2_vl_window", "smolvlm2_tied"),
)
LOGPROB = 1e-4  # absolute, float32, as for logits in test_parity.py
COUNT = 12  # tokens of an answer
PLENTY = 1 << 26
GRIDS = [(7, 23), (5, 3)]  # tokens of a block, of a prefill chunk


class Tower:
    """A model that counts the pictures it encodes."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.encoded: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: Any, cache: Any) -> mx.array:
        return self._model(inputs, cache)

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        self.encoded += [image.digest for image in images]
        return self._model.encode_images(images)


class Family:
    """A checkpoint, its processor and one model for any number of engines."""

    def __init__(self, name: str) -> None:
        self.case = Case(GOLDENS / name)
        self.source = self.case.open()

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[tuple[Engine, Tower]]:
        towers: list[Tower] = []

        def build(progress: Any) -> Any:
            towers.append(Tower(self.source.build(LoadOptions("float32"), progress)))
            return towers[0]

        config = EngineConfig(self.source.max_context, frozenset(), **settings)
        with Engine(build, self.source.processor, config) as engine:
            yield engine, towers[0]

    def prompt(self, *messages: Message) -> Prompt:
        return self.source.processor(messages, self.case.template)

    def picture(self, name: str) -> Path:
        return GOLDENS / "images" / f"{name}.png"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


Cold: TypeAlias = Callable[[Prompt], Completion]


@pytest.fixture(scope="module")
def cold(family: Family) -> Iterator[Cold]:
    """What an engine that keeps nothing answers."""
    answers: dict[Any, Completion] = {}
    with family.engine(prefix_cache_bytes=0, feature_cache_bytes=0) as (engine, _):

        def answer(prompt: Prompt) -> Completion:
            key = (prompt.token_ids, *(image.digest for image in prompt.images))
            if key not in answers:
                answers[key] = engine.generate(request(prompt))
            return answers[key]

        yield answer


def request(prompt: Prompt) -> Request:
    return Request(sampling=SamplingParams(max_tokens=COUNT, top_logprobs=2), prompt=prompt)


def assert_same(warm: Completion, cold: Completion) -> None:
    assert warm.token_ids == cold.token_ids
    found, expected = (np.array([token.logprob for token in answer.logprobs]) for answer in (warm, cold))
    assert np.abs(found - expected).max() <= LOGPROB


class Turn(NamedTuple):
    prompt: Prompt
    reused: int  # tokens at least that an earlier prompt or answer shares with this one
    images: int  # pictures that no earlier prompt had


def shared(one: Prompt, other: Prompt) -> int:
    """The tokens that two prompts begin with, up to the first picture that differs."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))
    for image, twin in zip(one.images, other.images, strict=False):
        if image.digest != twin.digest:
            length = min(length, image.span[0])
    return length


def conversation(family: Family, cold: Cold) -> list[Turn]:
    """Turns as users make them; each with what it shares with those before."""
    wide, rgba, tall = (family.picture(name) for name in ("wide", "rgba", "tall"))
    first, answer = user("What do you see?", [wide]), Message("assistant", (TextPart("A red ball."),))
    hello = user("Crème brûlée?")
    question = family.prompt(first)
    longer = Prompt((*question.token_ids, *cold(question).token_ids), question.images)
    prompts = [
        question,
        question,
        longer,
        Prompt((*longer.token_ids, *question.token_ids[-3:]), longer.images),
        family.prompt(first, answer, user("And now?", [rgba])),
        family.prompt(first, answer, user("And where?", [rgba])),
        family.prompt(first, answer, user("And now?", [tall])),
        family.prompt(first, answer, user("And now?", [rgba]), answer, user("Sure?")),
        family.prompt(user("What do you see?", [rgba])),
        family.prompt(hello),
        family.prompt(hello, answer, user("What do you see?", [tall])),
        family.prompt(user("Both?", [rgba, tall, rgba])),
    ]
    turns, seen = [], set()
    for index, prompt in enumerate(prompts):
        reused = max((shared(prompt, other) for other in prompts[:index]), default=0)
        digests = {image.digest for image in prompt.images}
        turns.append(Turn(prompt, min(reused, len(prompt.token_ids) - 1), len(digests - seen)))
        seen |= digests
    return turns


@pytest.mark.parametrize(("block", "chunk"), GRIDS)
def test_warm_equals_cold(family: Family, cold: Cold, block: int, chunk: int) -> None:
    settings = {"prefix_block_tokens": block, "prefill_chunk": chunk, "prefix_cache_bytes": PLENTY}
    with family.engine(**settings, feature_cache_bytes=PLENTY) as (engine, tower):
        for turn in conversation(family, cold):
            before = len(tower.encoded)
            answer = engine.generate(request(turn.prompt))
            assert_same(answer, cold(turn.prompt))
            assert len(tower.encoded) - before == turn.images
            assert turn.reused - block < answer.usage.cached_tokens < len(turn.prompt.token_ids)


@pytest.mark.parametrize("features", [0, PLENTY])
def test_pictures_in_the_prefix_need_no_tower(family: Family, cold: Cold, features: int) -> None:
    """Unless later tokens look at them again and their features are gone; equal answers in any case."""
    asked = family.prompt(user("What do you see?", [family.picture("wide"), family.picture("rgba")]))
    settings = {"prefix_block_tokens": 3, "prefix_cache_bytes": PLENTY, "feature_cache_bytes": features}
    with family.engine(**settings) as (engine, tower):
        looks_back = bool(tower.needed_images(asked, len(asked.token_ids) - 1))
        for count in range(3):
            answer = engine.generate(request(asked))
            assert_same(answer, cold(asked))
            assert (answer.usage.cached_tokens > asked.images[1].span[1]) == (count > 0)
        assert len(tower.encoded) == (6 if looks_back and not features else 2)
        assert engine.stats().encoded_images == len(tower.encoded)


def test_another_picture_is_another_answer(family: Family, cold: Cold) -> None:
    """Equal ids, other pixels: all of it another picture, or a single pixel."""
    picture = np.array(Image.open(family.picture("rgba")).convert("RGB"))
    turned, edited = 255 - picture, picture.copy()
    edited[3, 4, 1] ^= 1
    prompts = [family.prompt(user("What do you see?", [image])) for image in (picture, turned, edited)]
    assert len({prompt.token_ids for prompt in prompts}) == 1
    settings = {"prefix_block_tokens": 2, "prefix_cache_bytes": PLENTY, "feature_cache_bytes": PLENTY}
    with family.engine(**settings) as (engine, tower):
        for count, prompt in enumerate([*prompts, *prompts]):
            answer = engine.generate(request(prompt))
            assert_same(answer, cold(prompt))
            assert (answer.usage.cached_tokens > prompt.images[0].span[0]) == (count >= 3)
        assert len(set(tower.encoded)) == len(tower.encoded) == 3


def test_a_picture_is_the_same_however_it_comes(family: Family, web: Web) -> None:  # noqa: F811 - a fixture
    path = family.picture("wide")
    data, array = path.read_bytes(), np.array(Image.open(path).convert("RGB"))
    lossless = io.BytesIO()
    Image.fromarray(array).save(lossless, "bmp")
    text = base64.b64encode(data).decode()
    sources = [path, str(path), data, text, f"data:image/png;base64,{text}", array, lossless.getvalue()]
    sources += [path.absolute().as_uri(), web.add("/wide.png", data), web.add("/other?name", lossless.getvalue())]
    with family.engine(prefix_cache_bytes=PLENTY, feature_cache_bytes=PLENTY) as (engine, tower):
        for source in sources:
            sampling = SamplingParams(max_tokens=1)
            engine.generate(Request([user("What do you see?", [source])], sampling, family.case.template))
        assert len(tower.encoded) == 1
        assert engine.stats().feature_cache.entries == 1
    assert len(web.asked) == 2


def test_evictions_change_nothing(family: Family, cold: Cold) -> None:
    """Caches that hold a part of one prompt, with rows that run at once."""
    per_block = 5 * sum(spec.bytes_per_token(mx.float32) for spec in family_specs(family))
    prompts = [turn.prompt for turn in conversation(family, cold)]
    for blocks, features in ((4, 1), (12, 10_000)):
        settings = {"prefix_cache_bytes": blocks * per_block, "feature_cache_bytes": features}
        with family.engine(prefix_block_tokens=5, prefill_chunk=9, max_rows=3, **settings) as (engine, _):
            streams = [engine.submit(request(prompt)) for prompt in prompts]
            for prompt, stream in zip(prompts, streams, strict=True):
                assert_same(stream.result(), cold(prompt))
            stats = engine.stats()
            assert 0 < stats.prefix_cache.nbytes <= blocks * per_block
            assert stats.feature_cache.nbytes <= features


def family_specs(family: Family) -> Any:
    return family.case.build().kv_specs


def test_files_give_what_memory_gave(family: Family, cold: Cold, tmp_path: Path) -> None:
    """A new process finds the blocks of pictures too."""
    asked = family.prompt(user("What do you see?", [family.picture("wide"), family.picture("rgba")]))
    keep = {"prefix_cache_bytes": PLENTY, "prefix_block_tokens": 13, "prefix_cache_dir": tmp_path, "model_id": "tiny"}
    with family.engine(**keep) as (engine, _):
        inside = [engine.generate(request(asked)) for _ in range(2)][1]
    with family.engine(**keep) as (engine, tower):
        again = engine.generate(request(asked))
        assert_same(again, cold(asked))
        whole = inside.usage.cached_tokens // 13 * 13  # there are files of whole blocks
        assert again.usage.cached_tokens == whole > asked.images[1].span[1]
        assert len(tower.encoded) == len(tower.needed_images(asked, again.usage.cached_tokens))
