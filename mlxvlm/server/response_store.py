"""Responses that can be asked for again, in memory: gone when the server ends. Knows no HTTP.

What a response stands on (its turns and those before it) is kept with it, so that it outlives the ones before it. Texts
that several responses share are counted for each; pictures are held, and counted, once.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxvlm.api.messages import ChatMessage
from mlxvlm.api.responses.answers import InputItem, Response
from mlxvlm.errors import UnknownResponseError

MAX_COUNT = 1000
MAX_BYTES = 256 << 20
KEEP_S = 24 * 3600.0
_SHOWN_CHARS = 80  # of an id that is unknown


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, what it was asked, and the turns that one after it goes on from.

    pictures: the bytes of the turns' pictures, by the names that they have in there.
    """

    response: Response
    items: Sequence[InputItem] = ()
    turns: Sequence[ChatMessage] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def text_bytes(self) -> int:
        """About what all but pictures takes."""
        return sum(len(each.model_dump_json()) for each in (self.response, *self.items, *self.turns))


def picture_name(data: bytes) -> str:
    """What stands for a picture in the turns of a stored response."""
    return f"stored:{hashlib.sha256(data).hexdigest()}"


class ResponseStore:
    """The least recently made go first. on_drop is told of each that goes. `clock` gives seconds."""

    def __init__(
        self,
        *,
        max_count: int = MAX_COUNT,
        max_bytes: int = MAX_BYTES,
        keep_s: float = KEEP_S,
        on_drop: Callable[[str], Any] = lambda name: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_count, self.max_bytes, self.keep_s = max_count, max_bytes, keep_s
        self.nbytes = 0
        self.on_drop, self._clock = on_drop, clock
        self._kept: OrderedDict[str, tuple[Kept, int, float]] = OrderedDict()
        self._pictures: dict[str, bytes] = {}
        self._uses: Counter[str] = Counter()

    def __len__(self) -> int:
        self._expire()
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def get(self, name: str) -> Kept:
        """Raises UnknownResponseError."""
        self._expire()
        if name not in self._kept:
            raise UnknownResponseError(
                f"there is no response {name[:_SHOWN_CHARS]!r} here: it was not stored, or before a restart"
            )
        return self._kept[name][0]

    def put(self, kept: Kept) -> None:
        """Keeps it, or its new state."""
        name = kept.response.id
        self._take(name)
        for picture, data in kept.pictures.items():
            if not self._uses[picture]:
                self._pictures[picture] = data
                self.nbytes += len(data)
            self._uses[picture] += 1
        kept = replace(kept, pictures={picture: self._pictures[picture] for picture in kept.pictures})
        size = kept.text_bytes()
        self.nbytes += size
        self._kept[name] = (kept, size, self._clock() + self.keep_s)
        self._expire()
        while self.nbytes > self.max_bytes or len(self._kept) > self.max_count:
            self.drop(next(iter(self._kept)))

    def drop(self, name: str) -> None:
        """Raises UnknownResponseError."""
        self.get(name)
        self._take(name)
        self.on_drop(name)

    def _expire(self) -> None:
        # All are kept equally long: the oldest stands first.
        while self._kept:
            name, (_, _, until) = next(iter(self._kept.items()))
            if until > self._clock():
                return
            self._take(name)
            self.on_drop(name)

    def _take(self, name: str) -> None:
        kept, size, _ = self._kept.pop(name, (None, 0, 0.0))
        self.nbytes -= size
        for picture in kept.pictures if kept is not None else ():
            self._uses[picture] -= 1
            if not self._uses[picture]:
                del self._uses[picture]
                self.nbytes -= len(self._pictures.pop(picture))
