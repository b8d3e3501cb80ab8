"""Several ranks give the tokens that one gives: every family, unquantised and quantised, in any company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlxvlm.ranks.launch import _free_ports
from tests.checkpoint.sharing import wide
from tests.checkpoint.wide import CASES, write_wide
from tests.ranks.processes import Process

TYPES = (None, "4@32", "8@32")


class Group(NamedTuple):
    """Jobs of one group of processes; see program.py."""

    count: int
    jobs: Sequence[dict[str, Any]]
    patience_s: float = 250.0  # it takes some seconds alone on a machine


def chosen(count: int, **more: Any) -> Group:
    """Each family in one type."""
    types = {family: TYPES[index % len(TYPES)] for index, family in enumerate(CASES)}
    return Group(count, [job(family, isq, **more) for family, isq in types.items()])


def job(family: str, isq: str | None, **more: Any) -> dict[str, Any]:
    return {"name": f"{family}-{isq or 'float32'}", "folder": family, "golden": CASES[family][0], "isq": isq, **more}


def groups(is_thorough: bool) -> list[Group]:
    if is_thorough:
        every = [job(family, isq, examples=10) for family in CASES for isq in TYPES]
        # Tokens only: a value beside the border of two codes moves logprobs by more than rounding does.
        every += [job(family, None, kv_bits=8, is_brief=True) | {"name": f"{family}-kv8"} for family in CASES]
        # Ranks poll while they wait: four take minutes a schedule where there are two cores.
        schedules = [job(family, "4@32", examples=2) for family in ("llama4", "mllama")]
        brief = [each | {"is_brief": True} for each in every]
        return [Group(2, every, 3600), Group(4, brief, 3600), Group(4, schedules, 3600)]
    return [chosen(2, examples=1), Group(4, [job("llama4", None, is_brief=True)])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" in metafunc.fixturenames:
        found = groups(metafunc.config.getoption("--thorough-ranks"))
        metafunc.parametrize("group", found, ids=[f"{group.count}-ranks-{len(group.jobs)}-jobs" for group in found])


def test_tokens(group: Group, tmp_path: Path) -> None:
    jobs = [each | {"folder": str(tmp_path / each["folder"])} for each in group.jobs]
    for family in CASES:
        write_wide(tmp_path / family, family, config=wide(family))
    file, hosts = tmp_path / "jobs.json", tmp_path / "hosts.json"
    file.write_text(json.dumps(jobs))
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(group.count)]))
    words = ["-m", "tests.ranks.program", str(file)]
    processes = [
        Process(words, tmp_path / f"rank-{index}.txt", MLX_RANK=str(index), MLX_HOSTFILE=str(hosts))
        for index in range(group.count)
    ]
    try:
        statuses = [process.popen.wait(group.patience_s) for process in processes]
    finally:
        for process in processes:
            process.end()
    lines = [json.loads(line) for line in processes[0].said.splitlines() if line.startswith("{")]
    problems = [line["problem"] for line in lines if line["problem"]]
    assert not problems, problems[0]
    assert [line["name"] for line in lines] == [each["name"] for each in jobs], processes[0].said
    assert statuses == [0] * group.count, [process.said for process in processes]
