"""What an engine can tell about itself. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of an engine; totals count from its start."""

    running: int  # requests with a row: vision, prefill or decode
    waiting: int  # requests that are prepared or wait for a row
    budget_bytes: int
    model_bytes: int  # of the budget: what was in use when the model was loaded
    reserved_bytes: int  # of the budget: the worst case of all rows
    steps: int  # decode steps
    generated_tokens: int
