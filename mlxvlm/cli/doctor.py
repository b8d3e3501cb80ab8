"""`mlxvlm doctor`: what this machine is, and whether a model fits. Knows how to ask and to print."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.options import REQUANTIZE, size_text
from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.engine.device import DeviceReport


def add_parser(commands: Any) -> None:
    """Adds `doctor` to the commands."""
    parser = commands.add_parser(
        "doctor",
        help="report on this machine, and on what a model would need",
        description="Report platform, MLX, memory and cache folder; with -m also what a model would need in memory.",
    )
    parser.add_argument(
        "-m", "--model", metavar="MODEL", help="`demo`, a folder, a GGUF file, or a repository id (not downloaded)"
    )
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help="the GGUF file of a GGUF model's picture half")
    parser.add_argument("--from-uqff", metavar="NAME", help="UQFF files that are on this machine, as for `run`")
    parser.add_argument(
        "--requantize",
        default=REQUANTIZE,
        metavar="TYPE",
        help=f"what GGUF and UQFF tensors without an exact form become (default: {REQUANTIZE}; none: 16 bits)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--isq", metavar="TYPE", help="what it would need quantised while loading: 4, Q4K, mxfp4 ...")
    parser.add_argument("--isq-vision", action="store_true", help="the vision tower's layers too")
    parser.add_argument("--topology", type=Path, metavar="FILE", help="a YAML file of types by layer")
    parser.add_argument("--kv-bits", type=int, choices=(8, 4), help="keys and values held in 8 or 4 bits")
    parser.add_argument(
        "--kv-group-size", type=int, default=64, choices=(32, 64, 128), metavar="N", help="of --kv-bits: 32, 64 or 128"
    )
    parser.add_argument("--shards", type=int, metavar="N", help="what each of N Macs that share it would need")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    if args.shards is not None and (args.shards < 1 or args.model is None):
        raise UsageError(f"--shards is a number from 1 on, of Macs for -m MODEL; given are {args.shards}, {args.model}")
    from mlxvlm import __version__
    from mlxvlm.checkpoint.estimate import cache_folder
    from mlxvlm.engine import device

    machine = device.report()
    cache = cache_folder()
    usable = _usable_bytes(machine)
    _row("mlxvlm", __version__)
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("platform", platform.platform())
    _row("mlx", f"{machine.mlx_version}, {'GPU' if machine.is_gpu else 'CPU backend: for tests and small models'}")
    _row("device", machine.name)
    _row("memory", f"{size_text(_physical_bytes(machine))}, {size_text(usable)} of it for models")
    if sys.platform == "darwin":
        _row("wired limit", _wired_limit())
    _row("hub cache", f"{cache}, {size_text(shutil.disk_usage(_existing(cache)).free)} free")
    if args.model:
        _report_model(args, usable)
    return 0


def _report_model(args: argparse.Namespace, usable: int) -> None:
    from mlxvlm.checkpoint.build import recipe_of
    from mlxvlm.checkpoint.estimate import memory_need
    from mlxvlm.checkpoint.load import LoadOptions
    from mlxvlm.cli.sharing import Sharing

    recipe = recipe_of(LoadOptions(isq=args.isq, isq_tower=args.isq_vision, topology=args.topology))
    need = memory_need(
        args.model, args.revision, args.dtype, recipe, args.mmproj, args.from_uqff, requantize=args.requantize
    )
    sharing = Sharing(need, usable, args.kv_bits, args.kv_group_size)
    per_token = sharing.bytes_per_token(need)
    rows = [] if args.shards is None else sharing.rows(args.shards)
    held = f" in {args.kv_bits} bits" if args.kv_bits else ""
    print()
    _row("model", f"{args.model} ({need.model_type}){'' if need.is_local else ', not on this machine yet'}")
    _row("on disk", size_text(need.disk_bytes))
    _row("weights", f"{size_text(need.weights_bytes)}, {size_text(need.loading_bytes)} while loading")
    for line in need.left:
        _row("", line)
    _row("tensors", need.misfit or f"{need.num_tensors}, names and shapes are the model's")
    _row("KV cache", f"{size_text(1000 * per_token)} for 1000 tokens{held}, {need.max_context} tokens at most")
    for tokens in sharing.contexts:
        verdict = "fits" if sharing.fits([need], tokens) else "does not fit"
        _row(f"  {tokens} tokens", f"{size_text(sharing.total(need, tokens))} for weights and KV cache: {verdict}")
    for name, value in rows:
        _row(name, value)


def _row(name: str, value: str) -> None:
    print(f"{name:<14} {value}")


def _physical_bytes(machine: DeviceReport) -> int:
    return machine.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _usable_bytes(machine: DeviceReport) -> int:
    """What macOS lets a GPU keep resident; elsewhere four fifths of memory, MLX's own default limit."""
    return machine.working_set_bytes or _physical_bytes(machine) * 4 // 5


def _wired_limit() -> str:
    """macOS: 0 means the system's own choice; raising it lets larger models stay resident."""
    query = ["sysctl", "-n", "iogpu.wired_limit_mb"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    if not answer.isdigit():
        return "unknown"
    return f"{answer} MB" if int(answer) else "the system's default (raise it: sudo sysctl iogpu.wired_limit_mb=N)"


def _existing(path: Any) -> Any:
    """The nearest folder that exists: a new machine has no cache yet."""
    while not path.exists():
        path = path.parent
    return path
