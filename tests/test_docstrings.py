"""Examples in docstrings are run, against the demo model."""

from __future__ import annotations

import asyncio
import doctest
from importlib import import_module
from pathlib import Path

import pytest

import mlxvlm

MODULES = ["mlxvlm", "mlxvlm.engine.asking", "mlxvlm.mistralrs.runner", "mlxvlm.mistralrs.builders"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with mlxvlm.load("demo") as engine:
        names = {"engine": engine, "mlxvlm": mlxvlm, "asyncio": asyncio}
        done = doctest.testmod(import_module(name), extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted > 0
    assert not done.failed
