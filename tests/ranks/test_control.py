"""Link and Wire over socket pairs in one process, and what befalls them. `Raw` is a peer that misbehaves."""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlxvlm.errors import RanksError
from mlxvlm.ranks import control
from mlxvlm.ranks.control import Link, Wire
from mlxvlm.ranks.frames import BEAT, Decoder, encode
from mlxvlm.ranks.place import Place

SILENCE_S = 0.8
LONG_S = 60.0


class Raw:
    """The other end of a Link's connection: bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._decoder = Decoder()
        self._messages: list[Any] = []

    def send(self, message: Any) -> None:
        self.connection.sendall(encode(message))

    def next(self) -> Any:
        while not self._messages:
            data = self.connection.recv(1 << 16)
            assert data, "the connection was closed"
            self._messages += self._decoder.feed(data)
        return self._messages.pop(0)


class Ends:
    """In the place of end_process."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.came = threading.Event()

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        self.came.set()

    def text(self) -> str:
        assert self.came.wait(30)
        assert len(self.texts) == 1
        return self.texts[0]


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "GRACE_S", 0.0)


@contextmanager
def leading(count: int, timeout_s: float = LONG_S) -> Iterator[tuple[Link, list[Raw], Ends]]:
    pairs = [socket.socketpair() for _ in range(count - 1)]
    ends = Ends()
    link = Link(Place(0, count, "ring"), [ours for ours, _ in pairs], timeout_s, ends)
    peers = [Raw(theirs) for _, theirs in pairs]
    try:
        yield link, peers, ends
    finally:
        for peer in peers:
            peer.connection.close()
        link.close()


@contextmanager
def following(timeout_s: float = LONG_S) -> Iterator[tuple[Wire, Raw, Ends]]:
    ours, theirs = socket.socketpair()
    ends = Ends()
    wire, peer = Wire(Place(1, 2, "ring"), ours, timeout_s, ends), Raw(theirs)
    try:
        yield wire, peer, ends
    finally:
        peer.connection.close()
        wire.close()


def finish(wire: Wire) -> None:
    """As a follower does."""
    assert list(wire) == []
    wire.close()


@contextmanager
def pair(count: int) -> Iterator[tuple[Link, list[Wire], Ends]]:
    pairs = [socket.socketpair() for _ in range(count - 1)]
    ends = Ends()
    link = Link(Place(0, count, "ring"), [ours for ours, _ in pairs], LONG_S, ends)
    wires = [Wire(Place(index, count, "ring"), theirs, LONG_S, ends) for index, (_, theirs) in enumerate(pairs, 1)]
    try:
        yield link, wires, ends
    finally:
        closing = [threading.Thread(target=wire.close) for wire in wires]
        for thread in closing:
            thread.start()
        link.close()
        for thread in closing:
            thread.join()


