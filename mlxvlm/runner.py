"""The Python door: load a model, get an engine. Knows how the rooms fit together, and nothing of MLX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlxvlm.checkpoint.load import ModelSource, open_model
from mlxvlm.engine.engine import Engine, EngineConfig
from mlxvlm.engine.params import SamplingParams

Progress = Callable[[int, int], None]


def load(
    model: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    chat_template: str | Path | None = None,
    mmproj: str | Path | None = None,
    progress: Progress | None = None,
) -> Engine:
    """An engine with a model: "demo", a local folder, a GGUF file, or a Hugging Face repository id.

    dtype: auto (the checkpoint's own on a GPU, float32 on the CPU backend), bfloat16, float16 or float32.
    mmproj: the GGUF file of a GGUF model's picture half.
    progress: called with (bytes done, bytes in all) while weights are read.
    Raises ModelError and its kinds. Close the engine, or use it in a `with` block.
    """
    template, half = (None if path is None else Path(path) for path in (chat_template, mmproj))
    source = open_model(model, revision=revision, chat_template=template, mmproj=half)
    return start(source, dtype=dtype, progress=progress)


def start(source: ModelSource, *, dtype: str = "auto", progress: Progress | None = None) -> Engine:
    """An engine with an opened model."""
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids, sampling_defaults(source))
    return Engine(partial(source.build, dtype), source.processor, config, progress)


def sampling_defaults(source: ModelSource) -> SamplingParams:
    """How the checkpoint itself wants to be sampled (generation_config.json); greedy where it says nothing."""
    defaults = source.defaults
    return SamplingParams(
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        repetition_penalty=defaults.repetition_penalty,
    )
