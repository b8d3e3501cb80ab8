"""All ranks meet before MLX connects them: who is there, of which version, and asked for what. No MLX.

The others report to rank 0 on the address where its part of MLX will listen a moment later, so that no port of ours
needs configuring; these connections stay, for the control plane. MLX itself would wait for ever for a rank that does
not come, with Python's lock held, and give up after 15 s on one that comes late.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from mlxvlm.errors import EngineClosedError, RanksError
from mlxvlm.ranks.frames import BadFrameError, Decoder, encode
from mlxvlm.ranks.place import Address, Place

_LOOK_S = 0.1  # between looks at who has come, and whether to go on
_MAX_HELLO_BYTES = 4096
_HELLO_S = 2.0  # for a hello, once connected
_READ_BYTES = 4096
_GREETING = "mlxvlm"
_GO = {"go": True}
_OVER = {"over": True}  # rank 0 was interrupted, which is no failure


Terms = Mapping[str, str]  # what must be alike on all ranks, in words for a message
Check = Callable[[], None]  # raises what ends the wait


def listen(address: Address, place: Place) -> socket.socket:
    """Where the others report. Raises RanksError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=place.count)
    except OSError as error:
        remedy = {
            errno.EADDRINUSE: "does another group run here?",
            errno.EADDRNOTAVAIL: "that is not this machine's address: see the order of hosts",
        }.get(error.errno or 0, "see the file of hosts")
        why = f"{error.strerror or error}: {remedy}"
        raise RanksError(f"{place.name()} can't listen on {address[0]} port {address[1]}: {why}") from error


def gather(listener: socket.socket, place: Place, terms: Terms, deadline_s: float, check: Check) -> list[socket.socket]:
    """Rank 0's connections to ranks 1, 2 ... when all have come with the same terms. Raises RanksError, told to all.

    The listener is closed: MLX will listen there.
    """
    come: dict[int, socket.socket] = {}
    until = time.monotonic() + deadline_s
    try:
        with listener:
            while len(come) < place.count - 1:
                check()
                if time.monotonic() > until:
                    raise RanksError(_missing(place, come, deadline_s))
                _let_in(listener, place, terms, come)
        for connection in come.values():
            connection.sendall(encode(_GO))
    except OSError as error:
        _turn_away(come, text := f"{place.name()}: the ranks could not meet: {error.strerror or error}")
        raise RanksError(text) from error
    except EngineClosedError:
        _say(come.values(), _OVER)
        raise
    except BaseException as error:
        _turn_away(come, str(error) or f"{place.name()} was interrupted")
        raise
    return [come[index] for index in sorted(come)]


