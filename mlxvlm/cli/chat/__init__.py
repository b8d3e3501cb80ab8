"""`mlxvlm chat`: a conversation, with or without pictures. Knows flags; who reads the lines is decided here."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.engine_options import add_engine_options, engine_options, start_engine
from mlxvlm.cli.options import add_image_options, add_model_options, add_quantisation_options, open_source
from mlxvlm.cli.progress import byte_bar
from mlxvlm.cli.ranks_options import add_ranks_options, follow, membership
from mlxvlm.cli.sampling_options import add_sampling_options, sampling_params
from mlxvlm.cli.tool_options import add_tool_options, chat_tools, mcp_tools

if TYPE_CHECKING:
    from mlxvlm.checkpoint.load import ModelSource
    from mlxvlm.cli.chat.session import Session
    from mlxvlm.ranks.place import Member

_MAX_TOKENS = 2048
_EPILOG = """\
examples:
  mlxvlm chat -m demo
  mlxvlm chat -m Qwen/Qwen2-VL-2B-Instruct --isq Q4K
  > \\image https://example.org/mountain.jpg What mountain is this?
  printf '\\\\image photo.jpg Describe it.\\nIn one word?\\n' | mlxvlm chat -m demo

In the chat, \\help lists the commands. With input from a pipe each line is a message, and only answers go to stdout.
"""


def add_parser(commands: Any) -> None:
    """Adds `chat` to the commands."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model about pictures",
        description="Talk with a model, with or without pictures.",
        usage="%(prog)s [options] -m MODEL",  # all of them would fill a screen before each error
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-i",
        "--image",
        action="append",
        default=[],
        metavar="IMAGE",
        help="a picture for the first message; repeatable",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    parser.add_argument("-q", "--quiet", action="store_true", help="no figures after an answer")
    parser.add_argument("--no-history", action="store_true", help="keep nothing of what is typed for the next run")
    add_model_options(parser)
    add_quantisation_options(parser)
    add_engine_options(parser)
    add_image_options(parser)
    add_sampling_options(parser, _MAX_TOKENS)
    add_tool_options(parser)
    add_ranks_options(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    with membership(args) as member:
        if member is not None and member.follows:
            follow(args, member)
        return _talk(args, member)


def _talk(args: argparse.Namespace, member: Member | None) -> int:
    from mlxvlm.cli.chat.session import Picture, Session
    from mlxvlm.messages import ImageOptions
    from mlxvlm.runner import sampling_defaults

    pictures = [Picture.open(source) for source in args.image]
    source = open_source(args)
    sampling = sampling_params(args, sampling_defaults(source))
    sampling.check(sys.maxsize)  # before the weights; the vocabulary's size is looked at later
    options = engine_options(args)
    with mcp_tools(args.mcp_config) as mcp:
        tools = chat_tools(args, source, mcp)
        with byte_bar("loading") as progress:
            engine = start_engine(args, source, progress, options, member)
        sizes = ImageOptions(args.min_pixels, args.max_pixels)
        about = _about(source, args)
        session = Session(engine, args.model, about, sampling, sizes, system=args.system, pending=pictures, tools=tools)
        with engine:
            return _chat(session, args)


def _chat(session: Session, args: argparse.Namespace) -> int:
    if _is_terminal():
        from mlxvlm.cli.chat.terminal import Terminal

        return Terminal(session, is_quiet=args.quiet, keeps_history=not args.no_history).run()
    from mlxvlm.cli.chat.pipe import chat

    return chat(session)


def _is_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _about(source: ModelSource, args: argparse.Namespace) -> str:
    kind = str(source.config.get("model_type", "a model"))
    quantised = f", quantised to {args.isq}" if args.isq else ""
    return f"{kind}, context {source.max_context} tokens{quantised}"
