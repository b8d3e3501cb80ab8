"""Flags that several commands share. Knows names and help texts, not what they do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.checkpoint.load import LoadOptions, ModelSource
    from mlxvlm.engine.config import EngineOptions
    from mlxvlm.engine.request import Usage

REQUANTIZE = "8@32"  # of checkpoint.load, whose import would slow down --help


def add_model_options(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """-m, --mmproj, --from-uqff, --requantize, --revision, --dtype, --chat-template.

    many: -m may be given several times or not at all, and None stands for what is not given.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        action="append" if many else "store",
        required=not many,
        metavar="[NAME=]MODEL" if many else "MODEL",
        help="`demo` (ships with the package), a local folder, a GGUF file, or a Hugging Face repository id"
        + ("; repeatable" if many else ""),
    )
    group.add_argument("--mmproj", type=Path, metavar="FILE", help="the GGUF file of a GGUF model's picture half")
    group.add_argument(
        "--from-uqff", metavar="NAME", help="take the weights from UQFF files: a file, a folder, or a type in MODEL"
    )
    group.add_argument(
        "--requantize",
        default=None if many else REQUANTIZE,
        metavar="TYPE",
        help="what GGUF and UQFF tensors become that MLX can't hold as they are "
        f"(default: {REQUANTIZE}; none: 16 bits)",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    group.add_argument(
        "--dtype",
        default=None if many else "auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="number format of the weights (default: auto, the checkpoint's own on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="for weights, caches and all that runs (default: what the device recommends)",
    )
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja file (or JSON with that key) to use instead"
    )


def add_quantisation_options(parser: argparse.ArgumentParser) -> None:
    """--isq and its kin."""
    group = parser.add_argument_group("quantisation while loading (types: docs/quantisation.md)")
    group.add_argument("--isq", metavar="TYPE", help="2 3 4 5 6 8, Q4K, Q8_0, AFQ4, mxfp4 ..., or bits@group like 4@32")
    group.add_argument("--isq-vision", action="store_true", help="the vision tower's layers too")
    group.add_argument("--topology", type=Path, metavar="FILE", help="a YAML file of types by layer")
    group.add_argument(
        "--isq-cache", type=Path, metavar="DIR", help="keep quantised models here (default: the system's cache folder)"
    )
    group.add_argument("--no-isq-cache", action="store_true", help="quantise anew at every start, keep nothing")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--kv-bits, --kv-group-size and --context-shift."""
    group = parser.add_argument_group("keys and values of the context")
    group.add_argument("--kv-bits", type=int, choices=(8, 4), help="hold them in 8 or 4 bits (default: unquantised)")
    group.add_argument(
        "--kv-group-size", type=int, default=64, metavar="N", help="of --kv-bits: 32, 64 or 128 (default: %(default)s)"
    )
    group.add_argument(
        "--context-shift", action="store_true", help="go on when the context is full, without the older half of it"
    )


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What add_engine_options and add_speculation_options gave."""
    options: EngineOptions = {
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "context_shift": args.context_shift,
    }
    if args.no_speculation:
        options["speculation"] = "off"
    elif args.draft_tokens is not None:
        options |= {"speculation": "on", "max_draft_tokens": args.draft_tokens}
    return options


def load_options(args: argparse.Namespace) -> LoadOptions:
    """What add_model_options and add_quantisation_options gave."""
    from mlxvlm.checkpoint.load import LoadOptions
    from mlxvlm.runner import cache_folder

    folder = cache_folder(False if args.no_isq_cache else args.isq_cache or True)
    return LoadOptions(args.dtype, args.isq, args.isq_vision, args.topology, folder, args.requantize)


def max_memory_bytes(args: argparse.Namespace) -> int | None:
    """Of --max-memory. Raises UsageError."""
    if args.max_memory is None:
        return None
    if not 0 < args.max_memory < 1e6:
        raise UsageError(f"--max-memory is a number of gigabytes above 0, not {args.max_memory:g}")
    return int(args.max_memory * 1e9)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """--prefix-cache and --prefix-cache-size."""
    group = parser.add_argument_group("what the next start need not read again")
    group.add_argument(
        "--prefix-cache", type=Path, metavar="DIR", help="keep what was made of prompts and pictures in files here"
    )
    group.add_argument(
        "--prefix-cache-size", type=float, metavar="GB", help="at most, the longest unused goes first (default: 10)"
    )


def cache_options(args: argparse.Namespace) -> EngineOptions:
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


def open_source(args: argparse.Namespace) -> ModelSource:
    """The model of add_model_options; its losses and what it leaves alone are told on stderr while it is built."""
    import logging

    from mlxvlm.checkpoint.load import open_model

    logging.basicConfig(format="mlxvlm: %(message)s")
    return open_model(
        args.model,
        revision=args.revision,
        chat_template=args.chat_template,
        mmproj=args.mmproj,
        from_uqff=args.from_uqff,
    )


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
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


def draft_source(args: argparse.Namespace) -> ModelSource | None:
    """Of --draft-model: its small files are read. Raises UsageError, ModelError."""
    from mlxvlm.checkpoint.load import open_model

    if args.no_speculation and args.draft_model is not None:
        raise UsageError("--draft-model guesses, --no-speculation forbids it: leave one of them out")
    return None if args.draft_model is None else open_model(args.draft_model)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """--min-pixels and --max-pixels."""
    group = parser.add_argument_group("image sizes (models that take pictures of any size: Qwen2-VL)")
    group.add_argument("--min-pixels", type=int, metavar="N", help="enlarge pictures whose width x height is less")
    group.add_argument("--max-pixels", type=int, metavar="N", help="shrink those beyond it: fewer tokens, less detail")


def size_text(size: float) -> str:
    """Bytes as people read them: 512.0 kB, 4.49 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"


def figures(usage: Usage, peak_bytes: int, time_to_first_token_s: float) -> str:
    """One line of counts and speeds."""
    cached = f" ({usage.cached_tokens} kept)" if usage.cached_tokens else ""
    return (
        f"prompt {usage.prompt_tokens} tokens{cached}, {usage.prompt_tokens_per_s:.1f} tok/s | "
        f"completion {usage.completion_tokens} tokens, {usage.completion_tokens_per_s:.1f} tok/s | "
        f"first token {time_to_first_token_s:.2f} s | peak memory {size_text(peak_bytes)}"
    )