def test_all_hear_all_in_order_and_end_well() -> None:
    heard: list[list[Any]] = [[], []]
    with pair(3) as (link, wires, ends):

        def follow(index: int) -> None:
            wires[index].ready({"bytes": index})
            heard[index] += list(wires[index])
            wires[index].close()

        threads = [threading.Thread(target=follow, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        assert link.reports() == [{"bytes": 0}, {"bytes": 1}]
        told = [["fill", number, list(range(number % 50))] for number in range(500)]
        for message in told:
            link.tell(message)
        link.close()
        for thread in threads:
            thread.join()
    assert heard == [told, told]
    assert ends.texts == []


def test_from_many_threads_all_hear_the_same_order() -> None:
    with leading(3) as (link, peers, _):
        threads = [
            threading.Thread(target=lambda sender=sender: [link.tell([sender, each]) for each in range(100)])
            for sender in range(4)
        ]
        for thread in threads:
            thread.start()
        first, second = ([peer.next() for _ in range(400)] for peer in peers)
        for thread in threads:
            thread.join()
    assert first == second
    for sender in range(4):
        assert [each for who, each in first if who == sender] == list(range(100))


def test_a_finalizer_in_the_midst_of_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block:
        """Its end is told, as that of a block of keys and values."""

    with leading(3) as (link, peers, _):
        blocks = [Block()]
        weakref.finalize(blocks[0], link.tell, ["free"])
        send = link._channels[0].send

        def collecting(data: bytes) -> None:
            blocks.clear()
            gc.collect()
            send(data)

        monkeypatch.setattr(link._channels[0], "send", collecting)
        link.tell(["begin"])
        assert [[peer.next() for _ in range(2)] for peer in peers] == [[["begin"], ["free"]]] * 2


def test_what_is_no_json_is_not_told() -> None:
    with leading(2) as (link, peers, _):
        with pytest.raises(TypeError):
            link.tell([object()])
        with pytest.raises(ValueError, match="not JSON compliant"):
            link.tell([float("nan")])
        link.tell(["after"])
        assert peers[0].next() == ["after"]


@pytest.mark.parametrize("half", [b"", encode(["half"])[:7], struct.pack("!I", 100)])
def test_a_rank_whose_connection_ends(half: bytes) -> None:
    told: list[str] = []
    with leading(3) as (link, peers, ends):
        link.on_loss = told.append
        peers[1].connection.sendall(half)
        peers[1].connection.close()
        assert ends.text() == "rank 2 of 3 was lost: the connection was closed"
        assert told == ends.texts
        assert peers[0].next() == {"lost": ends.text()}
        with pytest.raises(RanksError, match="rank 2 of 3 was lost"):
            link.reports()
        link.tell(["to nobody"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("!I", 1 << 30), "it sent a message of 1073741824 bytes"),
        (struct.pack("!I", 4) + b"nono", "it sent no JSON"),
        (b"GET / HTTP/1.1\r\n\r\n", "it sent a message of 1195725856 bytes"),
        (encode("nonsense"), "failed: nonsense"),
        (encode({"ready": 1}), "failed: None"),
        (encode({"failed": "x" * 9000}), f"failed: {'x' * 1000}"),
        (encode({"failed": ["disk"]}), "failed: ['disk']"),
    ],
)
def test_a_rank_that_sends_what_it_should_not(data: bytes, words: str) -> None:
    with leading(2) as (_, peers, ends):
        peers[0].connection.sendall(data)
        assert ends.text().startswith("rank 1 of 2 ")
        assert words in ends.text()


def test_a_silent_rank_is_lost_and_one_that_beats_is_not() -> None:
    with leading(3, SILENCE_S) as (_, peers, ends):
        while not ends.came.wait(SILENCE_S / 5):
            peers[0].connection.sendall(BEAT)
        assert ends.text() == f"rank 2 of 3 was lost: nothing was heard of it for {SILENCE_S:g} s"


def test_both_ends_beat_while_nothing_is_said() -> None:
    ours, theirs = socket.socketpair()
    ends = Ends()
    link = Link(Place(0, 2, "ring"), [ours], SILENCE_S, ends)
    wire = Wire(Place(1, 2, "ring"), theirs, SILENCE_S, ends)
    assert not ends.came.wait(2 * SILENCE_S)
    closing = threading.Thread(target=finish, args=(wire,))
    closing.start()
    link.close()
    closing.join()
    assert not ends.came.is_set()


def test_telling_does_not_wait_for_a_slow_reader() -> None:
    big = ["x" * 100_000]
    with leading(3) as (link, peers, ends):
        for _ in range(100):  # far more than a socket's buffer
            link.tell(big)
        assert [peers[1].next() for _ in range(100)] == [big] * 100
        assert [peers[0].next() for _ in range(100)] == [big] * 100
        assert not ends.came.is_set()


def test_a_rank_that_never_reads_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxvlm.ranks.channel._MAX_UNSENT_BYTES", 1 << 20)
    with leading(2) as (link, peers, ends):
        for _ in range(20):
            link.tell(["x" * 100_000])
        peers[0].connection.sendall(BEAT)
        assert ends.text() == "rank 1 of 2 was lost: it does not read what it is told"


def test_the_first_loss_counts() -> None:
    with leading(3) as (_, peers, ends):
        for peer in peers:
            peer.send({"failed": "its disk"})
        assert ends.text() in ("rank 1 of 3 failed: its disk", "rank 2 of 3 failed: its disk")
        time.sleep(0.05)
        assert len(ends.texts) == 1


def test_a_failure_of_rank_0_waits_for_the_loss_behind_it() -> None:
    with leading(3) as (link, peers, ends):
        threading.Timer(0.1, lambda: peers[0].connection.close()).start()
        assert link.fail("RuntimeError: a peer was lost", 30) == "rank 1 of 3 was lost: the connection was closed"
        assert ends.text() == link.lost


def test_a_failure_of_rank_0_of_its_own() -> None:
    told: list[str] = []

    def slowly(text: str) -> None:
        time.sleep(0.1)
        told.append(text)

    with leading(2) as (link, peers, ends):
        link.on_loss = slowly
        link.fail("out of memory")
        assert told == ["rank 0 of 2 failed: out of memory"]
        assert peers[0].next() == {"lost": told[0]}
        assert ends.text() == told[0]


def test_a_failure_at_load_is_told() -> None:
    with following() as (_, peer, ends):
        peer.send({"lost": "rank 0 of 2 failed: no such file"})
        assert ends.text() == "rank 0 of 2 failed: no such file"
    with leading(2) as (link, peers, ends):
        threading.Timer(0.1, peers[0].connection.close).start()
        link.close("no such file")
        assert peers[0] is not None
        assert not ends.came.is_set()


def test_the_end_waits_until_all_are_done() -> None:
    with leading(3) as (link, peers, _):
        closing = threading.Thread(target=link.close)
        closing.start()
        assert [peer.next() for peer in peers] == [None, None]
        peers[0].send("done")
        closing.join(0.2)
        assert closing.is_alive()
        peers[1].send("done")
        closing.join(30)
        assert not closing.is_alive()


def test_the_end_waits_for_nobody_who_is_lost() -> None:
    with leading(2) as (link, peers, ends):
        peers[0].connection.close()
        link.close()
        assert ends.texts in ([], ["rank 1 of 2 was lost: the connection was closed"])


def test_last_words_are_sent_before_the_end() -> None:
    with following() as (wire, peer, _):
        big = {"text": "x" * 4_000_000}  # more than a socket's buffer
        wire.ready(big)
        failing = threading.Thread(target=wire.failed, args=("no such file",))
        failing.start()
        failing.join(0.2)
        assert failing.is_alive()
        assert peer.next() == {"ready": big}
        failing.join(30)
        assert peer.next() == {"failed": "no such file"}


def test_waiting_for_reports_can_be_ended() -> None:
    def check() -> None:
        raise InterruptedError

    with leading(2) as (link, _, _), pytest.raises(InterruptedError):
        link.reports(check)


def test_rank_0_is_lost_to_the_others() -> None:
    with following() as (_, peer, ends):
        peer.connection.close()
        assert ends.text() == "rank 0 of 2 was lost: the connection was closed"
    with following(SILENCE_S) as (_, peer, ends):
        assert ends.text() == f"rank 0 of 2 was lost: nothing was heard of it for {SILENCE_S:g} s"
    with following() as (_, peer, ends):
        peer.connection.sendall(b"\xff" * 8)
        assert "it sent a message of" in ends.text()


def test_rank_0_that_ends_before_the_others_are_done_is_lost() -> None:
    with following() as (wire, peer, ends):
        peer.send(None)
        assert list(wire) == []
        peer.connection.close()
        assert ends.text() == "rank 0 of 2 was lost: the connection was closed"


def test_a_follower_that_failed_says_so_and_hears_no_more() -> None:
    with following() as (wire, peer, ends):
        wire.failed("no such file")
        assert peer.next() == {"failed": "no such file"}
        peer.connection.close()
        time.sleep(0.05)
        assert not ends.came.is_set()


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with pair(3):
        assert threading.active_count() > before
    assert threading.active_count() <= before
