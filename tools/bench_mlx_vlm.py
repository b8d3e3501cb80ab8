"""mlx-vlm beside ours: the half of bench_engine.py and bench_peers.py that another Python runs.

Started as `PYTHON tools/bench_mlx_vlm.py FOLDER` by bench_worker.Peer; results are seconds. What is measured is the
quickest way that mlx-vlm 0.7.10 documents: generate_step for one row, BatchGenerator for several, stream_generate with
a PromptCacheState for a second question.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bench_worker import by_thread, least, median_gap, serve

SIDE = 336  # pixels of a Llama 4 tile
INPUTS = ("input_ids", "pixel_values", "attention_mask")


class Work:
    """In the other process."""

    def __init__(self, folder: str) -> None:
        import mlx.core as mx
        from mlx_vlm import load

        self.mx = mx
        self.folder = folder
        self.model, self.processor = load(folder)
        if self.model.config.model_type == "llava":
            self._pass_images_only()
        self.state: Any = None

    def _pass_images_only(self) -> None:
        """Its LLaVA 1.5 gives the tokenizer's settings to the image processor too, which transformers 5 refuses."""
        process = self.processor.image_processor

        class ImagesOnly(type(process)):  # type: ignore[misc]
            def __call__(self, images: Any, **_: Any) -> Any:
                return super().__call__(images)

        process.__class__ = ImagesOnly

    def load(self) -> float:
        """Once more, in a process that has loaded before; weights are evaluated. No freed memory is at hand."""
        from mlx_vlm import load

        self.mx.clear_cache()
        begun = time.perf_counter()
        load(self.folder)
        return time.perf_counter() - begun

    def prompt(self, text: str, images: int = 1) -> str:
        from mlx_vlm.prompt_utils import apply_chat_template

        return str(apply_chat_template(self.processor, self.model.config, text, num_images=images))

    def inputs(self, image: str, text: str = "What is this?") -> dict[str, Any]:
        """Of a decoded picture; evaluated."""
        from mlx_vlm.utils import prepare_inputs

        with _opened(image) as picture:
            found: dict[str, Any] = prepare_inputs(self.processor, images=[picture], prompts=self.prompt(text))
        self.mx.eval([value for value in found.values() if isinstance(value, self.mx.array)])
        return found

    def preprocess(self, image: str) -> float:
        """From a decoded picture and a question to arrays."""
        from mlx_vlm.utils import prepare_inputs

        def work() -> None:
            found = prepare_inputs(self.processor, images=[picture], prompts=self.prompt("What is this?"))
            self.mx.eval([value for value in found.values() if isinstance(value, self.mx.array)])

        with _opened(image) as picture:
            return least(work)

    def values(self, image: str) -> int:
        """How many numbers a picture becomes."""
        return int(self.mx.array(self.inputs(image)["pixel_values"]).size)

    def vision(self, image: str) -> float:
        """From arrays to the embeddings of the prompt."""
        found = self.inputs(image)
        ids, pixels, mask = (found.pop(name, None) for name in INPUTS)
        begun = time.perf_counter()
        embeds = self.model.get_input_embeddings(ids, pixels, mask=mask, **found)
        self.mx.eval([value for value in vars(embeds).values() if isinstance(value, self.mx.array)])
        return time.perf_counter() - begun

    def unfold(self, frames: int) -> float:
        """Llama 4's patches out of frames, without the matrix behind them."""
        cut = self.model.vision_model.patch_embedding.unfold
        pixels = self.mx.zeros((frames, 3, SIDE, SIDE))
        self.mx.eval(pixels)
        return least(lambda: self.mx.eval(cut(pixels)), 1)

    def step(self, length: int, tokens: int) -> float:
        """The median gap between one row's tokens, the first third left out."""
        from mlx_vlm.generate.ar import generate_step

        ids = self.mx.array([[5] * length])
        return median_gap([time.perf_counter() for _ in generate_step(ids, self.model, None, None, max_tokens=tokens)])

    def picture_step(self, image: str, tokens: int) -> float:
        """The same with a picture in the prompt."""
        from mlx_vlm.generate.ar import generate_step

        found = self.inputs(image)
        ids, pixels, mask = (found.pop(name, None) for name in INPUTS)
        steps = generate_step(ids, self.model, pixels, mask, max_tokens=tokens, **found)
        return median_gap([time.perf_counter() for _ in steps])

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
        return median_gap(times)

    def threads(self, length: int, rows: int) -> list[float]:
        """See by_thread."""
        if rows > 1:
            return by_thread(lambda tokens: self.rows(length, tokens, rows), 4, 36)
        return by_thread(lambda tokens: self.step(length, tokens), 20, 220)

    def prefill(self, ids: list[int]) -> float:
        """Up to the first token."""
        from mlx_vlm.generate.ar import generate_step

        begun = time.perf_counter()
        next(generate_step(self.mx.array([ids]), self.model, None, None, max_tokens=1))
        return time.perf_counter() - begun

    def question(self, image: str, text: str, first: bool) -> float:
        """From a file and a question to the first token; the second one goes on from the first one's cache."""
        from mlx_vlm.generate.common import PromptCacheState
        from mlx_vlm.generate.dispatch import stream_generate

        if first:
            self.state = PromptCacheState()
        begun = time.perf_counter()
        settings = {"image": image, "max_tokens": 1, "prompt_cache_state": self.state}
        answers = stream_generate(self.model, self.processor, self.prompt(text), **settings)
        seconds = [time.perf_counter() - begun for _ in answers]
        return seconds[0]


def _opened(image: str) -> Any:
    from PIL import Image

    picture = Image.open(image)
    picture.load()
    return picture


if __name__ == "__main__":
    serve(Work(sys.argv[1]))
