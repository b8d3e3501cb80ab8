"""Whole UQFF models: shards, versions, residuals, ties, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint import uqff
from mlxvlm.checkpoint.bind import bind, fit
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.errors import ModelError, UnsupportedModelError, WeightsError
from mlxvlm.families import family_of
from mlxvlm.processors.base import Prompt
from tests.checkpoint.uqff_models import CONFIGS, config_of, linear_paths, tensors_of, write_folder
from tests.checkpoint.uqff_samples import FORMATS, STACKED, VERSION, Sample, Stored, container, u32, write_container

IDS = (1, 2, 3, 50, 120, 7)


def samples(config: dict[str, Any], kinds: list[str]) -> dict[str, Sample]:
    """A layer for every module that can be quantised, the formats in turn."""
    rng = np.random.default_rng(1)
    layers = {}
    for number, (path, shape) in enumerate(linear_paths(config).items()):
        usable = [kind for kind in kinds if len(shape) == 2 or kind in STACKED]
        layers[path] = FORMATS[usable[number % len(usable)]](rng, shape)
    return layers


def write_model(folder: Path, config: dict[str, Any], layers: dict[str, Sample], shards: int = 2) -> list[Path]:
    """Layers over several files, split anywhere; everything else in the residual."""
    residual = {name: array for name, array in tensors_of(config).items() if name.removesuffix(".weight") not in layers}
    write_folder(folder, config, residual, "residual.safetensors")
    tensors = dict(VERSION)
    for path, sample in layers.items():
        tensors |= sample.named(path)
    names = list(tensors)
    files = []
    for number in range(shards):
        part = {name: tensors[name] for name in (*VERSION, *names[number::shards])}
        files.append(write_container(folder / f"mixed-{number}.uqff", part))
    return files


def twin(config: dict[str, Any], layers: dict[str, Sample]) -> dict[str, mx.array]:
    tensors = tensors_of(config) | {f"{path}.weight": sample.values for path, sample in layers.items()}
    return {name: mx.array(array) for name, array in tensors.items()}


def logits(config: dict[str, Any], weights: dict[str, mx.array], dtype: str = "float32") -> np.ndarray:
    from mlxvlm.engine.kv_cache import KVGroup, KVPass

    model = family_of(config).build_model(config)
    bind(model, weights, dtype, lambda done, total: None)
    inputs = model.embed_prompt(Prompt(IDS), [])
    forward = KVPass([KVGroup.single(model.kv_specs, 0)], len(IDS))
    hidden = model(inputs, forward.layers)
    assert hidden.dtype == {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[dtype]
    return np.array(model.logits(hidden)[0].astype(mx.float32))


EXACT = ["q4_0", "unquant", "q8_1", "gguf_f32", "fp8", "afq4", "f8q8", "mxfp4", "afq6"]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_loads_mixed_files(family: str, tmp_path: Path) -> None:
    """Names, quantised embeddings, vision and stacks of experts; the model equals its dequantised twin."""
    config = config_of(family)
    # Numbers of a usual size: the point is names and factors.
    layers = samples(config, [kind for kind in EXACT if kind not in ("fp8", "mxfp4")])
    files = write_model(tmp_path, config, layers)
    conversion = uqff.read(files, tmp_path)
    assert not conversion.notes()
    model = family_of(config).build_model(config)
    fit(model, model.sanitize(dict(conversion.weights)))
    found, expected = logits(config, conversion.weights), logits(config, twin(config, layers))
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", EXACT)
def test_each_type_computes_like_its_twin(kind: str, tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    paths = {path: shape for path, shape in linear_paths(config).items() if "mlp" in path or "embed_tokens" in path}
    layers = {path: FORMATS[kind](np.random.default_rng(3), shape) for path, shape in paths.items()}
    conversion = uqff.read(write_model(tmp_path, config, layers), tmp_path)
    assert all(np.isfinite(array).all() for array in twin(config, layers).values())
    found, expected = logits(config, conversion.weights), logits(config, twin(config, layers))
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def test_order_of_files_and_copies_of_the_version_do_not_matter(tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    files = write_model(tmp_path, config, samples(config, EXACT), shards=3)
    one, other = uqff.read(files, tmp_path).weights, uqff.read(files[::-1], tmp_path).weights
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], array) for name, array in other.items())


def small(folder: Path, **changes: Stored | None) -> list[Path]:
    """One layer in one file; names with __ for dots."""
    write_folder(folder, config_of("qwen2_vl"), {"norm.weight": np.ones(4, np.float32)}, "residual.safetensors")
    tensors: dict[str, Stored | None] = {**VERSION, **FORMATS["q4_0"](np.random.default_rng(0), (2, 32)).named("a.b")}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return [write_container(folder / "q4_0-0.uqff", kept)]


class TestVersions:
    def test_newer_minor_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnsupportedModelError, match=r"q4_0-0.uqff is of UQFF 1\.3\.0; up to 1\.2 can be read: update"
        ):
            uqff.read(small(tmp_path, uqff__version__minor=u32(3)), tmp_path)

    def test_other_major(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match=r"is of UQFF 2\.2\.0"):
            uqff.read(small(tmp_path, uqff__version__major=u32(2)), tmp_path)

    @pytest.mark.parametrize("minor", [0, 1, 2])
    def test_older_minors(self, minor: int, tmp_path: Path) -> None:
        assert "a.b.scales" in uqff.read(small(tmp_path, uqff__version__minor=u32(minor)), tmp_path).weights

    def test_no_version(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"its first shard is missing: no uqff\.version\.patch"):
            uqff.read(small(tmp_path, uqff__version__patch=None), tmp_path)


class TestNames:
    def test_a_tensor_in_two_shards(self, tmp_path: Path) -> None:
        (file,) = small(tmp_path)
        other = tmp_path / "q4_0-1.uqff"
        other.write_bytes(file.read_bytes())
        with pytest.raises(WeightsError, match=r"a\.b\.\S+ is in \S+-0\.uqff and, different, in \S+-1\.uqff"):
            uqff.read([file, other], tmp_path)

    def test_versions_that_differ(self, tmp_path: Path) -> None:
        (file,) = small(tmp_path)
        other = write_container(tmp_path / "q4_0-1.uqff", {"uqff.version.minor": u32(1)})
        with pytest.raises(WeightsError, match=r"uqff\.version\.minor is in"):
            uqff.read([file, other], tmp_path)

    @pytest.mark.parametrize("name", ["stray", "a.b.other", "c.weight", "c.bias"])
    def test_strays(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="are no tensors or layers of UQFF"):
            uqff.read(small(tmp_path, **{name: u32(1)}), tmp_path)

    def test_errors_name_file_and_layer(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"q4_0-0\.uqff: a\.b lacks shape"):
            uqff.read(small(tmp_path, **{"a.b.weight.shape": None}), tmp_path)

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no UQFF files"):
            uqff.read([], tmp_path)


class TestResidual:
    def test_none(self, tmp_path: Path) -> None:
        files = small(tmp_path)
        (tmp_path / "residual.safetensors").unlink()
        assert not uqff.has_residual(files)
        with pytest.raises(WeightsError, match=r"lacks residual\.safetensors"):
            uqff.read(files, tmp_path)

    def test_beside_the_files(self, tmp_path: Path) -> None:
        files = small(tmp_path / "files")
        assert uqff.has_residual(files)
        assert "norm.weight" in uqff.read(files, write_folder(tmp_path / "model", config_of("qwen2_vl"), {})).weights

    def test_ordinary_weights_go_before_it(self, tmp_path: Path) -> None:
        files = small(tmp_path / "files")
        model = write_folder(
            tmp_path / "model", config_of("qwen2_vl"), {"norm.weight": np.zeros(4), "a.b.weight": np.zeros((2, 32))}
        )
        weights = uqff.read(files, model).weights
        assert weights["norm.weight"].tolist() == [0] * 4
        assert weights["a.b.weight"].dtype == mx.uint32

    def test_its_dtype_is_the_models(self, tmp_path: Path) -> None:
        files = small(tmp_path)
        tensors = {"norm.weight": mx.ones((4,), mx.bfloat16), "other.weight": mx.ones((2,), mx.float32)}
        mx.save_safetensors(str(tmp_path / "residual.safetensors"), tensors)
        assert uqff.read(files, tmp_path).dtype == mx.bfloat16


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
@pytest.mark.parametrize("stored", ["head", "embedding", "both"])
def test_tied_models(family: str, stored: str, tmp_path: Path) -> None:
    """Minors before 1.2 have the head alone."""
    config = config_of(family, tie_word_embeddings=True)
    (embedding,) = [path for path in linear_paths(config) if path.endswith("embed_tokens")]
    sample = FORMATS["q4_0"](np.random.default_rng(0), (160, 64))
    names = {"head": ["lm_head"], "embedding": [embedding], "both": ["lm_head", embedding]}[stored]
    files = write_model(tmp_path, config, dict.fromkeys([embedding], sample), shards=1)
    tensors = dict(VERSION) | {name: tensor for path in names for name, tensor in sample.named(path).items()}
    write_container(files[0], tensors)
    weights = uqff.read(files, tmp_path).weights
    assert np.array_equal(logits(config, weights), logits(config, twin(config, {embedding: sample})))


def test_untied_models_need_their_embedding(tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    layers = samples(config, ["q4_0"])
    files = write_model(tmp_path, config, {path: s for path, s in layers.items() if "embed" not in path}, shards=1)
    residual = {
        name: array for name, array in mx.load(str(tmp_path / "residual.safetensors")).items() if "embed_" not in name
    }
    mx.save_safetensors(str(tmp_path / "residual.safetensors"), residual)
    with pytest.raises(WeightsError, match=r"1 missing: model\.embed_tokens\.weight"):
        logits(config, uqff.read(files, tmp_path).weights)


GOOD = container(
    VERSION | FORMATS["afq4"](np.random.default_rng(0), (2, 32)).with_bias(np.ones(2, np.float32)).named("a")
)
HEADER = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])


def refusal(folder: Path, data: bytes) -> str:
    file = folder / "x-0.uqff"
    file.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        uqff.read([file], folder)
    assert "\n" not in str(caught.value)
    assert "x-0.uqff" in str(caught.value)
    return str(caught.value)


class TestContainer:
    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            ({"data_offsets": [0, 3]}, "has 3 bytes for U32"),
            ({"data_offsets": [-1, 3]}, "makes no sense"),
            ({"data_offsets": [4, 8]}, "starts at 4 instead of 0|starts at"),
            ({"data_offsets": [0, 4, 8]}, "makes no sense"),
            ({"dtype": "F4"}, "is F4, a type that can't be read"),
            ({"dtype": 7}, "makes no sense"),
            ({"shape": [2**62, 2**62]}, "bytes for U32"),
            ({"shape": [True]}, "makes no sense"),
            ({"shape": [2**64]}, "makes no sense"),
            ({"shape": None}, "makes no sense"),
        ],
    )
    def test_entries_that_do_not_fit(self, entry: dict[str, Any], words: str, tmp_path: Path) -> None:
        name = "uqff.version.major"
        changed = container(VERSION, {name: {**HEADER[name], **entry}})
        (tmp_path / "x").write_bytes(changed)
        with pytest.raises(WeightsError, match=words):
            TensorFile(tmp_path / "x")

    def test_truncated_and_longer(self, tmp_path: Path) -> None:
        write_folder(tmp_path, config_of("qwen2_vl"), {"n": np.ones(1)}, "residual.safetensors")
        assert "damaged or truncated (its tensors need" in refusal(tmp_path, GOOD[:-1])
        assert "damaged or truncated (its tensors need" in refusal(tmp_path, GOOD + b"\0")
        assert "a header of" in refusal(tmp_path, GOOD[:4])
        assert "a header of" in refusal(tmp_path, (2**63).to_bytes(8, "little") + GOOD[8:])
        assert "its header is no JSON" in refusal(tmp_path, b"\4" + bytes(7) + b"[1,,")
        assert "no JSON object" in refusal(tmp_path, b"\4" + bytes(7) + b"[12]")
        assert "its header is no JSON" in refusal(tmp_path, (200_000).to_bytes(8, "little") + b"[" * 200_000)
        assert "run `git lfs pull`" in refusal(tmp_path, b"version https://git-lfs.github.com/spec/v1\n")
        assert "a name twice" in refusal(tmp_path, b"\x0f" + bytes(7) + b'{"a":1,"a":  2}')

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="can't be read: No such file"):
            TensorFile(tmp_path / "none.uqff")


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Never a crash, whatever byte or number of the header is wrong."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        write_folder(folder, config_of("qwen2_vl"), {"n": np.ones(1)}, "residual.safetensors")
    raw = bytearray(GOOD)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from([name for name in HEADER if name != "__metadata__"]))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        value: Any = data.draw(
            st.lists(st.integers(-1, 2**64) | st.integers(0, 300), max_size=4)
            | st.sampled_from(["F32", "U8", "U32", "F8_E4M3", "I64", "X"])
        )
        header = {**HEADER, name: {**HEADER[name], field: value}}
        text = json.dumps(header).encode()
        raw = bytearray(len(text).to_bytes(8, "little") + text + GOOD[8 + int.from_bytes(GOOD[:8], "little") :])
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x-0.uqff").write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try:
        assert isinstance(uqff.read([folder / "x-0.uqff"], folder), Conversion)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
