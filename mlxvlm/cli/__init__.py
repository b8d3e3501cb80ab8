"""The terminal door: one file a command. Knows flags and exit codes, not models."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType

from mlxvlm import __version__
from mlxvlm.cli import bench, chat, doctor, models, old_commands, pull, quantize, run, serve
from mlxvlm.cli.printable import printable
from mlxvlm.errors import InternalError, MlxvlmError, UsageError

_INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended

_DESCRIPTION = """\
Vision-language models on Apple Silicon.

  mlxvlm run -m demo --image picture.png "What is in this picture?"
  mlxvlm run -m HuggingFaceTB/SmolVLM-256M-Instruct --image photo.jpg "Describe it."
  mlxvlm run -m Qwen/Qwen2-VL-7B-Instruct --isq 4 --image photo.jpg "Describe it."
  mlxvlm chat -m Qwen/Qwen2-VL-2B-Instruct --isq Q4K
  mlxvlm serve -m Qwen/Qwen2-VL-7B-Instruct --isq 4 --port 1234
  mlxvlm quantize -m Qwen/Qwen2-VL-7B-Instruct --isq 4 -o Qwen2-VL-7B-4bit
  mlxvlm doctor -m HuggingFaceTB/SmolVLM-Instruct
"""
_COMMANDS: Mapping[str, ModuleType] = {
    each.__name__.rpartition(".")[2]: each for each in (run, chat, serve, quantize, doctor, bench, models, pull)
}
_FLAGS = ("-h", "--help", "--version", "--debug")
_EPILOG = "exit codes: 0 done, 1 a rank was lost, 2 usage, 3 input, 4 model, 5 internal error, 130 interrupted"


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    root = argparse.ArgumentParser(
        prog="mlxvlm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"mlxvlm {__version__}")
    root.set_defaults(argv=())  # what main() was given
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS.values():
        command.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _mend_streams()
    argv = sys.argv[1:] if argv is None else argv
    root = parser()
    if not argv:
        root.print_help(sys.stderr)
        return UsageError.exit_code
    if (hint := old_commands.hint(argv) or _misplaced(argv[0])) is not None:
        print(f"mlxvlm: error: {hint}", file=sys.stderr)
        return UsageError.exit_code
    args, strays = root.parse_known_args(argv)
    if strays:
        root.error(_stray(args, argv, strays))
    args.argv = argv
    try:
        code: int = args.execute(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head -1`): nothing to tell.
        _drop_output()
        return _BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the top of the command: a user gets one line, `--debug` the traceback
        if args.debug:
            traceback.print_exception(error)
        is_ours = isinstance(error, MlxvlmError)
        # One line, whatever a library put into the message.
        text = " ".join(str(error if is_ours else f"{type(error).__name__}: {error}").split())
        print(f"mlxvlm: error: {text}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_output()  # a full disk, say
        return error.exit_code if isinstance(error, MlxvlmError) else InternalError.exit_code


def _misplaced(word: str) -> str | None:
    """What is wrong with the first word, None if it may stand there."""
    if word in _COMMANDS or word in _FLAGS:
        return None
    if word.startswith("-"):
        return f"a command comes first: {', '.join(_COMMANDS)} (mlxvlm --help)"
    near = get_close_matches(word.lower(), _COMMANDS, n=1)
    guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(_COMMANDS)}"
    return f"there is no command {printable(word[:40])}: {guess}"


def _stray(args: argparse.Namespace, argv: Sequence[str], words: Sequence[str]) -> str:
    """What to say of words that no command takes."""
    if "prompt" in args and not any(word.startswith("-") for word in words):
        return "the prompt is more than one word: put it in quotes"
    command = next(word for word in argv if word in _COMMANDS)
    return f"unrecognized arguments: {' '.join(words)} (mlxvlm {command} --help lists the flags)"


def _mend_streams() -> None:
    """A stream that a parent closed is as good as an empty one; what a terminal can't show becomes a question mark."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """What Python has not written yet goes nowhere, so that its last flush has nothing to complain about."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
