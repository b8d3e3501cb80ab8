"""A bar for long work, where somebody looks at it. Knows bytes and terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxvlm.runner import Progress

_DELAY_S = 0.5  # short work shows nothing


@contextmanager
def byte_bar(title: str) -> Iterator[Progress]:
    """A progress callback that draws on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(
        desc=title,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        delay=_DELAY_S,
        leave=False,
        disable=sys.stderr is None or not sys.stderr.isatty(),
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
