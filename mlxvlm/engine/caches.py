"""What an engine keeps between requests, made from its settings. Knows shares of memory, not requests."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from mlxvlm.engine import device
from mlxvlm.engine.block_files import BlockFiles
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.feature_cache import FeatureCache
from mlxvlm.engine.prefix_cache import PrefixCache
from mlxvlm.errors import UsageError
from mlxvlm.models.base import KVSpec

# Of what both caches get. A picture's features take a 64th (LLaVA-1.5) to an eighth (Qwen2-VL-7B) of its keys and
# values, but serve for longer; cross-attention families have little else of a picture.
_FEATURE_SHARE = 0.25


def make_caches(config: EngineConfig, specs: Sequence[KVSpec], free_bytes: int) -> tuple[PrefixCache, FeatureCache]:
    """They share a part of what the model leaves free; `specs` say how blocks are held. Raises UsageError."""
    files, root = None, sha256(repr((3, config.model_id, list(specs))).encode()).digest()
    if config.prefix_cache_dir is not None:
        if not config.model_id:
            raise UsageError("prefix_cache_dir needs a model_id: models that share files must be told apart")
        files = BlockFiles(config.prefix_cache_dir, config.prefix_cache_dir_bytes, config.kv_bits)
    budget = device.cache_budget(free_bytes)
    of_features = int(budget * _FEATURE_SHARE)
    prefixes, features = config.prefix_cache_bytes, config.feature_cache_bytes
    return (
        PrefixCache(
            budget - of_features if prefixes is None else prefixes,
            config.prefix_block_tokens,
            root,
            files,
            config.prefix_cache_eager,
        ),
        FeatureCache(of_features if features is None else features),
    )
