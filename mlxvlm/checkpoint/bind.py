"""Tensors -> a model's parameters, strictly. Knows modules and shapes, not files and not families.

Which modules are quantised, and how, is read off the tensors themselves: the model knows each module's full shape,
so the packed width gives the bits and the scales' width the group size. Configs of various ages disagree with the
tensors; the tensors can't.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.isq import AS_IT_IS, Plan, Recipe, make_plan, stream
from mlxvlm.checkpoint.packed import OUTPUT_SCALE, QuantSpec
from mlxvlm.checkpoint.parts import Parts
from mlxvlm.errors import UnsupportedModelError, UsageError, WeightsError
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.repacked import repacked
from mlxvlm.models.shares import Cut, Share, column_units, keep_decoder, narrow

log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all

DTYPES: dict[str, mx.Dtype] = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
_PACKED_BITS = 32  # quantised weights are packed into uint32
_FLOAT_MODES = {(32, 4): "mxfp4", (16, 4): "nvfp4", (32, 8): "mxfp8"}  # (group size, bits), each mode's only one
_AFFINE_GROUPS = (32, 64, 128)
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


def choose_dtype(name: str, weights: Mapping[str, mx.array]) -> mx.Dtype:
    """`auto`: the checkpoint's own on a GPU, float32 on the CPU backend, where halves are far slower."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32
    return stored_dtype(weights)


def stored_dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    """What most of the float tensors are stored in; float16 where there are none."""
    sizes: dict[mx.Dtype, int] = {}
    for name, array in weights.items():
        # Re-packed and re-quantised layers have the scales that fit them, whatever the rest is in.
        if array.dtype in DTYPES.values() and not name.endswith((".scales", ".biases")):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else mx.float16


def bind(
    model: VisionLanguageModel,
    weights: dict[str, mx.array],
    dtype: str,
    progress: Progress,
    recipe: Recipe = AS_IT_IS,
    files: Sequence[TensorFile] = (),
    share: Share | None = None,
) -> None:
    """Puts a checkpoint's tensors into a model; see `streamed`. Peak memory is the bound model plus one tensor."""
    assert isinstance(model, nn.Module)
    for name, array in streamed(model, weights, choose_dtype(dtype, weights), progress, recipe, files, share):
        _assign(model, name, array)
    model.eval()
    model.freeze()


