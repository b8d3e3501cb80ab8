"""What an engine has counted since it was made. Plain values: no MLX, no threads."""

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
    """encoded_images: pictures that went through the vision tower."""

    prefix_cache: CacheStats = CacheStats()
    feature_cache: CacheStats = CacheStats()
    encoded_images: int = 0
