"""The builders: what they send, and answers in both manners."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mlxvlm import (
    IsqType,
    ModelDType,
    RequestBuilder,
    TextMessageRole,
    TextMessages,
    TextModelBuilder,
    VisionArchitecture,
    VisionLoaderType,
    VisionMessages,
    VisionModelBuilder,
)
from mlxvlm.errors import UsageError
from mlxvlm.mistralrs.builders import Model
from tests.fakes import eventually

PICTURE = Path(__file__).parent.parent.parent / "examples" / "pictures" / "pink-heart.png"
ANSWER = " The heart is pink."


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with VisionModelBuilder("demo").build() as model:
        yield model


def question() -> VisionMessages:
    return VisionMessages().add_image_message(TextMessageRole.User, "What color is the heart?", [Image.open(PICTURE)])


def test_whole_streamed_and_async(model: Model) -> None:
    response = model.send_chat_request(question())
    assert response.choices[0].message.content == ANSWER
    assert response.usage.avg_prompt_tok_per_sec > 0
    assert response.usage.avg_compl_tok_per_sec > 0
    streamed = [chunk.choices[0].delta.content for chunk in model.stream_chat_request(question())]
    assert "".join(map(str, streamed)) == ANSWER

    async def both() -> tuple[str | None, str]:
        whole = await model.async_send_chat_request(question())
        pieces = [chunk.choices[0].delta.content async for chunk in model.async_stream_chat_request(question())]
        return whole.choices[0].message.content, "".join(map(str, pieces))

    assert asyncio.run(both()) == (ANSWER, ANSWER)


def test_a_cancelled_task_ends_its_answer(model: Model) -> None:
    messages = question()._set(ignore_eos=True, temperature=1.0)
    engine = model.runner._engine
    before = engine.stats().generated_tokens

    async def leave() -> None:
        task = asyncio.create_task(model.async_send_chat_request(messages))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert eventually(lambda: engine.stats().running == 0)
    assert engine.stats().generated_tokens - before < 1000  # of the context's 2,048


@pytest.mark.parametrize(
    "name",
    ["add_vllama_image_message", "add_llava_image_message", "add_qwen2vl_image_message", "add_idefics_image_message"],
)
def test_names_of_earlier_releases(model: Model, name: str) -> None:
    messages = getattr(VisionMessages(), name)(TextMessageRole.User, "What color is the heart?", PICTURE, model)
    assert model.send_chat_request(messages).choices[0].message.content == ANSWER


def test_a_chat(model: Model) -> None:
    messages = question().add_message(TextMessageRole.Assistant, ANSWER).add_message("user", "Where is it?")
    assert model.send_chat_request(messages).choices[0].message.content == " It is in the center."
    assert "demo" in str(model.send_chat_request(TextMessages().add_message("user", "Who are you?")).choices[0].message)
    with pytest.raises(UsageError, match="str"):
        model.send_chat_request("Who are you?")  # type: ignore[arg-type]


def test_what_a_request_builder_sends() -> None:
    builder = (
        RequestBuilder()
        .add_message("system", "s")
        .set_sampler_temperature(0.5)
        .set_sampler_topk(3)
        .set_sampler_topp(0.6)
        .set_sampler_minp(0.1)
        .set_sampler_max_len(7)
        .set_sampler_frequency_penalty(0.2)
        .set_sampler_presence_penalty(0.3)
        .set_sampler_stop_toks(["x"])
        .set_sampler_n_choices(2)
        .set_sampler_logits_bias({1: 2.0})
        .set_tools([{"type": "function"}])
        .set_tool_choice("auto")
        .set_constraint("regex", "a+")
        .with_truncate_sequence()
        .enable_thinking(False)
        .return_logprobs()
    )
    sent = builder.request(stream=True)
    assert sent.messages == [{"role": "system", "content": "s"}]
    assert (sent.temperature, sent.top_k, sent.top_p, sent.min_p, sent.max_tokens) == (0.5, 3, 0.6, 0.1, 7)
    assert (sent.frequency_penalty, sent.presence_penalty, sent.stop_seqs, sent.n_choices) == (0.2, 0.3, ["x"], 2)
    assert (sent.logit_bias, sent.tools, sent.tool_choice) == ({1: 2.0}, [{"type": "function"}], "auto")
    assert (sent.grammar_type, sent.grammar, sent.truncate_sequence) == ("regex", "a+", True)
    assert (sent.enable_thinking, sent.logprobs, sent.stream) == (False, True, True)
    assert TextMessages().request().temperature == 0.0
    assert RequestBuilder().request().temperature is None


def test_what_a_model_builder_loads() -> None:
    builder = (
        VisionModelBuilder("demo", VisionLoaderType.Idefics3)
        .with_isq(IsqType.Q8_0)
        .with_dtype(ModelDType.F32)
        .with_max_num_seqs(3)
        .with_prefix_cache_n(None)
        .with_token_source("cache")
        ._with(isq_cache=False)
    )
    with asyncio.run(builder.async_build()) as model:
        assert model.runner._engine.config.max_rows == 3
        assert model.runner._model.options.isq == "Q8_0"
        assert model.send_chat_request(question()).choices[0].message.content == ANSWER
    with pytest.raises(UsageError, match=r"VisionArchitecture\.Llama4"):
        VisionModelBuilder("demo").with_loader_type(VisionArchitecture.Llama4).build()
    with pytest.raises(UsageError, match="Q99"):
        VisionModelBuilder("demo").with_isq("Q99").build()
    assert TextModelBuilder("x").with_tool_callback("f", print)._options["tool_callbacks"] == {"f": print}


def test_logging_is_switched_on_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("mlxvlm")
    handlers, level = list(logger.handlers), logger.level
    try:
        VisionModelBuilder("demo").with_logging().with_logging()
        assert len(logger.handlers) == max(len(handlers), 1)
        assert logger.isEnabledFor(logging.INFO)
    finally:
        logger.handlers, logger.level = handlers, level
