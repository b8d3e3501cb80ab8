"""Rows, and what is left of them."""

from __future__ import annotations

import weakref

import mlx.core as mx
import pytest

from mlxvlm.engine.rows import Rows
from mlxvlm.processors.base import Prompt
from tests.fakes import FakeModel


def test_a_pass_that_failed_keeps_no_row_alive() -> None:
    def fail(x: mx.array) -> None:
        if x.shape[1] == 1:
            raise MemoryError("no room")

    model = FakeModel(on_call=fail)
    rows = Rows(model, model.kv_specs)
    rows.begin(7)
    rows.read(7, Prompt((1, 2, 3)), [])
    rows.fill(7, 0, 2)
    rows.join(7)
    assert rows.order() == [7]
    with pytest.raises(MemoryError):
        rows.run(mx.array([[3]], mx.uint32))
    held = weakref.ref(rows.batch.groups[0])
    rows.drop(7)
    assert held() is None
