"""docs/server.md tells what the models say."""

from __future__ import annotations

from mlxvlm.api.schema import ChatCompletionRequest
from tools.server_fields import DOCUMENT, filled


def test_the_tables_are_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert filled(text) == text, "run python tools/server_fields.py"


def test_every_field_is_described() -> None:
    for name, field in ChatCompletionRequest.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
