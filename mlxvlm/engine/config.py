"""An engine's limits and defaults. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.prefix_cache import BLOCK_TOKENS
from mlxvlm.errors import UsageError

KV_BITS = (8, 4)
KV_GROUP_SIZES = (32, 64, 128)  # of mx.quantize

DRAFT_TOKENS = 8  # with a row's last token 9, which MLX's vector kernels take together (`get_qmv_batch_limit`: 10)


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
    # Keys and values are quantised to so many bits, in groups of so many of a head's values, 32 where that does not
    # divide it; None: they keep the model's type.
    kv_bits: int | None = None
    kv_group_size: int = 64
    context_shift: bool = False  # an answer that reaches the end of the context goes on without its oldest half
    speculation: Literal["auto", "on", "off"] = "auto"  # guess tokens, check several at once; auto: on GPUs
    max_draft_tokens: int = DRAFT_TOKENS  # of a row at once
    num_workers: int = 2  # threads that prepare prompts and images
    # Kept between requests; None: what device.cache_budget() gives both together. 0: nothing.
    prefix_cache_bytes: int | None = None
    feature_cache_bytes: int | None = None
    prefix_block_tokens: int = BLOCK_TOKENS  # of which files hold only whole ones
    # Blocks that were used twice are kept here too, for the next start of the same model: model_id must tell
    # checkpoint, revision, quantisation and dtype.
    prefix_cache_dir: Path | None = None
    prefix_cache_dir_bytes: int = 10 << 30
    prefix_cache_eager: bool = False  # after their first use already: for processes that answer once
    model_id: str = ""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            raise UsageError(f"kv_bits must be 8 or 4, or None for unquantised keys and values, not {self.kv_bits!r}")
        if self.kv_group_size not in KV_GROUP_SIZES:
            raise UsageError(f"kv_group_size must be one of {KV_GROUP_SIZES}, not {self.kv_group_size!r}")


class EngineOptions(TypedDict, total=False):
    """The fields of EngineConfig that doors pass on as they are."""

    max_rows: int
    prefix_cache_dir: Path | None
    prefix_cache_dir_bytes: int
    prefix_cache_eager: bool
    kv_bits: int | None
    kv_group_size: int
    context_shift: bool
    speculation: Literal["auto", "on", "off"]
    max_draft_tokens: int
