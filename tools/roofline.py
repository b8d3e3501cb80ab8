"""What a decode step, a prefill chunk and a picture must move and compute, and how near to it this device comes.

    python tools/roofline.py CONFIG.json [--bits 4] [--rows 1] [--context 1024] [--chunk 512] [--run]

The model is built as the config says, without a checkpoint, and all matrices and attentions of the three are written
down as its graph is built: bytes are those of weights, keys and values, each read once, operations two for each
multiplication. A picture is one tile or frame of the family, of Qwen2-VL 32 x 32 patches; the rows have one before
their text. --run fills the weights with noise, runs the three, and runs what was written down alone, with the same
weights on inputs of the same shapes: `share` is the part of the three's time that these bare kernels need. Last line
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxvlm.engine import device
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass, LayerCache
from mlxvlm.families import family_of
from mlxvlm.models.base import Inputs, RowState
from mlxvlm.models.experts import ExpertLinear, QuantizedExpertLinear
from mlxvlm.models.qwen2_vl import PatchEmbed
from mlxvlm.processors.base import PreparedImage, Prompt

GROUP = 64  # values that share a scale and a bias
RUNS = 7
SIDE = 32  # patches of Qwen2-VL's picture
SPREAD = 0.02  # of noise in the weights
Json = dict[str, Any]
Shape = tuple[tuple[int, ...], mx.Dtype]


@dataclass(frozen=True)
class Op:
    """A kernel call that was asked for, to be asked for again. Inputs that are arrays are kept as shapes."""

    call: Callable[..., mx.array]
    inputs: tuple[Any, ...]
    options: Json
    nbytes: float
    operations: float

    def again(self, made: dict[Shape, mx.array]) -> mx.array:
        """With other numbers; `made` has those of each shape."""
        options = {name: _like(value, made) for name, value in self.options.items()}
        return self.call(*(_like(value, made) for value in self.inputs), **options)


class Record:
    """What is asked for while graphs are built."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.last_attend = 0  # how many there were before the last layer had its keys and values

    @contextmanager
    def __call__(self) -> Iterator[Record]:
        with ExitStack() as stack:
            for layer in (nn.Linear, nn.QuantizedLinear, nn.Conv2d, PatchEmbed, ExpertLinear, QuantizedExpertLinear):
                stack.enter_context(mock.patch.object(layer, "__call__", self._layer(layer.__call__)))
            for embedding in (nn.Embedding, nn.QuantizedEmbedding):
                stack.enter_context(mock.patch.object(embedding, "as_linear", self._layer(embedding.as_linear)))
            fused = self._attention(mx.fast.scaled_dot_product_attention)
            stack.enter_context(mock.patch.object(mx.fast, "scaled_dot_product_attention", fused))
            stack.enter_context(mock.patch.object(LayerCache, "attend", self._attend(LayerCache.attend)))
            yield self

    def _layer(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(layer: nn.Module, x: mx.array, *rest: Any) -> mx.array:
            result = real(layer, x, *rest)
            nbytes: float = sum(array.nbytes for _, array in tree_flatten(layer.parameters()))
            if isinstance(layer, ExpertLinear | QuantizedExpertLinear):
                nbytes *= min(len(x) / len(layer.weight), 1.0)  # a token goes through some of the stack
            is_convolution = isinstance(layer, nn.Conv2d | PatchEmbed)
            each = layer.get("proj", layer).weight[0].size if is_convolution else x.shape[-1]
            self._note(lambda *inputs: real(layer, *inputs), (x, *rest), {}, nbytes, 2 * result.size * each)
            return result

        return call

    def _attention(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
            seen = keys.shape[2] - (queries.shape[2] / 2 if isinstance(options.get("mask"), str) else 0)
            self._note(real, (queries, keys, values), options, keys.nbytes + values.nbytes, 4 * queries.size * seen)
            return real(queries, keys, values, **options)

        return call

    def _attend(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*inputs: Any) -> mx.array:
            self.last_attend = len(self.ops)
            return real(*inputs)

        return call

    def _note(
        self, call: Callable[..., mx.array], inputs: Sequence[Any], options: Json, nbytes: float, operations: float
    ) -> None:
        shapes = {name: _shape(value) for name, value in options.items()}
        self.ops.append(Op(call, tuple(map(_shape, inputs)), shapes, nbytes, operations))


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, mx.array) else value


def _like(value: Any, made: dict[Shape, mx.array]) -> Any:
    """An array of a shape: noise, choices of experts, or a mask that hides nothing."""
    if not isinstance(value, tuple):
        return value
    if value not in made:
        shape, dtype = value
        if mx.issubdtype(dtype, mx.floating):
            made[value] = mx.random.normal(shape).astype(dtype)
        else:
            made[value] = mx.ones(shape, dtype) if dtype == mx.bool_ else mx.zeros(shape, dtype)
        mx.eval(made[value])
    return made[value]


class Work:
    """A model whose rows hold a picture and text: the three, each as arrays that are not evaluated yet."""

    def __init__(self, config: Json, args: argparse.Namespace) -> None:
        self.model = family_of(config).build_model(config)
        self.model.set_dtype(args.dtype)
        if args.bits < 16:
            paths = self.model.quant_paths
            nn.quantize(
                self.model,
                GROUP,
                args.bits,
                class_predicate=lambda path, module: (
                    path.startswith((paths.decoder, paths.head or paths.decoder))
                    and hasattr(module, "to_quantized")
                    and module.weight.shape[-1] % GROUP == 0
                ),
            )
        if args.run:
            self._fill()
        self.picture = picture_of(config)
        self._context, self._chunk, self._rows = args.context, args.chunk, args.rows
        self._prepare(config)

    def _fill(self) -> None:
        """Noise, one array after the other; zeros would send all tokens to one expert."""
        for name, array in tree_flatten(self.model.parameters()):
            if mx.issubdtype(array.dtype, mx.floating):
                noise = (SPREAD * mx.random.normal(array.shape)).astype(array.dtype)
                self.model.update(tree_unflatten([(name, noise)]))
                mx.eval(noise)

    def _prepare(self, config: Json) -> None:
        features = self.vision()
        token = config.get("image_token_index", config.get("image_token_id", 0))
        # Where pictures come through cross-attention, one token stands for them.
        count = 1 if hasattr(self.model, "state_bytes") else len(features[0])
        if count > self._context:
            raise SystemExit(f"a picture takes {count} tokens: give a --context of so many at least")
        picture = replace(self.picture, span=(0, count))
        ids = (token,) * count + (1,) * (self._context + self._chunk - count)
        self._prompt: Inputs = self.model.embed_prompt(Prompt(ids, (picture,)), features)
        self._alone, self._batch = self._row(0), KVBatch()
        for owner in range(self._rows):
            self._batch.join(self._row(owner))
        self._states = [self._prompt.rows[0] if self._prompt.rows else RowState()] * self._rows

    def _row(self, owner: int) -> KVGroup:
        group = KVGroup.single(self.model.kv_specs, owner)
        forward = KVPass([group], self._context)
        self.model(self._prompt[0 : self._context], forward.layers)
        forward.commit()
        return group

    def evaluate(self) -> None:
        """All that the three begin with."""
        mx.eval(self._alone.arrays, [group.arrays for group in self._batch.groups])

    def vision(self) -> list[mx.array]:
        features: list[mx.array] = self.model.encode_images([self.picture])
        return features

    def prefill_chunk(self) -> list[mx.array]:
        """Keys and values after the context; not committed, so that it can be done again."""
        forward = KVPass([self._alone], self._chunk)
        self.model(self._prompt[self._context : self._context + self._chunk], forward.layers)
        return self._alone.arrays

    def decode_step(self) -> list[mx.array]:
        forward = self._batch.forward()
        tokens = mx.ones((self._rows, 1), mx.uint32)
        hidden = self.model(self.model.embed_tokens(tokens, self._states), forward.layers)
        return [self.model.logits(hidden[:, -1])]


def picture_of(config: Json) -> PreparedImage:
    """A smallest picture: one tile of the tower's size, as each family's processor would hand it over."""
    vision, kind = config.get("vision_config", {}), config["model_type"]
    if kind == "qwen2_vl":
        patch = vision.get("patch_size", 14)
        return _prepared((SIDE * SIDE, 3, patch, patch), (SIDE, SIDE))
    side = vision.get("image_size", {"mllama": 448, "llama4": 448}.get(kind, 336))
    layouts = {"llama4": (1, 1), "llava": (), "idefics3": (0, 0), "smolvlm": (0, 0)}
    if kind == "mllama":  # tiles that the picture does not fill go through the tower too
        return _prepared((vision.get("max_num_tiles", 4), 3, side, side), (1, 1))
    if kind in layouts:
        return _prepared((1, 3, side, side), layouts[kind])
    return _prepared((2, 3, side, side), (1, 1, 0, 0))  # LLaVA-NeXT: the view of the whole, and one tile


def _prepared(shape: tuple[int, ...], layout: tuple[int, ...]) -> PreparedImage:
    return PreparedImage(np.zeros(shape, np.float32), layout, (0, 0), b"")


def written_down(work: Work) -> dict[str, list[Op]]:
    """What each of the three asks for and needs."""
    found = {}
    for name in ("decode_step", "prefill_chunk", "vision"):
        with Record()() as record:
            getattr(work, name)()
        # Of a prompt's last layer keys and values are all that is computed.
        found[name] = record.ops[: record.last_attend] if name == "prefill_chunk" else record.ops
    return found


def seconds(work: Callable[[], Any]) -> float:
    """The median; the first run, which fills caches, is not counted."""
    times = []
    for _ in range(RUNS + 1):
        begun = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def run(work: Work, ops: dict[str, list[Op]]) -> dict[str, dict[str, float]]:
    """Seconds of the three, and of their bare kernels."""
    work.evaluate()
    found = {}
    made: dict[Shape, mx.array] = {}
    for name, asked in ops.items():
        bare = seconds(lambda asked=asked: [op.again(made) for op in asked])  # type: ignore[misc]
        whole = seconds(getattr(work, name))
        found[name] = {"bare_s": bare, "whole_s": whole, "share": bare / whole}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--bits", type=int, default=16, choices=(2, 3, 4, 5, 6, 8, 16), help="of the decoder's weights (default: 16)"
    )
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024, help="tokens that are held (default: 1024)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prefill chunk (default: 512)")
    parser.add_argument("--run", action="store_true", help="run them on this device (on the CPU in float32)")
    args = parser.parse_args(argv)
    if min(args.rows, args.context, args.chunk) < 1:
        parser.error("--rows, --context and --chunk are 1 at least")
    if not args.config.is_file():
        parser.error(f"there is no config at {args.config}")
    device.configure()
    args.dtype = mx.float32 if args.run and not device.is_gpu() else mx.bfloat16
    work = Work(json.loads(args.config.read_text()), args)
    ops = written_down(work)
    found: dict[str, Json] = {
        name: {"bytes": sum(op.nbytes for op in asked), "operations": sum(op.operations for op in asked)}
        for name, asked in ops.items()
    }
    ran = run(work, ops) if args.run else {}
    for name, need in found.items():
        need |= ran.get(name, {})
        print(f"{name:<14}{need['bytes'] / 1e9:9.3f} GB {need['operations'] / 1e9:11.2f} GFLOP", end="")
        print(f"{1000 * need['bare_s']:10.2f} ms of {1000 * need['whole_s']:.2f}: {need['share']:.2f}" if ran else "")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
