"""What all bodies of requests have in common: they are strict, and their errors name the field. Knows no endpoint.

Numbers are no strings and strings no numbers, NaN and infinity are no numbers, a field that is not known is refused by
name, and null means "not given" everywhere, because clients send back whole messages of ours with their nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from mlxvlm.errors import RequestError

# Fields that OpenAI has and that can't be honoured, wherever they stand, with the remedy.
REFUSED_FIELDS: Mapping[str, str] = {
    "audio": "these models neither hear nor speak: leave it out",
    "prediction": "predicted outputs are not supported: leave it out",
    "functions": "it was replaced by tools: give tools=[{'type': 'function', 'function': {...}}]",
    "function_call": "it was replaced by tool_choice and tool_calls: use those",
    "suffix": "these models go on with a text, they fill no gaps: leave it out",
    "best_of": "answers are not ranked: ask for n of them",
    "conversation": "conversations are not kept: name the response to go on from in previous_response_id",
    "moderation": "this server moderates nothing: leave it out",
    "filters": "searches are not bound to domains: say in a message whom to trust",
    "allowed_domains": "searches are not bound to domains: say in a message whom to trust",
    "blocked_domains": "searches are not bound to domains: say in a message whom not to trust",
}

MAX_FIELDS = 256  # of one object; each one that is not known costs an error of its own
MAX_PATH_CHARS = 200  # of what an error repeats of a request


def _check_size(data: Mapping[str, Any]) -> None:
    if len(data) > MAX_FIELDS:
        raise PydanticCustomError("invalid_value", "an object can't have so many fields")


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    null = {"type": "null"}
    if null in schema.get("anyOf", ()) or not schema.keys() & {"type", "$ref", "const", "enum", "anyOf", "oneOf"}:
        return schema
    told = {key: value for key, value in schema.items() if key in ("default", "description", "title")}
    return {"anyOf": [{key: value for key, value in schema.items() if key not in told}, null], **told}


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        _check_size(data)
        return {name: value for name, value in data.items() if value is not None or not cls._may_be_null(name)}

    @classmethod
    def _may_be_null(cls, name: str) -> bool:
        return name in cls.model_fields or name in REFUSED_FIELDS

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Tells of the nulls that _drop_nulls lets pass, where the field's own type does not."""
        schema = handler(core_schema)
        inner = handler.resolve_ref_schema(schema)
        optional = inner.get("properties", {}).keys() - inner.get("required", [])
        for name in optional:
            inner["properties"][name] = _or_null(inner["properties"][name])
        return schema


class Returned(Body):
    """An object that may be a piece of an earlier answer, sent back with all the nulls that its client knows of."""

    @classmethod
    def _may_be_null(cls, name: str) -> bool:
        return True


B = TypeVar("B", bound=BaseModel)


def parse(shape: type[B], data: Any) -> B:
    """A body from decoded JSON. Raises RequestError for the first thing that is wrong, with where it stands."""
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        raise _request_error(error) from None
    except RecursionError:
        raise RequestError("the request is nested too deeply") from None


def by(key: str, default: str | None = None) -> Discriminator:
    """Chooses a member of a union by a field, where the members are tagged "<value>"; see path_of."""
    return Discriminator(lambda value: f"<{_get(value, key) or default}>")


def text_or(other: str) -> Discriminator:
    """Chooses between "<text>" and "<other>"."""
    return Discriminator(lambda value: "<text>" if isinstance(value, str) else f"<{other}>")


def one_of(
    key: str,
    *known: str,
    remedies: Mapping[str, str] | None = None,
    other: str | None = None,
    default: str | None = None,
) -> BeforeValidator:
    """Refuses an object whose `key` is none of the known words, with what to say instead where there is something.

    other: what to say of words without a remedy. default: the word of an object that has none.
    """
    choices = ", ".join(map(repr, known))

    def check(value: Any) -> Any:
        word = _get(value, key) or (default if isinstance(value, Mapping) else None)
        if word in known:
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("invalid_type", "must be an object")
        if word is None:
            message = f"must have the field {key!r}: {choices}"
        elif remedy := (remedies or {}).get(word, other):
            message = f"{key} {word[:MAX_PATH_CHARS]!r} is not supported: {remedy}"
        else:
            message = f"{key} must be one of {choices}"
        # Braces would be taken for places to fill in.
        raise PydanticCustomError("unsupported", "{message}", {"message": message})

    return BeforeValidator(check)


def _get(value: Any, key: str) -> Any:
    word = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return word if isinstance(word, str) else None


def path_of(place: tuple[str | int, ...], is_name: bool) -> str:
    """("messages", 0, "<user>", "content") -> "messages[0].content". The last is kept as it is where it is a name.

    What stands in angle brackets is the tag of a union's member, which the client has never seen.
    """
    path = ""
    for index, name in enumerate(place):
        if isinstance(name, int):
            path += f"[{name}]"
        elif name == "[key]":  # pydantic's word for what is wrong with a name itself
            continue
        elif not name.startswith("<") or (is_name and index == len(place) - 1):
            path += f".{name}" if path else name
    return path[:MAX_PATH_CHARS]


def _request_error(error: ValidationError) -> RequestError:
    errors = error.errors(include_url=False, include_input=False)
    first = errors[0]
    kind, place = first["type"], first["loc"]
    path = path_of(place, kind == "extra_forbidden")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if kind == "extra_forbidden":
        remedy = REFUSED_FIELDS.get(str(place[-1]))
        if remedy is not None:
            return RequestError(f"the field {path} is not supported: {remedy}{more}", path, "unsupported_parameter")
        return RequestError(f"the field {path} is not known: remove it{more}", path, "unknown_parameter")
    if kind == "missing":
        return RequestError(f"the field {path} is missing{more}", path, "missing_required_parameter")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    message = "must be an object" if kind == "model_type" else first["msg"]
    return RequestError(f"{path or 'the request'}: {_lower(message)}{more}", path or None, code)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
