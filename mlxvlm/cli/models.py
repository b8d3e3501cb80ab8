"""`mlxvlm models`: what is kept on this disk, and removing it. Knows tables and questions, not caches."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.options import size_text
from mlxvlm.cli.printable import printable
from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.checkpoint.inventory import Cached

_EPILOG = """\
examples:
  mlxvlm models
  mlxvlm models --json | jq '.models[].name'
  mlxvlm models --remove HuggingFaceTB/SmolVLM-Instruct --remove isq-0123456789ab

isq-... are models that were quantised while loading; without them the next start with --isq quantises again.
"""


def add_parser(commands: Any) -> None:
    """Adds `models` to the commands."""
    parser = commands.add_parser(
        "models",
        help="list the models that are kept on this disk, or remove some",
        description="List fetched and quantised models with their sizes, or remove some.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--remove", action="append", default=[], metavar="NAME", help="delete it; repeatable")
    what.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-y", "--yes", action="store_true", help="remove without asking")
    parser.add_argument("--isq-cache", type=Path, metavar="DIR", help="where quantised models are kept")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    from mlxvlm.checkpoint.inventory import cached_models
    from mlxvlm.runner import cache_folder

    found = cached_models(cache_folder(args.isq_cache or True))
    if args.remove:
        return _remove(found, args.remove, args.yes)
    if args.json:
        print(json.dumps(_as_json(found), ensure_ascii=False))
    else:
        _print(found)
    return 0


def _print(found: list[Cached]) -> None:
    if found:
        width = max(len(each.name) for each in found)
        for each in found:
            used = datetime.fromtimestamp(each.used_s).strftime("%Y-%m-%d")
            print(f"{each.name:<{width}}  {size_text(each.nbytes):>9}  used {used}  {printable(each.of)}".rstrip())
    count = f"{len(found)} model{'' if len(found) == 1 else 's'}"
    print(f"{count}, {size_text(sum(each.nbytes for each in found))}")


def _as_json(found: list[Cached]) -> dict[str, Any]:
    models = [
        {
            "name": each.name,
            "kind": each.kind,
            "of": each.of or None,
            "bytes": each.nbytes,
            "last_used": int(each.used_s),
            "path": str(each.path),
        }
        for each in found
    ]
    return {"models": models, "total_bytes": sum(each.nbytes for each in found)}


def _remove(found: list[Cached], names: list[str], is_agreed: bool) -> int:
    """All names are known before anything is deleted."""
    from mlxvlm.checkpoint.inventory import remove

    chosen = [each for each in found if each.name in names]
    unknown = sorted(set(names) - {each.name for each in chosen})
    if unknown:
        raise UsageError(f"no model of that name is kept here: {', '.join(unknown)} (`mlxvlm models` lists them)")
    if not is_agreed:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError("nobody is there to confirm: add --yes")
        _print(chosen)
        try:
            is_agreed = input("Remove? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            print()
    if not is_agreed:
        print("Nothing was removed.")
        return 0
    for each in chosen:
        remove(each)
        print(f"Removed {each.name}, {size_text(each.nbytes)}")
    return 0
