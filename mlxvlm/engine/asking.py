"""Ways to ask an engine: whole or in pieces, in threads or coroutines, one question or many. Knows only submit().

A question is a text with its pictures, a Message or a list of them, or a Request, which has everything in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.params import SamplingOptions
from mlxvlm.engine.request import Completion, Request
from mlxvlm.engine.stream import Stream, collect
from mlxvlm.errors import MlxvlmError, UsageError
from mlxvlm.messages import Message, user

Question: TypeAlias = str | Message | Sequence[Message] | Request


class AskOptions(SamplingOptions, TypedDict, total=False):
    """SamplingParams by name, and how long the answer may take."""

    timeout_s: float | None


class Asking(ABC):
    """What an Engine can be asked.

    In all methods `images` is None, a picture or a list of them (path, URL, data: URL, base64 text, bytes,
    Pillow image, array [H, W, C] of uint8), and `options` are SamplingParams by name, and timeout_s; the rest is as the
    checkpoint says.
    They raise what submit() raises, and UsageError where a Request comes with something beside it.
    """

    config: EngineConfig

    @abstractmethod
    def submit(self, request: Request) -> Stream:
        """Starts a request."""

    def generate(self, question: Question, images: Any = None, **options: Unpack[AskOptions]) -> Completion:
        """Waits for a whole answer.

        >>> answer = engine.generate("How many shapes are there?", "examples/pictures/pink-heart.png", max_tokens=50)
        >>> answer.text.strip(), answer.finish_reason
        ('There is one shape.', 'stop')
        """
        return self.stream(question, images, **options).result()

    def stream(self, question: Question, images: Any = None, **options: Unpack[AskOptions]) -> Stream:
        """The answer's Deltas as they come; for a loop that may be left early see Stream.

        >>> for delta in engine.stream("What color is the heart?", ["examples/pictures/pink-heart.png"]):
        ...     print(delta.text, end="")
         The heart is pink.
        """
        return self.submit(self._request(question, images, options))

    def astream(self, question: Question, images: Any = None, **options: Unpack[AskOptions]) -> Stream:
        """The same for `async for`; leaving the loop, or cancelling the task, ends the answer.

        >>> async def show():
        ...     async for delta in engine.astream("Who are you?"):
        ...         print(delta.text, end="")
        >>> asyncio.run(show())
         I am a small demo model. I can see simple shapes in pictures.
        """
        return self.stream(question, images, **options)

    async def agenerate(self, question: Question, images: Any = None, **options: Unpack[AskOptions]) -> Completion:
        """Awaits a whole answer; cancelling the task ends it.

        >>> asyncio.run(engine.agenerate("Is there a heart?", "examples/pictures/pink-heart.png")).text
        ' Yes.'
        """
        return collect([delta async for delta in self.astream(question, images, **options)])

    @overload
    def batch(
        self, questions: Iterable[Question], *, return_errors: Literal[False] = False, **options: Unpack[AskOptions]
    ) -> Iterator[Completion]: ...

    @overload
    def batch(
        self, questions: Iterable[Question], *, return_errors: Literal[True], **options: Unpack[AskOptions]
    ) -> Iterator[Completion | MlxvlmError]: ...

    def batch(
        self, questions: Iterable[Question], *, return_errors: bool = False, **options: Unpack[AskOptions]
    ) -> Iterator[Completion | MlxvlmError]:
        """Answers in the order of the questions, which are drawn as room comes free: they may be without number.

        Twice as many as run at once are under way. With return_errors a question that fails gives its error in its
        place; else it is raised, which ends the others, as leaving the loop does.

        >>> picture = "examples/pictures/pink-heart.png"
        >>> questions = [mlxvlm.user(f"Is there a {shape}?", [picture]) for shape in ("star", "heart")]
        >>> [answer.text for answer in engine.batch(questions)]
        [' No.', ' Yes.']
        """
        waiting: deque[Stream | MlxvlmError] = deque()
        try:
            for question in questions:
                waiting.append(self._started(question, options))
                if len(waiting) >= 2 * self.config.max_rows:
                    yield _outcome(waiting.popleft(), return_errors)
            while waiting:
                yield _outcome(waiting.popleft(), return_errors)
        finally:
            for each in waiting:
                if isinstance(each, Stream):
                    each.cancel()

    def _started(self, question: Question, options: AskOptions) -> Stream | MlxvlmError:
        try:
            return self.submit(self._request(question, None, options))
        except MlxvlmError as error:
            return error

    def _request(self, question: Question, images: Any, options: AskOptions) -> Request:
        if isinstance(question, Request):
            if images is not None or options:
                raise UsageError("a Request has its pictures and parameters in it: give nothing beside it")
            return question
        if isinstance(question, str):
            pictures = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
            messages: Sequence[Message] = [user(question, pictures)]
        elif images is not None:
            raise UsageError("messages have their pictures in them: mlxvlm.user(text, pictures)")
        else:
            messages = [question] if isinstance(question, Message) else question
        sampling: dict[str, Any] = dict(options)
        timeout_s = sampling.pop("timeout_s", None)
        return Request(messages, replace(self.config.sampling, **sampling), timeout_s=timeout_s)


def _outcome(started: Stream | MlxvlmError, return_errors: bool) -> Completion | MlxvlmError:
    try:
        if isinstance(started, MlxvlmError):
            raise started
        return started.result()
    except MlxvlmError as error:
        if not return_errors:
            raise
        return error
