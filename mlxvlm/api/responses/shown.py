"""What is told of a request to the Responses API beside its answer: the response's frame, and the input's items."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from mlxvlm.api.responses import answers, items
from mlxvlm.api.responses.convert import AnyItem, items_of
from mlxvlm.api.responses.request import ResponsesRequest, TextConfig
from mlxvlm.api.tools import TextFormat

MAX_URL_CHARS = 2048  # longer ones are pictures themselves
_PLAIN = TextConfig(format=TextFormat(type="text"), verbosity=None)


def new_id(kind: str) -> str:
    """Nobody can guess it."""
    return f"{kind}_{uuid.uuid4().hex}"


def response_of(body: ResponsesRequest, model: str) -> answers.Response:
    """The response before there is anything of an answer."""
    return answers.Response(
        id=new_id("resp"),
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=answers.ReasoningShown(effort=None if body.reasoning is None else body.reasoning.effort),
        store=body.store is not False,
        temperature=body.temperature,
        text=body.text if body.text is not None and body.text.format is not None else _PLAIN,
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs,
        top_p=body.top_p,
        truncation=body.truncation or "disabled",
        metadata=body.metadata or {},
    )


def shown_items(body: ResponsesRequest) -> list[answers.InputItem]:
    """The input as GET /v1/responses/{id}/input_items tells it."""
    return [shown for item in items_of(body) if (shown := _shown(item)) is not None]


def _shown(item: AnyItem) -> answers.InputItem | None:
    if isinstance(item, items.AskedMessage | items.InstructingMessage):
        content = item.content
        if isinstance(content, str):
            content = [items.InputText(type="input_text", text=content)]
        return answers.InputMessage(id=new_id("msg"), role=item.role, content=_parts(content))
    if isinstance(item, items.AnswerMessage):
        said = [item.content] if isinstance(item.content, str) else [*map(_said, item.content)]
        texts = [answers.OutputText(text=text) for text in said]
        return answers.OutputMessage(id=item.id or new_id("msg"), status="completed", content=texts)
    if isinstance(item, items.FunctionCall):
        return answers.OutputCall(
            id=item.id or new_id("fc"),
            call_id=item.call_id,
            name=item.name,
            arguments=item.arguments,
            status="completed",
        )
    if isinstance(item, items.FunctionCallOutput):
        output = item.output if isinstance(item.output, str) else _parts(item.output)
        return answers.CallOutput(id=item.id or new_id("fco"), call_id=item.call_id, output=output)
    return None


def _said(part: items.OutputPart) -> str:
    return part.text if isinstance(part, items.OutputText) else part.refusal


def _parts(content: Sequence[items.InputPart]) -> list[items.InputText | answers.ShownImage]:
    return [
        part
        if isinstance(part, items.InputText)
        else answers.ShownImage(
            image_url=part.image_url if len(part.image_url) <= MAX_URL_CHARS else None, detail=part.detail or "auto"
        )
        for part in content
    ]
