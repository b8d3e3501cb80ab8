"""`mlxvlm bench`: how fast a model runs on this machine. Knows what to ask of an engine and how to print it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.engine_options import add_engine_options, engine_options, start_engine
from mlxvlm.cli.options import add_model_options, add_quantisation_options, open_source, size_text
from mlxvlm.cli.progress import byte_bar
from mlxvlm.errors import ContextLengthError, MlxvlmError, UsageError

if TYPE_CHECKING:
    from mlxvlm.checkpoint.load import ModelSource
    from mlxvlm.engine.engine import Engine
    from mlxvlm.engine.request import Request, Usage
    from mlxvlm.engine.stream import Stream

_INTERRUPTED = 130
_TEXT = "The quick brown fox jumps over the lazy dog, while 42 zebras watch from a hill in the rain. "
_RECIPE = ("isq_vision", "topology", "from_uqff", "mmproj")  # told where they are given
_DECODE_PROMPT = 128  # tokens in front of what is decoded


def add_parser(commands: Any) -> None:
    """Adds `bench` to the commands."""
    parser = commands.add_parser(
        "bench",
        help="measure a model's speed on this machine",
        description="Measure loading, time to first token, prefill, decode and pictures. Ctrl-C prints what there is. "
        "Nothing is guessed but with --draft-tokens or --draft-model.",
        usage="%(prog)s [options] -m MODEL",
    )
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512, 2048], metavar="N")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], metavar="ROWS", help="rows decoded at once")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[336, 1024], metavar="PIXELS", help="sides of square pictures"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="decoded by each row (default: 64)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="the median of so many (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_model_options(parser)
    add_quantisation_options(parser)
    add_engine_options(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    from mlxvlm.processors.sources import DEFAULT_LIMITS

    for name in ("prompt_tokens", "batch", "image_size", "tokens", "repeat"):
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            if not 1 <= number <= 1_000_000:
                raise UsageError(f"--{name.replace('_', '-')} takes numbers from 1 to 1000000, not {number}")
    if args.tokens == 1:
        raise UsageError("--tokens takes numbers from 2: the first token ends the prompt, decoding begins after it")
    if max(args.image_size) > (side := math.isqrt(DEFAULT_LIMITS.max_pixels)):
        raise UsageError(f"--image-size takes numbers up to {side}: larger pictures are refused")
    options = engine_options(args)
    options["max_rows"] = max(args.batch)
    if args.draft_tokens is None and args.draft_model is None:
        options["speculation"] = "off"  # a text that repeats itself is guessed better than what people ask for
    found: dict[str, Any] = _machine(args) | {"speculation": options.get("speculation", "on")}
    code, failure = 0, None
    begun = time.perf_counter()
    source = open_source(args)
    with byte_bar("loading") as progress, start_engine(args, source, progress, options) as engine:
        found["load_s"] = time.perf_counter() - begun
        found["weights_bytes"] = engine.memory().active_bytes
        try:
            for name, value in _measure(args, source, engine):
                found[name] = value
                if sys.stderr is not None and sys.stderr.isatty():
                    print(f"{name}: done", file=sys.stderr)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        except MlxvlmError as error:  # what was measured before is told all the same
            code, failure = error.exit_code, error
        found["peak_memory_bytes"] = engine.memory().peak_bytes
    found["is_complete"] = code == 0
    print(json.dumps(found) if args.json else _table(found))
    if failure is not None:
        raise failure
    return code


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    from mlxvlm import __version__
    from mlxvlm.engine import device

    machine = device.report()
    return {
        "model": args.model,
        "dtype": args.dtype,
        "isq": args.isq,
        "kv_bits": args.kv_bits,
        **{name: str(value) for name in _RECIPE if (value := getattr(args, name))},
        "mlxvlm": __version__,
        "mlx": machine.mlx_version,
        "device": machine.name,
        "backend": "GPU" if machine.is_gpu else "CPU",
    }


def _measure(args: argparse.Namespace, source: ModelSource, engine: Engine) -> Iterator[tuple[str, Any]]:
    """Figures as they are found, each prompt another, so that nothing kept answers for the model."""
    prompts = _Prompts(source)
    first = engine.generate(prompts.text(_DECODE_PROMPT, 1)).usage.time_to_first_token_s
    yield "time_to_first_token_cold_s", first
    warm = [engine.generate(prompts.text(_DECODE_PROMPT, 1)).usage for _ in range(args.repeat)]
    yield "time_to_first_token_warm_s", median(usage.time_to_first_token_s for usage in warm)
    for length in args.prompt_tokens:
        if length >= source.max_context:
            continue
        usages = [engine.generate(prompts.text(length, 1)).usage for _ in range(args.repeat)]
        yield f"prefill_{length}_tokens_per_s", median(usage.prompt_tokens_per_s for usage in usages)
    for rows in args.batch:
        if _DECODE_PROMPT + args.tokens + max(_head_starts(engine, rows)) <= source.max_context:
            steps = [_step_s(engine, prompts, rows, args.tokens) for _ in range(args.repeat)]
            fitting = [step for step in steps if step is not None]
            yield f"decode_{rows}_rows_tokens_per_s", rows / median(fitting) if fitting else None
    if hasattr(source.processor, "prepare_image"):
        for side in args.image_size:
            usages = [usage for _ in range(args.repeat) if (usage := _picture(engine, prompts, side))]
            yield f"image_{side}", _picture_figures(usages)


class _Prompts:
    """Requests of a given length, no two alike from their first token on."""

    def __init__(self, source: ModelSource) -> None:
        from mlxvlm.messages import user

        self._ids = source.processor.tokenizer.encode(_TEXT, add_special_tokens=False)
        self._any = source.processor([user("Hello")])  # whose tokens are replaced
        self._digits = list(dict.fromkeys(self._ids))
        self._number = count()

    def text(self, length: int, max_tokens: int) -> Request:
        from dataclasses import replace

        from mlxvlm.engine.params import SamplingParams
        from mlxvlm.engine.request import Request

        # Three digits of a number, the one that changes first in front, then text.
        number, base = next(self._number), len(self._digits)
        digits = [self._digits[number // base**place % base] for place in range(3)]
        ids = (digits + self._ids * (length // len(self._ids) + 1))[:length]
        prompt = replace(self._any, token_ids=tuple(ids))
        return Request(sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True), prompt=prompt)

    def picture(self, side: int) -> Request:
        from random import Random

        from PIL import Image

        from mlxvlm.engine.params import SamplingParams
        from mlxvlm.engine.request import Request
        from mlxvlm.messages import user

        random = Random(next(self._number))
        noise = b"".join(random.randbytes(3 * side) for _ in range(side))
        picture = Image.frombytes("RGB", (side, side), noise)
        return Request([user("What is this?", [picture])], SamplingParams(max_tokens=1, ignore_eos=True))


def _head_starts(engine: Engine, rows: int) -> list[int]:
    """Tokens that each row has at most when the last row's prompt is done: a chunk of a prompt goes with each step."""
    ticks = 1 + math.ceil(_DECODE_PROMPT / engine.config.prefill_chunk_while_decoding)  # one more to begin
    return [ticks * others for others in reversed(range(rows))]


