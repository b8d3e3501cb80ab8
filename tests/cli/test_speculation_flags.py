"""The flags of speculation, from the command line to the engine's settings."""

from __future__ import annotations

import argparse

import pytest

from mlxvlm.cli.engine_options import add_engine_options, draft_source, engine_options
from mlxvlm.errors import UsageError
from mlxvlm.runner import load


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    return parser.parse_args(flags)


def test_flags() -> None:
    assert "speculation" not in engine_options(parsed())
    assert engine_options(parsed("--no-speculation"))["speculation"] == "off"
    some = engine_options(parsed("--draft-tokens", "5"))
    assert (some["speculation"], some["max_draft_tokens"]) == ("on", 5)


def test_the_draft_model_is_opened() -> None:
    assert draft_source(parsed()) is None
    source = draft_source(parsed("--draft-model", "demo"))
    assert source is not None
    assert source.max_context > 0
    with pytest.raises(UsageError, match="leave one of them out"):
        draft_source(parsed("--draft-model", "demo", "--no-speculation"))


def test_load_takes_a_draft_model() -> None:
    with load("demo", speculation="on", max_draft_tokens=3, draft_model="demo") as engine:
        assert (engine.config.speculation, engine.config.max_draft_tokens) == ("on", 3)
    with pytest.raises(UsageError, match="from 1 to 15, not 99"):
        load("demo", speculation="on", max_draft_tokens=99)
