"""The terminal door: one file a command. Knows flags and exit codes, not models."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from mlxvlm import __version__
from mlxvlm.cli import doctor, run
from mlxvlm.errors import MlxvlmError

_INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended

_DESCRIPTION = """\
Vision-language models on Apple Silicon.

  mlxvlm run -m demo --image picture.png "What is in this picture?"
  mlxvlm run -m HuggingFaceTB/SmolVLM-256M-Instruct --image photo.jpg "Describe it."
  mlxvlm doctor -m HuggingFaceTB/SmolVLM-Instruct
"""
_EPILOG = "exit codes: 0 done, 2 usage, 3 input, 4 model, 5 internal error, 130 interrupted"


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    root = argparse.ArgumentParser(
        prog="mlxvlm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"mlxvlm {__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_parser(commands)
    doctor.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = parser().parse_args(argv)
    try:
        code: int = args.execute(args)
        sys.stdout.flush()
        return code
    except MlxvlmError as error:
        if args.debug:
            traceback.print_exception(error)
        # One line, whatever a library put into the message.
        print(f"mlxvlm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head -1`): nothing to tell, and Python's last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
