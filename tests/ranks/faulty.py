"""The mlxvlm command with one thing that goes wrong: `python -m tests.ranks.faulty FAULT WORDS...`.

Where it happens `AT FAULT` is said on stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from mlxvlm.cli import main
from mlxvlm.ranks import group, meeting, place, roles
from mlxvlm.ranks.follower import FollowerRows
from mlxvlm.ranks.leader import LeaderRows
from mlxvlm.ranks.place import Place, find_place

FOR_EVER_S = 600.0
_connected, _introduced = group._connected, meeting._introduced


def say() -> None:
    print(f"AT {sys.argv[1]}", file=sys.stderr, flush=True)


def hang(*args: Any) -> NoReturn:
    """Whatever is asked."""
    say()
    time.sleep(FOR_EVER_S)
    raise AssertionError("nobody ended this process")


def connect_slowly(place: Place) -> Any:
    """As over a slow network."""
    say()
    time.sleep(1.0)
    return _connected(place)


def greet(*args: Any) -> int:
    """One who came."""
    index = _introduced(*args)
    say()
    return index


def fail(*args: Any) -> NoReturn:
    """As a disk might."""
    say()
    raise OSError("the disk is full")


def load_for_ever(group: Any, build: Any, progress: Any) -> NoReturn:
    """A checkpoint that never ends."""
    say()
    while True:
        time.sleep(0.05)
        progress(1, 2)


def without_addresses(environ: Mapping[str, str]) -> Place | None:
    """As with mpirun, which tells none."""
    found = find_place(environ)
    return None if found is None else replace(found, addresses=())


FAULTS = {
    "no-addresses": (place, "find_place", without_addresses),
    "greeting": (meeting, "_introduced", greet),
    "no-connection": (group, "_connected", hang),
    "slow-connection": (group, "_connected", connect_slowly),
    "load": (roles, "_shard", hang),
    "slow-load": (roles, "_shard", load_for_ever),
    "bad-load": (roles, "_shard", fail),
    "prefill": (FollowerRows, "fill", hang),
    "leaders-prefill": (LeaderRows, "fill", hang),
    "bad-prefill": (FollowerRows, "fill", fail),
    "decode": (FollowerRows, "run", hang),
    "bad-decode": (FollowerRows, "run", fail),
}

if __name__ == "__main__":
    setattr(*FAULTS[sys.argv[1]])
    sys.exit(main(sys.argv[2:]))
