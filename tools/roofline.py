"""What a decode step, a prefill chunk and a picture must move and compute, from a config alone; and bare kernels' pace.

    python tools/roofline.py CONFIG.json [--bits 4] [--rows 1] [--context 1024] [--chunk 512] [--patches 1024] [--run]

Bytes are those of weights and of keys and values, each read once; operations are two for each multiplication with a
weight and for each pair that attends. --run multiplies matrices of the very shapes, one layer of each kind, and says
what this device reaches: a runtime's own time over that is the share it adds. Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.families import family_of

GROUP = 64  # values that share a scale and a bias
RUNS = 7


@dataclass(frozen=True)
class Part:
    """Matrices (outputs, inputs) that every token goes through, how often each; of `stored` weights some are read."""

    matrices: Mapping[tuple[int, int], float]

    @property
    def weights(self) -> float:
        return sum(out * inner * times for (out, inner), times in self.matrices.items())


def parts_of(config: dict[str, Any]) -> dict[str, Part]:
    """`decoder` with its head, and `tower` with its projector, as the model itself is built: nothing is allocated."""
    model = family_of(config).build_model(config)
    text = config.get("text_config", config)
    share = text.get("num_experts_per_tok", 1) / text.get("num_local_experts", 1)
    found: dict[str, Counter[tuple[int, int]]] = {"decoder": Counter(), "tower": Counter()}
    decoder, head = model.quant_paths.decoder, model.quant_paths.head
    has_head = False
    for name, array in tree_flatten(model.parameters()):
        if not name.endswith("weight") or array.ndim < 2 or "embed" in name or "position" in name:
            continue
        is_decoder = name.startswith(decoder) or (bool(head) and name.startswith(head))
        has_head |= bool(head) and name.startswith(head)
        out, inner = (array.shape[-2], array.shape[-1]) if array.ndim == 3 else (array.shape[0], array[0].size)
        # A stack of experts: a token goes through some of them.
        times = array.shape[0] * share if array.ndim == 3 else 1
        found["decoder" if is_decoder else "tower"][out, inner] += times  # type: ignore[assignment]
    if not has_head:
        found["decoder"][model.vocab_size, text["hidden_size"]] += 1  # the embeddings serve as head too
    return {name: Part(matrices) for name, matrices in found.items()}


def weight_bytes(weights: float, bits: int) -> float:
    """Below 16 bits with two 16-bit numbers for each group."""
    return weights * (bits if bits >= 16 else bits + 32 / GROUP) / 8


def needs(config: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Bytes and operations of the three."""
    parts = parts_of(config)
    model = family_of(config).build_model(config)
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads", 32)
    kv = sum(spec.bytes_per_token(mx.bfloat16) for spec in model.kv_specs)
    pair = sum(4 * heads * spec.head_dim for spec in model.kv_specs)  # a query with a key, a weight with a value
    decoder, tower = parts["decoder"], parts["tower"]
    chunk = args.chunk
    return {
        "decode_step": {
            "bytes": weight_bytes(decoder.weights, args.bits) + args.rows * args.context * kv,
            "operations": args.rows * (2 * decoder.weights + args.context * pair),
        },
        "prefill_chunk": {
            "bytes": weight_bytes(decoder.weights, args.bits) + (args.context + chunk) * kv,
            "operations": chunk * (2 * decoder.weights + (args.context + chunk / 2) * pair),
        },
        "vision": {"bytes": weight_bytes(tower.weights, 16), "operations": args.patches * 2 * tower.weights},
    }


def bare_s(matrices: Mapping[tuple[int, int], float], tokens: int, bits: int, dtype: mx.Dtype) -> float:
    """Seconds of all matrices: one of each shape is multiplied, and counted as often as it is there."""
    total = 0.0
    for (out, inner), times in matrices.items():
        layer: nn.Module = nn.Linear(inner, out, bias=False)
        layer.set_dtype(dtype)
        if bits < 16 and not inner % GROUP:
            layer = nn.QuantizedLinear.from_linear(layer, GROUP, bits)
        x = mx.random.normal((1, tokens, inner)).astype(dtype)
        mx.eval(layer.parameters(), x)
        total += times * statistics.median(_timed(layer, x) for _ in range(RUNS))
    return total


def _timed(layer: nn.Module, x: mx.array) -> float:
    begun = time.perf_counter()
    mx.eval(layer(x))
    return time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--bits", type=int, default=16, help="of the decoder's weights (default: 16)")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024, help="tokens that are held (default: 1024)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prefill chunk (default: 512)")
    parser.add_argument("--patches", type=int, default=1024, help="of a picture (default: 1024)")
    parser.add_argument("--run", action="store_true", help="multiply matrices of these shapes on this device")
    parser.add_argument("--measured-ms", type=float, metavar="MS", help="a decode step of a runtime, to compare")
    args = parser.parse_args(argv)
    config = json.loads(args.config.read_text())
    found: dict[str, Any] = needs(config, args)
    for name, need in found.items():
        intensity = need["operations"] / need["bytes"]
        print(f"{name:<14}{need['bytes'] / 1e9:9.3f} GB {need['operations'] / 1e9:11.2f} GFLOP {intensity:9.1f} FLOP/B")
    if args.run:
        dtype = mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
        seconds = bare_s(parts_of(config)["decoder"].matrices, args.rows, args.bits, dtype)
        step = found["decode_step"]
        step |= {"bare_s": seconds, "bare_bytes_per_s": step["bytes"] / seconds}
        print(f"bare matrices of a decode step: {1000 * seconds:.2f} ms, {step['bytes'] / seconds / 1e9:.2f} GB/s")
        if args.measured_ms is not None:
            step["share_of_bare"] = 1000 * seconds / args.measured_ms
            print(f"a step of {args.measured_ms:g} ms reaches {step['share_of_bare']:.2f} of it")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
