"""Finds stop strings in streamed text. Knows text only: stop tokens are the sequence's business."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on as soon as it can't be the beginning of a stop string any more.

    A stop string may spread over any number of pieces; it and what follows are never passed on. Of several, the one
    that is complete first counts, so that the pieces don't matter.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def feed(self, text: str) -> str:
        """The text that is safe to pass on now."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            passed, self._held = self._held[:at], ""
            return passed
        keep = self._possible_start()
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
