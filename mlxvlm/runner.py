"""The Python door: load a model, get an engine. Knows how the rooms fit together, and nothing of MLX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlxvlm.checkpoint.load import REQUANTIZE, LoadOptions, ModelSource, open_model
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams

_CACHE, _MAC_CACHE = Path(".cache/mlxvlm/isq"), Path("Library/Caches/mlxvlm/isq")

Progress = Callable[[int, int], None]


def load(
    model: str,
    *,
    dtype: str = "auto",
    isq: str | int | None = None,
    in_situ_quant: str | int | None = None,
    isq_tower: bool = False,
    topology: str | Path | None = None,
    isq_cache: bool | str | Path = True,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    mmproj: str | Path | None = None,
    from_uqff: str | None = None,
    requantize: str = REQUANTIZE,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """An engine with a model: "demo", a local folder, a GGUF file, or a Hugging Face repository id.

    dtype: auto (the checkpoint's own on a GPU, float32 on the CPU backend), bfloat16, float16 or float32.
    isq, or in_situ_quant: quantise while loading: 4, 8, "Q4K", "4@32" ...; topology: a YAML file of types by layer;
    isq_tower: the vision tower's layers too. isq_cache: keep the result for the next start, True for the usual folder.
    from_uqff: UQFF files to take the weights from; mmproj: the GGUF file of a GGUF model's picture half; requantize:
    what quantised tensors without an exact MLX form become, "none" for 16 bits.
    max_memory_bytes: for weights, caches and all that runs; None for what the device recommends.
    progress: called with (bytes done, bytes in all) while weights are read.
    Raises ModelError and its kinds. Close the engine, or use it in a `with` block.
    """
    source = open_model(
        model, revision=revision, chat_template=_path(chat_template), mmproj=_path(mmproj), from_uqff=from_uqff
    )
    options = LoadOptions(
        dtype,
        isq if isq is not None else in_situ_quant,
        isq_tower,
        _path(topology),
        cache_folder(isq_cache),
        requantize,
    )
    return start(source, options, progress, max_memory_bytes)


def start(
    source: ModelSource,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
    max_memory_bytes: int | None = None,
    **limits: Any,
) -> Engine:
    """An engine with an opened model; see load(). limits: further fields of EngineConfig."""
    config = EngineConfig(
        source.max_context,
        source.defaults.eos_token_ids,
        sampling_defaults(source),
        max_memory_bytes=max_memory_bytes,
        **limits,
    )
    return Engine(partial(source.build, options or LoadOptions()), source.processor, config, progress)


def cache_folder(choice: bool | str | Path) -> Path | None:
    """Where quantised models are kept: True for the system's folder of caches, False for nowhere."""
    if choice is True:
        return Path.home() / (_MAC_CACHE if sys.platform == "darwin" else _CACHE)
    return None if choice is False else Path(choice)


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


def sampling_defaults(source: ModelSource) -> SamplingParams:
    """How the checkpoint itself wants to be sampled (generation_config.json); greedy where it says nothing."""
    defaults = source.defaults
    return SamplingParams(
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        repetition_penalty=defaults.repetition_penalty,
    )
