"""Quantising while loading: streamed equals at once, on every family; what is and what is not quantised."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint import isq as streaming
from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.isq import Recipe, make_plan
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.recipe import TYPES, fitted, parse_type, promoted
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import UsageError, WeightsError
from mlxvlm.families import family_of
from mlxvlm.messages import user
from mlxvlm.runner import load
from tests.checkpoint.wide import CASES, config_of, write_wide

Tensors = dict[str, mx.array]
# One of each kind: bits that cross words, small groups, the float modes.
KINDS = sorted({spec: name for name, spec in TYPES.items()}.values())


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wide")
    return {family: write_wide(root / family, family) for family in CASES}


def loaded(folder: Path, **options: Any) -> Tensors:
    model = open_model(str(folder)).build(LoadOptions(**options), silent)
    return dict(tree_flatten(model.parameters()))


def at_once(folder: Path, options: LoadOptions) -> Tensors:
    """The slow twin: the whole model in full, then each layer quantised by MLX's own nn.quantize."""
    source = open_model(str(folder))
    model = source.build(LoadOptions(options.dtype), silent)
    plan = make_plan(source.family.build_model(source.config), recipe_of(options))

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        spec = plan.specs.get(path)
        return {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode} if spec else False

    nn.quantize(model, class_predicate=choose)
    return dict(tree_flatten(model.parameters()))


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array, equal_nan=True).item(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CASES)
def test_streamed_is_the_same_as_at_once(family: str, kind: str, folders: dict[str, Path]) -> None:
    options = LoadOptions(isq=kind, isq_tower=True)
    found = loaded(folders[family], isq=kind, isq_tower=True)
    assert_same(found, at_once(folders[family], options))
    assert any(name.endswith(".scales") for name in found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_quantised_as_halves(dtype: str, folders: dict[str, Path]) -> None:
    found = loaded(folders["llama4"], isq="4", dtype=dtype)
    assert_same(found, at_once(folders["llama4"], LoadOptions(dtype, "4")))
    assert {array.dtype for name, array in found.items() if name.endswith(".scales")} == {getattr(mx, dtype)}


@pytest.mark.parametrize("family", CASES)
def test_what_is_quantised(family: str, folders: dict[str, Path]) -> None:
    model = open_model(str(folders[family])).build(LoadOptions(isq="4@32"), silent)
    paths = model.quant_paths
    kinds = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    packed = {
        path: (module.bits, module.group_size) for path, module in model.named_modules() if hasattr(module, "bits")
    }
    high = {f"{paths.decoder}.embed_tokens", paths.head} & (packed.keys() | kinds.keys())
    assert {path: packed.pop(path) for path in high} == dict.fromkeys(high, (6, 32))
    assert set(packed.values()) == {(4, 32)}
    assert all(path.startswith(f"{paths.decoder}.layers.") for path in packed)
    # What is left in the decoder are routers.
    left = {path for path in kinds if path.startswith(f"{paths.decoder}.")}
    assert all(path.endswith(".router") for path in left)
    assert bool(left) == (family == "llama4")
    assert any(path.startswith(paths.tower) for path in kinds), "the tower's place is right, and it is left alone"


@pytest.mark.parametrize("family", CASES)
def test_the_tower_on_request(family: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    plain = open_model(str(folders[family])).build(LoadOptions(isq="8@32"), silent)
    model = open_model(str(folders[family])).build(LoadOptions(isq="8@32", isq_tower=True), silent)
    before = {path for path, module in plain.named_modules() if hasattr(module, "bits")}
    added = {path for path, module in model.named_modules() if hasattr(module, "bits")} - before
    assert added
    assert all(path.startswith(f"{model.quant_paths.tower}.") for path in added)
    is_narrow = family in ("idefics3", "llava_next")
    assert ("no group of 8@32 divides 48 inputs" in caplog.text) == is_narrow


@pytest.mark.parametrize("family", CASES)
def test_a_quantised_model_answers(family: str, folders: dict[str, Path]) -> None:
    """Eight bits change little: the logprobs are close to the full model's, but not equal."""
    answers = []
    for options in (LoadOptions(), LoadOptions(isq="8@32")):
        source = open_model(str(folders[family]))
        config = EngineConfig(source.max_context, frozenset())
        with Engine(lambda progress: source.build(options, progress), source.processor, config) as engine:  # noqa: B023
            picture = Path(__file__).parent.parent / "goldens" / "images" / "wide.png"
            sampling = SamplingParams(max_tokens=1, top_logprobs=1)
            completion = engine.generate(Request([user("What?", [picture])], sampling))
            answers.append(completion.logprobs[0].logprob)
    assert answers[0] != answers[1]
    assert answers[1] == pytest.approx(answers[0], abs=0.3)


def test_experts_come_one_by_one(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no stack is read whole."""
    read: list[tuple[str, int]] = []
    original = TensorFile.read_part

    def watched(self: TensorFile, name: str, ranges: Any) -> Any:
        (index,) = ranges[0][0]
        read.append((name, index))
        return original(self, name, ranges)

    monkeypatch.setattr(TensorFile, "read_part", watched)
    monkeypatch.setattr(TensorFile, "read", None)
    loaded(folders["llama4"], isq="4@32")
    stacks = [name for name, array in read_weights(folders["llama4"]).items() if array.ndim == 3]
    assert stacks
    assert sorted(read) == sorted((name, index) for name in stacks for index in range(3))


def test_progress_counts_the_full_tensors(folders: dict[str, Path]) -> None:
    source = open_model(str(folders["llama4"]))
    steps: list[tuple[int, int]] = []
    source.build(LoadOptions(isq="4"), lambda done, total: steps.append((done, total)))
    full = sum(array.nbytes for array in read_weights(folders["llama4"]).values())
    assert steps[-1] == (full, full)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


class TestMemory:
    """Peaks of MLX's own allocator."""

    WIDTH, LAYERS = 512, 24

    def config(self) -> dict[str, Any]:
        config = config_of("llava_next")
        config["text_config"] |= {
            "hidden_size": self.WIDTH,
            "intermediate_size": self.WIDTH,
            "head_dim": 256,
            "num_hidden_layers": self.LAYERS,
        }
        return config

    def peak_over(self, folder: Path, **options: Any) -> tuple[int, int, int]:
        """(peak, size of the bound model, largest source tensor), each in bytes."""
        source = open_model(str(folder))
        largest = max(array.nbytes for array in read_weights(folder).values())
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = source.build(LoadOptions(**options), silent)
        peak = mx.get_peak_memory() - before
        return peak, sum(array.nbytes for _, array in tree_flatten(model.parameters())), largest

    def test_peak_is_the_quantised_model_and_one_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.checkpoint.wide.config_of", lambda family: self.config())
        folder = write_wide(tmp_path / "m", "llava_next")
        full = (folder / "model.safetensors").stat().st_size
        peak, size, largest = self.peak_over(folder, isq="4")
        assert full > 5 * size
        assert peak <= 1.1 * (size + largest) + 2**18

    def test_peak_of_experts_is_one_expert(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = config_of("llama4")
        config["text_config"] |= {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 16}
        monkeypatch.setattr("tests.checkpoint.wide.config_of", lambda family: config)
        folder = write_wide(tmp_path / "m", "llama4")
        peak, size, largest = self.peak_over(folder, isq="4")
        expert = largest // 16
        assert peak <= 1.1 * (size + 3 * expert) + 2**18
        assert largest > size / 4, "else this shows nothing"


class TestPlan:
    def plan(self, family: str, recipe: Recipe) -> dict[str, QuantSpec]:
        config = config_of(family)
        return dict(make_plan(family_of(config).build_model(config), recipe).specs)

    def test_topology_goes_before_the_type(self) -> None:
        topology = Topology.parse("0-1: {isq: 8}\n1: {isq: none}\n/lm_head/: {isq: 4@32}", "t")
        specs = self.plan("idefics3", Recipe(QuantSpec(3, 32), topology))
        layer = "model.text_model.layers.{}.mlp.gate_proj"
        assert specs[layer.format(0)] == QuantSpec(8)
        assert layer.format(1) not in specs
        assert specs["lm_head"] == QuantSpec(4, 32)
        assert specs["model.text_model.embed_tokens"] == QuantSpec(6, 32)

    def test_topology_alone(self) -> None:
        specs = self.plan("llama4", Recipe(None, Topology.parse("1: {isq: 4@32}", "t")))
        assert specs
        assert all(".layers.1." in path and "router" not in path for path in specs)

    def test_a_pattern_reaches_the_tower_and_routers(self) -> None:
        topology = Topology.parse("/router\\.weight$|vision_model.*q_proj/: {isq: 8@32}", "t")
        specs = self.plan("llama4", Recipe(None, topology))
        assert {path.rpartition(".")[2] for path in specs} == {"router", "q_proj"}

    def test_what_is_quantised_already_stays(self, tmp_path: Path, folders: dict[str, Path]) -> None:
        model = open_model(str(folders["idefics3"])).build(LoadOptions(isq="4@32"), silent)
        assert not make_plan(model, Recipe(QuantSpec(8, 32))).specs


class TestTypes:
    @pytest.mark.parametrize(
        ("name", "spec"),
        [
            ("4", QuantSpec(4)),
            (8, QuantSpec(8)),
            ("q4k", QuantSpec(4)),
            ("Q4_K", QuantSpec(4)),
            ("q8_0", QuantSpec(8)),
            ("Q2K", QuantSpec(2, 32)),
            ("afq3", QuantSpec(3)),
            ("MXFP4", QuantSpec(4, 32, "mxfp4")),
            ("nvfp4", QuantSpec(4, 16, "nvfp4")),
            ("fp8", QuantSpec(8, 32, "mxfp8")),
            ("5@128", QuantSpec(5, 128)),
            (" afq6@32 ", QuantSpec(6, 32)),
        ],
    )
    def test_names(self, name: str | int, spec: QuantSpec) -> None:
        assert parse_type(name) == spec

    @pytest.mark.parametrize("name", ["", "7", "16", "4@48", "9@64", "q4", "mxfp4@32", "4@", "@32", "four", "-4"])
    def test_unknown_names_list_the_known(self, name: str) -> None:
        with pytest.raises(UsageError, match=r"is unknown; choose one of 2, 3, .*Q4K.*4@32"):
            parse_type(name)

    @pytest.mark.parametrize("name", [name for name in TYPES if re.fullmatch(r"Q\d(K|_0)|Q[45]_1", name)])
    def test_sizes_are_about_those_of_the_name(self, name: str) -> None:
        """In bits per weight, a 16-bit scale and bias counted for each group."""
        kind = gguf.GGMLQuantizationType[name.replace("K", "_K")]
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        spec = TYPES[name]
        assert abs(spec.bits + 32 / spec.group_size - 8 * size / numbers) < 0.5

    def test_every_listed_type_quantises(self) -> None:
        weight = mx.random.normal((4, 128), key=mx.random.key(0))
        for spec in TYPES.values():
            mx.eval(mx.quantize(weight, spec.group_size, spec.bits, mode=spec.mode))

    @pytest.mark.parametrize(
        ("spec", "width", "expected"),
        [
            (QuantSpec(4), 96, QuantSpec(4, 32)),
            (QuantSpec(4, 128), 64, QuantSpec(4, 64)),
            (QuantSpec(4, 32), 128, QuantSpec(4, 32)),
            (QuantSpec(4), 48, None),
            (QuantSpec(4, 16, "nvfp4"), 48, QuantSpec(4, 16, "nvfp4")),
            (QuantSpec(4, 32, "mxfp4"), 48, None),
        ],
    )
    def test_groups_fit(self, spec: QuantSpec, width: int, expected: QuantSpec | None) -> None:
        assert fitted(spec, width) == expected

    def test_promotion(self) -> None:
        assert promoted(QuantSpec(2, 32)) == QuantSpec(6, 32)
        assert promoted(QuantSpec(4, 64)) == QuantSpec(6)
        assert promoted(QuantSpec(5)) == promoted(QuantSpec(8)) == QuantSpec(8)
        assert promoted(QuantSpec(4, 16, "nvfp4")) == QuantSpec(6)
        assert promoted(QuantSpec(8, 32, "mxfp8")) == QuantSpec(8)


def test_a_file_that_shrinks_under_the_experts(tmp_path: Path) -> None:
    folder = write_wide(tmp_path / "m", "llama4")
    source = open_model(str(folder))
    cut: list[int] = []

    def shrink(done: int, total: int) -> None:
        if not cut:
            cut.append(done)
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate((folder / "model.safetensors").stat().st_size // 3)

    with pytest.raises(WeightsError, match=r"can't be read|damaged"):
        source.build(LoadOptions(isq="4@32"), shrink)


@pytest.mark.parametrize("isq", [None, "4@32"])
def test_a_file_that_shrinks_after_its_header_was_read(
    isq: str | None, tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["idefics3"], folder)
    source = open_model(str(folder))
    model, weights = source.family.build_model(source.config), read_weights(folder)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 4)
    with pytest.raises(WeightsError, match=r"tensor .*\.weight.* can't be read"):
        bind(model, weights, "float32", silent, recipe_of(LoadOptions(isq=isq)))


@pytest.mark.parametrize("isq", [None, "4@32"])
def test_what_stays_as_stored_is_read_some_at_a_time(
    isq: str | None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []

    def read(batch: Tensors, call: Any = streaming._read) -> Iterator[tuple[str, mx.array]]:
        batches.append([array.nbytes for array in batch.values()])
        return call(batch)

    expected = at_once(folders["idefics3"], LoadOptions(isq=isq))
    monkeypatch.setattr(streaming, "_BATCH_BYTES", 4096)
    monkeypatch.setattr(streaming, "_read", read)
    found = loaded(folders["idefics3"], isq=isq)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], array) for name, array in expected.items())
    assert all(sum(batch[:-1]) < 4096 for batch in batches)
    assert max(map(len, batches)) > 1
    assert sum(map(sum, batches)) > 10 * 4096


def test_a_part_of_a_stack(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of gate and up projections, stored as one tensor, only the gates are wanted."""
    topology = tmp_path / "t.yaml"
    topology.write_text("/experts.gate_proj/: {isq: 4@32}")
    options = LoadOptions(topology=topology)
    found = loaded(folders["llama4"], topology=topology)
    expected = at_once(folders["llama4"], options)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], array) for name, array in expected.items())
    assert all("gate_proj" in name for name in found if name.endswith(".scales"))


def test_layers_left_alone_are_told_in_one_line(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(folders["idefics3"], isq="4@32", isq_tower=True)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "not quantised: model.vision_model.encoder.layers.0.mlp.fc2, as no group of 4@32 divides 48 inputs"
    ]


def test_a_tower_without_a_type_is_no_request() -> None:
    with pytest.raises(UsageError, match=r"the vision tower's layers have no type: give one with isq \(--isq\)"):
        recipe_of(LoadOptions(isq_tower=True))


def test_both_names_of_the_parameter(folders: dict[str, Path]) -> None:
    for name in ("isq", "in_situ_quant"):
        options: dict[str, Any] = {name: "4@32"}
        with load(str(folders["idefics3"]), isq_cache=False, **options) as engine:
            assert any(hasattr(module, "bits") for _, module in engine._runner.model.named_modules())


@pytest.mark.parametrize("mode", ["naive", "isq", "cached"])
def test_the_benchmark_of_loading_runs(mode: str, folders: dict[str, Path], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bench_load", Path(__file__).parents[2] / "tools" / "bench_load.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sizes = [tool.child(mode, folders["llava_next"], tmp_path, "4@32")["model_bytes"] for _ in range(2)]
    assert sizes[0] == sizes[1] < (folders["llava_next"] / "model.safetensors").stat().st_size
