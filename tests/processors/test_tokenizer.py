"""Ids and texts over tokenizer.json, and what the other files add to it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxvlm
from mlxvlm.errors import ContextLengthError, InputError, ModelError
from mlxvlm.processors.base import check_length
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer
from tests.processors.checkpoints import BOS, byte_tokenizer

BYTES = 256
PIECE = 1 << 16  # characters that check_length reads at a time
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def added(content: str, **flags: Any) -> dict[str, Any]:
    return {"content": content, "special": True, **FLAGS, **flags}


def read(
    folder: Path, config: dict[str, Any] | None = None, special_map: dict[str, Any] | None = None, **make: Any
) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        byte_tokenizer(**make).save(str(file))
    return Tokenizer.from_files(file, config or {}, special_map or {})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing in .*: this runtime needs the fast tokenizer"):
        Tokenizer.from_files(tmp_path / "tokenizer.json", {}, {})


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "None"}}'], ids=ascii)
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_files(file, {}, {})
    assert str(caught.value).startswith(f"{file} can't be read: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_prefix_that_aborts_the_process_elsewhere(tmp_path: Path) -> None:
    content = json.loads(byte_tokenizer().to_str())
    content["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="a continuing_subword_prefix are not supported"):
        Tokenizer.from_files(tmp_path / "tokenizer.json", {}, {})
    content["model"]["continuing_subword_prefix"] = ""
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_files(tmp_path / "tokenizer.json", {}, {})


def test_a_panic_is_an_error_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for error, expected in ((PanicException("slice"), ModelError), (KeyboardInterrupt(), KeyboardInterrupt)):
        library = Mock(from_buffer=Mock(side_effect=error))
        monkeypatch.setattr(tokenizers, "Tokenizer", library)
        with pytest.raises(expected):
            Tokenizer.from_files(tmp_path / "tokenizer.json", {}, {})


def test_padding_and_truncation_are_switched_off(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    assert len(backend.encode("abcdef").ids) == 7
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read(tmp_path)
    assert len(tokenizer.encode("abcdef", add_special_tokens=True)) == 6
    assert len(tokenizer.encode("a", add_special_tokens=True)) == 1


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("in_map", [False, True])
def test_names_of_special_tokens(tmp_path: Path, as_dict: bool, in_map: bool) -> None:
    entry = added(BOS) if as_dict else BOS
    config = {"bos_token": None if in_map else entry, "eos_token": "</s>", "unk_token": None, "model_max_length": 9}
    special_map = {"bos_token": entry if in_map else "<image>"}
    tokenizer = read(tmp_path, config, special_map)
    assert tokenizer.special_tokens == {"bos_token": BOS, "eos_token": "</s>"}


def test_added_tokens_get_the_ids_that_they_are_listed_with(tmp_path: Path) -> None:
    listed = {"260": added("<z>"), "259": added("<a>"), "258": added("<image>"), "1000": added("<far>")}
    tokenizer = read(tmp_path, {"added_tokens_decoder": listed})
    assert [tokenizer.token_id(token) for token in ("<image>", "<a>", "<z>", "<far>")] == [258, 259, 260, 261]
    assert tokenizer.encode("<z><a>", add_special_tokens=False) == [260, 259]


def test_runs_of_a_token_are_read_as_its_tokens(tmp_path: Path) -> None:
    listed = {"259": added("<i>"), "260": added("<r>", lstrip=True, rstrip=True)}
    tokenizer = read(tmp_path, {"added_tokens_decoder": listed, "bos_token": BOS})
    texts = ["", "<i>", "a<i><i>b <i> <i><i><i>", "<i> <r> <i><i><r><i>", "<<i>><i", BOS + "<i><i>"]
    assert tokenizer.stands_alone(259)
    for text in texts:
        assert tokenizer.encode_prompt(text, 259) == tokenizer.encode_prompt(text)


@pytest.mark.parametrize("other", ["<i><i>", "a<i>", "<i", "><", "x<", ">x"])
def test_a_token_that_another_one_overlaps_stands_not_alone(tmp_path: Path, other: str) -> None:
    tokenizer = read(tmp_path, {"added_tokens_decoder": {"259": added("<i>"), "260": added(other)}})
    assert not tokenizer.stands_alone(259)


@pytest.mark.parametrize("flag", ["single_word", "normalized"])
def test_a_token_that_depends_on_the_text_stands_not_alone(tmp_path: Path, flag: str) -> None:
    tokenizer = read(tmp_path, {"added_tokens_decoder": {"259": added("<i>", **{flag: True})}})
    assert not tokenizer.stands_alone(259)
    assert not tokenizer.stands_alone(65)  # part of the vocabulary, but not added


def test_added_tokens_sort_as_numbers(tmp_path: Path) -> None:
    many = {str(number): added(f"<t{number}>") for number in reversed(range(995, 1005))}
    tokenizer = read(tmp_path, {"added_tokens_decoder": many})
    assert [tokenizer.token_id(f"<t{number}>") for number in range(995, 1005)] == list(range(259, 269))


def test_added_tokens_keep_their_flags(tmp_path: Path) -> None:
    listed = {"259": added("<think>", special=False), "260": added("<end>", lstrip=True, rstrip=True)}
    tokenizer = read(tmp_path, {"added_tokens_decoder": listed})
    ids = tokenizer.encode("a<think>b  <end>  c", add_special_tokens=False)
    assert [token for token in ids if token >= BYTES] == [259, 260]
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "a<think>bc"  # not special: part of what the model says


def test_special_tokens_named_but_not_in_the_file(tmp_path: Path) -> None:
    config = {"pad_token": "<pad>", "extra_special_tokens": ["<x>", added("<y>")]}
    tokenizer = read(tmp_path, config)
    assert tokenizer.encode("<y><x><pad>", add_special_tokens=False) == [261, 260, 259]
    assert tokenizer.decode([261, 260, 259]) == ""


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_extra_special_tokens_by_name(tmp_path: Path, key: str) -> None:
    tokenizer = read(tmp_path, {key: {"image_token": "<image>", "video_token": "<video>"}})
    assert (tokenizer.token_id("<image>"), tokenizer.token_id("<video>")) == (258, 259)


def test_token_that_is_only_in_the_vocabulary_becomes_whole(tmp_path: Path) -> None:
    letter = read(tmp_path).token_id("a")
    assert letter is not None
    tokenizer = read(tmp_path, {"added_tokens_decoder": {str(letter): added("a")}})
    assert tokenizer.token_id("a") == letter
    assert tokenizer.decode(tokenizer.encode("abab", add_special_tokens=False)) == "bb"


def test_add_special(tmp_path: Path) -> None:
    tokenizer = read(tmp_path)
    assert tokenizer.token_id("<new>") is None
    assert tokenizer.add_special("<new>") == 259
    assert tokenizer.add_special("<new>") == 259
    assert tokenizer.add_special("<image>") == 258


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_text_survives(text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer(special=()), {})
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_decode_skips_special_tokens_and_marks_half_characters(tmp_path: Path) -> None:
    tokenizer = read(tmp_path)
    ids = tokenizer.encode("<s>a<image>é</s>", add_special_tokens=False)
    assert tokenizer.decode(ids) == "aé"
    assert tokenizer.decode(ids[:-2]) == "a\ufffd"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "😀\ud83d"], ids=ascii)
def test_half_a_surrogate_pair(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        read(tmp_path).encode_prompt(text)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("source", ["{{ bos_token }}Hi", "Hi"])
def test_one_bos(tmp_path: Path, as_dict: bool, adds_bos: bool, source: str) -> None:
    tokenizer = read(tmp_path, {"bos_token": added(BOS) if as_dict else BOS}, adds_bos=adds_bos)
    rendered = ChatTemplate(source, tokenizer.special_tokens).render([])
    ids = tokenizer.encode_prompt(rendered)
    expected = int(adds_bos or "bos_token" in source)
    assert ids.count(BYTES) == expected
    assert ids[expected:] == tokenizer.encode("Hi", add_special_tokens=False)
    assert ids[:expected] == [BYTES] * expected


def test_no_bos_token_is_named(tmp_path: Path) -> None:
    assert read(tmp_path, {"bos_token": ""}, adds_bos=True).encode_prompt("Hi")[0] == BYTES


def test_bos_in_the_middle_is_no_reason_to_leave_it_out(tmp_path: Path) -> None:
    ids = read(tmp_path, {"bos_token": BOS}, adds_bos=True).encode_prompt("Hi<s>")
    assert [ids[0], ids[-1]] == [BYTES, BYTES]


def test_an_empty_extra_token_stands_for_none(tmp_path: Path) -> None:
    plain = read(tmp_path)
    assert read(tmp_path, {"additional_special_tokens": [""]}).backend.get_vocab() == plain.backend.get_vocab()
    with pytest.raises(ModelError, match="does not take '' as a special token"):
        plain.add_special("")


@given(st.text())
@settings(max_examples=200)
def test_the_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer(), {})
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_the_bytes_of_every_token_are_what_it_decodes_to() -> None:
    demo = Path(mlxvlm.__file__).parent / "demo"
    tokenizer = Tokenizer.from_files(demo / "tokenizer.json", {}, {})
    tokenizer.add_special("<\u00e9>")  # a letter that also spells a byte
    for token_id in range(tokenizer.backend.get_vocab_size()):
        data = tokenizer.token_bytes(token_id)
        if token_id in tokenizer.backend.get_added_tokens_decoder():
            assert data.decode() == tokenizer.backend.id_to_token(token_id)
        else:
            assert data.decode("utf-8", "replace") == tokenizer.decode([token_id])
    assert tokenizer.token_bytes(10**6) == b""


def test_the_bytes_of_sentence_pieces() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "n": 2, "<0xE9>": 3, "<s>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    tokenizer = Tokenizer(backend, {})
    tokenizer.add_special("<s>")
    assert [tokenizer.token_bytes(token_id) for token_id in range(1, 5)] == [b" the", b"n", b"\xe9", b"<s>"]


@given(st.text(max_size=200), st.booleans())
def test_ids_are_those_of_the_library_s_plain_way(text: str, adds: bool) -> None:
    backend = byte_tokenizer()
    found = Tokenizer(backend, {}).encode(text, add_special_tokens=adds)
    assert found == backend.encode(text, add_special_tokens=adds).ids


def test_a_long_text_does_not_stop_other_threads() -> None:
    tokenizer, counts, ended = Tokenizer(byte_tokenizer(), {}), [0], threading.Event()

    def count() -> None:
        while not ended.wait(1e-3):
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    text, interval = "some words, " * 40_000, sys.getswitchinterval()
    sys.setswitchinterval(60)  # Python's lock goes to others only where it is given away
    try:
        before = counts[0]
        tokenizer.encode(text, add_special_tokens=False)
        assert counts[0] > before, "nobody else ran"
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()


class Reading:
    """A tokenizer of one token a character, or none, which counts what it reads."""

    def __init__(self, *, takes: bool = True) -> None:
        self.takes, self.num_read = takes, 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.num_read += len(text)
        return [0] * len(text) if self.takes else []


def test_a_text_that_can_t_fit_is_refused_before_it_is_read_to_its_end() -> None:
    reading: Any = Reading()
    with pytest.raises(ContextLengthError, match="the prompt has 1,000,000 characters"):
        check_length("a" * 1_000_000, reading, 20_000)
    assert reading.num_read == 2 * PIECE


@pytest.mark.parametrize(("length", "takes"), [(PIECE, True), (400, True), (4 * PIECE, False)])
def test_a_text_that_may_fit(length: int, takes: bool) -> None:
    """Short for its context, or made of what the tokenizer passes over."""
    reading: Any = Reading(takes=takes)
    check_length("a" * length, reading, 100)
    assert reading.num_read == (0 if length <= PIECE else length)
