"""Which model, and how it is loaded: what is honoured, passed over and refused."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import mlxvlm
from mlxvlm import Architecture, Runner, VisionArchitecture, Which
from mlxvlm.errors import ModelNotFoundError, UsageError
from mlxvlm.families import FAMILIES
from mlxvlm.mistralrs.architectures import check_architecture
from mlxvlm.mistralrs.choices import IsqType
from mlxvlm.mistralrs.loading import LoadableModel, _paths
from mlxvlm.mistralrs.options import IGNORED_OPTIONS, REFUSED_OPTIONS, RunnerOptions, check_options
from mlxvlm.mistralrs.requests import REFUSED_FIELDS, ChatCompletionRequest, CompletionRequest
from mlxvlm.mistralrs.which import IGNORED_ARGUMENTS, REFUSED_ARGUMENTS, check_which
from tests.golden import GOLDENS

ARCHITECTURES: list[Enum] = [*VisionArchitecture, *Architecture]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_checkpoint_has_one_architecture(model_type: str) -> None:
    fitting = []
    for arch in ARCHITECTURES:
        try:
            check_architecture(arch, "a model", {"model_type": model_type})
            fitting.append(arch)
        except UsageError as error:
            assert model_type in str(error)  # noqa: PT017
    assert len(fitting) == 1
    check_architecture(None, "a model", {"model_type": model_type})


# Tiny checkpoints, and the token that may be typed by hand.
PAGES = [
    (VisionArchitecture.Llama4, "llama4_norms", "<|image|>"),
    (VisionArchitecture.VLlama, "mllama_tiles", "<|image|>"),
    (VisionArchitecture.Qwen2VL, "qwen2_vl_tied", "<|vision_start|><|image_pad|><|vision_end|>"),
    (VisionArchitecture.Idefics3, "idefics3_split", "<image>"),
    (VisionArchitecture.Idefics3, "smolvlm2_tied", "<image>"),
    (VisionArchitecture.LLaVA, "llava_clip", "<image>"),
    (VisionArchitecture.LLaVANext, "llava_next_tiles", "<image>"),
]


@pytest.mark.parametrize(("arch", "name", "token"), PAGES)
def test_each_family_as_mistral_rs_writes_it(arch: VisionArchitecture, name: str, token: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": str(GOLDENS / "images" / "wide.png")}}
    with Runner(which=Which.VisionPlain(model_id=str(GOLDENS / name), arch=arch)) as runner:
        for text in ("What is this?", f"{token}What is this?"):
            res = runner.send_chat_completion_request(
                ChatCompletionRequest(
                    model="default",
                    messages=[{"role": "user", "content": [picture, {"type": "text", "text": text}]}],
                    max_tokens=4,
                    presence_penalty=1.0,
                    top_p=0.1,
                    temperature=0.1,
                )
            )
            assert res.choices[0].message.content is not None
            assert 0 < res.usage.completion_tokens <= 4
            assert res.usage.prompt_tokens_details.image_tokens > 0


def test_another_architecture_names_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"'idefics3'.*VisionArchitecture\.Idefics3"):
        Runner(which=Which.VisionPlain(model_id="demo", arch=VisionArchitecture.VLlama))
    with pytest.raises(UsageError, match="leave it out"):
        Runner(which=Which.VisionPlain(model_id="demo", arch="vllama"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_refused_arguments(name: str) -> None:
    kind: Any = Which.GGUF if name == "adapters" else Which.VisionPlain
    given = {"quantized_model_id": "x", "quantized_filename": "y"} if name == "adapters" else {"model_id": "demo"}
    with pytest.raises(UsageError, match=f"{name}: "):
        check_which(kind(**given, **{name: "x"}))


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_refused_options(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: "):
        Runner(Which.VisionPlain("demo"), **{name: 1})  # type: ignore[misc]
    check_options({name: None})  # type: ignore[misc]


def test_every_name_that_is_told_about_is_one() -> None:
    assert RunnerOptions.__annotations__.keys() >= {*IGNORED_OPTIONS, *REFUSED_OPTIONS}
    arguments = {*Which.VisionPlain.__annotations__, *Which.Plain.__annotations__, *Which.GGUF.__annotations__}
    assert arguments >= {*IGNORED_ARGUMENTS, *REFUSED_ARGUMENTS}
    fields = {*ChatCompletionRequest.__dataclass_fields__, *CompletionRequest.__dataclass_fields__}
    assert fields >= set(REFUSED_FIELDS)


def test_what_is_no_option_or_model() -> None:
    with pytest.raises(UsageError, match="no 'max_seq'"):
        Runner(Which.VisionPlain("demo"), max_seq=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="hf auth login"):
        Runner(Which.VisionPlain("demo"), token_source="literal:secret")
    with pytest.raises(UsageError, match="which takes a model"):
        Runner("demo")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Which\.XLora is not supported"):
        Which.XLora(xlora_model_id="x", order="y")  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="Which has no Other"):
        Which.Other  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(UsageError, match="Q99"):
        Runner(Which.VisionPlain("/no/such"), in_situ_quant="Q99")
    with pytest.raises(ModelNotFoundError):
        Runner(Which.VisionPlain("/no/such"))


@pytest.mark.parametrize("isq", IsqType)
def test_every_type_is_known(isq: IsqType) -> None:
    model = LoadableModel(Which.VisionPlain("demo"), {"isq_cache": False})
    assert model.requantized(isq.value).isq == isq.value


def test_gguf_files_lie_in_a_folder(tmp_path: Path) -> None:
    assert _paths(str(tmp_path), ["a.gguf", "b.gguf"], None) == [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    with pytest.raises(UsageError, match="quantized_filename"):
        Runner(Which.GGUF(str(tmp_path), []))


def test_aliases() -> None:
    assert Which.MultimodalPlain is Which.VisionPlain
    assert mlxvlm.MultimodalArchitecture is mlxvlm.VisionLoaderType is mlxvlm.MultimodalLoaderType is VisionArchitecture
    assert mlxvlm.MultimodalModelBuilder is mlxvlm.VisionModelBuilder
    assert mlxvlm.MultimodalMessages is mlxvlm.VisionMessages


@pytest.mark.peers("mistralrs")
def test_the_names_are_mistral_rs_s(mistralrs_python: Path) -> None:
    import subprocess

    code = "import mistralrs; print(*[n for n in dir(mistralrs.Runner) if n[0] != '_'])"
    done = subprocess.run([mistralrs_python, "-c", code], capture_output=True, text=True, check=True)
    from mlxvlm.mistralrs.runner import REFUSED_METHODS

    missing = set(done.stdout.split()) - set(dir(Runner)) - set(REFUSED_METHODS)
    assert not missing
