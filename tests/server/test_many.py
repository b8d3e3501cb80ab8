"""Many clients at once: each gets what it gets alone."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import openai

from mlxvlm.engine.engine import Engine
from tests.fakes import eventually, is_empty
from tests.golden import GOLDENS

CLIENTS = 32
QUESTIONS = ("What do you see?", "What color is the star?", "How many shapes are there?", "Describe as JSON.")


def request_of(number: int) -> dict[str, Any]:
    """Pictures for three of four; streamed for half; sampled all."""
    rng = random.Random(number)
    parts: list[dict[str, Any]] = [{"type": "text", "text": rng.choice(QUESTIONS)}]
    if number % 4:
        pictures = sorted((GOLDENS / "demo").glob("*.png"))
        parts.insert(0, {"type": "image_url", "image_url": {"url": str(rng.choice(pictures[:8]))}})
    return {
        "model": "default",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 2.0,
        "seed": number,
        "max_tokens": rng.randint(5, 30),
        "n": 1 + (number % 5 == 0),
        "stream": number % 2 == 0,
    }


async def ask(client: openai.AsyncOpenAI, request: dict[str, Any]) -> list[str]:
    answer = await client.chat.completions.create(**request)
    if not request["stream"]:
        return [choice.message.content for choice in answer.choices]
    texts = [""] * request["n"]
    async for chunk in answer:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


def test_every_answer_is_the_one_given_alone(demo_url: str, demo_engine: Engine) -> None:
    async def main() -> tuple[list[list[str]], list[list[str]]]:
        async with openai.AsyncOpenAI(api_key="x", base_url=f"{demo_url}/v1", max_retries=0, timeout=120) as client:
            requests = [request_of(number) for number in range(CLIENTS)]
            together = await asyncio.gather(*(ask(client, request) for request in requests))
            alone = [await ask(client, request) for request in requests]
            return list(together), alone

    together, alone = asyncio.run(main())
    assert together == alone
    assert len({text for texts in alone for text in texts}) > CLIENTS // 2, "they are not all alike"
    assert eventually(lambda: is_empty(demo_engine))
