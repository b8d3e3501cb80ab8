"""Joins this process with the other ranks: they meet, then MLX connects them. Runs on the thread that will use MLX."""

from __future__ import annotations

import json
import secrets
import socket
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from mlxvlm.errors import RanksError
from mlxvlm.ranks.endings import no_longer_than
from mlxvlm.ranks.frames import encode
from mlxvlm.ranks.meeting import Check, Terms, first_message, gather, listen, report
from mlxvlm.ranks.place import START_TIMEOUT_S, Place

_TOKEN_BYTES = 32
_TOKEN_S = 10.0  # for a rank to say it
_HEAD_START_S = 0.2  # the last connects while the others listen; where it is early, MLX tries again after 1 s
_ADDRESS_BYTES = 64  # of a host's number and a port, as JSON


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks, connected. `connections`: rank 0's to each other in order; another rank's to rank 0."""

    place: Place
    distributed: mx.distributed.Group
    connections: tuple[socket.socket, ...]

    def add(self, part: mx.array) -> mx.array:
        """The sum of all ranks' parts, on each of them."""
        return mx.distributed.all_sum(part, group=self.distributed)


def join(place: Place, terms: Terms, deadline_s: float = START_TIMEOUT_S, check: Check = lambda: None) -> Group:
    """Returns when all ranks are there and agree on the terms. Raises RanksError, and what `check` raises.

    check: called now and then while ranks are waited for. The process ends, with a line on stderr, where MLX does not
    connect ranks in time: nothing can interrupt it.
    """
    terms = {"the number of ranks": str(place.count), "MLX": version("mlx"), **terms}
    with ExitStack() as undone:
        if place.leader is not None:
            connections = _meet(place, terms, deadline_s, check)
            for connection in connections:
                undone.enter_context(connection)
            with _limited(place, deadline_s):
                distributed = _connected(place)
                _confirm(place, distributed, connections)
        else:  # mpirun has started all, and only MLX knows how to reach them
            with _limited(place, deadline_s):
                distributed = _connected(place)
                place, listener = _opened(place, distributed)
            connections = _meet(place, terms, deadline_s, check, listener)
            for connection in connections:
                undone.enter_context(connection)
            with _limited(place, deadline_s):
                _confirm(place, distributed, connections)
        undone.pop_all()
    return Group(place, distributed, tuple(connections))


def _meet(
    place: Place, terms: Terms, deadline_s: float, check: Check, listener: socket.socket | None = None
) -> list[socket.socket]:
    assert place.leader is not None
    if place.index == 0:
        return gather(listener or listen(place.leader, place), place, terms, deadline_s, check)
    return [report(place.leader, place, terms, deadline_s, check)]


def _limited(place: Place, deadline_s: float) -> AbstractContextManager[None]:
    others = ", ".join(place.name(index) for index in range(place.count) if index != place.index)
    return no_longer_than(
        deadline_s,
        f"{place.name()}: MLX's {place.backend} did not connect it with {others} within {deadline_s:g} s: see whether "
        "all run and each can reach the next",
    )


def _connected(place: Place) -> mx.distributed.Group:
    if place.backend == "ring" and place.index == place.count - 1:
        time.sleep(_HEAD_START_S)
    try:
        distributed = mx.distributed.init(strict=True, backend=place.backend)
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"{place.name()}: MLX's {place.backend} can't connect the ranks: {error}") from error
    if (distributed.rank(), distributed.size()) != (place.index, place.count):
        found = f"rank {distributed.rank()} of {distributed.size()}"
        raise RanksError(f"{place.name()} is {found} for MLX's {place.backend}: see the environment's variables")
    return distributed


def _told(distributed: mx.distributed.Group, data: bytes) -> bytes:
    """What rank 0 says to all, of a length that all know; the others give zeros."""
    try:
        summed = mx.distributed.all_sum(mx.array(list(data)), group=distributed)
        return np.array(summed).astype(np.uint8).tobytes()
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"MLX could not connect the ranks: {error}") from error


def _opened(place: Place, distributed: mx.distributed.Group) -> tuple[Place, socket.socket | None]:
    """Rank 0 listens on a free port of its host, and all are told where."""
    listener, text = None, b""
    if place.index == 0:
        listener = listen((socket.gethostbyname(socket.gethostname()), 0), place)
        text = json.dumps(listener.getsockname()[:2]).encode()
    host, port = json.loads(_told(distributed, text.ljust(_ADDRESS_BYTES, b" " if text else b"\0")))
    return replace(place, addresses=((host, port),)), listener


def _confirm(place: Place, distributed: mx.distributed.Group, connections: list[socket.socket]) -> None:
    """Whoever met rank 0 is whom MLX connected: it knows what MLX told it.

    It takes no time worth interrupting, and an interruption here would look like a loss to the others.
    """
    token = secrets.token_bytes(_TOKEN_BYTES) if place.index == 0 else bytes(_TOKEN_BYTES)
    token = _told(distributed, token)
    try:
        if place.index:
            connections[0].sendall(encode({"token": token.hex()}))
            return
        for index, connection in enumerate(connections, 1):
            answer = first_message(connection, time.monotonic() + _TOKEN_S, lambda: None)
            said = answer.get("token") if isinstance(answer, dict) else None
            if not isinstance(said, str) or not secrets.compare_digest(said.encode(), token.hex().encode()):
                raise RanksError(f"who came as {place.name(index)} is not whom MLX connected: start all ranks again")
    except OSError as error:
        raise RanksError(f"a rank was lost while MLX connected them: {error.strerror or error}") from error
