"""What the vision tower made of pictures, by digest. Knows neither towers nor prompts. Engine thread only.

A picture's features are a small part of its keys and values, and do not depend on where it stands: they serve when the
text before it differs.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import mlx.core as mx

from mlxvlm.engine.stats import CacheStats


class FeatureCache:
    """Features [N, D] by PreparedImage.digest, at most `max_bytes`; 0 turns it off. The longest unused goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = self.misses = 0  # pictures that were held, or had to be encoded
        self._features: OrderedDict[bytes, mx.array] = OrderedDict()

    def record(self, hits: int, misses: int) -> None:
        """Counts a prompt's pictures."""
        self.hits += hits
        self.misses += misses

    def get(self, digest: bytes) -> mx.array | None:
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: mx.array, room: float = math.inf) -> None:
        """Keeps evaluated features that are no view of something larger, within `room` bytes in all."""
        left = min(self.max_bytes, room) - int(features.nbytes)
        if left < 0 or digest in self._features:
            return
        self.shrink(left)
        self._features[digest] = features
        self.nbytes += int(features.nbytes)

    def shrink(self, max_bytes: float) -> None:
        """Drops pictures until at most `max_bytes` are held."""
        while self.nbytes > max_bytes:
            _, features = self._features.popitem(last=False)
            self.nbytes -= int(features.nbytes)

    def stats(self) -> CacheStats:
        return CacheStats(self.hits, self.misses, len(self._features), self.nbytes)
