"""Tokenizers from a GGUF file's vocabulary, against a slow twin and against what the files' makers document."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.errors import ModelError, UnsupportedModelError
from mlxvlm.processors.ggml_tokenizer import PRE_TOKENIZERS, TokenType, Vocabulary, build, score_merges
from mlxvlm.processors.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    *("▁", "a", "b", "n", "t", "h", "e", "s", "i", "."),
    *("▁t", "he", "▁the", "▁a", "an", "at", "▁b", "th", "is", "▁this", "▁ban", "ana", "na", "▁banana", "..", "▁▁"),
]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<image>", "[PAD1]", "[PAD2]"]
KINDS = (
    [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    + [TokenType.BYTE] * 256
    + [TokenType.NORMAL] * len(PIECES)
    + [TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED]
)
SPECIAL = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
SENTENCEPIECE = Vocabulary(
    model="llama",
    pre="default",
    tokens=TOKENS,
    types=KINDS,
    scores=[0.0 if index < 259 else -float(index) for index in range(len(TOKENS))],
    special=SPECIAL,
)


def slow_pieces(text: str, vocabulary: Vocabulary) -> list[int]:
    """SentencePiece's rule: join the neighbours that make the likeliest token, leftmost first, until none does."""
    normal = {
        token: (vocabulary.scores[index], index)
        for index, token in enumerate(vocabulary.tokens)
        if vocabulary.types[index] == TokenType.NORMAL
    }
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(left + right, place) for place, (left, right) in enumerate(pairwise(symbols))]
        known = [(-normal[pair][0], place) for pair, place in pairs if pair in normal]
        if not known:
            break
        _, place = min(known)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    ids: list[int] = []
    for symbol in symbols:
        ids += [normal[symbol][1]] if symbol in normal else [3 + byte for byte in symbol.encode()]
    return ids


class TestSentencePiece:
    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet="abnthesi. ▁é漢\n", max_size=24))
    def test_equals_the_slow_twin(self, text: str) -> None:
        assert TOKENIZER.encode(text, add_special_tokens=False) == slow_pieces(text, SENTENCEPIECE)

    def test_the_beginning_of_a_sequence(self) -> None:
        assert TOKENIZER.encode("the", add_special_tokens=True)[0] == 1
        silent = build(replace(SENTENCEPIECE, adds_bos=False))
        assert silent.encode("the", add_special_tokens=True) == silent.encode("the", add_special_tokens=False)

    def test_space_in_front(self) -> None:
        without = build(replace(SENTENCEPIECE, adds_space=False))
        assert TOKENIZER.encode("the", add_special_tokens=False) == [TOKENS.index("▁the")]
        assert without.encode("the", add_special_tokens=False) == [TOKENS.index("t"), TOKENS.index("he")]
        assert TOKENIZER.decode([TOKENS.index("▁the")]) == "the"
        assert without.decode([TOKENS.index("▁the")]) == " the"

    def test_special_tokens_are_found_in_a_text(self) -> None:
        image, the = TOKENS.index("<image>"), TOKENS.index("▁the")
        assert TOKENIZER.encode("<image>the</s>", add_special_tokens=False) == [image, the, 2]
        assert TOKENIZER.decode([1, the, 2]) == "the"
        assert TOKENIZER.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

    def test_bytes_become_text(self) -> None:
        assert TOKENIZER.decode(TOKENIZER.encode("é漢", add_special_tokens=False)) == "é漢"

    def test_no_text_becomes_a_byte_token_by_its_name(self) -> None:
        tokens = ["<unk>", "<0x4", "1>", "<0x41>"]
        kinds = [TokenType.UNKNOWN, TokenType.NORMAL, TokenType.NORMAL, TokenType.BYTE]
        vocabulary = replace(SENTENCEPIECE, tokens=tokens, types=kinds, scores=[0.0] * 4)
        assert score_merges(vocabulary, {token: index for index, token in enumerate(tokens)}) == []

    def test_padding_of_the_vocabulary_is_left_out(self) -> None:
        assert TOKENIZER.token_id("[PAD1]") is None
        assert TOKENIZER.add_special("<new>") == TOKENS.index("[PAD1]")


TOKENIZER: Tokenizer = build(SENTENCEPIECE)

LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
WORDS = ["12", "34", "ab", "Ġa", "Ġab", "abab", "cat", "he", "'l", "'ll"]
BYTE_LEVEL = Vocabulary(
    model="gpt2",
    pre="gpt-2",
    tokens=[*LETTERS, *WORDS, "<|end|>", "<tag>"],
    types=[TokenType.NORMAL] * (len(LETTERS) + len(WORDS)) + [TokenType.CONTROL, TokenType.USER_DEFINED],
    merges=["1 2", "3 4", "a b", "Ġ a", "Ġ ab", "ab ab", "h e", "' l", "'l l"],
    special={"bos_token": len(LETTERS) + len(WORDS)},
)


