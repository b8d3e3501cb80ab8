"""Topology files: what they say, and that bad ones name the line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.errors import UsageError

TEXT = """\
# The first layers in three bits.
0-8:
  isq: Q3K
16:
  isq: 6
  device: metal[0]
'/self_attn/':
  isq: 8
4-6: {isq: none}
20:
"""


def spec(path: str, layer: int | None, text: str = TEXT) -> QuantSpec | None:
    entry = Topology.parse(text, "t.yaml").find(path, layer)
    assert entry is not None
    return entry.spec


def test_ranges_layers_and_patterns() -> None:
    assert spec("layers.0.mlp", 0) == spec("layers.7.mlp", 7) == QuantSpec(3)
    assert Topology.parse(TEXT, "t").find("layers.8.mlp", 8) is None
    assert spec("layers.16.mlp", 16) == QuantSpec(6)
    assert spec("layers.4.mlp", 4) is None, "the later of two ranges"
    assert spec("layers.4.self_attn.q_proj", 4) == QuantSpec(8), "a pattern goes before a range"
    assert Topology.parse(TEXT, "t").find("visual.mlp", None) is None
    assert Topology.parse(TEXT, "t").find("layers.20.mlp", 20) is None, "an entry that says nothing"


def test_patterns_are_searched_in_tensor_names() -> None:
    topology = Topology.parse("/a\\.weight$/: {isq: 4}\n/b/: {isq: 4}\n/b.c/: {isq: 8}", "t")
    assert topology.find("x.a", None) is not None
    assert topology.find("x.ab", None) == topology.entries[1]
    assert topology.find("x.b.c", None) == topology.entries[2], "the later of two patterns"


BAD = {
    "isq: 4": r"t.yaml, line 1: 'isq' is no range",
    "\n\n0-8: {isq: Q9K}": r"line 3: quantisation 'Q9K' is unknown",
    "0:\n  isq: 4\n  bits: 3": r"line 3: 'bits' is unknown; there are isq and device",
    "0: {isq: 4}\n0: {isq: 5}": r"line 2: '0' is there twice",
    "0:\n  isq: 4\n  isq: 5": r"line 3: 'isq' is there twice",
    "8-8: {isq: 4}": r"line 1: the range 8-8 is empty",
    "9-8: {isq: 4}": r"line 1: the range 9-8 is empty",
    "/(/: {isq: 4}": r"line 1: /\(/ is no regular expression",
    "- 0": r"line 1: layers and what they get are expected",
    "0: 4": r"line 1: layers and what they get are expected",
    "0: {isq: [4]}": r"line 1: isq is a type's name",
    "0: {isq: }": r"line 1: quantisation '' is unknown",
    "? [1]\n: 2": r"line 1: a key is a plain word",
    "0: {isq: 4": r"line 1: no YAML",
    "\t0: 1": r"line 1: no YAML",
    "": r"t.yaml is empty",
    "# nothing": r"t.yaml is empty",
    "[" * 5000: r"t.yaml: nested too deeply",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files_name_the_line(text: str) -> None:
    with pytest.raises(UsageError, match=BAD[text]) as caught:
        Topology.parse(text, "t.yaml")
    assert caught.value.exit_code == 2


@given(st.text(alphabet="0123-:/{}[]isq Q4K\n'\"&*!|>,a", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    problem = "t.yaml"
    try:
        Topology.parse(text, "t.yaml")
    except UsageError as error:
        problem = str(error)
    assert problem.startswith("t.yaml")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(TEXT)
    assert Topology.read(path) == Topology.parse(TEXT, "t")
    with pytest.raises(UsageError, match="can't be read"):
        Topology.read(tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="can't be read"):
        Topology.read(path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UsageError, match="too large"):
        Topology.read(path)
