"""What --from-uqff may name: files, folders, types, bits, names in reports, and repositories."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxvlm.checkpoint.uqff_files import find
from mlxvlm.errors import ModelError, ModelNotFoundError
from tests.checkpoint.fake_hub import FakeHub, hub_environment

REPORT = {
    "outputs": [
        {"quant": "q4k", "shards": ["q4k-0.uqff", "q4k-1.uqff"]},
        {"quant": "afq6", "shards": ["tiny-afq6-0.uqff"]},
    ]
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Every kind of file that there is in the wild; q4k-3 is not its sibling, as q4k-2 lacks."""
    folder = tmp_path / "model"
    folder.mkdir()
    names = ["q4k-0", "q4k-1", "q4k-3", "afq4-0", "q8_0-0", "q5k-0", "tiny-afq6-0", "old", "Model-Q4K-10", "fp8-0"]
    for name in names:
        (folder / f"{name}.uqff").write_bytes(b"")
    (folder / "uqff_report.json").write_text(json.dumps(REPORT))
    return folder


CASES = {
    "q4k": ["q4k-0", "q4k-1"],
    "Q4K": ["q4k-0", "q4k-1"],
    "AFQ6": ["tiny-afq6-0"],
    "tiny-afq6-0.uqff": ["tiny-afq6-0"],
    "q4k-1.uqff": ["q4k-0", "q4k-1"],
    "4": ["afq4-0"],
    "5": ["q5k-0"],
    "8": ["q8_0-0"],
    "fp8": ["fp8-0"],
    "old.uqff": ["old"],
    "q4k;old.uqff": ["q4k-0", "q4k-1", "old"],
    "q4k; q4k-0.uqff": ["q4k-0", "q4k-1"],
}


@pytest.mark.parametrize("name", CASES)
def test_names_of_a_model_folder(name: str, model: Path) -> None:
    assert find(name, str(model)) == [model / f"{stem}.uqff" for stem in CASES[name]]


def test_paths_need_no_model_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = str(tmp_path / "base")
    assert find(str(model / "old.uqff"), base) == [model / "old.uqff"]
    assert find(str(model / "q4k-1.uqff"), base) == [model / "q4k-0.uqff", model / "q4k-1.uqff"]
    # Siblings count from 0: this is one of no series.
    assert find(str(model / "Model-Q4K-10.uqff"), base) == [model / "Model-Q4K-10.uqff"]


def test_folders(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"holds Model-Q4K, afq4, fp8, old, q4k, q5k, q8_0, tiny-afq6: name one"
    ):
        find(str(model), str(model))
    single = tmp_path / "single"
    single.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"has no \.uqff files"):
        find(str(single), str(model))
    (single / "x-0.uqff").write_bytes(b"")
    assert find(str(single), str(model)) == [single / "x-0.uqff"]


@pytest.mark.parametrize("name", ["", "3", "q9", "none.uqff", "../q4k", "*", "q4k;nothing", "\0", "a/b", "x" * 5000])
def test_what_means_nothing(name: str, model: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no UQFF files") as caught:
        find(name, str(model))
    assert str(model) in str(caught.value)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"outputs": [{"quant": "q4k", "shards": ["../q4k-0.uqff"]}]}, "names files that are not beside it"),
        ({"outputs": [{"quant": "q4k", "shards": "q4k-0.uqff"}]}, "makes no sense"),
        ({"outputs": [{"quant": "q4k", "shards": [3]}]}, "makes no sense"),
        ({"outputs": ["q4k"]}, "makes no sense"),
    ],
)
def test_reports_that_make_no_sense(report: Any, words: str, model: Path) -> None:
    (model / "uqff_report.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match=words):
        find("q4k", str(model))


def test_a_report_without_its_files(model: Path) -> None:
    """Then the name may be another's."""
    (model / "uqff_report.json").write_text(json.dumps({"outputs": [{"quant": "q4k", "shards": ["gone-0.uqff"]}]}))
    assert find("q4k", str(model)) == [model / "q4k-0.uqff", model / "q4k-1.uqff"]


REMOTE = {
    "config.json": b"{}",
    "residual.safetensors": b"rest",
    "q4k-0.uqff": b"0",
    "q4k-1.uqff": b"1",
    "q8_0-0.uqff": b"8",
    "tiny-q4k.uqff": b"old",
    "README.md": b"text",
    "original/q4k-0.uqff": b"no",
    "model.safetensors": b"full",
}
SCRIPT = """
import sys
from mlxvlm.checkpoint.uqff_files import find
from mlxvlm.errors import MlxvlmError
try:
    for file in find(sys.argv[1], sys.argv[2]):
        print(file)
except MlxvlmError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(dict(REMOTE)) as running:
        yield running


def found(hub: FakeHub, home: Path, name: str, model: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, model],
        env=hub_environment(hub.url, home),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


class TestRepositories:
    @pytest.mark.parametrize(
        ("name", "names"),
        [
            ("4", ["q4k-0.uqff", "q4k-1.uqff"]),
            ("owner/tiny/tiny-q4k.uqff", ["tiny-q4k.uqff"]),
            ("owner/tiny/q4k-0.uqff", ["q4k-0.uqff", "q4k-1.uqff"]),
        ],
    )
    def test_only_what_is_named_is_fetched(self, name: str, names: list[str], hub: FakeHub, tmp_path: Path) -> None:
        files = [Path(line) for line in found(hub, tmp_path, name, "owner/tiny")]
        assert [file.name for file in files] == names
        assert set(hub.fetched) == {"config.json", "residual.safetensors", *names}
        assert (files[0].parent / "residual.safetensors").is_file()

    def test_another_repository_than_the_models(self, hub: FakeHub, tmp_path: Path) -> None:
        """The form of 2024: the base model is here, the file there."""
        (tmp_path / "base").mkdir()
        (file,) = found(hub, tmp_path, "owner/tiny/tiny-q4k.uqff", str(tmp_path / "base"))
        assert Path(file).read_bytes() == b"old"

    def test_what_is_not_there(self, hub: FakeHub, tmp_path: Path) -> None:
        (line,) = found(hub, tmp_path, "owner/tiny/none.uqff", "owner/tiny")
        assert line.startswith("ModelNotFoundError: no UQFF files 'owner/tiny/none.uqff'")
        (line,) = found(hub, tmp_path, "owner/other/none.uqff", "owner/tiny")
        assert line.startswith("ModelNotFoundError: owner/other is not on the hub, or is private: check the name")
