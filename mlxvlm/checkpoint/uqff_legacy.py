"""UQFF 0.1 and 0.2: numbered records -> a model's modules. Knows records and orders, not containers.

The numbers are the order in which the program walked its own modules; it depends on family and release. An order is
right only if every record has its module's shape. Source: mistral.rs 0.3 to 0.8, `utils/uqff.rs` and `get_layers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.container import Bytes, Tensor, TensorFile
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.packed import OUTPUT_SCALE
from mlxvlm.checkpoint.uqff_layers import Format, Parts, add, format_of, named, shape_of
from mlxvlm.errors import UnsupportedModelError, WeightsError
from mlxvlm.models.base import VisionLanguageModel

_VERSIONS = ((0, 1), (0, 2))
# The records' numbers of types; more were defined, none was written.
_DTYPES = ("U8", "U32", "I32", "I64", "F16", "BF16", "F32", "F64", "I16", "F8_E4M3")
_MAX_DIMS = 8
_MXFP4_BITS = 40  # an AFQ record that holds MXFP4


class _Record:
    """A cursor over one record. Raises WeightsError where a field goes beyond its end."""

    def __init__(self, data: Bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> Bytes:
        if count > self._data.size - self._at:
            raise WeightsError(f"ends too early: {count} bytes are missing after {self._at} of {self._data.size}")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        return int.from_bytes(self.take(4).tobytes(), "little")

    def byte(self) -> int:
        return int(self.take(1)[0])

    def u32(self, count: int = 1) -> Tensor:
        return Tensor("U32", (count,), self.take(4 * count))

    def u8(self) -> Tensor:
        return Tensor("U8", (), self.take(1))

    def f32(self) -> Tensor:
        return Tensor("F32", (), self.take(4))

    def shape(self) -> Tensor:
        """A count and as many u32."""
        return self.u32(self._dims())

    def tensor(self) -> Tensor:
        size, dtype = self.number(), self.number()
        if dtype >= len(_DTYPES):
            raise WeightsError(f"has a tensor of type {dtype}, which can't be read")
        shape = tuple(self.shape().numbers("U32"))
        return Tensor(_DTYPES[dtype], shape, self.take(size))

    def raw(self, count: int) -> Tensor:
        return Tensor("U8", (count,), self.take(count))

    def end(self) -> None:
        if self._at != self._data.size:
            raise WeightsError(f"has {self._data.size - self._at} bytes too many")

    def _dims(self) -> int:
        count = self.number()
        if count > _MAX_DIMS:
            raise WeightsError(f"has {count} dimensions")
        return count


def parts_of(data: Bytes) -> Parts:
    """A record as the parts of a UQFF 1.x layer. Raises WeightsError that says what is wrong, not where."""
    record = _Record(data)
    version = record.number()
    if (version >> 16, version >> 8 & 255) not in _VERSIONS:
        raise UnsupportedModelError(f"is of UQFF {version >> 16}.{version >> 8 & 255}; 0.1 and 0.2 can be read here")
    kind = record.u8()
    if kind.data[0] not in _FIELDS:
        raise UnsupportedModelError(f"is of type {kind.data[0]}, which is unknown")
    parts = {"format": kind, **_FIELDS[Format(kind.data[0])](record)}
    record.end()
    return _from_afq_variant(parts)


def _bias(record: _Record, is_there: int) -> dict[str, Tensor]:
    return {"bias": record.tensor()} if is_there else {}


def _gguf(record: _Record) -> dict[str, Tensor]:
    size, has_bias = record.number(), record.byte()
    parts = {"dtype": record.u32(), "shape": record.shape(), "": record.raw(size)}
    return parts | _bias(record, has_bias)


def _unquant(record: _Record) -> dict[str, Tensor]:
    has_bias = record.byte()
    return {"": record.tensor()} | _bias(record, has_bias)


def _hqq(record: _Record) -> dict[str, Tensor]:
    has_bias = record.byte()
    parts = {name: record.tensor() for name in ("", "scales", "zeros")}
    parts |= {"shape": record.shape(), "bits": record.u8(), "group_size": record.u32(), "axis": record.u8()}
    parts |= {"optimization_steps": record.u32(), "round_zeros": record.u8(), "channel_wise": record.u8()}
    return parts | _bias(record, has_bias)


def _fp8(record: _Record) -> dict[str, Tensor]:
    has_bias = record.byte()
    parts = {"": record.tensor()}
    parts |= {name: record.f32() for name in ("dequant_w_scale", "dequant_x_scale", "quant_scale")}
    return parts | {"dtype": record.u32()} | _bias(record, has_bias)


def _afq(record: _Record) -> dict[str, Tensor]:
    has_bias = record.byte()
    parts = {name: record.tensor() for name in ("", "scales", "biases")}
    return parts | {"bits": record.u8(), "group_size": record.u8()} | _bias(record, has_bias)


def _f8q8(record: _Record) -> dict[str, Tensor]:
    has_bias, count = record.byte(), record.u32()
    (blocks,) = count.numbers("U32")
    return {"num_blocks": count, "shape": record.shape(), "": record.raw(33 * blocks)} | _bias(record, has_bias)


def _mxfp4(record: _Record) -> dict[str, Tensor]:
    has_bias = record.byte()
    return {"": record.tensor(), "scales": record.tensor()} | _bias(record, has_bias)


_FIELDS: Mapping[int, Callable[[_Record], dict[str, Tensor]]] = {
    Format.GGUF: _gguf,
    Format.UNQUANT: _unquant,
    Format.HQQ: _hqq,
    Format.FP8: _fp8,
    Format.AFQ: _afq,
    Format.F8Q8: _f8q8,
    Format.MXFP4: _mxfp4,
}


def _from_afq_variant(parts: dict[str, Tensor]) -> Parts:
    if format_of(parts) != Format.AFQ or parts["bits"].data[0] != _MXFP4_BITS:
        return parts
    weight = parts[""]
    if weight.dtype == "U32" and weight.shape:
        weight = Tensor("U8", (*weight.shape[:-1], 4 * weight.shape[-1]), weight.data)
    mxfp4 = Tensor("U8", (), np.array([Format.MXFP4], np.uint8))
    return {"format": mxfp4, "": weight} | {name: parts[name] for name in ("scales", "bias") if name in parts}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a record goes. path None: nowhere, as a tied model's head; expert: the place in a stack."""

    path: str | None
    shape: tuple[int, ...]
    expert: int | None = None