def pieces(pre: str, text: str) -> list[str]:
    """How a text is cut before merging."""
    backend = build(replace(BYTE_LEVEL, pre=pre)).backend
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


class TestByteLevel:
    @pytest.mark.parametrize(
        ("pre", "text", "expected"),
        [
            ("gpt-2", "I'll pay 12345 now\n\n", ["I", "'ll", " pay", " 12345", " now", "\n\n"]),
            ("default", "a  b", ["a", " ", " b"]),
            ("smollm", "I'LL pay 123", ["I", "'", "LL", " pay", " ", "1", "2", "3"]),
            ("llama-bpe", "I'LL pay 12345 (now)\n\n", ["I", "'LL", " pay", " ", "123", "45", " (", "now", ")\n\n"]),
            ("smaug-bpe", "x1234", ["x", "123", "4"]),
            ("qwen2", "x12 y", ["x", "1", "2", " y"]),
            ("llama4", "HelloWorld I'll/\n 1234", ["Hello", "World", " I'll", "/\n", " ", "123", "4"]),
            ("tekken", "HelloWorld I'll 12", ["Hello", "World", " I", "'ll", " ", "1", "2"]),
        ],
    )
    def test_cuts(self, pre: str, text: str, expected: list[str]) -> None:
        assert pieces(pre, text) == expected

    @pytest.mark.parametrize("pre", PRE_TOKENIZERS)
    @settings(max_examples=30, deadline=None)
    @given(text=st.text(max_size=30))
    def test_nothing_is_lost(self, pre: str, text: str) -> None:
        normalised = build(replace(BYTE_LEVEL, pre=pre)).backend.pre_tokenizer.pre_tokenize_str(text)
        assert "".join(text[start:end] for _, (start, end) in normalised) == text

    def test_merges(self) -> None:
        tokenizer = build(BYTE_LEVEL)
        assert tokenizer.encode("ab ab", add_special_tokens=False) == [
            BYTE_LEVEL.tokens.index(token) for token in ("ab", "Ġab")
        ]

    def test_whole_words_go_before_merges_in_llama_3(self) -> None:
        """ "cat" is a token that no merge makes."""
        ids = [
            build(replace(BYTE_LEVEL, pre=pre)).encode("cat", add_special_tokens=False) for pre in ("llama-bpe", "dbrx")
        ]
        assert [len(found) for found in ids] == [1, 3]

    @pytest.mark.parametrize(
        ("pre", "said", "expected"),
        [("llama-bpe", None, 1), ("llama-bpe", False, 0), ("qwen2", None, 0), ("qwen2", True, 1)],
    )
    def test_the_beginning_of_a_sequence(self, pre: str, said: bool | None, expected: int) -> None:
        tokenizer = build(replace(BYTE_LEVEL, pre=pre, adds_bos=said))
        assert len(tokenizer.encode("a", add_special_tokens=True)) == 1 + expected

    def test_accents_are_composed_for_qwen(self) -> None:
        normalizers = [build(replace(BYTE_LEVEL, pre=pre)).backend.normalizer for pre in ("qwen2", "llama-bpe")]
        assert normalizers[0].normalize_str("e\u0301") == "\u00e9"
        assert normalizers[1] is None

    def test_added_tokens(self) -> None:
        tokenizer = build(BYTE_LEVEL)
        end, tag = BYTE_LEVEL.tokens.index("<|end|>"), BYTE_LEVEL.tokens.index("<tag>")
        assert tokenizer.encode("<tag><|end|>", add_special_tokens=False) == [tag, end]
        assert tokenizer.decode([tag, end]) == "<tag>"  # control tokens are not shown


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"types": [1]}, "token types"),
            ({"tokens": [], "types": []}, "the file's vocabulary is empty"),
            ({"merges": ["q z"]}, "fit no tokenizer"),
            ({"merges": [""]}, "fit no tokenizer"),
            ({"merges": ["ab"]}, "fit no tokenizer"),
        ],
    )
    def test_vocabularies_that_fit_nothing(self, changes: dict[str, list[str]], words: str) -> None:
        with pytest.raises(ModelError, match=words):
            build(replace(BYTE_LEVEL, **changes))

    def test_scores(self) -> None:
        with pytest.raises(ModelError, match="but 1 scores"):
            build(replace(SENTENCEPIECE, scores=[0.0]))

    @pytest.mark.parametrize("changes", [{"model": "t5"}, {"pre": "viking"}])
    def test_kinds(self, changes: dict[str, str]) -> None:
        with pytest.raises(UnsupportedModelError, match="is not supported; supported: "):
            build(replace(BYTE_LEVEL, **changes))
