"""Token ids -> text, piece by piece. Knows nothing of vocabularies: it only asks for a list of ids to be decoded.

The pieces join to decode(all ids): a piece is given out only when it ends in a whole character, and each is cut out of
a window that begins at an earlier whole character, so decoders that look at neighbours (SentencePiece) agree too.
Source: the offsets of text-generation-inference `Model.decode_token`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

_INCOMPLETE = "�"  # what decoders give for the bytes of an unfinished character


class Detokenizer:
    """One sequence's stream of text. `visible`: the text of special tokens, which `decode` leaves out, to be shown."""

    def __init__(self, decode: Callable[[Sequence[int]], str], visible: Mapping[int, str] | None = None) -> None:
        self._decode = decode
        self._visible = visible or {}
        self._ids: list[int] = []
        self._window = 0  # where the decoded window begins
        self._given = 0  # ids whose text was given out

    def feed(self, token_id: int) -> str:
        """The new text, "" while a character is unfinished."""
        if token_id in self._visible:
            return self.flush() + self._visible[token_id]
        self._ids.append(token_id)
        text = self._new_text()
        # A token without text (a special one) is no place to begin a window: decoders strip what comes first.
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """The rest, with U+FFFD for what never became a character."""
        text = self._new_text()
        self._advance()
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._window : self._given])
        return self._decode(self._ids[self._window :])[len(known) :]

    def _advance(self) -> None:
        self._window, self._given = self._given, len(self._ids)
