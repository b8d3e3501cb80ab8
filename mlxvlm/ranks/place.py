"""Which of several ranks this process is, read off what `mlx.launch` or mpirun put into the environment. No MLX.

Sources: mlx/_distributed_utils/launch.py and mlx/distributed/*/ of MLX 0.32; Open MPI's documentation of OMPI_*.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from mlxvlm.errors import UsageError

RANK, RING_HOSTS = "MLX_RANK", "MLX_HOSTFILE"
_JACCL_DEVICES, _JACCL_LEADER = "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"
_MPI_RANK, _MPI_COUNT = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"
_MAX_FILE_BYTES = 1 << 20
_MAX_RANKS = 256  # no model has more heads to share
_MAX_PORT = 65535
TIMEOUT_S = 15.0  # of silence, then a rank is lost: it is stopped, asleep, or its cable is pulled
STALL_TIMEOUT_S = 120.0  # of a tick: then MLX waits for what does not come, though all ranks are alive
START_TIMEOUT_S = 60.0  # for all to come: another disk, another Python

Address = tuple[str, int]  # host, port


@dataclass(frozen=True, slots=True)
class Place:
    """One of `count` ranks, counted from 0, which leads."""

    index: int
    count: int
    backend: Literal["ring", "jaccl", "mpi"]  # of mx.distributed
    addresses: tuple[Address | None, ...] = ()  # by rank, as far as they are known

    @property
    def leader(self) -> Address | None:
        """Where rank 0 will listen for MLX's own connections, and does before for ours; None for MPI."""
        return self.addresses[0] if self.addresses else None

    def name(self, index: int | None = None) -> str:
        """Of a rank, this one's by default: rank 2 of 4 (10.0.0.3)."""
        index = self.index if index is None else index
        address = self.addresses[index] if index < len(self.addresses) else None
        return f"rank {index} of {self.count}" + ("" if address is None else f" ({address[0]})")


@dataclass(frozen=True, slots=True)
class Member:
    """A process that takes part in a group of ranks, and its limits."""

    place: Place
    timeout_s: float = TIMEOUT_S
    start_timeout_s: float = START_TIMEOUT_S
    stall_timeout_s: float = STALL_TIMEOUT_S
    check: Callable[[], None] = lambda: None  # called while ranks are waited for; raises what ends that
    connected: Callable[[], None] = lambda: None  # called by rank 0 once: no rank needs the file of hosts any more

    @property
    def follows(self) -> bool:
        """Whether another rank leads."""
        return self.place.index > 0


class _Limits(TypedDict, total=False):
    timeout_s: float
    start_timeout_s: float
    stall_timeout_s: float


class RankOptions(_Limits, total=False):
    """Fields of Member, and host: where all reach rank 0, if not at its first address in the file of hosts."""

    host: str | None


def find_member(environ: Mapping[str, str], host: str | None = None, **limits: Unpack[_Limits]) -> Member | None:
    """See find_place and RankOptions."""
    place = find_place(environ)
    if place is None:
        return None
    if place.leader is not None and host is not None:
        place = replace(place, addresses=((host, place.leader[1]), *place.addresses[1:]))
    return Member(place, **limits)


def find_place(environ: Mapping[str, str]) -> Place | None:
    """None for a process on its own. Raises UsageError for variables and files that can't be."""
    if RANK not in environ:
        count = _number(environ, _MPI_COUNT) if _MPI_RANK in environ else 1
        return None if count == 1 else _checked(Place(_number(environ, _MPI_RANK), count, "mpi"))
    index = _number(environ, RANK)
    if _JACCL_DEVICES in environ and _JACCL_LEADER in environ:
        devices = _list(environ, _JACCL_DEVICES)
        leader = _address(environ[_JACCL_LEADER], _JACCL_LEADER)
        return _checked(Place(index, len(devices), "jaccl", (leader, *[None] * (len(devices) - 1))))
    if RING_HOSTS not in environ:
        raise UsageError(
            f"{RANK} is set, but not {RING_HOSTS}, nor {_JACCL_DEVICES} with {_JACCL_LEADER}: start all ranks with "
            "mlx.launch --backend ring or jaccl"
        )
    hosts = _list(environ, RING_HOSTS)
    if len(hosts) <= 1 and index == 0:
        return None  # mlx.launch with one host
    return _checked(Place(index, len(hosts), "ring", tuple(_first(host, environ[RING_HOSTS]) for host in hosts)))


def _checked(place: Place) -> Place:
    if not 0 <= place.index < place.count <= _MAX_RANKS:
        raise UsageError(f"rank {place.index} of {place.count} can't be: there are 2 to {_MAX_RANKS}, counted from 0")
    known = [address for address in place.addresses if address is not None]
    if len(set(known)) < len(known):
        raise UsageError("two ranks have the same address and port: give each its own in the file of hosts")
    return place


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{name} is a number from 0 on, not {text[:80]!r}")
    return int(text)


def _list(environ: Mapping[str, str], name: str) -> list[Any]:
    """Of a JSON file, [] of an empty one."""
    path = Path(environ[name])
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES)
        found = json.loads(text) if text.strip() else []
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{name}: {path} can't be read: {error}") from error
    if not isinstance(found, list):
        raise UsageError(f"{name}: {path} holds no JSON list with an entry for each rank")
    return found


def _first(host: Any, path: str) -> Address:
    """The first of a rank's addresses in a ring's file."""
    if not (isinstance(host, list) and host and all(isinstance(each, str) for each in host)):
        raise UsageError(
            f'{RING_HOSTS}: {path} is a list with one list of "ip:port" for each rank, not with {str(host)[:80]!r} '
            "(a file for mlx.launch --hostfile has another form: let mlx.launch make this one)"
        )
    return _address(host[0], path)


def _address(text: str, place: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port[:6]) <= _MAX_PORT):
        raise UsageError(f'{place}: {text[:80]!r} is no "ip:port"')
    return host.strip("[]"), int(port)
