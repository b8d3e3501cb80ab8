"""mistral.rs beside ours: the half of bench_peers.py that a Python with mistralrs 0.9.5 runs.

Started as `PYTHON tools/bench_mistralrs.py FOLDER` by bench_worker.Peer; results are seconds, of which the library
tells whole milliseconds. Its prompt is rendered by the template, so prefill is of as many words, not of the same ids.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from bench_worker import serve

# A picture's place, which its Python must be given for some families.
IMAGES = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "llava": "<image>", "llava_next": "<image>"}
WORDS = count()  # no two prompts begin alike, as its prefix cache would answer


class Work:
    """In the other process."""

    def __init__(self, folder: str) -> None:
        from mistralrs import ModelDType, Runner, Which

        self.image = IMAGES.get(json.loads(Path(folder, "config.json").read_text())["model_type"], "")
        self.runner = Runner(which=Which.MultimodalPlain(model_id=folder, dtype=ModelDType.F32))

    def _usage(self, content: Any, tokens: int) -> Any:
        from mistralrs import ChatCompletionRequest

        messages = [{"role": "user", "content": content}]
        request = ChatCompletionRequest(model="default", messages=messages, max_tokens=tokens, temperature=0)
        return self.runner.send_chat_completion_request(request).usage

    def step(self, length: int, tokens: int) -> float:
        """The mean gap between one row's tokens; `length` letters stand for as many tokens."""
        usage = self._usage(f"{next(WORDS)} " + "a b " * (length // 4), tokens)
        return float(usage.total_completion_time_sec) / usage.completion_tokens

    def prefill(self, ids: list[int]) -> float:
        """Up to the first token, a token of the prompt taken for one of `ids`."""
        usage = self._usage(f"{next(WORDS)} " + "a b " * (len(ids) // 4), 1)
        return float(usage.total_prompt_time_sec) * len(ids) / usage.prompt_tokens

    def question(self, image: str, text: str, first: bool) -> float:
        """From a file and a question to the first token."""
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": self.image + text}]
        return float(self._usage(content, 1).total_time_sec)


if __name__ == "__main__":
    serve(Work(sys.argv[1]))
