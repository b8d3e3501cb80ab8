"""Which rank a process is, as mlx.launch and mpirun say it, and what they can't have said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.errors import UsageError
from mlxvlm.ranks.place import Member, Place, find_member, find_place


def ring(tmp_path: Path, hosts: Any, rank: str = "0") -> dict[str, str]:
    path = tmp_path / "hosts.json"
    path.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    return {"MLX_RANK": rank, "MLX_HOSTFILE": str(path)}


def test_a_process_on_its_own(tmp_path: Path) -> None:
    assert find_place({}) is None
    assert find_place(ring(tmp_path, [["10.0.0.1:1"]])) is None
    assert find_place(ring(tmp_path, "")) is None  # what mlx.launch writes for one host
    assert find_place({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_a_ring(tmp_path: Path) -> None:
    hosts = [["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"], ["[fe80::3]:5003"]]
    place = find_place(ring(tmp_path, hosts, "2"))
    assert place == Place(2, 3, "ring", (("10.0.0.1", 5000), ("10.0.0.2", 5002), ("fe80::3", 5003)))
    assert place.leader == ("10.0.0.1", 5000)
    assert (place.name(), place.name(0)) == ("rank 2 of 3 (fe80::3)", "rank 0 of 3 (10.0.0.1)")
    assert Member(place).follows
    assert not Member(Place(0, 2, "mpi")).follows


def test_jaccl_wins_over_a_ring(tmp_path: Path) -> None:
    devices = tmp_path / "devices.json"
    devices.write_text(json.dumps([[None, "rdma_en5"], ["rdma_en5", None]]))
    given = {"MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
    place = find_place({**ring(tmp_path, [["1.1.1.1:1"], ["1.1.1.2:1"], ["1.1.1.3:1"]], "1"), **given})
    assert place == Place(1, 2, "jaccl", (("10.0.0.1", 32323), None))
    assert (place.name(), place.name(0)) == ("rank 1 of 2", "rank 0 of 2 (10.0.0.1)")


def test_rank_0_is_reached_elsewhere(tmp_path: Path) -> None:
    given = ring(tmp_path, [["10.0.0.1:5000"], ["10.0.0.2:5001"]], "1")
    member = find_member(given, host="mac1.local", timeout_s=7)
    assert member is not None
    assert member.place == Place(1, 2, "ring", (("mac1.local", 5000), ("10.0.0.2", 5001)))
    assert (member.timeout_s, member.start_timeout_s, member.stall_timeout_s) == (7, 60, 120)
    assert find_member({}, host="mac1.local") is None
    member = find_member({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, host="mac1.local")
    assert member is not None
    assert member.place == Place(0, 2, "mpi")


def test_mpi_tells_no_address() -> None:
    place = find_place({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"})
    assert place == Place(3, 4, "mpi")
    assert place.leader is None


@pytest.mark.parametrize(
    ("hosts", "rank", "words"),
    [
        ([["10.0.0.1:1"], ["10.0.0.2:1"]], "2", "rank 2 of 2 can't be"),
        ([["10.0.0.1:1"]], "1", "rank 1 of 1 can't be"),
        ("", "1", "rank 1 of 0 can't be"),
        ([["10.0.0.1:1"], ["10.0.0.2:1"]], "-1", "MLX_RANK is a number"),
        ([["10.0.0.1:1"], ["10.0.0.2:1"]], "", "MLX_RANK is a number"),
        ([["10.0.0.1:1"], ["10.0.0.1:1"]], "0", "same address"),
        ([["10.0.0.1:1"], ["10.0.0.2"]], "0", "no \"ip:port\""),
        ([["10.0.0.1:1"], ["10.0.0.2:70000"]], "0", "no \"ip:port\""),
        ([["10.0.0.1:1"], []], "0", "one list of"),
        ([["10.0.0.1:1"]] * 1000, "0", "can't be"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b"}], "0", "let mlx.launch make this one"),
        ({"hosts": []}, "0", "no JSON list"),
        ("[[", "0", "can't be read"),
        ("[" * 100_000, "0", "can't be read"),
    ],
)  # fmt: skip
def test_what_can_not_be(tmp_path: Path, hosts: Any, rank: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_place(ring(tmp_path, hosts, rank))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"MLX_HOSTFILE: .*nowhere"):
        find_place({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "nowhere")})
    with pytest.raises(UsageError, match=r"mlx\.launch --backend"):
        find_place({"MLX_RANK": "0"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["10.0.0.1:1", "h:2", ":3", "a:b:4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@given(hosts=JSON, rank=st.text(max_size=3))
def test_whatever_is_said_a_place_or_a_usage_error(folder: Path, hosts: Any, rank: str) -> None:
    try:
        place = find_place(ring(folder, hosts, rank))
    except UsageError:
        return
    assert place is None or (0 <= place.index < place.count == len(place.addresses))
