"""`mlxvlm run`: one question, one answer. Knows terminals and pipes, not models."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.engine_options import add_engine_options, engine_options, start_engine
from mlxvlm.cli.interrupts import on_interrupt
from mlxvlm.cli.options import (
    add_image_options,
    add_model_options,
    add_quantisation_options,
    figures,
    open_source,
)
from mlxvlm.cli.printable import printable
from mlxvlm.cli.progress import byte_bar
from mlxvlm.cli.ranks_options import add_ranks_options, follow, membership
from mlxvlm.cli.sampling_options import add_sampling_options, sampling_params
from mlxvlm.cli.tool_options import add_tool_options, call_text, chat_tools, mcp_tools, tool_answer
from mlxvlm.errors import InputError, UsageError

if TYPE_CHECKING:
    from mlxvlm.agent.rounds import ToolAnswer
    from mlxvlm.cli.chat_tools import ChatTools
    from mlxvlm.engine.engine import Engine
    from mlxvlm.engine.request import Completion, Delta, Request
    from mlxvlm.engine.stream import Stream
    from mlxvlm.messages import Message, ToolCall
    from mlxvlm.ranks.place import Member

_MAX_TOKENS = 2048
_INTERRUPTED = 130
_EPILOG = """\
examples:
  mlxvlm run -m demo --image picture.png "How many shapes are there?"
  mlxvlm run -m ./SmolVLM-Instruct --image https://example.org/a.jpg --image b.png "Compare the two."
  cat notes.txt | mlxvlm run -m ./SmolVLM-Instruct -
  mlxvlm run -m demo --json "hello" | jq .text
  mlxvlm run -m demo --image picture.png --regex "(red|blue) (star|heart)" "What is it?"
  mlxvlm run -m demo --json-schema '{"type": "array", "items": {"type": "string"}}' "Name two colours."
  mlxvlm run -m demo --temperature 0.7 --min-p 0.05 --seed 1 --timeout 20 "Tell me a story."

