"""`mlxvlm quantize`: the folder it writes is a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint import write
from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.isq import Recipe
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.quantize import quantize_folder, quantize_uqff
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.checkpoint.write import new_folder, write_shards
from mlxvlm.cli import main
from mlxvlm.errors import ModelError, ModelNotFoundError, UsageError
from mlxvlm.families import family_of
from tests.checkpoint.wide import CASES, config_of, write_wide

Tensors = dict[str, mx.array]
_LLAVA = ("language_model.", "vision_tower.vision_model.", "multi_modal_projector.", "image_newline")
_IDEFICS3 = ("language_model.", "vision_model.", "connector.")
PARTS = {
    "idefics3": _IDEFICS3,
    "llama4": ("language_model.", "vision_model.", "multi_modal_projector."),
    "llava_next": _LLAVA,
    "mllama": ("language_model.", "vision_tower.", "multi_modal_projector."),
    "qwen2_vl": ("language_model.", "vision_tower."),
    "smolvlm": _IDEFICS3,
}
FOUR = Recipe(QuantSpec(4, 32))


def silent(done: int, total: int) -> None:
    pass


def parameters(folder: Path, **options: Any) -> Tensors:
    return dict(tree_flatten(open_model(str(folder)).build(LoadOptions(**options), silent).parameters()))


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and mx.array_equal(found[name], array).item()
        for name, array in expected.items()
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("family", CASES)
def test_the_folder_is_what_loading_with_isq_gives(family: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    source, out = write_wide(tmp_path / "source", family, dtype), tmp_path / "deep" / "er" / "out"
    quantize_folder(str(source), out, FOUR, "auto", silent)
    name = "bfloat16" if dtype == mx.bfloat16 else "float32"
    assert same(parameters(out, dtype=name), parameters(source, dtype=name, isq="4@32"))
    assert {path.name for path in source.iterdir()} <= {path.name for path in out.iterdir()}
    assert not list(tmp_path.glob("deep/er/.*")), "drafts are gone"
    assert out.stat().st_mode & 0o777 == 0o755
    assert mx.load(str(out / "model.safetensors"), return_metadata=True)[1]["format"] == "mlx"
    floats = {array.dtype for array in read_weights(out).values()} - {mx.uint32}
    assert floats == {dtype}


@pytest.mark.parametrize("family", CASES)
def test_names_are_those_of_mlx_community(family: str) -> None:
    """sanitize takes them back, one by one."""
    model = family_of(config_of(family)).build_model(config_of(family))
    for name, array in tree_flatten(model.parameters()):
        published, stored = model.published(name, array)
        (back,) = model.sanitize({published: stored}).items()
        assert (back[0], back[1].shape) == (name, array.shape)
        assert published.startswith(PARTS[family])


def test_convolutions_have_their_channels_last(tmp_path: Path) -> None:
    source, out = write_wide(tmp_path / "source", "qwen2_vl"), tmp_path / "out"
    quantize_folder(str(source), out, FOUR, "auto", silent)
    kernels = {name: array.shape for name, array in read_weights(out).items() if array.ndim == 5}
    assert kernels == {"vision_tower.patch_embed.proj.weight": (32, 2, 4, 4, 3)}


def test_the_config_names_types_as_mlx_loaders_read_them(tmp_path: Path) -> None:
    source, out = write_wide(tmp_path / "source", "idefics3"), tmp_path / "out"
    topology = Topology.parse("0: {isq: mxfp4}\n/q_proj/: {isq: 8@32}\n/layers.1.*k_proj/: {isq: none}", "t")
    quantize_folder(str(source), out, Recipe(QuantSpec(4, 32), topology), "auto", silent)
    config = json.loads((out / "config.json").read_text())
    block = config["quantization"]
    assert config["quantization_config"] == block
    tensors = read_weights(out)
    modules = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    usual = {key: block[key] for key in ("bits", "group_size", "mode")}
    assert usual == {"bits": 4, "group_size": 32, "mode": "mxfp4"} or usual["mode"] == "affine"
    for path in modules:
        entry = block.get(path, usual)
        width = tensors[f"{path}.scales"].shape[-1] * entry["group_size"]
        assert tensors[f"{path}.weight"].shape[-1] * 32 == width * entry["bits"]
        assert (f"{path}.biases" in tensors) == (entry["mode"] == "affine")
    assert block["language_model.layers.0.self_attn.q_proj"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert "language_model.layers.1.self_attn.k_proj" not in modules
    assert block["language_model.embed_tokens"]["bits"] == 6
    original = json.loads((source / "config.json").read_text())
    assert {key: value for key, value in config.items() if not key.startswith("quant")} == original


def test_tensors_that_this_runtime_never_binds_are_kept(tmp_path: Path) -> None:
    """LLaVA's tower ends before its last layer; other runtimes want the whole."""
    source, out = write_wide(tmp_path / "source", "llava_next"), tmp_path / "out"
    tensors = dict(read_weights(source))
    unused = "vision_tower.vision_model.post_layernorm.weight"
    tensors |= {unused: mx.ones((32,)), "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((8,))}
    mx.eval(tensors)
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    quantize_folder(str(source), out, FOUR, "auto", silent)
    found = read_weights(out)
    assert unused in found
    assert not any("inv_freq" in name for name in found)


def test_a_type_for_what_stays(tmp_path: Path) -> None:
    """For tensors that this runtime never binds too."""
    source, out = write_wide(tmp_path / "source", "llava_next"), tmp_path / "out"
    tensors = read_weights(source) | {"vision_tower.vision_model.post_layernorm.weight": mx.ones((32,))}
    mx.eval(tensors)
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    quantize_folder(str(source), out, FOUR, "bfloat16", silent)
    assert {array.dtype for array in read_weights(out).values()} == {mx.uint32, mx.bfloat16}


@pytest.mark.parametrize("kind", ["4@32", "8", "mxfp4"])
@pytest.mark.parametrize("family", CASES)
def test_uqff_files_are_what_loading_with_isq_gives(family: str, kind: str, tmp_path: Path) -> None:
    source, out = write_wide(tmp_path / "source", family), tmp_path / "out"
    recipe = recipe_of(LoadOptions(isq=kind, isq_tower=True))
    quantize_uqff(str(source), out, recipe, "auto", silent)
    found = parameters(out)
    expected = parameters(source, isq=kind, isq_tower=True)
    # Marks of re-packed layers, which change nothing here.
    found = {name: array for name, array in found.items() if not name.endswith(".output_scale")}
    assert same(found, expected)
    stem = {"4@32": "afq4", "8": "afq8", "mxfp4": "mxfp4"}[kind]
    assert [path.name for path in out.glob("*.uqff")] == [f"{stem}-0.uqff"]


def test_uqff_of_what_is_quantised_already(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source", "idefics3")
    quantize_folder(str(source), tmp_path / "first", FOUR, "auto", silent)
    with pytest.raises(UsageError, match="is quantised already: give the original checkpoint"):
        quantize_uqff(str(tmp_path / "first"), tmp_path / "out", FOUR, "auto", silent)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is no model: it has no config\.json"):
        quantize_folder(str(tmp_path), tmp_path / "out", FOUR, "auto", silent)


def test_the_card_names_repositories_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of two parts is none."""
    write_wide(tmp_path / "my" / "model", "idefics3")
    monkeypatch.chdir(tmp_path)
    quantize_folder("my/model", tmp_path / "out", FOUR, "auto", silent)
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source", "idefics3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for out in (tmp_path / "out", tmp_path / "out" / "precious", source):
        for quantize in (quantize_folder, quantize_uqff):
            with pytest.raises(UsageError, match="is there already: give a new folder"):
                quantize(str(source), out, FOUR, "auto", silent)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    (tmp_path / "empty").mkdir()
    quantize_folder(str(source), tmp_path / "empty", FOUR, "auto", silent)
    assert parameters(tmp_path / "empty")


def test_places_that_no_folder_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_wide(tmp_path / "source", "idefics3")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path("."), tmp_path / "link"):
        with pytest.raises(UsageError, match="is there already: give a new folder"):
            quantize_folder(str(source), out, FOUR, "auto", silent)


@pytest.mark.parametrize("name", ["model.gguf", "model.GGUF", "m.uqff"])
def test_files_of_other_formats_are_no_source(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="is quantised already: give an ordinary checkpoint"):
        quantize_folder(str(tmp_path / name), tmp_path / "out", FOUR, "auto", silent)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("broken")])
def test_an_interruption_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source", "idefics3")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(type(error)):
        quantize_folder(str(source), tmp_path / "out", FOUR, "auto", stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quantised_again(tmp_path: Path) -> None:
    """What is quantised already stays; the rest can follow."""
    source, first, second = (tmp_path / name for name in ("source", "first", "second"))
    write_wide(source, "idefics3")
    quantize_folder(str(source), first, Recipe(None, Topology.parse("0: {isq: 8@32}", "t")), "auto", silent)
    quantize_folder(str(first), second, FOUR, "auto", silent)
    block = json.loads((second / "config.json").read_text())["quantization"]
    assert block["language_model.layers.0.mlp.up_proj"]["bits"] == 8
    assert block["bits"] == 4 or block["language_model.layers.1.mlp.up_proj"]["bits"] == 4


class TestShards:
    def test_sizes_and_index(self, tmp_path: Path) -> None:
        tensors = {f"t{number}": mx.full((100,), number) for number in range(7)}
        weight_map = write_shards(tmp_path, tensors.items(), max_bytes=1000)
        names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert names == [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {"total_size": 2800}, "weight_map": weight_map}
        assert same(read_weights(tmp_path), tensors)

    def test_a_tensor_larger_than_a_shard_has_one_of_its_own(self, tmp_path: Path) -> None:
        tensors = {"a": mx.zeros((10,)), "b": mx.zeros((1000,)), "c": mx.zeros((10,))}
        weight_map = write_shards(tmp_path, tensors.items(), max_bytes=100)
        assert len(set(weight_map.values())) == 3

    def test_one_shard_has_no_number(self, tmp_path: Path) -> None:
        assert write_shards(tmp_path, [("a", mx.zeros((1,)))]) == {"a": "model.safetensors"}

    def test_hubs_limit(self) -> None:
        assert write.MAX_SHARD_BYTES <= 5_000_000_000

    def test_a_place_that_cant_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelError, match="can't be written"), new_folder(tmp_path / "file" / "out"):
            pass

    def test_a_folder_that_appears_meanwhile_wins(self, tmp_path: Path) -> None:
        def race() -> None:
            with new_folder(tmp_path / "out") as draft:
                (draft / "mine").write_text("")
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "theirs").write_text("")

        with pytest.raises(ModelError, match="can't be written"):
            race()
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


class TestCommand:
    def test_it_writes_and_tells_the_size(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = write_wide(tmp_path / "source", "idefics3")
        out = tmp_path / "out"
        assert main(["quantize", "-m", str(source), "-o", str(out), "--isq", "q4k"]) == 0
        assert capsys.readouterr().out.startswith(f"{out}: ")
        assert "| 4@64 |" in (out / "README.md").read_text()

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            ([], "nothing to do: give a type with --isq"),
            (["--isq", "q99"], "quantisation 'q99' is unknown"),
            (["--topology", "/no/such.yaml"], "topology file /no/such.yaml can't be read"),
        ],
    )
    def test_usage_errors(
        self, flags: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_wide(tmp_path / "source", "idefics3")
        assert main(["quantize", "-m", str(source), "-o", str(tmp_path / "out"), *flags]) == 2
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
