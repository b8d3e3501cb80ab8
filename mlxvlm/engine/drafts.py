"""Guesses of a row's next tokens, and whether guessing pays. Knows token ids, no tensors and no models.

Source: Saxena 2023, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); transformers
`PromptLookupCandidateGenerator`.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from mlxvlm.engine.admission import Sizes
from mlxvlm.engine.kv_cache import room_in_class
from mlxvlm.engine.sequence import Sequence
from mlxvlm.errors import UsageError

# A pass over more rows of tokens leaves the kernels that read each weight once (MLX: `get_qmv_batch_limit`, 10 to 16 of
# them), and more sequences than these fill a pass with their own next tokens.
MAX_POSITIONS = 16
MAX_ROWS = 4
MAX_DRAFT_TOKENS = MAX_POSITIONS - 1
_NGRAMS = (3, 2)  # tokens that must have occurred before, the longer first: its guesses are better
_FIRST_WIDTH, _LEAST_WIDTH = 4, 2  # tokens of a guess: the first one, and one after a failure
_FIRST_PAUSE, _LONGEST_PAUSE = 2, 64  # tokens without a guess; a failed pass in 64 steps costs next to nothing


class Lookup:
    """A row's text by its n-grams: what followed the last occurrence of its end may follow again.

    `foreign`: ids that only a prompt may have (placeholders); a guess ends before them. Takes some 300 bytes a token,
    of which keys and values take tens of kilobytes.
    """

    def __init__(self, token_ids: Seq[int], foreign: Collection[int], vocab_size: int) -> None:
        self._foreign, self._vocab_size = foreign, vocab_size
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # where what followed an n-gram stands
        self.extend(token_ids)

    @property
    def length(self) -> int:
        return len(self._ids)

    def extend(self, token_ids: Seq[int]) -> None:
        """More of the text."""
        ids, places = self._ids, self._places
        for token in token_ids:
            for size in _NGRAMS:
                if len(ids) >= size:
                    places[tuple(ids[-size:])] = len(ids)
            ids.append(token)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that may come next. A repetition that reaches the end goes on with itself."""
        ids = self._ids
        place = next((at for size in _NGRAMS if (at := self._places.get(tuple(ids[-size:])))), None)
        found: list[int] = []
        while place is not None and len(found) < count:
            token = ids[place] if place < len(ids) else found[place - len(ids)]
            if token in self._foreign or token >= self._vocab_size:
                break
            found.append(token)
            place += 1
        return found


class Pace:
    """How long one row's guesses are, and when they are made: hopeful at first, less and less often while they fail.

    A pass of guesses costs more than a step (up to its share of positions, on a machine that computes at its limit), so
    it must bring half of them.
    """

    def __init__(self, max_width: int) -> None:
        self._max_width = max_width
        self._pause = 0
        self._resume = 0  # the length of the answer from which on guesses are made
        self.width = min(_FIRST_WIDTH, max_width)

    def is_open(self, length: int) -> bool:
        """Whether to guess after `length` tokens of an answer."""
        return length >= self._resume

    def settle(self, length: int, guessed: int, accepted: int) -> None:
        """What came of a guess; the answer has `length` tokens now."""
        self.width = min(max(2 * accepted, _LEAST_WIDTH), self._max_width)
        if 2 * accepted >= guessed:
            self._pause = 0
        else:
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._resume = length + self._pause


class Drafter(Protocol):
    """Who guesses. kv_token: bytes of one position in each layer of a model of its own."""

    kv_token: Seq[int]

    def is_ready(self, row: Sequence) -> bool:
        """Whether a guess is likely once the token under way is read."""
        ...

    def guess(self, row: Sequence, count: int) -> list[int]:
        """At most `count` tokens that may come after what was read of a row's answer."""
        ...

    def forget(self, row_id: int) -> None:
        """A row has ended, or its text has changed."""
        ...


