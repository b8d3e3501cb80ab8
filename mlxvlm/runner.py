"""The Python door: load a model, get an engine. Knows how the rooms fit together, and nothing of MLX."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Unpack

from mlxvlm.checkpoint.load import REQUANTIZE, LoadOptions, ModelSource, open_model
from mlxvlm.engine.config import EngineConfig, EngineOptions
from mlxvlm.engine.draft_model import Draft
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.errors import UsageError
from mlxvlm.ranks.place import Member, RankOptions, find_member

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
    draft_model: str | None = None,
    progress: Progress | None = None,
    ranks: RankOptions | None = None,
    **engine: Unpack[EngineOptions],
) -> Engine:
    """An engine with a model: "demo", a local folder, a GGUF file, or a Hugging Face repository id.

    dtype: auto (the checkpoint's own on a GPU, float32 on the CPU backend), bfloat16, float16 or float32.
    isq, or in_situ_quant: quantise while loading: 4, 8, "Q4K", "4@32" ...; topology: a YAML file of types by layer;
    isq_tower: the vision tower's layers too. isq_cache: keep the result for the next start, True for the usual folder.
    from_uqff: UQFF files to take the weights from; mmproj: the GGUF file of a GGUF model's picture half; requantize:
    what quantised tensors without an exact MLX form become, "none" for 16 bits.
    max_memory_bytes: for weights, caches and all that runs; None for what the device recommends.
    kv_bits: keys and values in 8 or 4 bits, in groups of kv_group_size of a head's values (64). context_shift: an
    answer that reaches the end of the context goes on without the older half of it (docs/engine.md).
    speculation: guess tokens and check several at once, with the same answers: "auto" for where that helps (GPUs),
    "on" or "off"; max_draft_tokens: of a row at once (8). draft_model: a small model with the same vocabulary that
    guesses; without one, what was said before is looked up.
    max_rows: requests that run at once (16). prefix_cache_dir: a folder for what was made of prompts, for the next
    start of the same model; prefix_cache_dir_bytes: its limit (10 GiB); prefix_cache_eager: also what was used once.
    progress: called with (bytes done, bytes in all) while weights are read.
    Under mlx.launch all ranks run the model together (docs/scale.md): on rank 0 this returns, on the others it never
    does, they end with rank 0. ranks: {"timeout_s": 15, "start_timeout_s": 60, "stall_timeout_s": 120, "host": None}.
    Raises UsageError, ModelError and its kinds, RanksError. Close the engine, or use it in a `with` block.
    """
    source = open_model(
        model, revision=revision, chat_template=_path(chat_template), mmproj=_path(mmproj), from_uqff=from_uqff
    )
    isq = in_situ_quant if isq is None else isq
    options = LoadOptions(dtype, isq, isq_tower, _path(topology), cache_folder(isq_cache), requantize)
    draft = None if draft_model is None else open_model(draft_model)
    member = find_member(os.environ, **(ranks or {}))
    return start(source, options, progress, max_memory_bytes, draft, member, **engine)


def start(
    source: ModelSource,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
    max_memory_bytes: int | None = None,
    draft_model: ModelSource | None = None,
    member: Member | None = None,
    **engine: Unpack[EngineOptions],
) -> Engine:
    """An engine with an opened model; see load(). member: of ranks that run it together, None for this process alone.

    Does not return on ranks after the first: SystemExit when rank 0 is done.
    """
    options, draft = options or LoadOptions(), None
    if member is not None:
        _check_alone(draft_model, engine)
    if draft_model is not None:
        # As it is stored: how the large model is quantised is not meant for the small one.
        build = partial(draft_model.build, LoadOptions(options.dtype))
        draft = Draft(build, draft_model.processor, draft_model.max_context)
    config = EngineConfig(
        source.max_context,
        source.defaults.eos_token_ids,
        sampling_defaults(source),
        max_memory_bytes=max_memory_bytes,
        model_id=source.identity(options) if engine.get("prefix_cache_dir") else "",
        **engine,
    )
    if member is None:
        return Engine(partial(source.build, options), source.processor, config, progress, draft)
    from mlxvlm.ranks.roles import Lead, take_part

    build, terms = partial(source.build, options), _terms(source, options, config)
    if member.follows:
        take_part(member, build, terms, max_memory_bytes, (config.kv_bits, config.kv_group_size))
    lead = Lead(member, build, terms)
    return Engine(lead.build, source.processor, config, progress, ranks=lead)


def _check_alone(draft_model: ModelSource | None, engine: EngineOptions) -> None:
    """Raises UsageError for what several ranks can't do."""
    if draft_model is not None:
        raise UsageError(
            "several ranks can't have a draft model: leave draft_model (--draft-model) out, guesses then come from the "
            "text so far"
        )
    if engine.get("prefix_cache_dir") is not None:
        raise UsageError(
            "several ranks can't keep prompts in files, each would need its own: leave prefix_cache_dir "
            "(--prefix-cache) out, memory still keeps them"
        )


def _terms(source: ModelSource, options: LoadOptions, config: EngineConfig) -> dict[str, str]:
    """What all ranks must be asked for alike; where a file lies may differ."""
    from mlxvlm.ranks.roles import terms_of

    try:
        recipe = "" if options.topology is None else options.topology.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"topology {options.topology}: {error}") from error
    files = source.files or sorted(source.folder.glob("*.safetensors"))
    asked = (options.dtype, options.isq, options.isq_tower, options.requantize, config.kv_bits, config.kv_group_size)
    return terms_of(source.config, [(path.name, path.stat().st_size) for path in files], [*asked, recipe])


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
        min_p=defaults.min_p,
        typical_p=defaults.typical_p,
        repetition_penalty=defaults.repetition_penalty,
    )
