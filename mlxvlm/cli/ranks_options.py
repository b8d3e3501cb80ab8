"""Flags for several ranks, and which of them this process is. Knows names and help texts, no network."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from mlxvlm.errors import RanksError, UsageError

if TYPE_CHECKING:
    from mlxvlm.ranks.place import Member


def add_ranks_options(parser: argparse.ArgumentParser) -> None:
    """--shards, --rank-timeout and their kin."""
    group = parser.add_argument_group("a model that several Macs share (docs/scale.md)")
    group.add_argument(
        "--shards", type=int, metavar="N", help="run it in N processes on this machine, to try out what Macs would do"
    )
    group.add_argument(
        "--rank-host", metavar="HOST", help="where all reach rank 0 (default: its first address in the file of hosts)"
    )
    group.add_argument(
        "--rank-timeout", type=float, metavar="S", help="a rank that is silent for S seconds is lost (default: 15)"
    )
    group.add_argument(
        "--rank-start-timeout", type=float, metavar="S", help="all must have come within S seconds (default: 60)"
    )
    group.add_argument(
        "--rank-stall-timeout", type=float, metavar="S", help="no step may take longer than S seconds (default: 120)"
    )
    group.add_argument("--shard-of", type=int, help=argparse.SUPPRESS)  # whose --shards this process is of


@contextmanager
def membership(args: argparse.Namespace) -> Iterator[Member | None]:
    """Of a group of ranks: of mlx.launch, or of --shards, whose other processes run until the block ends.

    None for a process on its own. Raises UsageError, RanksError.
    """
    from mlxvlm.ranks.place import STALL_TIMEOUT_S, START_TIMEOUT_S, TIMEOUT_S, RankOptions, find_member

    options: RankOptions = {
        "host": args.rank_host,
        "timeout_s": _seconds(args.rank_timeout, "--rank-timeout", TIMEOUT_S),
        "start_timeout_s": _seconds(args.rank_start_timeout, "--rank-start-timeout", START_TIMEOUT_S),
        "stall_timeout_s": _seconds(args.rank_stall_timeout, "--rank-stall-timeout", STALL_TIMEOUT_S),
    }
    parent: int | None = args.shard_of
    mine = _shards(args) if parent is None else nullcontext((lambda: _check_parent(parent), _nothing))
    with mine as (check, connected):
        member = find_member(os.environ, **options)
        if member is not None and member.follows:
            if parent is None:
                _log_lines()
            # A terminal sends Ctrl-C to all of its processes: rank 0 decides what it means.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield None if member is None else replace(member, check=check, connected=connected)


@contextmanager
def _shards(args: argparse.Namespace) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Member's check and connected."""
    if args.shards is None or args.shards == 1:
        yield _nothing, _nothing
        return
    from mlxvlm.ranks.launch import MAX_SHARDS, shards

    if not 1 <= args.shards <= MAX_SHARDS:
        raise UsageError(f"--shards is a number from 1 to {MAX_SHARDS}, not {args.shards}")
    with shards(args.shards, args.argv) as started:
        yield started


def follow(args: argparse.Namespace, member: Member) -> NoReturn:
    """What a rank after the first does in place of `run` and `chat`. Raises SystemExit at its end, and MlxvlmError."""
    from mlxvlm.cli.engine_options import engine_options, start_engine
    from mlxvlm.cli.options import open_source

    start_engine(args, open_source(args), lambda done, total: None, engine_options(args), member)
    raise AssertionError("rank 0 alone gets an engine")


def _seconds(given: float | None, flag: str, default: float) -> float:
    if given is None:
        return default
    if not 0 < given < 1e6:
        raise UsageError(f"{flag} is a number of seconds above 0, not {given:g}")
    return given


def _nothing() -> None:
    pass


def _check_parent(parent: int) -> None:
    if os.getppid() != parent:
        raise RanksError("the process that started this one is gone")


def _log_lines() -> None:
    """A rank that has no terminal of its own says in lines what it is at."""
    import logging

    logging.basicConfig(format="mlxvlm: %(message)s", stream=sys.stderr)
    logging.getLogger("mlxvlm.ranks").setLevel(logging.INFO)
