"""The flags of speculation, from the command line to the engine's settings."""

from __future__ import annotations

import argparse

import pytest

from mlxvlm.cli.options import add_speculation_options, guesses
from mlxvlm.errors import UsageError
from mlxvlm.runner import Guesses, load


def parsed(*flags: str) -> Guesses:
    parser = argparse.ArgumentParser()
    add_speculation_options(parser)
    return guesses(parser.parse_args(flags))


def test_flags() -> None:
    assert parsed() == Guesses("auto", 8, None)
    assert parsed("--no-speculation") == Guesses("off", 8, None)
    assert parsed("--draft-tokens", "5") == Guesses("on", 5, None)
    source = parsed("--draft-model", "demo").source
    assert source is not None
    assert source.max_context > 0
    with pytest.raises(UsageError, match="leave one of them out"):
        parsed("--draft-model", "demo", "--no-speculation")


def test_load_takes_a_draft_model() -> None:
    with load("demo", speculation=3, draft_model="demo") as engine:
        assert (engine.config.speculation, engine.config.max_draft_tokens) == ("on", 3)
    with pytest.raises(UsageError, match="from 1 to 15, not 99"):
        load("demo", speculation=99)