def report(leader: Address, place: Place, terms: Terms, deadline_s: float, check: Check) -> socket.socket:
    """The connection to rank 0, when it says that all have come.

    Raises RanksError, EngineClosedError where rank 0 was interrupted.
    """
    until = time.monotonic() + deadline_s
    connection, why = None, ""
    while connection is None:
        check()
        connection, why = _connected(leader)
        if connection is None:
            if time.monotonic() > until:
                raise RanksError(
                    f"{place.name(0)} did not come within {deadline_s:g} s: {leader[0]} port {leader[1]}: {why}"
                )
            time.sleep(_LOOK_S)
    try:
        connection.sendall(encode({"hello": _GREETING, "rank": place.index, "terms": dict(terms)}))
        # Rank 0, whose time may have begun later, knows better who is missing.
        answer = first_message(connection, time.monotonic() + deadline_s + _HELLO_S, check)
        if answer == _OVER:
            raise EngineClosedError(f"{place.name(0)} was interrupted before all had come")
        if answer != _GO:
            text = answer.get("refused") if isinstance(answer, dict) else None
            raise RanksError(str(text or f"what answers as {place.name(0)} is no mlxvlm"))
    except OSError as error:
        connection.close()
        raise RanksError(f"{place.name(0)} was lost before all had come: {error.strerror or error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _missing(place: Place, come: Mapping[int, Any], deadline_s: float) -> str:
    missing = ", ".join(place.name(index) for index in range(1, place.count) if index not in come)
    where = "" if place.leader is None else f" and can reach {place.leader[0]} port {place.leader[1]}"
    return f"{missing} did not come within {deadline_s:g} s: see whether each runs the same command{where}"


def _drop_gone(come: dict[int, socket.socket]) -> None:
    """Who closed the connection may come again."""
    for index, connection in list(come.items()):
        with suppress(BlockingIOError):
            try:
                if connection.recv(_READ_BYTES, socket.MSG_DONTWAIT):
                    continue
            except ConnectionError:
                pass
            come.pop(index).close()


def _let_in(listener: socket.socket, place: Place, terms: Terms, come: dict[int, socket.socket]) -> None:
    """One of those who wait at the door, if any. Raises RanksError for a rank that can't work with this one."""
    listener.settimeout(_LOOK_S)
    with suppress(TimeoutError):
        connection, _ = listener.accept()
        try:
            come[_introduced(connection, place, terms, come)] = connection
        except RanksError as error:
            _refuse(connection, str(error))
            raise
        except OSError as error:  # a stranger, or a rank that is in trouble and will come again
            _refuse(connection, str(error))


def _introduced(connection: socket.socket, place: Place, terms: Terms, come: dict[int, socket.socket]) -> int:
    """The rank that a connection is from."""
    hello = first_message(connection, time.monotonic() + _HELLO_S, lambda: None)
    if not isinstance(hello, dict) or hello.get("hello") != _GREETING:
        raise ConnectionRefusedError("this is no place for you")
    index = hello.get("rank")
    _drop_gone(come)
    if type(index) is not int or not 0 < index < place.count or index in come:
        raise ConnectionRefusedError(f"{place.name(0)} expects no rank {index}, or has it already")
    _compare(place, index, terms, hello.get("terms"))
    return index


def _compare(place: Place, index: int, terms: Terms, theirs: Any) -> None:
    """Raises RanksError for the first difference."""
    theirs = theirs if isinstance(theirs, dict) else {}
    for name, ours in terms.items():
        if (other := str(theirs.get(name))[:200]) != ours:
            raise RanksError(
                f"{place.name(index)} has {name} {other}, {place.name(0)} {ours}: all ranks need the same command, "
                "versions and files"
            )


def _refuse(connection: socket.socket, text: str) -> None:
    _say([connection], {"refused": text[:1000]})


def _turn_away(come: Mapping[int, socket.socket], text: str) -> None:
    for connection in come.values():
        _refuse(connection, text)


def _say(connections: Iterable[socket.socket], last: Mapping[str, Any]) -> None:
    """And closes them."""
    for connection in connections:
        with connection, suppress(OSError):
            connection.sendall(encode(last))


def _connected(leader: Address) -> tuple[socket.socket | None, str]:
    """A connection, or why there is none."""
    try:
        connection = socket.create_connection(leader, timeout=_HELLO_S)
    except OSError as error:
        return None, error.strerror or str(error)
    if connection.getsockname() == connection.getpeername():  # TCP can connect a free local port with itself
        connection.close()
        return None, "nothing listens there"
    return connection, ""


def first_message(connection: socket.socket, until: float, check: Check) -> Any:
    """The next message, and nothing of what follows it. Raises OSError where none comes in time, or no more."""
    decoder, ready = Decoder(_MAX_HELLO_BYTES), select.poll()
    ready.register(connection, select.POLLIN)
    while time.monotonic() < until:
        check()
        if not ready.poll(_LOOK_S * 1000):
            continue
        data = connection.recv(decoder.missing)
        if not data:
            raise ConnectionResetError("the connection was closed")
        try:
            for message in decoder.feed(data):
                return message
        except BadFrameError as error:
            raise ConnectionAbortedError(f"{error}") from error
    raise TimeoutError("no answer")
