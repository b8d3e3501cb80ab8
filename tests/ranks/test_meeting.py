"""How ranks meet: threads on loopback in the place of machines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxvlm.errors import EngineClosedError, RanksError
from mlxvlm.ranks import meeting
from mlxvlm.ranks.frames import Decoder, encode
from mlxvlm.ranks.meeting import Check, first_message, gather, listen, report
from mlxvlm.ranks.place import Place

TERMS = {"mlxvlm": "1", "the model": "abc"}
LONG_S, SHORT_S = 30.0, 0.3


def nothing() -> None:
    pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class Party:
    """Ranks on one port, each in a thread; what becomes of each."""

    def __init__(self, count: int) -> None:
        self.count, self.port = count, free_port()
        self.outcomes: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def place(self, index: int) -> Place:
        return Place(index, self.count, "ring", tuple(("127.0.0.1", self.port + each) for each in range(self.count)))

    def start(
        self, index: int, terms: dict[str, str] = TERMS, deadline_s: float = LONG_S, check: Check = nothing
    ) -> None:
        place = self.place(index)
        assert place.leader is not None
        leader = place.leader

        def lead() -> list[socket.socket]:
            return gather(listen(leader, place), place, terms, deadline_s, check)

        def come() -> list[socket.socket]:
            return [report(leader, place, terms, deadline_s, check)]

        self._threads.append(threading.Thread(target=self._note, args=(index, come if index else lead)))
        self._threads[-1].start()

    def _note(self, index: int, work: Callable[[], list[socket.socket]]) -> None:
        try:
            self.outcomes[index] = work()
        except (RanksError, EngineClosedError) as error:
            self.outcomes[index] = str(error)

    def end(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join()
        return self.outcomes

    def knock(self, data: bytes = b"") -> socket.socket:
        """A stranger."""
        until = time.monotonic() + 30
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
            except ConnectionRefusedError:
                assert time.monotonic() < until
                time.sleep(0.01)
                continue
            connection.sendall(data)
            return connection


@pytest.fixture
def party() -> Iterator[Party]:
    made = Party(3)
    yield made
    for outcome in made.end().values():
        for connection in outcome if isinstance(outcome, list) else ():
            connection.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_meet_in_any_order(party: Party, order: tuple[int, ...]) -> None:
    for index in order:
        party.start(index)
        time.sleep(0.05)
    found = party.end()
    for index in (1, 2):  # rank 0's connections are in the order of ranks
        found[0][index - 1].sendall(encode({"to": index}))
        assert first_message(found[index][0], time.monotonic() + 30, nothing) == {"to": index}
    with socket.create_server(("127.0.0.1", party.port)):
        pass  # MLX can listen there now


def test_the_missing_are_named_to_all_who_came(party: Party) -> None:
    party.start(0, deadline_s=SHORT_S)
    party.start(2)
    text = (
        f"rank 1 of 3 (127.0.0.1) did not come within {SHORT_S:g} s: see whether each runs the same command and can "
        f"reach 127.0.0.1 port {party.port}"
    )
    assert party.end() == {0: text, 2: text}


def test_without_rank_0(party: Party) -> None:
    party.start(1, deadline_s=SHORT_S)
    assert "rank 0 of 3 (127.0.0.1) did not come within 0.3 s" in party.end()[1]


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"mlxvlm": "2", "the model": "abc"}, "rank 1 of 3 (127.0.0.1) has mlxvlm 2, rank 0 of 3 (127.0.0.1) 1"),
        ({"mlxvlm": "1", "the model": "xyz"}, "has the model xyz"),
        ({}, "has mlxvlm None"),
    ],
)
def test_a_difference_is_told_to_all(party: Party, terms: dict[str, str], words: str) -> None:
    party.start(0)
    party.start(2)
    time.sleep(0.2)
    party.start(1, terms)
    found = party.end()
    assert words in found[0]
    assert found[0] == found[1] == found[2]


def test_strangers_are_sent_away(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_HELLO_S", 0.2)
    party.start(0)
    hello = {"hello": "mlxvlm", "terms": TERMS}
    strangers = [
        b"GET / HTTP/1.1\r\n\r\n",
        encode({"hello": "world"}),
        encode({**hello, "rank": 0}),
        encode({**hello, "rank": 3}),
        encode({**hello, "rank": True}),
        encode({**hello, "rank": "1"}),
        encode([hello]),
        encode({**hello, "rank": 1})[:10],
        b"",
    ]
    for data in strangers:
        with party.knock(data) as connection:
            answer = first_message(connection, time.monotonic() + 30, nothing)
            assert list(answer) == ["refused"]
    party.start(1)
    party.start(2)
    assert all(isinstance(outcome, list) for outcome in party.end().values())


def test_a_rank_that_comes_twice_and_one_that_comes_again(party: Party) -> None:
    party.start(0)
    hello = encode({"hello": "mlxvlm", "rank": 1, "terms": TERMS})
    with party.knock(hello), party.knock(hello) as second:
        assert "or has it already" in first_message(second, time.monotonic() + 30, nothing)["refused"]
    party.start(1)
    party.start(2)
    assert all(isinstance(outcome, list) for outcome in party.end().values())


def test_something_else_on_rank_0s_port(party: Party) -> None:
    with socket.create_server(("127.0.0.1", party.port)) as server:
        party.start(1)
        connection, _ = server.accept()
        with connection:
            assert next(Decoder().feed(connection.recv(4096)))["rank"] == 1
            connection.sendall(encode({"220": "ftp"}))
        assert party.end()[1] == "what answers as rank 0 of 3 (127.0.0.1) is no mlxvlm"


def test_a_taken_port(party: Party) -> None:
    with socket.create_server(("127.0.0.1", party.port)):
        party.start(0)
        assert "does another group run here?" in party.end()[0]


def test_another_machines_address() -> None:
    place = Place(0, 2, "ring", (("192.0.2.1", 4000), ("192.0.2.2", 4000)))
    with pytest.raises(RanksError, match="not this machine's address: see the order of hosts"):
        listen(("192.0.2.1", 4000), place)


def test_waiting_can_be_ended(party: Party) -> None:
    def check() -> None:
        raise EngineClosedError("loading was interrupted")

    place = party.place(0)
    assert place.leader is not None
    with pytest.raises(EngineClosedError):
        gather(listen(place.leader, place), place, TERMS, LONG_S, check)
    with pytest.raises(EngineClosedError):
        report(place.leader, party.place(1), TERMS, LONG_S, check)


def test_who_has_come_hears_of_an_interruption(monkeypatch: pytest.MonkeyPatch, party: Party) -> None:
    has_come = threading.Event()

    def introduced(*args: Any) -> int:
        has_come.set()
        return _introduced(*args)

    def check() -> None:
        if has_come.is_set():
            raise EngineClosedError("loading was interrupted")

    _introduced = meeting._introduced
    monkeypatch.setattr(meeting, "_introduced", introduced)
    party.start(0, check=check)
    party.start(1)
    assert party.end() == {
        0: "loading was interrupted",
        1: "rank 0 of 3 (127.0.0.1) was interrupted before all had come",
    }


def test_a_port_that_connects_to_itself_is_nobody(monkeypatch: pytest.MonkeyPatch, party: Party) -> None:
    class Mirror(socket.socket):
        def getpeername(self) -> Any:
            return self.getsockname()

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Mirror())
    party.start(1, deadline_s=SHORT_S)
    assert "nothing listens there" in party.end()[1]


def test_what_follows_a_message_stays_for_the_next() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(encode({"token": "1"}) + encode({"ready": {}}))
        assert first_message(ours, time.monotonic() + 30, nothing) == {"token": "1"}
        assert first_message(ours, time.monotonic() + 30, nothing) == {"ready": {}}
