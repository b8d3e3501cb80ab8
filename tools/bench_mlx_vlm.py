"""mlx-vlm beside the engine: the half of bench_engine.py that another Python runs, and the pipe to it.

Started as `PYTHON tools/bench_mlx_vlm.py FOLDER`, it answers one JSON line of seconds for each JSON line of work. What
is measured is the quickest way that mlx-vlm 0.7.10 documents: generate_step for one row, BatchGenerator for several,
stream_generate with a PromptCacheState for a second question.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT = "<|im_start|>User:<image>{}<end_of_utterance>\nAssistant:"  # of the demo's chat template


class Peer:
    """The other process; one piece of work at a time, so that both never run at once."""

    def __init__(self, python: Path, folder: Path) -> None:
        command = [str(python), __file__, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, work: str, **arguments: Any) -> float:
        """Seconds of a piece of work. Raises RuntimeError when the other process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([work, arguments]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("SECONDS "):
                return float(line.removeprefix("SECONDS "))
        raise RuntimeError("the process of mlx-vlm has ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Work:
    """In the other process."""

    def __init__(self, folder: str) -> None:
        import mlx.core as mx
        from mlx_vlm import load

        self.mx = mx
        self.model, self.processor = load(folder)
        self.state: Any = None

    def step(self, length: int, tokens: int) -> float:
        """The median gap between one row's tokens, the first third left out."""
        from mlx_vlm.generate.ar import generate_step

        ids = self.mx.array([[5] * length])
        times = [time.perf_counter() for _ in generate_step(ids, self.model, None, None, max_tokens=tokens)]
        return _median_gap(times)

    def rows(self, length: int, tokens: int, rows: int) -> float:
        """The same with several rows at once."""
        from mlx_vlm.generate.ar import BatchGenerator

        batch = BatchGenerator(self.model.language_model, self.processor, max_tokens=tokens, stop_tokens=set())
        prompts = [[5] * (length - 1) + [row] for row in range(rows)]
        embeds = [self.model.get_input_embeddings(self.mx.array([ids]), None).inputs_embeds for ids in prompts]
        batch.insert(prompts, prompt_kwargs=[{"inputs_embeds": array} for array in embeds])
        times = []
        while batch.has_work:
            _, answers = batch.next()
            if len(answers) == rows:
                times.append(time.perf_counter())
        return _median_gap(times)

    def prefill(self, ids: list[int]) -> float:
        """Up to the first token."""
        from mlx_vlm.generate.ar import generate_step

        begun = time.perf_counter()
        next(generate_step(self.mx.array([ids]), self.model, None, None, max_tokens=1))
        return time.perf_counter() - begun

    def question(self, image: str, text: str, first: bool) -> float:
        """Up to the first token; the second one goes on from the first one's cache."""
        from mlx_vlm.generate.common import PromptCacheState
        from mlx_vlm.generate.dispatch import stream_generate

        if first:
            self.state = PromptCacheState()
        begun = time.perf_counter()
        settings = {"image": image, "max_tokens": 1, "prompt_cache_state": self.state}
        seconds = [
            time.perf_counter() - begun
            for _ in stream_generate(self.model, self.processor, PROMPT.format(text), **settings)
        ]
        return seconds[0]


def _median_gap(times: list[float]) -> float:
    late = times[len(times) // 3 :]
    gaps = sorted(after - before for before, after in pairwise(late))
    return gaps[len(gaps) // 2]


def main() -> None:
    work = Work(sys.argv[1])
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print("SECONDS", getattr(work, name)(**arguments), flush=True)


if __name__ == "__main__":
    main()
