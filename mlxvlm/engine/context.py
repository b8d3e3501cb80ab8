"""What fits into the context: conversations cut to it, answers that outgrow it. Knows turns and ids, no tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, takewhile

from mlxvlm.engine import admission
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.request import Request
from mlxvlm.errors import ContextLengthError, InputError
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.processors.base import PreparedImage, Processor, Prompt, check_messages

_ENDLESS = sys.maxsize  # tokens of an answer that nothing bounds
_USUAL_ANSWER = 256  # tokens that truncation leaves for one without max_tokens
# Tokens that a shift never drops. Source: Xiao et al. 2023, attention sinks (arXiv 2309.17453).
_SINKS = 4


def make_prompt(processor: Processor, config: EngineConfig, request: Request, max_tokens: int | None) -> Prompt:
    """Of a request, cut to the context where it asks for that. Raises InputError and its kinds."""
    if request.prompt is not None:
        return request.prompt
    check_messages(request.messages)
    num_images, limit = sum(len(message.images) for message in request.messages), config.max_images
    if num_images > limit:
        raise InputError(f"the request has {num_images} images, but the limit is {limit}: send fewer")
    if not request.truncate:
        return processor(request.messages, request.template, request.image_options)
    answer = min(_USUAL_ANSWER if max_tokens is None else max_tokens, config.max_context // 4)
    return _Truncation(processor, request, config.max_context - answer).shortest_cut()


class _Truncation:
    """Tries a request's prompt without its oldest exchanges; no picture of a prompt that was made is decoded again.

    An exchange is a user's turn with all up to the next one: templates want a conversation to begin with the user, and
    a tool's result stays with its call.
    """

    def __init__(self, processor: Processor, request: Request, max_length: int) -> None:
        self._processor, self._request, self._max_length = processor, request, max_length
        self._first = _system_turns(request.messages)
        self._exchanges: list[list[Message]] = []
        for message in request.messages[len(self._first) :]:
            if message.role == "user" or not self._exchanges:
                self._exchanges.append([])
            self._exchanges[-1].append(message)
        self._most = max(len(self._exchanges) - 1, 0)  # exchanges that may be dropped
        self._pictures: dict[int, PreparedImage] = {}  # by the identity of their parts

    def shortest_cut(self) -> Prompt:
        """The prompt without as few exchanges as possible; the last one alone may be of any length."""
        prompt = self._without(0)
        if prompt is not None:
            return prompt
        too_few, enough, best = 0, self._most, self._without(self._most)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            prompt = self._without(middle)
            if prompt is None:
                too_few = middle
            else:
                enough, best = middle, prompt
        assert best is not None
        return best

    def _without(self, dropped: int) -> Prompt | None:
        """None where it does not fit."""
        kept = [*self._first, *chain.from_iterable(self._exchanges[dropped:])]
        request, is_last = self._request, dropped == self._most
        try:
            prompt = self._processor([self._prepared(turn) for turn in kept], request.template, request.image_options)
        except ContextLengthError:
            if is_last:
                raise
            return None
        parts = [part for turn in kept for part in turn.images]
        self._pictures |= {id(part): image for part, image in zip(parts, prompt.images, strict=True)}
        return prompt if is_last or len(prompt.token_ids) <= self._max_length else None

    def _prepared(self, message: Message) -> Message:
        """With what is known of its pictures in their places."""
        known = self._pictures
        parts = (ImagePart(known[id(part)]) if id(part) in known else part for part in message.parts)
        return replace(message, parts=tuple(parts))


def _system_turns(messages: Sequence[Message]) -> list[Message]:
    return list(takewhile(lambda message: message.role in ("system", "developer"), messages))


def limits(config: EngineConfig, prompt: Prompt, wanted: int | None) -> tuple[int, int, int]:
    """Tokens of an answer: those to reserve memory for, those that may come, those that fit into the context."""
    room = config.max_context - len(prompt.token_ids)
    longest = _ENDLESS if wanted is None else wanted
    if not config.context_shift:
        longest = min(longest, room)
    return min(admission.ANSWER_STEP if wanted is None else wanted, room), longest, room


def kept_beginning(processor: Processor, request: Request, prompt: Prompt) -> int:
    """Tokens that a shift keeps: the system turn with the header of the turn after it, else the sinks."""
    first = _system_turns(request.messages)
    if not first:
        return _SINKS
    try:
        other = processor([*first, Message("user", (TextPart("."),))], request.template, request.image_options)
    except InputError:  # a template that wants more than that
        return _SINKS
    pairs = zip(prompt.token_ids, other.token_ids, strict=False)
    return max(next((index for index, (one, two) in enumerate(pairs) if one != two), 0), _SINKS)


def shifted(prompt: Prompt, answer: Sequence[int], keep: int) -> Prompt:
    """What goes on as a prompt of its own: a prompt and its answer without the older half of what follows `keep`.

    A picture is dropped whole or stays whole, so that it may be a quarter, or nearly all.
    """
    ids = (*prompt.token_ids, *answer)
    start, end = _gap(len(ids), [image.span for image in prompt.images], keep)
    images = []
    for image in prompt.images:
        first, last = image.span
        if last <= start:
            images.append(image)
        elif first >= end:
            images.append(replace(image, span=(first - (end - start), last - (end - start))))
    return Prompt(ids[:start] + ids[end:], tuple(images))


def _gap(length: int, spans: Sequence[tuple[int, int]], keep: int) -> tuple[int, int]:
    """[start, end) of the tokens that are dropped: one at least, and never the last."""
    start = min(keep, (length - 1) // 2)
    start = next((first for first, last in spans if first < start < last), start)
    half = max((length - start) // 2, 1)
    end = start + half
    for first, last in spans:
        if first < end < last:
            # A small gap would soon be full again, and each shift is a prefill.
            end = first if 2 * (first - start) >= half else last
            break
    return start, end