class FromText:
    """Guesses what stands in a row's own prompt and answer; see Lookup for `foreign`."""

    kv_token: Seq[int] = ()

    def __init__(self, foreign: Collection[int], vocab_size: int) -> None:
        self._foreign, self._vocab_size = foreign, vocab_size
        self._texts: dict[int, Lookup] = {}

    def is_ready(self, row: Sequence) -> bool:
        return len(self.guess(row, 2)) == 2  # the token under way, and one more

    def guess(self, row: Sequence, count: int) -> list[int]:
        text = self._texts.get(row.id)
        if text is None:
            text = self._texts[row.id] = Lookup(row.prompt.token_ids, self._foreign, self._vocab_size)
        text.extend(row.token_ids[row.before + text.length - len(row.prompt.token_ids) :])
        return text.guess(count)

    def forget(self, row_id: int) -> None:
        self._texts.pop(row_id, None)


class Speculation:
    """What is guessed of the rows of a batch. Guesses change the number of steps, never the tokens."""

    def __init__(self, drafters: Seq[Drafter], max_tokens: int) -> None:
        """At most `max_tokens` are guessed at once. Raises UsageError."""
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or not 1 <= max_tokens <= MAX_DRAFT_TOKENS:
            raise UsageError(
                f"the draft tokens must be a whole number from 1 to {MAX_DRAFT_TOKENS}, not {max_tokens!r}"
            )
        self._drafters = list(drafters)
        self._max_tokens = max_tokens
        self._paces: dict[int, Pace] = {}
        self._expecting: set[int] = set()  # rows whose token under way was read early

    def added_to(self, sizes: Sizes) -> Sizes:
        """With what guessing takes: keys and values of a draft model, logits of the positions of a pass."""
        if not self._drafters:
            return sizes
        specs = [spec for drafter in self._drafters for spec in drafter.kv_token]
        return replace(
            sizes,
            kv_token=sizes.kv_token + sum(specs),
            num_layers=min(sizes.num_layers, len(specs) or sizes.num_layers),
            checked=min(MAX_POSITIONS, MAX_ROWS * (1 + self._max_tokens)),
        )

    def expects(self, rows: Seq[Sequence]) -> bool:
        """Whether to wait for the tokens under way instead of starting a step without knowing them."""
        self._expecting = {row.id for row in self._open(rows) if any(each.is_ready(row) for each in self._drafters)}
        return bool(self._expecting)

    def drafts(self, rows: Seq[Sequence]) -> dict[int, list[int]]:
        """Guesses of rows all of whose tokens are read, by row; none for most."""
        expecting, self._expecting = self._expecting, set()
        # All rows are padded to the longest guess, which must not outgrow what any of them has reserved.
        room = min((min(row.max_tokens - len(row.token_ids), room_in_class(row.length)) for row in rows), default=0) - 1
        found = {}
        for row in self._open(rows):
            pace = self._paces[row.id]
            guess = self._guess(row, min(room, pace.width, MAX_POSITIONS // len(rows) - 1))
            if guess:
                found[row.id] = guess
            elif row.id in expecting:
                pace.settle(len(row.token_ids), 1, 0)
        return found

    def settle(self, row: Sequence, guessed: int, accepted: int) -> None:
        """What came of a row's guess, when its tokens are read."""
        self._paces[row.id].settle(len(row.token_ids) + accepted + 1, guessed, accepted)

    def forget(self, row_id: int) -> None:
        """A row has ended."""
        self._paces.pop(row_id, None)
        for drafter in self._drafters:
            drafter.forget(row_id)

    def _open(self, rows: Seq[Sequence]) -> list[Sequence]:
        """The rows that may have guesses now."""
        if not self._drafters or len(rows) > MAX_ROWS:
            return []
        able = [row for row in rows if not row.sampling.reads_history]
        for row in able:
            self._paces.setdefault(row.id, Pace(self._max_tokens))
        return [row for row in able if self._paces[row.id].is_open(len(row.token_ids))]

    def _guess(self, row: Sequence, count: int) -> list[int]:
        guesses = (drafter.guess(row, count) for drafter in self._drafters) if count > 0 else ()
        return next((guess for guess in guesses if guess), [])
