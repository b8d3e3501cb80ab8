"""`mlxvlm pull`: a model is fetched before it is needed. Knows flags, not files."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlxvlm.cli.options import size_text


def add_parser(commands: Any) -> None:
    """Adds `pull` to the commands."""
    parser = commands.add_parser(
        "pull",
        help="fetch a model without running it",
        description="Fetch what running a model needs into the hub's cache, and print where it is. An interrupted "
        "download goes on where it was.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face repository id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    parser.add_argument("--from-uqff", metavar="NAME", help="the UQFF files of that type in MODEL, see `run`")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    from mlxvlm.checkpoint.inventory import pull

    folder = pull(args.model, args.revision, args.from_uqff)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{args.model}: {size_text(size)}, ready to run", file=sys.stderr)
    print(folder)
    return 0
