"""Milliseconds of a prompt's mixtures of experts, by how their matrices lie in memory. The last line is JSON.

    python tools/bench_experts.py [--tokens 511] [--dims 256] [--hidden 512] [--experts 4]

[outputs, inputs] is what quantised kernels take and ours has at any rate, [inputs, outputs] how Llama 4 is published.
"""

from __future__ import annotations

import argparse
import json

import mlx.core as mx
from bench_worker import least

from mlxvlm.models.experts import Experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 511), ("dims", 256), ("hidden", 512), ("experts", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    layer = Experts(args.experts, args.dims, args.hidden, "silu")
    rows = mx.random.normal((args.tokens, args.dims))
    chosen = mx.random.randint(0, args.experts, (args.tokens,)).astype(mx.uint32)
    found = {}
    for name in ("outputs_inputs", "inputs_outputs"):
        for projection in (layer.gate_proj, layer.up_proj, layer.down_proj):
            weight = mx.random.normal(projection.weight.shape)
            if name == "inputs_outputs":
                weight = mx.contiguous(weight.swapaxes(-1, -2)).swapaxes(-1, -2)
            projection.weight = weight
        mx.eval(layer.parameters(), rows, chosen)
        found[f"{name}_ms"] = 1000 * least(lambda: mx.eval(layer(rows, chosen)), 7)
        print(f"{name:<16}{found[f'{name}_ms']:8.2f} ms")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
