"""Names of models, and huggingface_hub's own code against a hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxvlm
from mlxvlm.checkpoint.hub import is_on_disk, resolve
from mlxvlm.errors import ModelError, ModelNotFoundError
from tests.checkpoint.fake_hub import COMMIT, FakeHub, fetch
from tests.checkpoint.layouts import INDEX, SPLIT, logits

DEAD = "http://127.0.0.1:9"  # the discard port: nobody listens
SMALL = {"config.json", "tokenizer.json", "chat_template.jinja"}


def index_of(*names: Any) -> bytes:
    return json.dumps({"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}).encode()


def repository(**more: bytes) -> dict[str, bytes]:
    """Two shards in the index, and everything else that repositories keep."""
    files = {
        "config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "chat_template.jinja": b"template",
        INDEX: index_of("model-1.safetensors", "model-2.safetensors"),
        "model-1.safetensors": b"1" * 100_000,
        "model-2.safetensors": b"2" * 100_000,
        "model-3.safetensors": b"not in the index",
        "consolidated.safetensors": b"another runtime's",
        "pytorch_model.bin": b"pickle",
        "README.md": b"text",
        ".gitattributes": b"text",
        "original/params.json": b"{}",
        "original/consolidated.00.pth": b"pickle",
        "onnx/model.safetensors": b"another runtime's",
    }
    return files | {name.replace("__", "."): data for name, data in more.items()}


class TestNames:
    def test_demo(self) -> None:
        folder = resolve("demo")
        assert folder == Path(mlxvlm.__file__).parent / "demo"
        assert (folder / "config.json").is_file()

    def test_folder(self, tmp_path: Path) -> None:
        assert resolve(str(tmp_path)) == tmp_path

    def test_relative_folder_goes_before_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve("owner/name") == Path("owner/name")
        assert is_on_disk("owner/name")
        assert not is_on_disk("owner/other")

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve("~/models") == tmp_path / "models"

    @pytest.mark.parametrize("name", ["config.json", "model.gguf"])
    def test_file(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelNotFoundError, match="is a file: give the folder that holds"):
            resolve(str(tmp_path / name))

    @pytest.mark.parametrize(
        "name",
        [
            "",
            " ",
            "smolvlm",
            "/no/such/folder",
            "./no/such",
            "~nobody-of-that-name/model",
            "a/b/c",
            "owner/",
            "/name",
            "owner/name\n",
            "owner name/model",
            "https://huggingface.co/owner/name",
            "-x/name",
            "\0",
            "x" * 5000,
            "é/name?",
        ],
        ids=lambda name: repr(name[:40]),
    )
    def test_neither_folder_nor_repository(self, name: str) -> None:
        with pytest.raises(
            ModelNotFoundError, match=r"neither a folder nor a repository id like owner/name$"
        ) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "name", ["owner/na--me", "owner/name..x", "owner/name.git", "owner/-name", "o/" + "x" * 99]
    )
    def test_ids_that_the_hub_refuses(self, name: str) -> None:
        """huggingface_hub checks these before it asks the network."""
        with pytest.raises(ModelError, match="can't be fetched") as caught:
            resolve(name)
        assert "\n" not in str(caught.value)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(repository()) as running:
        yield running


class TestWhatIsFetched:
    def test_only_what_is_needed(self, hub: FakeHub, tmp_path: Path) -> None:
        answer = fetch(hub.url, tmp_path)
        wanted = {*SMALL, INDEX, "model-1.safetensors", "model-2.safetensors"}
        assert answer.names == wanted
        assert sorted(hub.fetched) == sorted(wanted)
        assert (answer.folder / "model-2.safetensors").read_bytes() == hub.files["model-2.safetensors"]

    def test_small_files_only(self, hub: FakeHub, tmp_path: Path) -> None:
        assert fetch(hub.url, tmp_path, weights=False).names == {*SMALL, INDEX}

    def test_without_an_index(self, tmp_path: Path) -> None:
        files = repository(weights__00__safetensors=b"old", model__safetensors=b"new")
        del files[INDEX], files["model-1.safetensors"], files["model-2.safetensors"], files["model-3.safetensors"]
        with FakeHub(files) as hub:
            assert fetch(hub.url, tmp_path).names == {*SMALL, "model.safetensors", "weights.00.safetensors"}

    def test_a_revision(self, hub: FakeHub, tmp_path: Path) -> None:
        assert fetch(hub.url, tmp_path, revision=COMMIT).folder.name == COMMIT

    def test_all_files_are_of_one_commit(self, hub: FakeHub, tmp_path: Path) -> None:
        """The branch moves between the small files and the weights."""
        hub.moves_to = "b" * 40
        answer = fetch(hub.url, tmp_path)
        assert answer.folder.name == "b" * 40
        assert answer.names == {*SMALL, INDEX, "model-1.safetensors", "model-2.safetensors"}

    def test_from_the_cache_when_the_hub_is_gone(self, hub: FakeHub, tmp_path: Path) -> None:
        first = fetch(hub.url, tmp_path)
        fetched = len(hub.fetched)
        assert fetch(hub.url, tmp_path) == first
        assert len(hub.fetched) == fetched
        hub.stop()
        assert fetch(hub.url, tmp_path) == first

    def test_a_model_that_is_loaded_from_there(self, tmp_path: Path) -> None:
        files = {path.name: path.read_bytes() for path in SPLIT.iterdir()}
        with FakeHub(files) as hub:
            folder = fetch(hub.url, tmp_path).folder
        assert np.array_equal(logits(folder, SPLIT, "text_only"), logits(SPLIT, SPLIT, "text_only"))


class TestFailures:
    def refused(self, text: str, tmp_path: Path, *, revision: str = "", **settings: Any) -> None:
        with FakeHub(repository(), **settings) as hub:
            answer = fetch(hub.url, tmp_path, revision=revision)
        assert answer.exit_code == 4
        assert text in answer.text
        assert "\n" not in answer.text

    @pytest.mark.parametrize("status", [401, 404])
    def test_no_such_repository(self, status: int, tmp_path: Path) -> None:
        self.refused(
            "ModelNotFoundError: owner/tiny is not on the hub, or is private: check the name, or run `hf auth login`",
            tmp_path,
            refuse=(status, "RepoNotFound"),
        )

    @pytest.mark.parametrize("which", ["refuse", "refuse_files"])
    def test_gated(self, which: str, tmp_path: Path) -> None:
        self.refused(
            "ModelNotFoundError: owner/tiny is gated: accept its terms on its hub page, then run `hf auth login`",
            tmp_path,
            **{which: (403, "GatedRepo")},
        )

    def test_no_such_revision(self, tmp_path: Path) -> None:
        self.refused("ModelNotFoundError: owner/tiny has no revision 'v9'", tmp_path, revision="v9")

    def test_wrong_token(self, tmp_path: Path) -> None:
        self.refused("ModelError: owner/tiny can't be fetched: Client error '401", tmp_path, refuse=(401, "Other"))

    @pytest.mark.parametrize("weights", [False, True])
    def test_hub_down_and_nothing_cached(self, weights: bool, tmp_path: Path) -> None:
        answer = fetch(DEAD, tmp_path, weights=weights)
        assert answer.exit_code == 4
        assert answer.text.startswith("ModelNotFoundError: owner/tiny is not in the local cache and the hub can't be")
        assert "\n" not in answer.text

    def test_hub_down_and_only_small_files_cached(self, hub: FakeHub, tmp_path: Path) -> None:
        fetch(hub.url, tmp_path, weights=False)
        hub.stop()
        assert fetch(hub.url, tmp_path, weights=False).exit_code == 0
        answer = fetch(hub.url, tmp_path)
        assert answer.exit_code == 4
        assert "the hub can't be reached" in answer.text

    def test_connection_cut_in_a_shard_and_fetched_again(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.cut = "model-2.safetensors"
        answer = fetch(hub.url, tmp_path)
        assert answer.exit_code == 4
        assert answer.text.startswith("ModelError: owner/tiny can't be fetched: ")
        assert "\n" not in answer.text
        hub.cut = None
        folder = fetch(hub.url, tmp_path).folder
        for name in ("model-1.safetensors", "model-2.safetensors"):
            assert (folder / name).read_bytes() == hub.files[name]

    @pytest.mark.parametrize(
        "name", ["../../outside.safetensors", "/tmp/outside.safetensors", "*", "onnx/model.safetensors", "x.bin", None]
    )
    def test_unsafe_shard_names(self, name: str | None, hub: FakeHub, tmp_path: Path) -> None:
        hub.files[INDEX] = index_of("model-1.safetensors", name)
        answer = fetch(hub.url, tmp_path)
        assert answer.exit_code == 4
        assert answer.text.startswith(
            f"WeightsError: {INDEX} names files that are no safetensors beside it: {name!r}"[:70]
        )
        assert "\n" not in answer.text
        assert set(hub.fetched) == {*SMALL, INDEX}

    @pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b'{"weight_map": []}', b"\xff"])
    def test_damaged_index(self, content: bytes, hub: FakeHub, tmp_path: Path) -> None:
        hub.files[INDEX] = content
        answer = fetch(hub.url, tmp_path)
        assert answer.exit_code == 4
        assert INDEX in answer.text
        assert "\n" not in answer.text
