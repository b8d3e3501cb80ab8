"""What every error's message is."""

from __future__ import annotations

import pytest

from mlxvlm.errors import WeightsError


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("layers.0 größe", "layers.0 größe"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[2J", r"\x1b[2J"),  # would clear the screen
        ("\u2028\ud800", r"\u2028\ud800"),
    ],
)
def test_one_line_that_any_terminal_can_show(name: str, shown: str) -> None:
    assert str(WeightsError(f"{name} is wrong")) == f"{shown} is wrong"
