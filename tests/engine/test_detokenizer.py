"""Streamed text against the text of all ids at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from mlxvlm.engine.detokenizer import Detokenizer

Decode = Callable[[Sequence[int]], str]
_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral ship it: bytes as fallback, ▁ for a space, the first space dropped."""
    words = ["<s>", *_BYTES, "▁", "▁the", "▁cat", "s", "▁é", "🚲", "."]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3, Qwen and GPT-2: every byte is a token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *alphabet, "Ġthe", "Ġcat", "Ã©"]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {"sentencepiece": sentencepiece_like(), "byte_level": byte_level()}


def decode_of(name: str) -> Decode:
    return lambda ids: TOKENIZERS[name].decode(list(ids), skip_special_tokens=True)


def streamed(decode: Decode, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


@given(st.data())
def test_byte_level_pieces_join_to_the_whole(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, TOKENIZERS["byte_level"].get_vocab_size() - 1), max_size=40))
    decode = decode_of("byte_level")
    assert "".join(streamed(decode, ids)) == decode(ids)


@given(st.lists(st.one_of(st.sampled_from(["<s>", "▁", "▁the", "▁cat", "s", "▁é", "🚲", "."]), st.characters())))
def test_sentencepiece_pieces_join_to_the_whole(words: list[str]) -> None:
    # Bytes come as whole characters here: this decoder judges a run of bytes as one, so that a broken byte turns
    # those before it into U+FFFD too, which nothing that streams can take back.
    vocab = TOKENIZERS["sentencepiece"].get_vocab()
    ids = [
        token
        for word in words
        for token in ([vocab[word]] if word in vocab else [vocab[_BYTES[b]] for b in word.encode(errors="replace")])
    ]
    decode = decode_of("sentencepiece")
    assert "".join(streamed(decode, ids)) == decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=12))
def test_no_piece_cuts_a_character(name: str, text: str) -> None:
    vocab = TOKENIZERS[name].get_vocab()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    to_letter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name == "byte_level":
        letters = to_letter.pre_tokenize_str(text)[0][0] if text else ""
        assert set(letters) <= set(alphabet)
        ids = [vocab[letter] for letter in letters]
    else:
        ids = [vocab[_BYTES[byte]] for byte in text.encode()]
    if "�" not in text:
        assert not any("�" in piece for piece in streamed(decode_of(name), ids))


def test_a_character_of_four_tokens_comes_whole() -> None:
    vocab = TOKENIZERS["sentencepiece"].get_vocab()
    ids = [vocab[_BYTES[byte]] for byte in "🚲".encode()]
    assert streamed(decode_of("sentencepiece"), ids) == ["", "", "", "🚲", ""]


def test_an_unfinished_character_is_flushed() -> None:
    vocab = TOKENIZERS["sentencepiece"].get_vocab()
    assert streamed(decode_of("sentencepiece"), [vocab["s"], vocab[_BYTES[0xE2]]]) == ["s", "", "�"]


def test_spaces_between_words_survive_special_tokens() -> None:
    vocab = TOKENIZERS["sentencepiece"].get_vocab()
    ids = [vocab["<s>"], vocab["▁the"], vocab["<s>"], vocab["▁cat"]]
    assert "".join(streamed(decode_of("sentencepiece"), ids)) == "the cat"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
def test_visible_tokens_stand_between_whole_pieces(name: str, data: st.DataObject) -> None:
    tokenizer, decode = TOKENIZERS[name], decode_of(name)
    special = tokenizer.token_to_id("<s>")
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1) | st.just(special), max_size=20))
    detokenizer = Detokenizer(decode, {special: "<s>"})
    pieces = [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]
    assert "".join(pieces).count("<s>") == ids.count(special)
    assert all(piece.endswith("<s>") for token, piece in zip(ids, pieces, strict=False) if token == special)
    if special not in ids:
        assert pieces == streamed(decode, ids)


def test_a_visible_token_lets_an_unfinished_character_go() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(decode_of("byte_level"), {tokenizer.token_to_id("<s>"): "<s>"})
    half, word = tokenizer.token_to_id("Ã"), tokenizer.token_to_id("Ġcat")
    fed = [detokenizer.feed(token) for token in (half, tokenizer.token_to_id("<s>"), word)]
    assert fed == ["", "�<s>", " cat"]
