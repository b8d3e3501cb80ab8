"""The cost model's formulas against what graphs really send, and its arithmetic."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.checkpoint.estimate import need_of
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.engine.rows import Rows
from mlxvlm.families import family_of
from mlxvlm.models.base import RowState
from mlxvlm.models.shares import Rank, narrow
from mlxvlm.ranks.shard import Shard
from tests.checkpoint.sharing import tensors_of, wide
from tests.checkpoint.wide import CASES
from tools.scale_cost import Link, Message, Shape, fitted, recorded, seconds

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "scale_model.py"
COUNT = 2


def shard_of(family: str, add: Callable[[mx.array], mx.array] | None = None) -> Shard:
    config = wide(family)
    model = family_of(config).build_model(config)
    narrow(model, Rank(0, COUNT), add or (lambda part: mx.distributed.all_sum(part)))
    return Shard(model, Rank(0, COUNT), mx.distributed.init())


def shape_of(family: str) -> Shape:
    """Of a text: mllama's cross layers are not passed."""
    config = wide(family)
    model = family_of(config).build_model(config)
    has_head = any(name.startswith(f"{model.quant_paths.head}.") for name in tensors_of(model))
    text = config.get("text_config", config)
    return Shape(len(model.kv_specs), text["hidden_size"], model.vocab_size, has_head, 4)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("family", CASES)
def test_a_step_sends_what_the_formula_says(family: str, num_rows: int) -> None:
    shard = shard_of(family)
    rows = Rows(shard, shard.kv_specs)
    with recorded(alone=COUNT):
        for owner in range(num_rows):
            rows.begin(owner)
            rows.keep(owner, shard.embed_tokens(mx.zeros((1, 4), mx.uint32), [RowState()]))
            rows.fill(owner, 0, 4)
            rows.join(owner)
        with recorded(alone=COUNT) as messages:
            rows.order()
            mx.eval(rows.run(mx.zeros((num_rows, 1), mx.uint32)))
            rows.commit()
    assert messages == shape_of(family).step(num_rows, COUNT)


@pytest.mark.parametrize("family", CASES)
def test_a_chunk_sends_what_the_formula_says(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the graph that is evaluated: sums are made to leave a trace there."""
    shard = shard_of(family, mx.arcsinh)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group: mx.arcsinh(array))
    inputs = shard.embed_tokens(mx.zeros((1, 5), mx.uint32), [RowState()])
    forward = KVPass([group := KVGroup.single(shard.kv_specs, 0)], 5)
    shard(inputs, forward.layers)
    forward.commit()
    mx.export_to_dot(str(tmp_path / "graph.dot"), *group.arrays)
    sums = re.findall(r'label ?="ArcSinh"', (tmp_path / "graph.dot").read_text())
    assert shape_of(family).chunk(5) == [Message("sum", 5 * 128 * 4)] * len(sums)


def test_seconds_of_a_ring() -> None:
    """4 ranks: 6 exchanges of a quarter for a sum, 3 of all that is given for a gathering."""
    link = Link("ring", 1e-3, 1e6)
    assert link.seconds(Message("sum", 4000), 4) == pytest.approx(6 * (1e-3 + 1e-3))
    assert link.seconds(Message("gather", 4000), 4) == pytest.approx(3 * (1e-3 + 4e-3))
    assert seconds([Message("sum", 4000)] * 5, link, 4) == pytest.approx(5 * 12e-3)


def test_seconds_of_a_mesh() -> None:
    """One exchange with all others at once, after what each collective costs."""
    link = Link("mesh", 1e-3, 1e6, 5e-3, is_mesh=True)
    assert link.seconds(Message("sum", 4000), 4) == pytest.approx(5e-3 + 1e-3 + 6e-3)
    assert link.seconds(Message("sum", 4000), 2) == pytest.approx(5e-3 + 1e-3 + 4e-3)


@pytest.mark.parametrize("count", [2, 5])
def test_a_fitted_link_takes_what_was_measured(count: int) -> None:
    real = Link("real", 30e-6, 2e9)
    points = [(size, real.seconds(Message("sum", size), count)) for size in (1024, 1 << 20)]
    found = fitted("found", count, points[0], points[1])
    assert found.step_s == pytest.approx(real.step_s)
    assert found.bandwidth == pytest.approx(real.bandwidth)


def test_nothing_is_sent_alone() -> None:
    given = mx.arange(3)
    with recorded(alone=2) as messages:
        assert mx.distributed.all_sum(given) is given
        assert mx.distributed.all_gather(given).tolist() == [0, 1, 2, 0, 1, 2]
    assert messages == [Message("sum", 12), Message("gather", 12)]


def test_what_the_bench_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's chunks and steps are told apart by size; a ratio is measured over predicted."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    bench = importlib.import_module("bench_ranks")
    args = argparse.Namespace(tokens=64, steps=5, rounds=2)
    shape = bench.Shape(3, 128, 1000, True, 4)
    built = bench.Message("sum", 64 * 128 * 4)
    messages = ([*shape.chunk(64), built, built] * 3) + shape.step(1, 2) * 6
    link = bench.fitted("", 2, (512, 1e-3), (32768, 5e-3))
    found = {
        "messages": messages,
        "alone": {size: {"sum": each, "gather": 0.0} for size, each in ((512, 1e-3), (32768, 5e-3), (2000, 0.0))},
        **{who: {"step": [0.2, 0.1], "chunk": [0.4, 0.3]} for who in ("one", "share", "untold", "real")},
    }
    figures = bench.report(found, shape, 2, args)
    for name, sent, least in (("step", shape.step(1, 2), 0.1), ("chunk", shape.chunk(64), 0.3)):
        assert figures[name]["is_formula"]
        assert (figures[name]["messages"], figures[name]["bytes"]) == (len(sent), sum(each.nbytes for each in sent))
        assert figures[name]["ratio"] == pytest.approx(least / (least + bench.seconds(sent, link, 2)))


def test_the_tables(tmp_path: Path) -> None:
    """Memory is doctor's, and a Mac alone sends nothing."""
    config: dict[str, Any] = wide("llama4")
    folder = tmp_path / "org__Name-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(TOOL), str(folder), "--macs", "1", "2"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| Name, ")]
    weights = {
        name: array.astype(mx.bfloat16) for name, array in tensors_of(family_of(config).build_model(config)).items()
    }
    need = need_of(config, weights, "bfloat16").share(1, 2)
    gigabytes = (need.weights_bytes + 8192 * need.kv_bytes_per_token) / 1e9
    assert rows[0][0] == "| Name, 16 bits"
    assert rows[0][2].rstrip(" |").endswith(f", {gigabytes:.0f}")
    times = [row for row in rows if row[1] in ("JACCL", "TCP, Thunderbolt", "TCP, 10 Gb Ethernet")]
    assert len(times) == 2 * 2 * 3
    assert len({row[2] for row in times if row[0] == "| Name, 16 bits"}) == 1
    assert all(row[-1].startswith("1, 1") for row in times if row[1] != "JACCL")
