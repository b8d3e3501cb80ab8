"""The machine under MLX: its name, its memory, and the limits set once a process. Knows no model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

_MEMORY_SHARE = 0.8  # of physical memory, where the device recommends nothing
_CACHE_SHARE = 0.05  # of the working set: freed buffers that MLX may keep for reuse
_BETWEEN_REQUESTS_SHARE = 0.25  # of free memory: keys, values and features that the next request may need
_BETWEEN_REQUESTS_ON_CPU = 256 << 20  # bytes; that backend is for tests and trials


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What `doctor` shows; bytes are 0 where the backend does not say."""

    name: str
    is_gpu: bool
    mlx_version: str
    memory_bytes: int
    working_set_bytes: int  # what macOS lets the GPU keep wired


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """MLX's own counters, in bytes."""

    active_bytes: int
    peak_bytes: int
    cached_bytes: int


def is_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def report() -> DeviceReport:
    """The default device."""
    info = mx.device_info()
    return DeviceReport(
        name=str(info.get("device_name", "unknown")),
        is_gpu=is_gpu(),
        mlx_version=version("mlx"),
        memory_bytes=int(info.get("memory_size", 0)),
        working_set_bytes=int(info.get("max_recommended_working_set_size", 0)),
    )


def memory() -> MemoryReport:
    """Callable from any thread."""
    return MemoryReport(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())


def cache_budget(free_bytes: int) -> int:
    """Bytes of so many free ones that may be kept between requests."""
    share = int(max(free_bytes, 0) * _BETWEEN_REQUESTS_SHARE)
    return share if is_gpu() else min(share, _BETWEEN_REQUESTS_ON_CPU)


def default_budget() -> int:
    """Bytes that MLX may use: what macOS recommends, elsewhere 4/5 of the machine's memory."""
    info = report()
    physical = info.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return info.working_set_bytes or int(physical * _MEMORY_SHARE)


def configure() -> None:
    """Limits for a long-lived process; called on the engine thread before a model is loaded."""
    if not is_gpu():
        # Compiled kernels need g++ at run time here and take seconds to build; Metal's pay at once.
        mx.disable_compile()
        return
    working_set = report().working_set_bytes
    if working_set:
        # Weights stay resident between requests, and freed buffers can't grow to all of memory.
        mx.set_wired_limit(working_set)
        mx.set_cache_limit(int(working_set * _CACHE_SHARE))
