"""An engine's limits and defaults. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.prefix_cache import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine must know beside the model. Token counts."""

    max_context: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)  # of requests that bring none
    max_rows: int = 16
    prefill_chunk: int = 2048
    prefill_chunk_while_decoding: int = 256  # a long prompt must not stall running streams
    max_images: int = 64  # of one request
    max_queue: int = 256  # requests that wait for a row; one more is refused
    max_queue_bytes: int = 2 << 30  # of their pictures
    max_memory_bytes: int | None = None  # for weights and rows; None: what the device recommends
    timeout_s: float | None = None  # of requests that bring none
    num_workers: int = 2  # threads that prepare prompts and images
    # Kept between requests; None: what device.cache_budget() gives both together. 0: nothing.
    prefix_cache_bytes: int | None = None
    feature_cache_bytes: int | None = None
    prefix_block_tokens: int = BLOCK_TOKENS  # of which only whole ones are kept
    # Blocks that were used twice are kept here too, for the next start of the same model: model_id must tell
    # checkpoint, revision, quantisation and dtype.
    prefix_cache_dir: Path | None = None
    prefix_cache_dir_bytes: int = 10 << 30
    prefix_cache_eager: bool = False  # after their first use already: for processes that answer once
    model_id: str = ""


class EngineOptions(TypedDict, total=False):
    """The fields of EngineConfig that doors pass on as they are."""

    max_rows: int
    prefix_cache_dir: Path | None
    prefix_cache_dir_bytes: int
    prefix_cache_eager: bool