The answer goes to stdout, a line of figures to stderr.
"""


def add_parser(commands: Any) -> None:
    """Adds `run` to the commands."""
    parser = commands.add_parser(
        "run",
        help="answer one question, with or without pictures",
        description="Answer one question, with or without pictures, and stream the answer to stdout.",
        usage="%(prog)s [options] -m MODEL [prompt]",  # all of them would fill a screen before each error
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", help="the question; `-` reads it from a pipe")
    parser.add_argument(
        "-i",
        "--image",
        action="append",
        default=[],
        metavar="IMAGE",
        help="a path, URL, data: URL or base64 text; repeatable, in order, before the question",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end the answer with what there is by then")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a stream")
    parser.add_argument("-q", "--quiet", action="store_true", help="no figures on stderr")
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
        return _run(args, member)


def _run(args: argparse.Namespace, member: Member | None) -> int:
    from mlxvlm.engine.request import Request
    from mlxvlm.messages import ImageOptions
    from mlxvlm.runner import sampling_defaults

    messages = _messages(args)
    source = open_source(args)
    # Before the weights: a mistyped path or number should not cost a minute of loading.
    sampling = sampling_params(args, sampling_defaults(source))
    sampling.check(sys.maxsize)  # the vocabulary's size is looked at later
    timeout_s, options = _timeout_s(args), engine_options(args)
    options["prefix_cache_eager"] = True  # one question a process: what it leaves must be there for the next
    begun = time.perf_counter()
    sizes = ImageOptions(args.min_pixels, args.max_pixels)
    prompt = source.processor(messages, options=sizes)
    prepare_s = time.perf_counter() - begun
    with ExitStack() as stack:
        tools = chat_tools(args, source, stack.enter_context(mcp_tools(args.mcp_config)))
        progress = stack.enter_context(byte_bar("loading"))
        engine = stack.enter_context(start_engine(args, source, progress, options, member))
        request = Request(messages, sampling, image_options=sizes, prompt=prompt, timeout_s=timeout_s)
        answer = _print_json if args.json else _print_stream
        return answer(args, engine, _submitted(args, engine, request, tools), prepare_s)


def _submitted(args: argparse.Namespace, engine: Engine, request: Request, tools: ChatTools) -> Stream | ToolAnswer:
    def show(calls: Sequence[ToolCall]) -> None:
        if not args.quiet:
            print("\n".join(f"[{call_text(call)}]" for call in calls), file=sys.stderr)

    rounds = tools.rounds(engine, request, show)
    return engine.submit(request) if rounds is None else tool_answer(engine, rounds)


def _timeout_s(args: argparse.Namespace) -> float | None:
    seconds: float | None = args.timeout
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError(f"--timeout is a number of seconds above 0, not {seconds:g}")
    return seconds


def _messages(args: argparse.Namespace) -> list[Message]:
    from mlxvlm.messages import system, user

    text = args.prompt
    if text is None:
        raise UsageError(
            "no prompt: give a question in quotes, or `-` to read it from a pipe; `mlxvlm chat` is for a conversation"
        )
    if text == "-":
        text = _read_stdin()
    if not text.strip():
        raise InputError("the prompt is empty")
    return [*([system(args.system)] if args.system else []), user(text, args.image)]


def _read_stdin() -> str:
    if sys.stdin is None:
        raise InputError("there is no stdin to read the prompt from")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not text: {error}") from error


def _print_stream(args: argparse.Namespace, engine: Engine, stream: Stream | ToolAnswer, prepare_s: float) -> int:
    is_terminal = sys.stdout.isatty()

    def show(text: str) -> None:
        sys.stdout.write(printable(text) if is_terminal else text)
        sys.stdout.flush()

    completion, code = _consume(stream, show)
    if not completion.text.endswith("\n"):
        show("\n")
    usage = completion.usage
    if not args.quiet:
        if completion.finish_reason == "length":
            print(f"(cut at {usage.completion_tokens} tokens: see --max-tokens)", file=sys.stderr)
        if completion.finish_reason == "timeout":
            print(f"(cut after {args.timeout:g} s: see --timeout)", file=sys.stderr)
        print(figures(usage, engine.memory().peak_bytes, prepare_s + usage.time_to_first_token_s), file=sys.stderr)
    return code


def _print_json(args: argparse.Namespace, engine: Engine, stream: Stream | ToolAnswer, prepare_s: float) -> int:
    completion, code = _consume(stream, lambda text: None)
    figures = _as_json(args.model, completion, engine.memory().peak_bytes, prepare_s)
    print(json.dumps(figures, ensure_ascii=False))
    return code


def _consume(stream: Stream | ToolAnswer, show: Callable[[str], None]) -> tuple[Completion, int]:
    """The whole answer, shown as it comes, without the space that some templates leave to the model to write first.

    The first Ctrl-C ends it with what there is, a second one leaves.
    """
    from mlxvlm.engine.stream import collect

    deltas: list[Delta] = []
    begun = False
    with on_interrupt(stream.cancel) as interrupted:
        for delta in stream:
            deltas.append(delta)
            if text := delta.text if begun else delta.text.lstrip(" "):
                begun = True
                show(text)
    return collect(deltas), _INTERRUPTED if interrupted else 0


def _as_json(model: str, completion: Completion, peak_bytes: int, prepare_s: float) -> dict[str, Any]:
    usage = completion.usage
    return {
        "model": model,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "image_tokens": usage.image_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_per_s": round(usage.prompt_tokens_per_s, 2),
        "completion_tokens_per_s": round(usage.completion_tokens_per_s, 2),
        "prepare_s": round(prepare_s + usage.prepare_s, 4),
        "prompt_s": round(usage.prompt_s, 4),
        "completion_s": round(usage.completion_s, 4),
        "time_to_first_token_s": round(prepare_s + usage.time_to_first_token_s, 4),
        "total_s": round(prepare_s + usage.total_s, 4),
        "peak_memory_bytes": peak_bytes,
    }
