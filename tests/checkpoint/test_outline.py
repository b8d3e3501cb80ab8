"""What headers tell of GGUF and UQFF files is what reading and binding them gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint import outline, uqff
from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.container import Tensor, TensorFile
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.estimate import memory_need
from mlxvlm.checkpoint.ggml import GGMLType, nbytes
from mlxvlm.checkpoint.gguf import GGUFFile, TensorInfo
from mlxvlm.checkpoint.llama_cpp import load
from mlxvlm.checkpoint.llama_cpp.load import open_gguf
from mlxvlm.checkpoint.llama_cpp.names import Piece, Recipe
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.outline import add_gguf
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.errors import ModelError, ModelNotFoundError, UnsupportedModelError, UsageError
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, Kind, write_pair
from tests.checkpoint.test_uqff import samples, write_model
from tests.checkpoint.uqff_models import CONFIGS, config_of
from tests.checkpoint.uqff_samples import FORMATS
from tests.golden import GOLDENS

PAIRS = ["idefics3_split", "smolvlm2_tied", "qwen2_vl_tied", "llava_siglip", "llama4_norms", "llama4_dense"]
SPECS = [None, QuantSpec(8, 32), QuantSpec(4, 64)]


def shapes(weights: Mapping[str, mx.array]) -> dict[str, tuple[Any, ...]]:
    return {name: (array.shape, array.dtype) for name, array in weights.items()}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("golden", PAIRS)
def test_gguf(golden: str, kind: Any, spec: QuantSpec | None, tmp_path: Path) -> None:
    folder = write_pair(tmp_path, GOLDENS / golden, kind)
    model = open_gguf(folder / TEXT, folder / MMPROJ)
    found = Conversion(spec)
    stored = add_gguf(found, model, spec)
    read = model.read(spec)
    assert shapes(found.weights) == shapes(read.weights)
    assert found.dtype == read.dtype
    sizes = [path.stat().st_size for path in folder.glob("*.gguf")]
    assert 0.1 * sum(sizes) < stored < sum(sizes)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kinds", [[kind] for kind in FORMATS] + [list(FORMATS)], ids=lambda kinds: "-".join(kinds)[:9])
def test_uqff_formats(kinds: list[str], spec: QuantSpec | None, tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    layers = {}
    for path, sample in samples_of(config, kinds).items():
        layers[path] = sample.with_bias(np.zeros(sample.values.shape[0], np.float32)) if "q_proj" in path else sample
    files = write_model(tmp_path, config, layers)
    found, read = uqff.outline(files, tmp_path, spec), uqff.read(files, tmp_path, requantize=spec)
    assert shapes(found.weights) == shapes(read.weights)
    assert found.dtype == read.dtype


def samples_of(config: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Those layers that a type can hold."""
    widths = {"q8k": 256, "afq4_f16": 128, "afq4_bf16": 64}
    found = {}
    for path, sample in samples(config, ["unquant"]).items():
        usable = [kind for kind in kinds if sample.values.shape[-1] % widths.get(kind, 32) == 0]
        usable = [kind for kind in usable if sample.values.size % 64 == 0]
        if usable:
            kind = usable[len(found) % len(usable)]
            found[path] = FORMATS[kind](np.random.default_rng(1), sample.values.shape)
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_uqff_families(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    files = write_model(tmp_path, config, samples(config, ["q4_0", "unquant", "afq4", "f8q8", "mxfp4"]))
    assert shapes(uqff.outline(files, tmp_path).weights) == shapes(uqff.read(files, tmp_path).weights)


def built_bytes(options: LoadOptions, model: str, **source: Any) -> int:
    built = open_model(model, **source).build(options, lambda done, total: None)
    return sum(array.nbytes for _, array in tree_flatten(built.parameters()))


@pytest.mark.parametrize("requantize", ["8@32", "none"])
@pytest.mark.parametrize(("isq", "dtype"), [(None, "float32"), (None, "bfloat16"), ("8@32", "float32")])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
def test_memory_of_gguf_files(kind: Any, isq: str | None, dtype: str, requantize: str, tmp_path: Path) -> None:
    folder = write_pair(tmp_path, GOLDENS / "idefics3_split", kind)
    options = LoadOptions(dtype, isq, requantize=requantize)
    need = memory_need(str(folder), None, dtype, recipe_of(options), requantize=requantize)
    assert need.weights_bytes == built_bytes(options, str(folder))
    assert not need.misfit
    text, mmproj = folder / TEXT, folder / MMPROJ
    assert memory_need(str(text), None, dtype, recipe_of(options), mmproj, None, requantize) == need
    alone = memory_need(str(text), None, dtype, recipe_of(options), requantize=requantize)
    assert alone.weights_bytes == built_bytes(options, str(text)) < need.weights_bytes
    with pytest.raises(UsageError, match="is an mmproj"):
        memory_need(str(mmproj))


@pytest.mark.parametrize("requantize", ["8@32", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_of_uqff_files(dtype: str, requantize: str, tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    layers = samples_of(config, list(FORMATS))
    files = write_model(tmp_path, config, layers)
    options = LoadOptions(dtype, requantize=requantize)
    need = memory_need(str(tmp_path), None, dtype, from_uqff=str(files[0]), requantize=requantize)
    assert need.weights_bytes == built_bytes(options, str(tmp_path), from_uqff=str(files[0]))
    assert need == memory_need(str(tmp_path), None, dtype, requantize=requantize)
    assert need.disk_bytes == sum(path.stat().st_size for path in [*files, tmp_path / "residual.safetensors"])
    assert not need.misfit


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, model = write_pair(tmp_path / "gguf", GOLDENS / "qwen2_vl_tied", Kind.Q8_0), tmp_path / "uqff"
    config = config_of("qwen2_vl")
    write_model(model, config, samples(config, list(FORMATS)[2:4]))
    read = TensorFile.read

    def small(self: TensorFile, name: str) -> Tensor:
        tensor = read(self, name)
        assert tensor.data.size <= 16, name
        return tensor

    monkeypatch.setattr(TensorFile, "read", small)
    monkeypatch.setattr(GGUFFile, "bytes", None)
    assert memory_need(str(model)).weights_bytes
    assert memory_need(str(pair)).weights_bytes


def test_a_tensor_that_a_file_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pair(tmp_path, GOLDENS / "qwen2_vl_tied")
    open_file = GGUFFile.__init__

    def without_one(self: GGUFFile, path: Path) -> None:
        open_file(self, path)
        self.tensors.pop("blk.0.ffn_up.weight", None)

    monkeypatch.setattr(GGUFFile, "__init__", without_one)
    assert "layers.0.mlp.up_proj.weight" in memory_need(str(folder)).misfit


def test_old_files_say_that_their_headers_do_not_tell(tmp_path: Path) -> None:
    from tests.checkpoint.test_uqff_legacy import ORDERS, write_legacy

    family, order = next(iter(ORDERS.values()))
    write_legacy(tmp_path, config_of(family), order)
    with pytest.raises(UnsupportedModelError, match=r"UQFF 0\.x, .* about its own size"):
        memory_need(str(tmp_path))


def test_files_that_are_not_here_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(name: str, revision: str | None = None, weights: bool = True) -> Path:
        asked.append((name, weights))
        return GOLDENS / "qwen2_vl_tied"

    monkeypatch.setattr("mlxvlm.checkpoint.estimate.resolve", resolve)
    for name in ("q4k", "owner/name/q4k-0.uqff"):
        with pytest.raises(ModelNotFoundError, match="`mlxvlm pull some/model --from-uqff"):
            memory_need("some/model", from_uqff=name)
    assert not any(weights for _, weights in asked)
    with pytest.raises(ModelError):
        memory_need(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("kinds", [(GGMLType.Q8_0, GGMLType.Q4_0), (GGMLType.F16, GGMLType.Q8_0), (GGMLType.Q6K,) * 2])
def test_pieces_of_different_types(kinds: tuple[GGMLType, GGMLType], tmp_path: Path) -> None:
    class Fake:
        tensors: ClassVar = {
            name: TensorInfo(kind, (rows, 256), 0, 0, nbytes(kind, (rows, 256)))
            for name, kind, rows in zip("ab", kinds, (4, 2), strict=True)
        }

        def bytes(self, name: str) -> Any:
            return np.zeros(self.tensors[name].nbytes, np.uint8)

    recipe = Recipe("x.weight", (Piece("a", np.array([1, 0])), Piece("b")))
    for spec in SPECS:
        found, read = Conversion(spec), Conversion(spec)
        outline._add_recipe(found, Fake(), recipe, spec)  # type: ignore[arg-type]
        load._add(read, Fake(), tmp_path, recipe)  # type: ignore[arg-type]
        assert shapes(found.weights) == shapes(read.weights)
