"""Which number format `auto` means."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlxvlm.checkpoint.bind import DTYPES, choose_dtype


def on(kind: mx.DeviceType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=kind))


def tensors(**sizes: tuple[mx.Dtype, int]) -> dict[str, mx.array]:
    return {name: mx.zeros((size,), dtype) for name, (dtype, size) in sizes.items()}


# One dtype leads in elements; others in tensors, in bytes, and integers in everything.
MIXED = tensors(
    first=(mx.float32, 3),
    second=(mx.float32, 4),
    packed=(mx.uint32, 100),
    large=(mx.bfloat16, 10),
    half=(mx.float16, 8),
)


def test_auto_on_a_gpu_is_the_dtype_of_most_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    on(mx.DeviceType.gpu, monkeypatch)
    assert choose_dtype("auto", MIXED) == mx.bfloat16
    # Sums count, not the largest tensor.
    assert choose_dtype("auto", {**MIXED, **tensors(third=(mx.float16, 4))}) == mx.float16
    assert choose_dtype("auto", tensors(only=(mx.float32, 1))) == mx.float32


def test_scales_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    on(mx.DeviceType.gpu, monkeypatch)
    scales = {f"layer.{leaf}": mx.zeros((99,), mx.float32) for leaf in ("scales", "biases")}
    assert choose_dtype("auto", {**MIXED, **scales}) == mx.bfloat16


def test_auto_on_a_gpu_without_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    on(mx.DeviceType.gpu, monkeypatch)
    assert choose_dtype("auto", tensors(packed=(mx.uint32, 9))) == mx.float16


def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(mx.DeviceType.cpu, monkeypatch)
    assert choose_dtype("auto", MIXED) == mx.float32


@pytest.mark.parametrize("kind", [mx.DeviceType.cpu, mx.DeviceType.gpu])
@pytest.mark.parametrize("name", DTYPES)
def test_a_named_dtype_is_taken_anywhere(name: str, kind: mx.DeviceType, monkeypatch: pytest.MonkeyPatch) -> None:
    on(kind, monkeypatch)
    assert choose_dtype(name, MIXED) == DTYPES[name]
