"""The decoder against mlx_lm's Llama with the same weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.models.decoder import Decoder, DecoderConfig

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 1},
    "llama3": {"rope_scaling": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def run(decoder: Decoder, config: DecoderConfig, ids: mx.array, chunk: int) -> np.ndarray:
    """[L, D], fed in pieces."""
    group = KVGroup.single(config.kv_specs, 0)
    pieces = []
    for start in range(0, ids.shape[1], chunk):
        embeds = decoder.embed(ids[:, start : start + chunk])
        forward = KVPass([group], embeds.shape[1])
        pieces.append(decoder(embeds, forward.layers))
        forward.commit()
    return np.array(mx.concatenate(pieces, axis=1)[0])


@pytest.mark.parametrize("chunk", [1, 7, 40])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_equals_llama(variant: str, chunk: int) -> None:
    settings = {**BASE, **VARIANTS[variant]}
    mx.random.seed(0)
    reference = llama.LlamaModel(llama.ModelArgs.from_dict({"model_type": "llama", **settings}))
    weights = [
        (name, mx.random.normal(array.shape) * (0.3 if array.ndim > 1 else 1.0))
        for name, array in tree_flatten(reference.parameters())
    ]
    reference.load_weights(weights)
    config = DecoderConfig.from_dict(settings)
    decoder = Decoder(config)
    decoder.load_weights(weights)  # strict: the names are Llama's
    ids = mx.random.randint(0, 50, (1, 40))
    expected = np.array(reference(ids)[0])
    found = run(decoder, config, ids, chunk)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_defaults_of_a_partial_config() -> None:
    """LlamaConfig's, and kv heads and head size that follow from what is given."""
    found = DecoderConfig.from_dict({})
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (4096, 11008, 32)
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (32, 32, 128)
    assert (found.rms_norm_eps, found.hidden_act, found.vocab_size) == (1e-6, "silu", 32000)
    null = DecoderConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None})
    assert (null.num_key_value_heads, null.head_dim) == (4, 16)
    assert [(spec.num_kv_heads, spec.head_dim) for spec in null.kv_specs] == [(4, 16)] * 32
