"""What an engine can tell about itself. Plain values: no MLX, no threads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStats:
    """hits and misses: prompts for the prefix cache, pictures for the feature cache."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of an engine; totals count from its start. The caches' counters are zeros once it is closed."""

    running: int = 0  # requests with a row: vision, prefill or decode
    waiting: int = 0  # requests that are prepared or wait for a row
    budget_bytes: int = 0
    model_bytes: int = 0  # of the budget: what was in use when the model was loaded
    reserved_bytes: int = 0  # of the budget: the worst case of all rows; what the caches hold gives way to it
    steps: int = 0  # decode steps
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the generated ones, those that were guessed
    prefix_cache: CacheStats = CacheStats()
    feature_cache: CacheStats = CacheStats()
    encoded_images: int = 0  # pictures that went through the vision tower
