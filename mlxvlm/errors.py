"""Every error a user can meet. Each class knows its HTTP status and exit code; nothing here knows why it is raised.

Exit codes: 0 done, 1 a rank was lost, 2 usage, 3 input, 4 model, 5 internal, 130 interrupted.
"""

from __future__ import annotations

from typing import ClassVar


class MlxvlmError(Exception):
    """Base class. The message is one line that says what is wrong and, where there is one, the remedy."""

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 5
    code: str | None = None  # OpenAI's word for it, where it has one
    param: str | None = None  # the request's field that is wrong, as a path: messages[0].content

    def __init__(self, message: str) -> None:
        # Names and values of a checkpoint or a request stand in it, which may break lines or steer a terminal.
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


class UsageError(MlxvlmError):
    """A flag or a parameter has no meaning or is out of range."""

    http_status = 400
    exit_code = 2


class InputError(MlxvlmError):
    """What the user sent (messages, images, sizes) can't be answered."""

    http_status = 400
    exit_code = 3


class RequestError(InputError):
    """A field of a request is unknown, missing, or holds what it can't."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ImageError(InputError):
    """A picture can't be fetched, read or decoded."""

    code = "invalid_image"


class TemplateError(InputError):
    """The chat template refuses these messages."""


class ContextLengthError(InputError):
    """The prompt does not fit into the model's context."""

    code = "context_length_exceeded"


class MemoryBudgetError(InputError):
    """The request needs more memory than the engine may use, whatever else runs."""


class BodyError(InputError):
    """A request's body is no JSON that can be taken."""


class BodyTooLargeError(BodyError):
    """A request's body has more bytes than the server takes."""

    http_status = 413


class BodyTimeoutError(BodyError):
    """A request's body took too long to arrive."""

    http_status = 408


class UnknownResponseError(InputError):
    """No response of that name is kept."""

    http_status = 404
    code = "response_not_found"


class UnknownModelError(InputError):
    """The server serves no model of that name."""

    http_status = 404
    code = "model_not_found"  # as OpenAI says it


class ModelError(MlxvlmError):
    """The model can't be loaded."""

    exit_code = 4


class ModelNotFoundError(ModelError):
    """No such folder or repository, or no access to it."""

    http_status = 404
    code = "model_not_found"


class UnsupportedModelError(ModelError):
    """The checkpoint is of a kind that this runtime does not run."""

    http_status = 400


class WeightsError(ModelError):
    """A weight file is damaged, or its tensors are not the model's."""


class InternalError(MlxvlmError):
    """A defect of ours, or a device that failed."""


class EngineClosedError(MlxvlmError):
    """The engine was closed before the request was done."""

    http_status = 503
    retry_after_s: ClassVar[int] = 5  # a guess: a server is started again, a model is loaded again


class RanksError(MlxvlmError):
    """Ranks that run a model together could not meet, or one is lost, silent, or has gone another way: all end."""

    http_status = 503
    exit_code = 1


class AnswerTimeoutError(MlxvlmError):
    """A request's own time was over before there was anything of an answer."""

    http_status = 504
    code = "timeout"


class OverloadedError(MlxvlmError):
    """More requests wait than the engine takes; try again later."""

    http_status = 429
    code = "rate_limit_exceeded"
    retry_after_s: ClassVar[int] = 2  # a hint; HTTP's Retry-After
