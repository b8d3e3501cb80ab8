"""Drops the oldest turns of a chat that does not fit. Knows nothing of tokens: it is told what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxvlm.messages import Message


def truncated(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> Sequence[Message]:
    """The longest end of the chat that fits, with all its instructions; the last question at least, fit or not.

    What is left begins with a user's message, so that no answer stands without its question. Asks about log2(turns)
    times: a shorter chat is taken to fit where a longer one does.
    """
    heads = [index for index, message in enumerate(messages) if message.role == "user"]
    low, high = 0, max(len(heads) - 1, 0)
    while low < high:
        middle = (low + high) // 2
        if fits(_from(messages, heads[middle] if middle else 0)):
            high = middle
        else:
            low = middle + 1
    return _from(messages, heads[low]) if low else messages


def _from(messages: Sequence[Message], start: int) -> list[Message]:
    return [message for index, message in enumerate(messages) if index >= start or message.role == "system"]
