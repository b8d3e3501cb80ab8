"""Flags that several commands share. Knows names and help texts, not what they do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.checkpoint.load import LoadOptions, ModelSource
    from mlxvlm.engine.request import Usage

REQUANTIZE = "8@32"  # of checkpoint.load, whose import would slow down --help


def add_model_options(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """-m, --arch, --mmproj, --from-uqff, --requantize, --revision, --dtype, --chat-template.

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
    group.add_argument(
        "-a",
        "--arch",
        type=_arch,
        metavar="NAME",
        help="mistral.rs's name of the architecture, which must be the checkpoint's own; not needed",
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


def _arch(name: str) -> tuple[str, ...]:
    from mlxvlm.mistralrs.architectures import model_types

    try:
        return model_types(name)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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


def load_options(args: argparse.Namespace) -> LoadOptions:
    """What add_model_options and add_quantisation_options gave."""
    from mlxvlm.checkpoint.load import LoadOptions
    from mlxvlm.runner import cache_folder

    folder = cache_folder(False if args.no_isq_cache else args.isq_cache or True)
    return LoadOptions(args.dtype, args.isq, args.isq_vision, args.topology, folder, args.requantize)


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
        arch=args.arch or (),
    )


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