Order = Sequence[Slot]


class LegacyLayers:
    """The records of the numbered tensors, and the model's modules they belong to."""

    def __init__(self, model: VisionLanguageModel, homes: Mapping[str, TensorFile]) -> None:
        assert isinstance(model, nn.Module)
        self._model = model
        self._homes = {int(name): (file, name) for name, file in homes.items()}
        if len(self._homes) != len(homes):
            raise WeightsError(f"{next(iter(homes.values())).path} has a layer's number twice")

    def add_to(self, conversion: Conversion) -> None:
        # Twice read, so that one record at a time is in memory.
        shapes = {}
        for number in sorted(self._homes):
            with self._named(number):
                shapes[number] = shape_of(self._parts(number))
        file = next(file for file, _ in self._homes.values())
        order = _choose(orders(_modules(self._model)), shapes, str(file.path))
        experts: dict[str, int] = {}
        for number in shapes:
            slot = order[number]
            if slot.path is None:
                continue
            path = slot.path
            if slot.expert is not None:
                experts[path] = experts.get(path, 0) + 1
                path = f"{path}#{slot.expert}"
            with self._named(number):
                add(conversion, path, self._parts(number))
        for path, count in experts.items():
            _stack(conversion.weights, path, count)

    def check_complete(self, conversion: Conversion, file: Path) -> None:
        """Old files leave out what later loads took from the base model. Raises WeightsError naming all of it."""
        found = self._model.sanitize(dict(conversion.weights))
        missing = [name for name in _parameters(self._model) if name not in found]
        if missing:
            raise WeightsError(
                f"{file} and its residual lack {len(missing)} tensors, as old UQFF files do: {', '.join(missing)};"
                " give the base model's folder, too"
            )

    def _named(self, number: int) -> AbstractContextManager[None]:
        file, name = self._homes[number]
        return named(f"{file.path}: layer {name}")

    def _parts(self, number: int) -> Parts:
        file, name = self._homes[number]
        tensor = file.read(name)
        if tensor.dtype != "U8" or len(tensor.shape) != 1:
            raise WeightsError(f"is {tensor.dtype} {list(tensor.shape)}, no record")
        return parts_of(tensor.data)


def _stack(weights: dict[str, mx.array], path: str, count: int) -> None:
    """Single experts' tensors, named `path`#i, become one module's."""
    leaves = [name.rpartition(".")[2] for name in list(weights) if name.startswith(f"{path}#0.")]
    names = {leaf: [f"{path}#{expert}.{leaf}" for expert in range(count)] for leaf in leaves}
    everything = {name for name in weights if name.startswith(f"{path}#")}
    if everything != {name for several in names.values() for name in several}:
        raise WeightsError(f"{path}: the experts are not all there, or of different types")
    for leaf, several in names.items():
        arrays = [weights.pop(name) for name in several]
        if leaf == OUTPUT_SCALE:
            if len({array.item() for array in arrays}) > 1:
                raise WeightsError(f"{path}: the experts have different scales; use a file of another type")
            weights[f"{path}.{leaf}"] = arrays[0]
            continue
        if len({(array.shape, array.dtype) for array in arrays}) > 1:
            raise WeightsError(f"{path}: the experts are of different types")
        weights[f"{path}.{leaf}"] = mx.stack(arrays)
        mx.eval(weights[f"{path}.{leaf}"])


