"""What is kept of responses, against a slow twin that counts everything anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.api.base import parse
from mlxvlm.api.responses.request import ResponsesRequest
from mlxvlm.api.responses.shown import response_of
from mlxvlm.errors import UnknownResponseError
from mlxvlm.server.response_store import Kept, ResponseStore, picture_name

BODY = parse(ResponsesRequest, {"input": "Hello!"})
PICTURES = [bytes([number]) * 1000 for number in range(4)]


def kept(name: str, text: str = "", pictures: list[int] | None = None) -> Kept:
    response = response_of(BODY, "demo").model_copy(update={"id": name, "instructions": text})
    return Kept(response, pictures={picture_name(PICTURES[each]): PICTURES[each] for each in pictures or ()})


def counted(store: ResponseStore) -> int:
    """The slow twin of nbytes."""
    alive = [each for each, _, _ in store._kept.values()]
    pictures = {name: data for each in alive for name, data in each.pictures.items()}
    return sum(each.text_bytes() for each in alive) + sum(map(len, pictures.values()))


STEPS = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.integers(0, 3000),
        st.lists(st.integers(0, 3), max_size=3, unique=True),
        st.sampled_from(["put", "put", "drop", "wait"]),
    ),
    max_size=30,
)


@given(STEPS)
def test_what_is_counted_is_what_is_kept(steps: list[tuple[str, int, list[int], str]]) -> None:
    now = [0.0]
    dropped: list[str] = []
    store = ResponseStore(max_count=4, max_bytes=8000, keep_s=3, on_drop=dropped.append, clock=lambda: now[0])
    alive: dict[str, float] = {}
    for name, size, pictures, action in steps:
        if action == "put":
            store.put(kept(name, "x" * size, pictures))
            alive[name] = now[0] + 3
        elif action == "wait":
            now[0] += 1
        elif name in store:
            try:
                store.drop(name)
            except UnknownResponseError:
                assert alive[name] <= now[0]
        for gone in dropped:
            alive.pop(gone, None)
        dropped.clear()
        assert len(store) <= 4
        for gone in dropped:
            alive.pop(gone, None)
        dropped.clear()
        assert store.nbytes == counted(store) <= 8000
        assert set(store._kept) == set(alive)
        assert all(until > now[0] for until in alive.values())


def test_pictures_are_held_once() -> None:
    store = ResponseStore()
    store.put(kept("a", pictures=[0, 1]))
    one = store.nbytes
    other = bytes([0]) * 1000
    store.put(Kept(kept("b").response, pictures={picture_name(other): other}))
    assert store.nbytes - one < 1000
    (data,) = store.get("b").pictures.values()
    assert data is store.get("a").pictures[picture_name(other)]
    store.drop("a")
    assert store.get("b").pictures == {picture_name(other): other}
    store.drop("b")
    assert store.nbytes == 0


def test_the_oldest_go_first_and_what_is_too_large_is_not_kept() -> None:
    dropped: list[str] = []
    store = ResponseStore(max_count=2, max_bytes=10_000, on_drop=dropped.append)
    for name in "abc":
        store.put(kept(name))
    assert (dropped, "a" in store, "c" in store) == (["a"], False, True)
    store.put(kept("d", "x" * 20_000))
    assert (len(store), store.nbytes, dropped) == (0, 0, ["a", "b", "c", "d"])
    with pytest.raises(UnknownResponseError):
        store.get("d")
