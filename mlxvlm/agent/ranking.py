"""Passages of texts, the best for a question first. Knows words only.

Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

PASSAGE_CHARS = 1200  # about 300 tokens
_K1, _B = 1.5, 0.75  # the usual ones
# Scripts without spaces are counted by character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def passages_of(blocks: Iterable[str], size: int = PASSAGE_CHARS) -> list[str]:
    """Blocks joined to passages of at most `size` characters; longer ones are cut at spaces."""
    passages: list[str] = []
    current = ""
    for block in blocks:
        while block:
            piece, block = _first(block, size)
            if current and len(current) + 1 + len(piece) > size:
                passages.append(current)
                current = ""
            current = f"{current}\n{piece}" if current else piece
    return [*passages, current] if current else passages


def _first(block: str, size: int) -> tuple[str, str]:
    if len(block) <= size:
        return block, ""
    space = block.rfind(" ", 1, size)
    end = space if space > 0 else size
    return block[:end], block[end:].strip()


def bm25(query: str, passages: Sequence[str]) -> list[float]:
    """A score for each passage; 0 for one that shares no word with the query."""
    counts = [Counter(words_of(passage)) for passage in passages]
    lengths = [count.total() for count in counts]
    average = sum(lengths) / len(lengths) if lengths else 0.0
    scores = [0.0] * len(passages)
    for word in set(words_of(query)):
        having = sum(word in count for count in counts)
        weight = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
        for index, count in enumerate(counts):
            found = count[word]
            if found:
                length = _K1 * (1 - _B + _B * lengths[index] / average)
                scores[index] += weight * found * (_K1 + 1) / (found + length)
    return scores
