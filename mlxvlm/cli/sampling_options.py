"""Flags for how an answer is chosen, what it must look like and where it ends. Knows names and help texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.engine.params import Grammar, SamplingParams

MAX_SEED = 2**64 - 1
# Flags that are fields of SamplingParams under the same name.
_PLAIN = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "xtc_threshold", "seed"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("dry_multiplier", "dry_base", "dry_allowed_length"),
)


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """--temperature and its kin; what is not given comes from the checkpoint, then from SamplingParams."""
    group = parser.add_argument_group("sampling (defaults come from the checkpoint's generation_config.json)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that sum up to P (1: all)")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens (0: all)")
    group.add_argument("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the best")
    group.add_argument(
        "--typical-p", type=float, metavar="P", help="keep the P of tokens about as surprising as is usual (1: all)"
    )
    group.add_argument(
        "--xtc-probability", type=float, metavar="P", help="how often XTC leaves out all top choices but the last"
    )
    group.add_argument("--xtc-threshold", type=float, metavar="P", help="what XTC calls a top choice (0.1)")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    _add_repetition(parser)
    _add_structure(parser)
    group = parser.add_argument_group("where an answer ends")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="longest answer (default: %(default)s)"
    )


def _add_repetition(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("repetition and bias (all off unless given)")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: avoid tokens seen so far")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="as OpenAI's, for each earlier use")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="as OpenAI's, once for a token used")
    group.add_argument("--dry-multiplier", type=float, metavar="X", help="DRY: avoid going on as before (0.8 is usual)")
    group.add_argument("--dry-base", type=float, metavar="X", help="DRY: how it grows with the repeated length (1.75)")
    group.add_argument("--dry-allowed-length", type=int, metavar="N", help="DRY: longest repetition that is free (2)")
    group.add_argument(
        "--dry-sequence-breaker",
        action="append",
        metavar="TEXT",
        help="DRY: no repetition goes across this text; repeatable (line break, colon, double quote, asterisk)",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID=VALUE",
        help="add -100 (never) to 100 (always) to a token's logit; repeatable",
    )


def _add_structure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("structured output (one of these: what the whole answer must look like)")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument("--json-object", action="store_true", help="any JSON object")
    kinds.add_argument("--json-schema", metavar="FILE|TEXT", help="JSON of this schema: a file, or '{\"type\": ...}'")
    kinds.add_argument("--regex", metavar="TEXT", help="text that this regular expression (Rust's syntax) matches")
    kinds.add_argument("--grammar", metavar="FILE|TEXT", help="text of this Lark grammar: a file, or 'start: ...'")


def sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The checkpoint's defaults with what the user gave. Raises UsageError for what can't be read."""
    from dataclasses import replace

    check_seed(args.seed)
    given = {name: getattr(args, name) for name in _PLAIN if getattr(args, name) is not None}
    if args.dry_sequence_breaker:
        given["dry_sequence_breakers"] = tuple(args.dry_sequence_breaker)
    return replace(
        defaults,
        **given,
        logit_bias=_biases(args.logit_bias),
        stop=tuple(args.stop),
        max_tokens=args.max_tokens,
        grammar=_grammar(args),
    )


def check_seed(seed: int | None) -> None:
    """Raises UsageError: the sampler has 64 bits, and takes what is beyond them for another seed."""
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed}")


def _biases(texts: Sequence[str]) -> Mapping[int, float]:
    biases: dict[int, float] = {}
    for text in texts:
        token, _, value = text.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias takes ID=VALUE like 42=-100, not {text!r}") from None
    return biases


def _grammar(args: argparse.Namespace) -> Grammar | None:
    from mlxvlm.engine.params import Grammar

    if args.json_object:
        return Grammar("json_object")
    if args.json_schema is not None:
        schema = _file_or_text("--json-schema", args.json_schema, lambda text: text.lstrip().startswith("{"))
        try:
            json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--json-schema is no JSON: {error}") from error
        return Grammar("json_schema", schema)
    if args.regex is not None:
        return Grammar("regex", args.regex)
    if args.grammar is not None:
        return Grammar("lark", _file_or_text("--grammar", args.grammar, lambda text: ":" in text))
    return None


def _file_or_text(flag: str, value: str, is_text: Callable[[str], bool]) -> str:
    """A file's text; what is no file and looks like text is taken as it is."""
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag}: {value} is not text: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:  # no such name, a name too long, no such home
        if is_text(value):
            return value
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{flag}: {value[:80]}: {reason}") from error
