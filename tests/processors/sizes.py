"""Sizes of pictures that processors must take, and exact arithmetic beside their floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxvlm.messages import user
from mlxvlm.processors.base import Processor, Prompt

SIDES = st.integers(1, 5000)
EXTREMES = ((1, 1), (1, 5000), (5000, 1), (37, 5000), (5000, 37), (5000, 5000), (2, 3), (1080, 1920), (4032, 3024))
# Where a side is a whole number of tiles, an area a whole budget, or a fraction is dropped before a tile is counted.
EDGES = ((560, 560), (1120, 300), (24, 48), (336, 672), (20, 60), (900, 1110), (4, 7), (7, 4))
MAX_PIXELS = 40_000  # of pictures that are really made
FLOAT32_NOISE = Fraction(1, 1000)  # pixels; sides of 5000 have 6e-4 in float32


def any_size(test: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a test of (height, width) over random sizes and the extremes."""
    for height, width in EXTREMES + EDGES:
        test = example(height=height, width=width)(test)
    return settings(deadline=None)(given(height=SIDES, width=SIDES)(test))


@st.composite
def thin_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(height, width), either long, of pictures that are made in no time."""
    long = draw(SIDES)
    short = draw(st.integers(1, max(1, min(long, MAX_PIXELS // long))))
    return (long, short) if draw(st.booleans()) else (short, long)


def any_pictures(test: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a test of `sizes`, those of the pictures of one turn, over random ones and the extremes."""
    test = example(sizes=[(1, 1), (37, 5000), (5000, 37)])(test)
    return settings(deadline=None)(given(sizes=st.lists(thin_sizes(), min_size=1, max_size=4))(test))


def floors(exact: Fraction, noise: Fraction = Fraction(0)) -> set[int]:
    """What a float's floor may be: the exact one, and both neighbours of a whole number that rounding may miss."""
    nearest = round(exact)
    return {nearest - 1, nearest} if abs(exact - nearest) <= noise else {math.floor(exact)}


def ceilings(exact: Fraction) -> set[int]:
    return {exact.numerator, exact.numerator + 1} if exact.denominator == 1 else {math.ceil(exact)}


def prompt_of(processor: Processor, images: list[Any]) -> Prompt:
    return processor([user("Look.", images)])
