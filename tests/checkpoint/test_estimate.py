"""Estimates equal what is really allocated, for folders and for repositories that are not here yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from mlx.utils import tree_flatten

from mlxvlm.checkpoint import estimate
from mlxvlm.checkpoint.bind import DTYPES
from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.estimate import memory_need
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.errors import ModelError, ModelNotFoundError, WeightsError
from mlxvlm.models.base import Inputs
from tests.checkpoint.layouts import INDEX, SPLIT, TIED, config_of, mlx_names, quantised, tensors_of, write, write_mlx
from tests.checkpoint.wide import CASES, write_wide
from tests.golden import GOLDENS


def folder_of(kind: str, tmp_path: Path) -> Path:
    if kind in ("idefics3_split", "idefics3_resaved", "smolvlm2_tied"):
        return GOLDENS / kind
    tensors = tensors_of(TIED if kind == "tied-with-head" else SPLIT)
    if kind == "tied-with-head":
        tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"]
        tensors["model.text_model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((8,))
        return write(tmp_path / "m", TIED, tensors)
    mode, bits, group = {"affine": ("affine", 4, 32), "mxfp8": ("mxfp8", 8, 32)}[kind]
    packed, _ = quantised(mlx_names(tensors), lambda path, weight: QuantSpec(bits, group, mode))
    return write_mlx(tmp_path / "m", SPLIT, packed)


KINDS = ["idefics3_split", "idefics3_resaved", "smolvlm2_tied", "tied-with-head", "affine", "mxfp8"]


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_folder_are_what_binding_allocates(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    need = memory_need(str(folder), dtype=dtype)
    model = open_model(str(folder)).build(LoadOptions(dtype), lambda done, total: None)
    assert need.weights_bytes == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert need.is_local
    assert need.model_type == config_of(folder)["model_type"]
    assert need.max_context == open_model(str(folder)).max_context


@pytest.mark.parametrize("isq", ["4@32", "8", "5", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CASES)
def test_quantised_sizes_are_what_loading_allocates(family: str, dtype: str, isq: str, tmp_path: Path) -> None:
    folder = write_wide(tmp_path / "m", family)
    options = LoadOptions(dtype, isq, isq_tower=True)
    need = memory_need(str(folder), dtype=dtype, recipe=recipe_of(options))
    tensors = read_weights(folder)
    assert need.disk_bytes == sum(array.nbytes for array in tensors.values())
    largest = max(array.nbytes // (array.shape[0] if array.ndim == 3 else 1) for array in tensors.values())
    model = open_model(str(folder)).build(options, lambda done, total: None)
    assert need.weights_bytes == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert need.loading_bytes == need.weights_bytes + largest
    is_narrow = family in ("idefics3", "llava_next") and isq != "nvfp4"
    assert any("48 inputs" in line for line in need.left) == is_narrow


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["idefics3_split", "smolvlm2_tied", "mxfp8"])
def test_kv_bytes_are_the_caches_growth(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    model = open_model(str(folder)).build(LoadOptions(dtype), lambda done, total: None)
    width = model.embed_tokens(mx.array([[1]]), None).embeds.shape[-1]
    sizes = []
    for length in (256, 512):  # whole buffers, so that nothing is in reserve
        group = KVGroup.single(model.kv_specs, 0)
        forward = KVPass([group], length)
        mx.eval(model(Inputs(mx.zeros((1, length, width), DTYPES[dtype])), forward.layers))
        sizes.append(group.nbytes)
    per_token = memory_need(str(folder), dtype=dtype).kv_bytes_per_token
    assert sizes == [256 * per_token, 512 * per_token]


def test_context_that_the_config_leaves_out(tmp_path: Path) -> None:
    config = config_of(SPLIT)
    del config["text_config"]["max_position_embeddings"]
    folder = write(tmp_path / "m", SPLIT, tensors_of(SPLIT), config=config)
    assert memory_need(str(folder)).max_context == 2048


class TestFolders:
    def test_damaged_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        for model in (tmp_path / "m.gguf", tmp_path):
            with pytest.raises(WeightsError, match="damaged or cut off"):
                memory_need(str(model))

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="is no model"):
            memory_need(str(tmp_path))

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config_of(SPLIT)))
        with pytest.raises(ModelError, match="has no weights"):
            memory_need(str(tmp_path))

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "m", SPLIT, tensors_of(SPLIT))
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
        with pytest.raises(WeightsError, match="lacks 1 of 2 weight files"):
            memory_need(str(folder))

    @pytest.mark.parametrize(
        ("name", "value"), [("max_position_embeddings", [1]), ("hidden_size", "32"), ("hidden_size", -32)]
    )
    def test_nonsense(self, name: str, value: Any, tmp_path: Path) -> None:
        config = config_of(SPLIT)
        config["text_config"][name] = value
        folder = write(tmp_path / "m", SPLIT, tensors_of(SPLIT), config=config)
        with pytest.raises(ModelError, match="makes no sense"):
            memory_need(str(folder))


class Repository:
    """A repository whose small files are in `folder` and whose weights only the hub knows."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.error: Exception | None = None
        names = {mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32", mx.uint8: "U8"}
        tensors = {
            name: TensorInfo(dtype=names[array.dtype], shape=list(array.shape), data_offsets=(0, int(array.nbytes)))  # type: ignore[arg-type]
            for name, array in tensors_of(folder).items()
        }
        half = len(tensors) // 2
        self.files = {
            f"model-{number}.safetensors": SafetensorsFileMetadata({}, dict(part))
            for number, part in enumerate((list(tensors.items())[:half], list(tensors.items())[half:]))
        }
        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", self.metadata)
        monkeypatch.setattr(estimate, "resolve", lambda name, revision, weights: folder)

    def metadata(self, name: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        self.asked.append((name, revision))
        if self.error:
            raise self.error
        return SafetensorsRepoMetadata(None, True, {}, self.files)


class TestRepositories:
    @pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
    @pytest.mark.parametrize("kind", ["tied-with-head", "affine", "mxfp8"])
    def test_sizes_are_those_of_the_folder(
        self, kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = folder_of(kind, tmp_path)
        local = memory_need(str(folder), dtype=dtype)
        repository = Repository(folder, monkeypatch)
        (folder / "model.safetensors").unlink()
        need = memory_need("owner/name", "v1", dtype)
        assert repository.asked == [("owner/name", "v1")]
        assert not need.is_local
        assert need.weights_bytes == local.weights_bytes
        assert need.kv_bytes_per_token == local.kv_bytes_per_token

    def test_fetched_repositories_are_read_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = folder_of("affine", tmp_path)
        repository = Repository(folder, monkeypatch)
        assert memory_need("owner/name").is_local
        assert not repository.asked

    def test_half_fetched_repositories_are_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = folder_of("affine", tmp_path)
        repository = Repository(folder, monkeypatch)
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
        assert not memory_need("owner/name").is_local
        assert repository.asked

    @pytest.mark.parametrize(
        "error",
        [
            NotASafetensorsRepoError("no\nsafetensors"),
            SafetensorsParsingError("bad header"),
            ConnectionError("down"),
            OSError(),
        ],
        ids=repr,
    )
    def test_hub_that_gives_no_sizes(self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = folder_of("affine", tmp_path)
        repository = Repository(folder, monkeypatch)
        repository.error = error
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelNotFoundError, match="the hub gives no sizes for owner/name: ") as caught:
            memory_need("owner/name")
        assert "\n" not in str(caught.value)
