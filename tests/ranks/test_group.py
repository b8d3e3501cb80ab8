"""What joins a group beside the meeting: the token, and MLX that finds other ranks than the environment says."""

from __future__ import annotations

import socket
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.errors import RanksError
from mlxvlm.ranks import endings, group
from mlxvlm.ranks.frames import encode
from mlxvlm.ranks.place import Place

HERE = Place(0, 2, "ring", (("127.0.0.1", 4000), ("127.0.0.1", 4001)))


class Alone:
    """In the place of mx.distributed: a sum of one part."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.fixture(autouse=True)
def _one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group: array)
    monkeypatch.setattr(group, "_TOKEN_S", 0.3)


def confirm(said: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if said is not None:
            theirs.sendall(said)
        group._confirm(HERE, Alone(), [ours])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "said", [{"token": ""}, {"token": "00" * 32}, {"token": None}, {"token": "\u2603"}, ["token"], 7]
)
def test_who_does_not_know_the_token_is_a_stranger(said: Any) -> None:
    with pytest.raises(RanksError, match=r"who came as rank 1 of 2 \(127.0.0.1\) is not whom MLX connected"):
        confirm(encode(said))


@pytest.mark.parametrize("said", [None, b"\xff\xff\xff\xff", encode({"token": "x" * 9000})])
def test_who_says_none_is_lost(said: bytes | None) -> None:
    with pytest.raises(RanksError, match="a rank was lost while MLX connected them"):
        confirm(said)


def test_the_token_is_another_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bytes] = []

    def knows(distributed: Any, data: bytes) -> bytes:
        told.append(data)
        theirs.sendall(encode({"token": data.hex()}))
        return data

    monkeypatch.setattr(group, "_told", knows)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(2):
            group._confirm(HERE, Alone(), [ours])  # type: ignore[arg-type]
    assert len(set(told)) == 2
    assert all(len(each) == 32 for each in told)


def test_what_is_told_comes_through() -> None:
    data = bytes(range(256))
    assert group._told(Alone(), data) == data  # type: ignore[arg-type]


def test_mlx_that_sees_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.distributed, "init", lambda strict, backend: Alone())
    with pytest.raises(RanksError, match=r"rank 0 of 2 \(127.0.0.1\) is rank 0 of 1 for MLX's ring"):
        group._connected(HERE)


def test_mlx_without_such_a_backend() -> None:
    with pytest.raises(RanksError, match="MLX's jaccl can't connect the ranks: "):
        group._connected(Place(0, 2, "jaccl", (("127.0.0.1", 4000), None)))


def test_what_is_done_in_time_goes_on() -> None:
    with endings.no_longer_than(30, "too long"):
        pass
