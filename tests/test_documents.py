"""The Python blocks of the documents run: with the demo model, and pictures of ours, in the place of large ones."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve_demo import PICTURES, demo_server

ROOT = Path(__file__).parent.parent
NAMES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("python", "http", "embedding", "server"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(path.stem, index, block) for path in NAMES for index, block in enumerate(BLOCK.findall(path.read_text()))]
# What a small machine without a network has in the place of what the documents name.
SMALL = [
    (r'"[\w.-]+/(?:Llama-4|Cephalo|Qwen2|Idefics3|SmolVLM|llava)[\w.-]*"', '"demo"'),
    (r"VisionArchitecture\.\w+", "VisionArchitecture.Idefics3"),
    (r"VisionLoaderType\.\w+", "VisionLoaderType.Idefics3"),
    (r"<\|image\|>", "<image>"),
    (r"https://example\.org/picture\.png", "picture.png"),
]

# Not only does a block run: what it prints is what the picture shows.
RIGHT = {
    "What is this?": "pink heart",
    "What is shown in this image?": "pink heart",
    "What color is the heart?": "pink",
    "What is depicted here?": "pink heart",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with demo_server("--served-name", "demo", "--served-name", "llama-vision") as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the blocks call picture.png and other.png, and a home without caches of ours."""
    shutil.copy(PICTURES / "pink-heart.png", tmp_path / "picture.png")
    shutil.copy(PICTURES / "pink-square-blue-star.png", tmp_path / "other.png")
    shutil.copytree(PICTURES, tmp_path / "examples" / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = logging.getLogger("mlxvlm")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("document", "block"),
    [(document, block) for document, _, block in BLOCKS],
    ids=[f"{document}-{index}" for document, index, _ in BLOCKS],
)
def test_block(document: str, block: str, request: pytest.FixtureRequest) -> None:
    for pattern, small in SMALL:
        block = re.sub(pattern, small, block)
    if "localhost:1234" in block:
        # Relative paths are the server's, which is another process in another folder.
        url = request.getfixturevalue("server")
        block = block.replace("http://localhost:1234", url).replace("examples/pictures/", "")
        block = re.sub(r'(url": )"picture\.png"', r'\1"pink-heart.png"', block)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(block, f"{document}.md", "exec"), {"__name__": "__main__"})
    assert len(shown.getvalue().strip()) > 3
    for words, right in RIGHT.items():
        assert words not in block or right in shown.getvalue()


def test_there_are_blocks() -> None:
    """A slip in the expression that finds them must not pass for success."""
    counts = {path.stem: sum(document == path.stem for document, _, _ in BLOCKS) for path in NAMES}
    assert all(counts.values())
    assert counts["python"] >= 12
    assert counts["http"] >= 6
