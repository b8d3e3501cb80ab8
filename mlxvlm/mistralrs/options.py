"""What a Runner is given beside the model. Knows mistral.rs's names, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from mlxvlm.errors import UsageError
from mlxvlm.mistralrs.choices import refuse

# Taken and passed over, with the reason.
IGNORED_OPTIONS: Mapping[str, str] = {
    "prefix_cache_n": "what is kept between requests is limited by bytes and gives way to them",
    "no_paged_attn": "keys and values lie in slots that need no pages",
    "paged_attn": "keys and values lie in slots that need no pages",
    **dict.fromkeys(
        ("pa_blk_size", "pa_gpu_mem", "pa_gpu_mem_usage", "pa_ctxt_len"),
        "rows reserve what they need: max_memory_bytes",
    ),
    "search_bert_model": "passages are ranked by BM25",
    "search_embedding_model": "passages are ranked by BM25",
}
REFUSED_OPTIONS: Mapping[str, str] = {
    "no_kv_cache": "keys and values are always kept; give max_memory_bytes for a limit",
    "num_device_layers": "there is one device: leave it out",
    "anymoe_config": "leave it out",
    "memory_goal": "give max_memory_bytes",
    "pa_cache_type": "give kv_bits=8 or 4",
    "mtp_model": "give draft_model, a small model with the same vocabulary",
    "mtp_n_predict": "give max_draft_tokens",
    "mcp_client_config": "give its tools as tool_schemas and tool_callbacks",
    "code_execution_config": "this runtime runs no code that a model writes; give a tool that does",
    "shell_config": "this runtime runs no commands that a model writes; give a tool that does",
}
_TOKEN_SOURCES = ("cache", "env:HF_TOKEN")

ToolCallback = Callable[[str, dict[str, Any]], Any]
SearchCallback = Callable[[str], list[dict[str, str]]]


class RunnerOptions(TypedDict, total=False):
    """mistral.rs's, then ours. tool_callbacks: functions of a tool's name and arguments, by its name."""

    max_seqs: int
    chat_template: str | None
    jinja_explicit: str | None
    in_situ_quant: str | int | None
    seed: int | None
    enable_search: bool
    search_callback: SearchCallback | None
    tool_callbacks: Mapping[str, ToolCallback] | None
    token_source: str
    no_kv_cache: bool
    prefix_cache_n: int
    num_device_layers: list[str] | None
    anymoe_config: Any
    memory_goal: str | float | None
    no_paged_attn: bool
    paged_attn: bool
    pa_blk_size: int | None
    pa_cache_type: Any
    pa_gpu_mem: int | None
    pa_gpu_mem_usage: float | None
    pa_ctxt_len: int | None
    search_bert_model: str | None
    search_embedding_model: str | None
    mtp_model: str | None
    mtp_n_predict: int | None
    mcp_client_config: Any
    code_execution_config: Any
    shell_config: Any
    hf_revision: str | None
    isq_cache: bool | str | Path
    max_memory_bytes: int | None
    draft_model: str | None
    max_draft_tokens: int
    kv_bits: int | None
    context_shift: bool
    progress: Callable[[int, int], None] | None


def check_options(options: RunnerOptions) -> None:
    """Raises UsageError for what is not known or can't be honoured."""
    known = RunnerOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(f"a Runner has no {unknown[0]!r}: it takes which, {', '.join(known)}")
    refuse("a Runner", options, REFUSED_OPTIONS)
    source = options.get("token_source", "cache")
    if source not in _TOKEN_SOURCES:
        raise UsageError(f"token_source {source!r} is not supported: run `hf auth login`, or set HF_TOKEN")
