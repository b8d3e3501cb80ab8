"""Halves that fit nothing, damaged metadata, missing tensors: one line each, and always a ModelError."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.gguf import GGUFFile
from mlxvlm.checkpoint.llama_cpp import load
from mlxvlm.checkpoint.llama_cpp.keys import Keys
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.errors import MlxvlmError, ModelError, UnsupportedModelError, UsageError, WeightsError
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, Arrays, write_mmproj, write_pair, write_text
from tests.golden import GOLDENS

SMOL, QWEN, LLAVA, LLAMA4 = (
    GOLDENS / name for name in ("smolvlm2_tied", "qwen2_vl_tied", "llava_clip", "llama4_norms")
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pairs")
    return {case.name: write_pair(root / case.name, case) for case in (SMOL, QWEN, LLAVA, LLAMA4)}


def refusal(model: Path, mmproj: Path | None = None, kind: type[MlxvlmError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        open_model(str(model), mmproj=mmproj).build(LoadOptions("float32"), lambda done, total: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPairs:
    def test_the_halves_by_name(self, pairs: dict[str, Path]) -> None:
        folder = pairs[SMOL.name]
        source = open_model(str(folder / TEXT), mmproj=folder / MMPROJ)
        assert source.config == open_model(str(folder)).config
        assert source.config["model_type"] == "idefics3"

    def test_a_picture_half_is_no_model(self, pairs: dict[str, Path]) -> None:
        path = pairs[SMOL.name] / MMPROJ
        assert "give the text model with -m" in refusal(path, kind=UsageError)

    def test_a_text_half_is_no_picture_half(self, pairs: dict[str, Path]) -> None:
        path = pairs[SMOL.name] / TEXT
        assert "is no mmproj: its architecture is 'llama'" in refusal(path, path, UsageError)

    def test_of_another_architecture(self, pairs: dict[str, Path]) -> None:
        text = refusal(pairs[SMOL.name] / TEXT, pairs[QWEN.name] / MMPROJ)
        assert "belongs to a text model of architecture qwen2vl, this one is llama" in text

    def test_of_another_width(self, pairs: dict[str, Path]) -> None:
        text = refusal(pairs[LLAVA.name] / TEXT, pairs[SMOL.name] / MMPROJ)
        assert "belongs to a text model of width 16, this one has 12: give the mmproj" in text

    def test_the_text_half_of_a_mixture_needs_the_other(self, pairs: dict[str, Path]) -> None:
        assert "give its mmproj with --mmproj" in refusal(pairs[LLAMA4.name] / TEXT, kind=UsageError)

    @pytest.mark.parametrize("golden", [SMOL, QWEN])
    def test_a_text_half_alone_reads_text(self, pairs: dict[str, Path], golden: Path) -> None:
        source = open_model(str(pairs[golden.name] / TEXT))
        assert source.config["model_type"] in ("llama", "qwen2")
        source.build(LoadOptions("float32"), lambda done, total: None)

    def test_two_models_in_a_folder(self, tmp_path: Path, pairs: dict[str, Path]) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes((pairs[SMOL.name] / TEXT).read_bytes())
        text = refusal(tmp_path)
        assert "holds a.gguf, b.gguf" in text
        assert "name the model's file with -m" in text

    def test_no_such_file(self, tmp_path: Path) -> None:
        assert "there is no file" in refusal(tmp_path / "none.gguf")

    def test_missing_mmproj(self, tmp_path: Path, pairs: dict[str, Path]) -> None:
        assert "there is no file" in refusal(pairs[SMOL.name] / TEXT, tmp_path / "none.gguf")


Change = Callable[[gguf.GGUFWriter, Arrays], None]


def changed(folder: Path, case: Path, text: Change | None = None, mmproj: Change | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    write_text(folder / TEXT, case, change=text)
    write_mmproj(folder / MMPROJ, case, change=mmproj)
    return folder


def without(*names: str) -> Change:
    def drop(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
        for name in names:
            arrays.pop(name)

    return drop


def with_key(key: str, value: Any) -> Change:
    """Replaced: the writer refuses a key twice."""

    def put(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
        kind = gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][key] = gguf.GGUFValue(value=value, type=kind)

    return put


class TestTensors:
    def test_missing_in_the_text(self, tmp_path: Path) -> None:
        text = refusal(changed(tmp_path, SMOL, text=without("blk.1.ffn_up.weight")), kind=WeightsError)
        assert "1 missing: model.text_model.layers.1.mlp.up_proj.weight" in text

    def test_missing_in_the_tower(self, tmp_path: Path) -> None:
        text = refusal(changed(tmp_path, QWEN, mmproj=without("v.blk.0.attn_k.bias")), kind=WeightsError)
        assert "visual.blocks.0.attn.qkv.bias needs v.blk.0.attn_k.bias, which the file lacks" in text

    @pytest.mark.parametrize("name", ["token_embd.weight"])
    def test_missing_embedding(self, tmp_path: Path, name: str) -> None:
        text = refusal(changed(tmp_path, SMOL, text=without(name)), kind=WeightsError)
        assert "lacks the tensor token_embd.weight: convert the model again" in text

    def test_unknown(self, tmp_path: Path) -> None:
        def add(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            arrays["blk.0.attn_q_norm.weight"] = np.ones(4, np.float32)

        assert "1 unknown: blk.0.attn_q_norm.weight" in refusal(changed(tmp_path, SMOL, text=add), kind=WeightsError)

    def test_fewer_tokens_than_rows(self, tmp_path: Path) -> None:
        def cut(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            arrays["token_embd.weight"] = arrays["token_embd.weight"][:100]

        text = refusal(changed(tmp_path, SMOL, text=cut), kind=WeightsError)
        assert "has more tokens than its embedding has rows" in text

    def test_fewer_rows_than_heads(self, tmp_path: Path) -> None:
        def cut(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            arrays["blk.1.attn_q.weight"] = arrays["blk.1.attn_q.weight"][:-2]

        text = refusal(changed(tmp_path, SMOL, text=cut), kind=WeightsError)
        assert "blk.1.attn_q.weight has 22 rows, the heads of the metadata have 24" in text


class TestMetadata:
    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("llama.block_count", 3, "block_count is 3, but it has 2 layers"),
            ("llama.block_count", 1, "block_count is 1, but it has 2 layers"),
            ("llama.block_count", "two", "llama.block_count is 'two', which makes no sense"),
            ("llama.attention.head_count", 0, "makes no sense"),
            ("llama.attention.head_count", True, "makes no sense"),
            ("llama.attention.head_count", 2**30, "has 24 rows, the heads of the metadata have"),
            ("llama.attention.head_count_kv", 2, "has 12 rows, the heads of the metadata have 24"),
            ("llama.attention.layer_norm_rms_epsilon", float("nan"), "makes no sense"),
            ("llama.embedding_length", 99, "makes no sense"),
            ("llama.rope.dimension_count", 4, "only a part of each head"),
            ("llama.rope.scaling.type", "yarn", "rope_type 'yarn' is not supported"),
            ("llama.expert_count", 8, "a mixture of 8 experts"),
            ("tokenizer.ggml.model", "bert", "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
            ("tokenizer.ggml.pre", "klingon", "tokenizer.ggml.pre 'klingon' is not supported"),
            ("general.architecture", "mamba", "the architecture 'mamba', which is not supported; supported: llama"),
        ],
    )
    def test_of_the_text(self, tmp_path: Path, key: str, value: Any, words: str) -> None:
        assert words in refusal(changed(tmp_path, SMOL, text=with_key(key, value)))

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("clip.projector_type", "resampler", "the projector 'resampler', which is not supported; supported: mlp"),
            ("clip.vision.block_count", 9, "has 2 layers"),
            ("clip.vision.image_std", [0.5, 0.0, 0.5], "makes no sense"),
            ("clip.vision.image_mean", [0.5], "makes no sense"),
            ("clip.vision.patch_size", 0, "patch_size is 0, which makes no sense"),
            ("clip.vision.patch_size", 3, "patch_size is 3, which makes no sense"),
            ("clip.vision.image_size", 2**30, "64 positions, 288230376151711744 are due"),
        ],
    )
    def test_of_the_pictures(self, tmp_path: Path, key: str, value: Any, words: str) -> None:
        assert words in refusal(changed(tmp_path, SMOL, mmproj=with_key(key, value)))

    def test_no_image_token(self, tmp_path: Path) -> None:
        def rename(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
            tokens[tokens.index("<|image_pad|>")] = "<|other|>"

        text = refusal(changed(tmp_path, QWEN, text=rename))
        assert "the text model has no token <|image_pad|>" in text

    def test_no_template(self, tmp_path: Path) -> None:
        def drop(writer: gguf.GGUFWriter, arrays: Arrays) -> None:
            writer.kv_data[0].pop("tokenizer.chat_template")

        folder = changed(tmp_path, QWEN, text=drop)
        assert "--chat-template FILE" in refusal(folder)
        template = tmp_path / "own.jinja"
        template.write_text("{{ messages[0].content }}")
        for model in (folder, changed(tmp_path / "with", QWEN)):
            assert open_model(str(model), chat_template=template).processor.template.source == template.read_text()


# Values of every type that GGUF has, and some that make sense.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 40),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 300), max_size=6).map(lambda values: np.array(values, np.int64)),
    st.lists(st.floats(), max_size=4),
    st.lists(st.text(max_size=4), max_size=5),
    st.lists(st.lists(st.integers(), max_size=2), max_size=2),
)


@pytest.mark.parametrize("golden", [SMOL, QWEN, LLAVA, LLAMA4], ids=lambda golden: golden.name)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_metadata_is_read_or_refused(
    pairs: dict[str, Path], golden: Path, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some keys gone or with other values, in either half: a model, or a ModelError; never anything else."""
    paths = pairs[golden.name] / TEXT, pairs[golden.name] / MMPROJ
    changes: dict[str, dict[str, Any]] = {}
    for path in paths:
        with GGUFFile(path) as file:
            keys = sorted(file.metadata)
        changes[str(path)] = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=3))

    def damaged(path: Path, file: GGUFFile) -> Keys:
        shapes = {name: info.shape for name, info in file.tensors.items()}
        merged = file.metadata | changes[str(path)]
        return Keys(str(path), {key: value for key, value in merged.items() if value is not None}, shapes)

    monkeypatch.setattr(load, "_keys", damaged)
    with suppress(ModelError, UsageError):
        source = open_model(str(paths[0]), mmproj=paths[1])
        source.family.build_model(source.config)


def test_unsupported_is_its_own_kind(tmp_path: Path) -> None:
    folder = changed(tmp_path, SMOL, text=with_key("general.architecture", "mamba"))
    refusal(folder, kind=UnsupportedModelError)
