"""`mlxvlm models` and `mlxvlm pull`, with a hub on loopback and caches of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxvlm
from mlxvlm.cli import main
from tests.checkpoint.fake_hub import FakeHub, hub_environment
from tests.checkpoint.layouts import SPLIT

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = {path.name: path.read_bytes() for path in SPLIT.iterdir()}
    with FakeHub(files | {"README.md": b"text", "original/consolidated.00.pth": b"pickle"}) as running:
        yield running


def mlxvlm_with(hub: FakeHub, home: Path, *argv: str, answer: str = "") -> Done:
    """The command in a process of its own, as huggingface_hub reads its settings at import."""
    command = [sys.executable, "-m", "mlxvlm", *argv]
    env = hub_environment(hub.url, home) | {"HOME": str(home)}
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, input=answer
    )


class TestPull:
    def test_what_loading_needs_and_nothing_else(self, hub: FakeHub, tmp_path: Path) -> None:
        done = mlxvlm_with(hub, tmp_path, "pull", "owner/tiny")
        assert done.returncode == 0, done.stderr
        assert "owner/tiny: " in done.stderr
        folder = Path(done.stdout.strip())
        left = {"README.md", "original/consolidated.00.pth", "golden.npz"}
        assert {path.name for path in folder.iterdir()} == set(hub.files) - left
        fetched = len(hub.fetched)
        hub.stop()  # all is there: it can run
        assert mlxvlm_with(hub, tmp_path, "run", "-m", "owner/tiny", "--max-tokens", "2", "hello").returncode == 0
        assert len(hub.fetched) == fetched

    def test_an_interrupted_download_goes_on(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.cut = "model-00002-of-00002.safetensors"
        done = mlxvlm_with(hub, tmp_path, "pull", "owner/tiny")
        assert done.returncode == 4
        assert done.stderr.splitlines()[-1].startswith("mlxvlm: error: owner/tiny can't be fetched: ")
        hub.cut = None
        done = mlxvlm_with(hub, tmp_path, "pull", "owner/tiny")
        assert done.returncode == 0, done.stderr
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            assert (Path(done.stdout.strip()) / name).read_bytes() == hub.files[name]
        assert hub.fetched.count("model-00001-of-00002.safetensors") == 1

    def test_a_model_that_is_not_run_is_refused_before_its_weights(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.files["config.json"] = json.dumps({"model_type": "mamba"}).encode()
        done = mlxvlm_with(hub, tmp_path, "pull", "owner/tiny")
        assert done.returncode == 4
        assert "mamba" in done.stderr
        assert not [name for name in hub.fetched if name.endswith(".safetensors")]

    def test_what_is_here_already(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["pull", "demo"]) == 0
        assert Path(capsys.readouterr().out.strip()) == Path(mlxvlm.__file__).parent / "demo"


class TestModels:
    def listed(self, hub: FakeHub, home: Path) -> dict[str, dict[str, object]]:
        done = mlxvlm_with(hub, home, "models", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["total_bytes"] == sum(each["bytes"] for each in found["models"])
        return {each["name"]: each for each in found["models"]}

    def test_nothing_yet(self, hub: FakeHub, tmp_path: Path) -> None:
        assert mlxvlm_with(hub, tmp_path, "models").stdout == "0 models, 0.0 kB\n"

    def test_listed_and_removed(self, hub: FakeHub, tmp_path: Path) -> None:
        assert mlxvlm_with(hub, tmp_path, "pull", "owner/tiny").returncode == 0
        isq = ("run", "-m", "demo", "--isq", "8@32", "--max-tokens", "1", "hello")
        assert mlxvlm_with(hub, tmp_path, *isq).returncode == 0
        found = self.listed(hub, tmp_path)
        (quantised,) = (name for name in found if name.startswith("isq-"))
        assert set(found) == {"owner/tiny", quantised}
        assert found[quantised]["of"] == "demo --isq 8@32"
        shards = sum(len(data) for name, data in hub.files.items() if name.endswith(".safetensors"))
        assert shards < found["owner/tiny"]["bytes"] < shards + 2_000_000  # type: ignore[operator]
        table = mlxvlm_with(hub, tmp_path, "models").stdout
        assert table.splitlines()[-1].startswith("2 models, ")
        assert "used 20" in table

        done = mlxvlm_with(hub, tmp_path, "models", "--remove", "owner/tiny", "--remove", "owner/other", "--yes")
        assert done.returncode == 2
        assert "owner/other" in done.stderr
        done = mlxvlm_with(hub, tmp_path, "models", "--remove", "owner/tiny")
        assert done.returncode == 2
        assert "add --yes" in done.stderr
        assert set(self.listed(hub, tmp_path)) == {"owner/tiny", quantised}

        path = Path(str(found["owner/tiny"]["path"]))
        done = mlxvlm_with(hub, tmp_path, "models", "--remove", "owner/tiny", "--yes")
        assert done.stdout.startswith("Removed owner/tiny, ")
        assert not path.exists()
        assert set(self.listed(hub, tmp_path)) == {quantised}
        assert mlxvlm_with(hub, tmp_path, "models", "--remove", quantised, "-y").returncode == 0
        assert self.listed(hub, tmp_path) == {}

    @pytest.mark.parametrize(("answer", "is_left"), [("y\r", False), ("\r", True), ("\x04", True)])
    def test_it_asks(self, answer: str, is_left: bool, hub: FakeHub, tmp_path: Path) -> None:
        import pexpect

        entry = tmp_path / "isq" / ("ab" * 16)
        entry.mkdir(parents=True)
        (entry / "manifest.json").write_text('{"of": "\\u001b[31mx"}')
        env = hub_environment(hub.url, tmp_path) | {"HOME": str(tmp_path)}
        argv = ["-m", "mlxvlm", "models", "--isq-cache", str(entry.parent), "--remove", "isq-abababababab"]
        child = pexpect.spawn(sys.executable, argv, env=env, cwd=str(ROOT), timeout=120, encoding="utf-8")
        child.expect_exact("Remove? [y/N] ")
        assert "\x1b" not in child.before
        child.send(answer)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        assert entry.exists() is is_left
