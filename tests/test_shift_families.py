"""For every family: an answer that outgrows the context goes on as a fresh request for what is left of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.context import kept_beginning, shifted
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request, TokenLogprob
from mlxvlm.messages import user
from mlxvlm.processors import family as family_processor
from mlxvlm.processors.base import Prompt
from tests.fakes import eventually
from tests.golden import GOLDENS, Case

FAMILIES = (
    *("idefics3_split", "llama4_norms", "llava_clip", "llava_next_tiles", "mllama_tiles"),
    *("qwen2_vl_tied", "qwen2_vl_window", "smolvlm2_tied"),
)
SCENARIOS = ("two_images", "long_text", "text_only")
LOGPROB = 1e-4  # absolute, float32, as in test_prefix_families.py
ROOM = 6  # tokens that the context has after the longest prompt
COUNT = 2 * ROOM  # of the longest prompt's answer, after its first shift


class Family:
    def __init__(self, name: str) -> None:
        self.case = Case(GOLDENS / name)
        self.source = self.case.open()
        self.prompts = [self.source.processor(self.case.messages(name), self.case.template) for name in SCENARIOS]
        self.max_context = max(len(prompt.token_ids) for prompt in self.prompts) + ROOM

    @contextmanager
    def engine(self, max_context: int, **settings: Any) -> Iterator[Engine]:
        config = EngineConfig(max_context, frozenset(), **settings)
        with Engine(partial(self.source.build, LoadOptions("float32")), self.source.processor, config) as engine:
            yield engine

    def count(self, prompt: Prompt) -> int:
        """Tokens of an answer that shifts once at least."""
        return self.max_context - len(prompt.token_ids) + COUNT


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def ask(prompt: Prompt, count: int) -> Request:
    return Request(sampling=SamplingParams(max_tokens=count, top_logprobs=0), prompt=prompt)


Answer = tuple[TokenLogprob, ...]


@pytest.fixture(scope="module")
def in_pieces(family: Family) -> list[tuple[Answer, int]]:
    """The slow twin: each piece an answer of its own, to a prompt that is what is left; and the pictures left."""
    found = []
    with family.engine(family.max_context, prefix_cache_bytes=0, feature_cache_bytes=0) as engine:
        for prompt in family.prompts:
            answer: Answer = ()
            keep, left = kept_beginning(family.source.processor, Request(), prompt), prompt
            while len(answer) < family.count(prompt):
                room = min(family.max_context - len(left.token_ids), family.count(prompt) - len(answer))
                piece = engine.generate(ask(left, room))
                answer += piece.logprobs
                if len(answer) < family.count(prompt):
                    left = shifted(left, piece.token_ids, keep)
            found.append((answer, len(left.images)))
    return found


@pytest.mark.parametrize(("kept", "speculation"), [(0, "off"), (1 << 26, "off"), (1 << 26, "on")])
def test_a_shift_is_a_fresh_prompt(
    family: Family, in_pieces: list[tuple[Answer, int]], kept: int, speculation: str
) -> None:
    """Rows together, with and without what is kept between requests and guesses, in small chunks."""
    settings: dict[str, Any] = {"prefix_cache_bytes": kept, "feature_cache_bytes": kept, "prefix_block_tokens": 3}
    settings |= {"speculation": speculation}
    with family.engine(family.max_context, **settings, prefill_chunk=50, context_shift=True) as engine:
        streams = [engine.submit(ask(prompt, family.count(prompt))) for prompt in family.prompts]
        for prompt, stream, (expected, _) in zip(family.prompts, streams, in_pieces, strict=True):
            done = stream.result()
            assert done.token_ids == tuple(token.token_id for token in expected)
            pairs = zip(done.logprobs, expected, strict=True)
            assert max(abs(one.logprob - other.logprob) for one, other in pairs) <= LOGPROB
            assert done.usage.prompt_tokens == len(prompt.token_ids)
            images = prompt.token_ids.count(family.source.processor.image_token_id) if prompt.images else 0
            assert done.usage.image_tokens == images
        assert eventually(lambda: engine.stats().reserved_bytes == 0)


def test_pictures_go_and_stay(in_pieces: list[tuple[Answer, int]]) -> None:
    assert in_pieces[0][1] < 2


def test_pictures_are_decoded_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a truncated prompt is tried; with the same result."""
    opened: list[Any] = []
    load_image = family_processor.load_image
    monkeypatch.setattr(family_processor, "load_image", lambda source: opened.append(source) or load_image(source))
    pictures = [GOLDENS / "images" / f"{name}.png" for name in ("wide", "tall", "rgba", "wide", "tall")]
    turns = [user(f"Number {number}?", [picture]) for number, picture in enumerate(pictures)]
    processor = family.source.processor
    lengths = [len(processor(turns[start:], family.case.template).token_ids) for start in range(5)]
    with family.engine(lengths[2] + 8) as engine:
        opened.clear()
        asked = Request(turns, SamplingParams(max_tokens=8), family.case.template, truncate=True)
        assert engine.generate(asked).usage.prompt_tokens == lengths[2]
        assert sorted(opened) == sorted(pictures)
