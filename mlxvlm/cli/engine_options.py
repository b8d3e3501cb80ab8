"""Flags of the engine that commands share: its memory, its caches, its guesses. Knows names and help texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.checkpoint.load import ModelSource
    from mlxvlm.engine.config import EngineOptions
    from mlxvlm.engine.engine import Engine
    from mlxvlm.ranks.place import Member
    from mlxvlm.runner import Progress


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--kv-bits, --context-shift, --prefix-cache, --draft-model and their kin."""
    _add_context_options(parser)
    _add_cache_options(parser)
    _add_speculation_options(parser)


def start_engine(
    args: argparse.Namespace,
    source: ModelSource,
    progress: Progress,
    options: EngineOptions,
    member: Member | None = None,
) -> Engine:
    """The engine of an opened model as the flags have it, with what engine_options() gave. Raises MlxvlmError.

    Ranks after the first don't get one, see runner.start().
    """
    from mlxvlm.cli.options import load_options
    from mlxvlm.runner import start

    return start(source, load_options(args), progress, max_memory_bytes(args), draft_source(args), member, **options)


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What add_engine_options gave, but for models and memory. Raises UsageError."""
    return _context_options(args) | _cache_options(args) | _speculation_options(args)


def _add_context_options(parser: argparse.ArgumentParser) -> None:
    """--kv-bits, --kv-group-size and --context-shift."""
    group = parser.add_argument_group("keys and values of the context")
    group.add_argument("--kv-bits", type=int, choices=(8, 4), help="hold them in 8 or 4 bits (default: unquantised)")
    group.add_argument(
        "--kv-group-size", type=int, default=64, metavar="N", help="of --kv-bits: 32, 64 or 128 (default: 64)"
    )
    group.add_argument(
        "--context-shift", action="store_true", help="go on when the context is full, without the older half of it"
    )


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    """--prefix-cache and --prefix-cache-size."""
    group = parser.add_argument_group("what the next start need not read again")
    group.add_argument(
        "--prefix-cache", type=Path, metavar="DIR", help="keep what was made of prompts and pictures in files here"
    )
    group.add_argument(
        "--prefix-cache-size", type=float, metavar="GB", help="at most, the longest unused goes first (default: 10)"
    )


def _add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """--no-speculation, --draft-tokens, --draft-model."""
    group = parser.add_argument_group("speculation (guess tokens, check several at once; the answer is the same)")
    group.add_argument("--no-speculation", action="store_true", help="never guess")
    group.add_argument(
        "--draft-tokens", type=int, metavar="N", help="guess on any device, 1 to 15 at once (default: 8, on GPUs)"
    )
    group.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a small model with the same vocabulary that guesses (default: guesses come from the text so far)",
    )


def _context_options(args: argparse.Namespace) -> EngineOptions:
    return {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size, "context_shift": args.context_shift}


def _cache_options(args: argparse.Namespace) -> EngineOptions:
    """What add_cache_options gave. Raises UsageError."""
    size, folder = args.prefix_cache_size, args.prefix_cache
    if size is not None and folder is None:
        raise UsageError("--prefix-cache-size limits a folder: give it with --prefix-cache DIR")
    if size is not None and not 0 < size < 1e6:
        raise UsageError(f"--prefix-cache-size is a number of gigabytes above 0, not {size:g}")
    found: EngineOptions = {} if folder is None else {"prefix_cache_dir": folder.expanduser()}
    if size is not None:
        found["prefix_cache_dir_bytes"] = int(size * 1e9)
    return found


def _speculation_options(args: argparse.Namespace) -> EngineOptions:
    if args.no_speculation:
        return {"speculation": "off"}
    return {} if args.draft_tokens is None else {"speculation": "on", "max_draft_tokens": args.draft_tokens}


def draft_source(args: argparse.Namespace) -> ModelSource | None:
    """Of --draft-model: its small files are read. Raises UsageError, ModelError."""
    from mlxvlm.checkpoint.load import open_model

    if args.no_speculation and args.draft_model is not None:
        raise UsageError("--draft-model guesses, --no-speculation forbids it: leave one of them out")
    return None if args.draft_model is None else open_model(args.draft_model)


def max_memory_bytes(args: argparse.Namespace) -> int | None:
    """Of --max-memory. Raises UsageError."""
    if args.max_memory is None:
        return None
    if not 0 < args.max_memory < 1e6:
        raise UsageError(f"--max-memory is a number of gigabytes above 0, not {args.max_memory:g}")
    return int(args.max_memory * 1e9)
