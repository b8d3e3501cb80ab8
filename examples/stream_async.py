"""Several questions at once, in one event loop: python examples/stream_async.py."""

import asyncio
from pathlib import Path

import mlxvlm

PICTURE = Path(__file__).parent / "pictures" / "orange-heart-red-star-black-triangle.png"
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "What colour is the background?")


async def ask(engine: mlxvlm.Engine, question: str) -> str:
    request = mlxvlm.Request([mlxvlm.user(question, [PICTURE])])
    return "".join([delta.text async for delta in engine.submit(request)])


async def main() -> None:
    with mlxvlm.load("demo") as engine:
        answers = await asyncio.gather(*(ask(engine, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(question, answer.strip())


asyncio.run(main())
