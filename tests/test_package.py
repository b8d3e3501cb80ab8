"""What `import mlxvlm` brings, and what it does not."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import mlxvlm

NEVER = ("torch", "torchvision", "transformers", "mlx_lm", "llguidance")  # unless asked for
HEAVY = (
    *("mlx", "mlx.core", "starlette", "uvicorn", "httpx2", "pydantic", "numpy", "PIL", "huggingface_hub"),
    *("rich", "prompt_toolkit", *NEVER),
)


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_the_package_alone_is_light() -> None:
    assert not modules_after("import mlxvlm") & set(HEAVY)


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["run", "--help"], ["doctor", "--help"], ["chat", "--help"], ["serve", "--help"], ["--version"]],
)
def test_help_is_light(argv: list[str]) -> None:
    code = f"import mlxvlm.cli\ntry: mlxvlm.cli.main({argv!r})\nexcept SystemExit as end: assert end.code == 0"
    assert not modules_after(code) & set(HEAVY)


@pytest.mark.parametrize("extra", [[], ["--image", "examples/pictures"]])
def test_running_needs_neither_torch_nor_transformers(extra: list[str]) -> None:
    root = Path(__file__).parent.parent
    if extra:
        extra = ["--image", str(sorted((root / extra[1]).glob("*.png"))[0])]
    argv = ["run", "-m", "demo", *extra, "hello", "--max-tokens", "3"]
    loaded = modules_after(f"import mlxvlm.cli; assert mlxvlm.cli.main({argv!r}) == 0")
    assert "mlx.core" in loaded
    assert not {name.split(".")[0] for name in loaded} & set(NEVER)


def test_public_names() -> None:
    for name in mlxvlm.__all__:
        assert getattr(mlxvlm, name) is not None
    assert set(mlxvlm._HOMES) == set(mlxvlm.__all__) - {"__version__"}
    assert dir(mlxvlm) == sorted(mlxvlm.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        mlxvlm.nothing  # noqa: B018


def test_the_version_is_one() -> None:
    assert version("mlxvlm") == mlxvlm.__version__


def test_types_ship() -> None:
    assert (Path(mlxvlm.__file__).parent / "py.typed").is_file()