def _step_s(engine: Engine, prompts: _Prompts, rows: int, tokens: int) -> float | None:
    """Seconds of a decode step: the median gap of the stream that begins last, beside which all others go on.

    None where they don't, as memory holds fewer.
    """
    from mlxvlm.engine.stream import collect

    ends: list[float] = []

    def read(stream: Stream, begun: float) -> None:
        ends.append(begun + stream.result().usage.total_s)

    requests = [prompts.text(_DECODE_PROMPT, tokens + more) for more in _head_starts(engine, rows)]
    readers = []
    for request in requests[:-1]:
        readers.append(threading.Thread(target=read, args=(engine.submit(request), time.perf_counter()), daemon=True))
        readers[-1].start()
    begun, deltas, times = time.perf_counter(), [], []
    for delta in engine.submit(requests[-1]):
        deltas.append(delta)
        times.append(time.perf_counter())
    for reader in readers:
        reader.join()
    last = collect(deltas).usage
    if any(end < begun + last.time_to_first_token_s for end in ends):
        return None
    # Several tokens may come at once where the engine guesses.
    gaps = [gap / len(delta.token_ids) for gap, delta in zip(_gaps(times), deltas[1:], strict=True) if delta.token_ids]
    return median(gaps) if gaps else None


def _gaps(times: list[float]) -> list[float]:
    return [late - early for early, late in pairwise(times)]


def _picture(engine: Engine, prompts: _Prompts, side: int) -> Usage | None:
    """None where a picture of that size does not fit into the context."""
    try:
        return engine.generate(prompts.picture(side)).usage
    except ContextLengthError:
        return None


def _picture_figures(usages: list[Usage]) -> dict[str, float] | None:
    if not usages:
        return None
    return {
        "tokens": usages[0].image_tokens,
        "prepare_s": median(usage.prepare_s for usage in usages),
        "vision_s": median(usage.vision_s for usage in usages),
        "vision_and_prefill_s": median(usage.prompt_s for usage in usages),
        "time_to_first_token_s": median(usage.time_to_first_token_s for usage in usages),
    }


def _table(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if name == "is_complete":
            continue
        words = name.removesuffix("_tokens_per_s").removesuffix("_s").removesuffix("_bytes").replace("_", " ")
        lines.append(f"{words:<28} {_cell(name, value)}")
    return "\n".join(lines if found["is_complete"] else [*lines, "(interrupted)"])


def _cell(name: str, value: Any) -> str:
    if value is None:
        reasons = {"image": "does not fit into the context", "decode": "so many don't fit into the memory at once"}
        return reasons.get(name.partition("_")[0], "-")
    if isinstance(value, dict):
        seconds = (f"{key.removesuffix('_s').replace('_', ' ')} {1000 * value[key]:.1f} ms" for key in list(value)[1:])
        return f"{value['tokens']} tokens, {', '.join(seconds)}"
    if name.endswith("_tokens_per_s"):
        return f"{value:.1f} tok/s"
    if name.endswith("_bytes"):
        return size_text(value)
    return f"{value:.3f} s" if name.endswith("_s") else str(value)


def median(values: Iterable[float]) -> float:
    from statistics import median as of  # costs `mlxvlm --help` 8 ms where it is imported at the top

    return of(values)
