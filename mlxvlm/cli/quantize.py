"""`mlxvlm quantize`: an ordinary checkpoint -> a quantised one. Knows flags, not weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlxvlm.cli.options import size_text
from mlxvlm.cli.progress import byte_bar
from mlxvlm.errors import UsageError

_EPILOG = """\
examples:
  mlxvlm quantize -m Qwen/Qwen2-VL-2B-Instruct -o Qwen2-VL-2B-4bit --isq 4
  mlxvlm quantize -m ./llava-1.5-7b-hf -o llava-8bit --isq Q8_0 --topology layers.yaml
  mlxvlm quantize -m ./llava-1.5-7b-hf -o llava-uqff --isq 4 --uqff

The folder is in MLX-community's layout: mlxvlm and mlx-vlm load it as it is. To quantise while a model is loaded,
without writing a folder, see `mlxvlm run --help`.
"""


def add_parser(commands: Any) -> None:
    """Adds `quantize` to the commands."""
    parser = commands.add_parser(
        "quantize",
        help="write a quantised copy of a checkpoint",
        description="Write a quantised copy of a checkpoint, holding a part of it in memory at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help="a folder, or a repository id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--isq", metavar="TYPE", help="2 3 4 5 6 8, Q4K, Q8_0, AFQ4, mxfp4 ..., or bits@group like 4@32"
    )
    parser.add_argument("--isq-vision", action="store_true", help="the vision tower's layers too")
    parser.add_argument("--topology", type=Path, metavar="FILE", help="a YAML file of types by layer")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of everything that is not quantised (default: auto, as in the checkpoint)",
    )
    parser.add_argument("--uqff", action="store_true", help="write UQFF files, which mistral.rs loads, instead")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    from mlxvlm.checkpoint.build import recipe_of
    from mlxvlm.checkpoint.load import LoadOptions
    from mlxvlm.checkpoint.quantize import quantize_folder, quantize_uqff

    if args.isq is None and args.topology is None:
        raise UsageError("nothing to do: give a type with --isq, like --isq 4, or types by layer with --topology")
    recipe = recipe_of(LoadOptions(isq=args.isq, isq_tower=args.isq_vision, topology=args.topology))
    with byte_bar("quantising") as progress:
        write = quantize_uqff if args.uqff else quantize_folder
        write(args.model, args.output, recipe, args.dtype, progress, args.revision)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {size_text(size)}")
    return 0
