"""Guesses that tests decide about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxvlm.engine.engine import Engine
from mlxvlm.engine.request import Completion
from mlxvlm.engine.sequence import Sequence as Row

Spoil = Callable[[int], bool]  # whether the guess of a position of an answer is wrong


class Told:
    """A drafter that knows the answers, by prompt, and spoils some of its guesses."""

    def __init__(self, answers: Mapping[tuple[int, ...], Sequence[int]], spoil: Spoil = lambda at: False) -> None:
        self.answers, self.spoil = answers, spoil
        self.guessed: list[int] = []

    kv_token = ()

    def is_ready(self, row: Row) -> bool:
        return True

    def guess(self, row: Row, count: int) -> list[int]:
        first = len(row.token_ids)
        truth = self.answers.get(row.prompt.token_ids, ())[first : first + count]
        found = [(token + 1) % 50 if self.spoil(at) else token for at, token in enumerate(truth, first)]
        self.guessed.append(len(found))
        return found

    def forget(self, row_id: int) -> None:
        pass


def told(engine: Engine, drafter: Any) -> Any:
    """Puts a drafter in the place of an engine's own."""
    engine._decoding._speculation._drafters[:] = [drafter]
    return drafter


def outcome(completion: Completion) -> tuple[Any, ...]:
    return completion.text, completion.token_ids, completion.finish_reason