def streamed(
    model: VisionLanguageModel,
    weights: dict[str, mx.array],
    dtype: mx.Dtype,
    progress: Progress,
    recipe: Recipe = AS_IT_IS,
    files: Sequence[TensorFile] = (),
    share: Share | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """A checkpoint's tensors under the model's names, evaluated one by one; `weights` is emptied.

    The model's modules become what the tensors are, and what `recipe` makes of them. files: those that `weights` came
    from, for reading parts of tensors. share: of which the model and its tensors become a part. Raises WeightsError
    with every missing, extra or wrongly shaped name, and as `planned`.
    """
    assert isinstance(model, nn.Module)
    named = model.sanitize(weights)
    fit(model, named)
    plan, named, cuts = planned(model, named, recipe, share)
    for line in plan.left:
        log.warning(line)
    if recipe != AS_IT_IS and not plan.specs:
        log.warning("nothing is quantised: no layer that the type or the topology asks for is in full precision")
    quantised = {f"{path}.weight" for path in plan.specs}
    parts = Parts(model.sanitize, files, weights, quantised, cuts) if cuts or quantised else None
    weights.clear()
    _quantize(model, plan)
    dtypes = {name: bound_dtype(name, named, dtype) for name in named}
    # Bytes of the full tensors, also where they are quantised: reading and quantising them is the work.
    sizes = {name: expected_bytes(array, dtypes[name]) for name, array in named.items()}
    total, done = sum(sizes.values()), 0
    lazy_bytes = sum(array.nbytes for name, array in named.items() if parts is None or name not in parts)
    for name, array in stream(named, dtypes, plan, parts):
        yield name, array
        done += sizes.get(name, 0)
        progress(done, total)
    if files:
        log.info("%d bytes of the checkpoint's tensors were read", lazy_bytes + (parts.bytes_read if parts else 0))


def planned(
    model: VisionLanguageModel, named: Mapping[str, mx.array], recipe: Recipe, share: Share | None
) -> tuple[Plan, dict[str, mx.array], Mapping[str, Cut]]:
    """What a model that fits its tensors is to become, the share of the tensors in the model's order, what was cut.

    Leaves of the model what is the share's. The plan is the same on all ranks. Raises UsageError for too many ranks,
    UnsupportedModelError where they would cut quantised groups, before anything is changed.
    """
    assert isinstance(model, nn.Module)
    plan = make_plan(model, recipe, {} if share is None else _units(model, share.rank.count))
    cuts = {} if share is None else narrowed(model, share)
    return plan, {name: _cut(name, named[name], cuts) for name in dict(tree_flatten(model.parameters()))}, cuts


def _units(model: VisionLanguageModel, count: int) -> Mapping[str, int]:
    """See `column_units`. Raises as `planned`."""
    try:
        units = column_units(model, count)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path, group_size = min(_cut_groups(model, units), default=("", 0))
    if path:
        fewer = next(n for n in range(count - 1, 0, -1) if not any(_cut_groups(model, column_units(model, n))))
        raise UnsupportedModelError(
            f"{path} is quantised in groups of {group_size} columns, which {count} ranks would cut: use "
            f"{fewer}, or the checkpoint in full precision with isq (--isq)"
        )
    return units


def _cut_groups(model: VisionLanguageModel, units: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Path and group size of each quantised module that is cut inside a group."""
    assert isinstance(model, nn.Module)
    modules: dict[str, Any] = dict(model.named_modules())
    for path, unit in units.items():
        if "scales" in modules[path] and unit % modules[path].group_size:
            yield path, modules[path].group_size


def narrowed(model: VisionLanguageModel, share: Share) -> Mapping[str, Cut]:
    """Leaves of a model what is the share's; see `narrow`. Raises UsageError where it can't be shared."""
    try:
        cuts = narrow(model, share.rank, share.add)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if share.rank.index:
        keep_decoder(model)
    return cuts


def _cut(name: str, array: mx.array, cuts: Mapping[str, Cut]) -> mx.array:
    path, _, leaf = name.rpartition(".")
    return cuts[path].of(leaf, array) if path in cuts else array


def _quantize(model: nn.Module, plan: Plan) -> None:
    """Replaces modules by their quantised forms, of no value yet."""
    modules = dict(model.named_modules())
    replaced = [
        (path, modules[path].to_quantized(group_size=spec.group_size, bits=spec.bits, mode=spec.mode))
        for path, spec in plan.specs.items()
        if path in modules
    ]
    if replaced:
        model.update_modules(tree_unflatten(replaced))


def fit(model: nn.Module, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The model's parameters by name, its modules quantised as the sanitised weights are.

    Raises WeightsError with every missing, extra or wrongly shaped name. Evaluates nothing but output scales.
    """
    quantize_modules(model, weights)
    expected = dict(tree_flatten(model.parameters()))
    _check(expected, weights)
    return expected


def quantize_modules(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Replaces each module whose `.scales` is there by its quantised form (weights still to be bound)."""
    modules = dict(model.named_modules())
    replaced, problems = [], []
    for name in weights:
        path, _, leaf = name.rpartition(".")
        if leaf != "scales":
            continue
        module = modules.get(path)
        if module is None or not hasattr(module, "to_quantized"):
            problems.append(f"{path} is quantised in the checkpoint, but is no layer that can be")
            continue
        try:
            spec = quant_spec(path, module.weight.shape[-1], weights)
        except WeightsError as error:
            problems.append(str(error))
            continue
        quantised = module.to_quantized(group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        factor = weights.get(f"{path}.{OUTPUT_SCALE}")
        if factor is not None:
            quantised = repacked(quantised, is_scaled=factor.size != 1 or factor.item() != 1)
        replaced.append((path, quantised))
    if problems:
        raise WeightsError("; ".join(sorted(problems)))
    if replaced:
        model.update_modules(tree_unflatten(replaced))


def quant_spec(path: str, width: int, weights: Mapping[str, mx.array]) -> QuantSpec:
    """How the module at `path`, whose full input width is `width`, was quantised."""
    packed, scales = weights.get(f"{path}.weight"), weights[f"{path}.scales"]
    if packed is None or packed.dtype != mx.uint32 or not packed.ndim == scales.ndim >= 2 or not scales.size:
        raise WeightsError(f"{path} has scales, but no packed weight beside them")
    bits, group = packed.shape[-1] * _PACKED_BITS / width, width / scales.shape[-1]
    if f"{path}.biases" in weights:
        if group in _AFFINE_GROUPS and bits in _AFFINE_BITS:
            return QuantSpec(int(bits), int(group))
    elif (group, bits) in _FLOAT_MODES and scales.dtype == mx.uint8:
        return QuantSpec(int(bits), int(group), _FLOAT_MODES[int(group), int(bits)])
    raise WeightsError(
        f"{path}: weight {tuple(packed.shape)} and scales {tuple(scales.shape)} fit no quantisation of width {width}"
    )


def expected_bytes(array: mx.array, dtype: mx.Dtype) -> int:
    """Bytes of a tensor once it is bound."""
    return int(array.size * (dtype.size if array.dtype in DTYPES.values() else array.dtype.size))


def _kind(array: mx.array) -> str:
    return "float" if array.dtype in DTYPES.values() else str(array.dtype).removeprefix("mlx.core.")


def bound_dtype(name: str, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.Dtype:
    """`dtype`, but for integers, and the parts of re-packed modules that it would round."""
    if weights[name].dtype not in DTYPES.values():
        # Packed weights and the scales of the float modes.
        return weights[name].dtype
    path, _, leaf = name.rpartition(".")
    is_exact = leaf in (OUTPUT_SCALE, "scales", "biases") and f"{path}.{OUTPUT_SCALE}" in weights
    return mx.float32 if is_exact and weights[name].dtype != dtype else dtype


def _assign(model: nn.Module, name: str, array: mx.array) -> None:
    owner: Any = model
    *path, leaf = name.split(".")
    for key in path:
        owner = owner[int(key)] if isinstance(owner, list) else owner[key]
    owner[leaf] = array


def _check(expected: Mapping[str, mx.array], found: Mapping[str, mx.array]) -> None:
    both = [name for name in expected if name in found]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    # FP8 arrives as uint8: its bytes would be taken for numbers.
    mistyped = [f"{name} {_kind(found[name])}" for name in both if _kind(found[name]) != _kind(expected[name])]
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("unknown", [name for name in found if name not in expected]),
        _listed("wrongly shaped", wrong),
        _listed("of a type that can't be used", mistyped),
    ]
    text = "; ".join(problem for problem in problems if problem)
    if text:
        raise WeightsError(f"the checkpoint's tensors are not this model's: {text}")


def _listed(kind: str, names: list[str]) -> str:
    """Every name, long as it may be: this error is the only place where a user sees them."""
    return f"{len(names)} {kind}: {', '.join(sorted(names))}" if names else ""
