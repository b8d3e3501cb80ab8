"""Ours in a process of its own, for bench_peers.py: the pieces of work of bench_mlx_vlm.py. Results are seconds."""

from __future__ import annotations

import sys
import threading
import time

import mlx.core as mx
from bench_worker import by_thread, least, median_gap, serve
from PIL import Image

from mlxvlm import load
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.messages import Message, user
from mlxvlm.processors.base import Prompt

SIDE = 336  # pixels of a Llama 4 tile


class Work:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.source = open_model(folder)
        self.engine = load(folder, dtype="float32")
        self.model = self.source.build(LoadOptions("float32"), lambda done, total: None)
        self.prompt: Prompt | None = None

    def load(self) -> float:
        """Until it could be asked; once more, in a process that has loaded before. No freed memory is at hand."""
        mx.clear_cache()
        begun = time.perf_counter()
        with load(self.folder, dtype="float32"):
            return time.perf_counter() - begun

    def preprocess(self, image: str) -> float:
        question = asked(image)
        return least(lambda: self.source.processor(question))

    def values(self, image: str) -> int:
        """How many numbers a picture becomes."""
        return sum(picture.pixels.size for picture in self.source.processor(asked(image)).images)

    def vision(self, image: str) -> float:
        prompt = self.source.processor(asked(image))
        begun = time.perf_counter()
        inputs = self.model.embed_prompt(prompt, self.model.encode_images(prompt.images))
        states = [row.vision for row in inputs.rows if row.vision is not None]
        mx.eval(inputs.embeds, [(state.keys, state.values) for state in states])
        return time.perf_counter() - begun

    def unfold(self, frames: int) -> float:
        cut = self.model.vision_model.patch_embedding.cut  # type: ignore[attr-defined]
        pixels = mx.zeros((frames, 3, SIDE, SIDE))
        mx.eval(pixels)
        return least(lambda: mx.eval(mx.contiguous(cut(pixels))))

    def step(self, length: int, tokens: int) -> float:
        return self._gap([Prompt((5,) * length)], tokens)

    def picture_step(self, image: str, tokens: int) -> float:
        return self._gap([self.source.processor(asked(image))], tokens)

    def rows(self, length: int, tokens: int, rows: int) -> float:
        return self._gap([Prompt((*[5] * (length - 1), row)) for row in range(rows)], tokens)

    def _gap(self, prompts: list[Prompt], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        streams = [self.engine.submit(Request(sampling=sampling, prompt=prompt)) for prompt in prompts]
        readers = [threading.Thread(target=stream.result) for stream in streams[1:]]
        for reader in readers:
            reader.start()
        times = [time.perf_counter() for _ in streams[0]]
        for reader in readers:
            reader.join()
        return median_gap(times)

    def threads(self, length: int, rows: int) -> list[float]:
        """See by_thread."""
        if rows > 1:
            return by_thread(lambda tokens: self.rows(length, tokens, rows), 4, 36)
        return by_thread(lambda tokens: self.step(length, tokens), 20, 220)

    def prefill(self, ids: list[int]) -> float:
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        return self.engine.generate(Request(sampling=sampling, prompt=Prompt(tuple(ids)))).usage.time_to_first_token_s

    def question(self, image: str, text: str, first: bool) -> float:
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        return self.engine.generate(Request([user(text, [image])], sampling)).usage.time_to_first_token_s


def asked(image: str) -> list[Message]:
    picture = Image.open(image)
    picture.load()
    return [user("What is this?", [picture])]


if __name__ == "__main__":
    serve(Work(sys.argv[1]))