def _modules(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every module's weight."""
    parameters = _parameters(model).items()
    return {name.removesuffix(".weight"): array.shape for name, array in parameters if name.endswith(".weight")}


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
# Vision layers in the order of their records; those of other families were never numbered.
_VISION = (r".*\bglobal_transformer\.layers", r".*\btransformer\.layers", r".*\bvision_model\.model\.layers")


def orders(modules: Mapping[str, tuple[int, ...]]) -> Iterator[Order]:
    """Every order in which some release numbered the modules of a model."""
    (embedding,) = [path for path in modules if path.endswith("embed_tokens")]
    heads = [path for path in modules if path.endswith("lm_head")]
    # The head has a number even where it is the embedding.
    head = [Slot(heads[0] if heads else None, modules[embedding if not heads else heads[0]][:2])]
    vision = [Slot(path, modules[path]) for path in _vision(modules)]
    ways = _EXPERT_ORDERS if any(path.endswith(".experts.gate_proj") for path in modules) else _EXPERT_ORDERS[:1]
    for start, end, way in product((head, []), ([], vision) if vision else ([],), ways):
        yield [*start, *_text(modules, embedding.removesuffix("embed_tokens"), way), *end]


def _numbered(modules: Mapping[str, tuple[int, ...]], prefix: str, leaf: str) -> list[str]:
    """The layers below a prefix (a pattern) that have `leaf`, by number."""
    pattern = re.compile(rf"((?:{prefix})\.(\d+))\.{re.escape(leaf)}")
    found = [match for path in modules if (match := pattern.fullmatch(path))]
    return [match[1] for match in sorted(found, key=lambda match: int(match[2]))]


def _text(modules: Mapping[str, tuple[int, ...]], prefix: str, way: ExpertOrder) -> Iterator[Slot]:
    # Layers of cross-attention have no self_attn, and no numbers.
    for layer in _numbered(modules, f"{re.escape(prefix)}layers", "self_attn.q_proj"):
        yield from _slots(modules, f"{layer}.self_attn", _ATTENTION)
        if f"{layer}.feed_forward.router" in modules:
            yield from _slots(modules, f"{layer}.feed_forward", ("router",))
            yield from way(_slots(modules, f"{layer}.feed_forward.experts", _GATED))
            yield from _slots(modules, f"{layer}.feed_forward.shared_expert", _GATED)
        else:
            is_dense = f"{layer}.feed_forward.gate_proj" in modules
            yield from _slots(modules, f"{layer}.{'feed_forward' if is_dense else 'mlp'}", _GATED)


def _slots(modules: Mapping[str, tuple[int, ...]], block: str, leaves: Sequence[str]) -> list[Slot]:
    return [Slot(f"{block}.{leaf}", modules[f"{block}.{leaf}"]) for leaf in leaves]


def _vision(modules: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for prefix in _VISION:
        for layer in _numbered(modules, prefix, "mlp.fc1"):
            yield from (f"{layer}.self_attn.{leaf}" for leaf in _ATTENTION)
            yield from (f"{layer}.mlp.{leaf}" for leaf in ("fc1", "fc2"))
    yield from (path for path in sorted(modules) if re.search(r"\bvision_adapter\.mlp\.fc[12]$", path))


ExpertOrder = Callable[[list[Slot]], list[Slot]]


def _each(stack: Slot) -> list[Slot]:
    return [Slot(stack.path, stack.shape[1:], expert) for expert in range(stack.shape[0])]


def _by_projection(stacks: list[Slot]) -> list[Slot]:
    return [slot for stack in stacks for slot in _each(stack)]


def _by_expert(stacks: list[Slot]) -> list[Slot]:
    return [slot for expert in zip(*map(_each, stacks), strict=True) for slot in expert]


def _not_stored(stacks: list[Slot]) -> list[Slot]:
    return []


# Stacked (from 0.7.0), all gates then ups then downs (before), expert by expert, or left in the residual.
_EXPERT_ORDERS: tuple[ExpertOrder, ...] = (list, _by_projection, _by_expert, _not_stored)


def _choose(candidates: Iterator[Order], shapes: Mapping[int, tuple[int, ...]], file: str) -> Order:
    """The one order that all records fit; of several, one whose every number is there."""
    fitting = [
        order
        for order in candidates
        if all(number < len(order) and order[number].shape == shape for number, shape in shapes.items())
    ]
    chosen = [order for order in fitting if len(order) == len(shapes)] or fitting
    if not chosen:
        raise WeightsError(f"{file}: the shapes of its {len(shapes)} layers fit no known order of this model's modules")
    if any([order[number] for number in shapes] != [chosen[0][number] for number in shapes] for order in chosen):
        raise WeightsError(f"{file}: its {len(shapes)} layers fit this model's modules in several ways")
    return chosen[0]
