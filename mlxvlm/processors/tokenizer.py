"""Text <-> token ids over `tokenizers`. Knows the checkpoint's special tokens, nothing of chats or images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from mlxvlm.errors import InputError, ModelError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# How byte-level vocabularies spell a byte: printable ones as they are, the others from U+0100 on.
# Source: GPT-2's `bytes_to_unicode`.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's, for what it has no piece of

# Of no model here, and one that the merges don't have aborts the process in `tokenizers`.
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


class Tokenizer:
    """A tokenizer.json with the names of its special tokens.

    Source: transformers `PreTrainedTokenizerFast` (5.x `TokenizersBackend`), whose ids and texts it equals.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        # A checkpoint may have been saved in the middle of training, with padding or truncation switched on.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)

    @classmethod
    def from_files(cls, path: Path, config: Mapping[str, Any], special_map: Mapping[str, Any]) -> Tokenizer:
        """Reads tokenizer.json; `config` is tokenizer_config.json, `special_map` special_tokens_map.json."""
        if not path.is_file():
            raise ModelError(f"{path.name} is missing in {path.parent}: this runtime needs the fast tokenizer's file")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}") from error
        if _PREFIX.search(content):
            raise ModelError(f"{path} can't be read: merges with a continuing_subword_prefix are not supported")
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as error:
            # Where the library panics, what it raises is no Exception, and has no public type.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelError(f"{path} can't be read: {error}") from error
        special = {}
        for name in SPECIAL_NAMES:
            token = config.get(name) or special_map.get(name)
            if isinstance(token, Mapping):
                token = token.get("content")
            if isinstance(token, str):
                special[name] = token
        tokenizer = cls(backend, special)
        tokenizer._add_missing(config)
        return tokenizer

    def _add_missing(self, config: Mapping[str, Any]) -> None:
        """Tokens that only tokenizer_config.json names, in transformers' order: by id, named ones, extra ones."""
        added = config.get("added_tokens_decoder") or {}
        for _, token in sorted(added.items(), key=lambda item: int(item[0])):
            special = token.get("special", False) or token["content"] in self.special_tokens.values()
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            self._add(tokenizers.AddedToken(token["content"], special=special, **flags))
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        for token in [*self.special_tokens.values(), *(extra.values() if isinstance(extra, Mapping) else extra)]:
            content = token["content"] if isinstance(token, Mapping) else token
            if content:  # an empty one stands for none
                self.add_special(content)

    def _add(self, token: tokenizers.AddedToken) -> None:
        known = self.backend.get_added_tokens_decoder().values()
        if token.content not in {other.content for other in known}:
            self.backend.add_tokens([token])

    def add_special(self, token: str) -> int:
        """The id of a special token. Added at the end of the vocabulary if missing; never split in a text again."""
        self._add(tokenizers.AddedToken(token, normalized=False, special=True))
        token_id = self.token_id(token)
        if token_id is None:
            raise ModelError(f"the tokenizer does not take {token!r} as a special token")
        return token_id

    def token_id(self, token: str) -> int | None:
        """The id of one token, None if there is none."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def spelling(self, token_id: int) -> str:
        """How the vocabulary writes a token, "" for an id that it does not have."""
        return self.backend.id_to_token(token_id) or ""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; with add_special_tokens as the checkpoint's post-processor says (BOS ...)."""
        try:
            # A batch of one: encode() holds Python's lock, so that a long text would stop every other thread.
            ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:  # how the Rust side refuses what UTF-8 can't hold
            raise InputError("the text holds half of a surrogate pair, which is no character: remove it") from error
        return ids

    def encode_prompt(self, rendered: str, repeated: int | None = None) -> list[int]:
        """Ids of a rendered chat with exactly one BOS: the template's own, or the tokenizer's where it wrote none.

        repeated: a token that stands in long runs and for which `stands_alone`: it is read once a run.
        """
        bos = self.special_tokens.get("bos_token")
        adds = not (bos and rendered.startswith(bos))
        if repeated is None:
            return self.encode(rendered, add_special_tokens=adds)
        token = self.spelling(repeated)
        runs = re.compile(f"(?:{re.escape(token)})+")
        counts = iter([len(run) // len(token) for run in runs.findall(rendered)])
        ids = self.encode(runs.sub(lambda _: token, rendered), add_special_tokens=adds)
        return [same for each in ids for same in ([each] * next(counts) if each == repeated else [each])]

    def stands_alone(self, token_id: int) -> bool:
        """Whether an added token is found in any text, whatever is beside it: no other one overlaps it."""
        added = dict(self.backend.get_added_tokens_decoder())
        token = added.pop(token_id, None)
        # One that is looked for in the normalised text may have other spellings.
        if token is None or token.single_word or token.normalized:
            return False
        return not any(_overlap(token.content, other.content) for other in added.values())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids without special tokens; incomplete UTF-8 becomes U+FFFD."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """The same with special tokens by their names."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, a special one for its own name; b"" for an id that there is not.

        A SentencePiece's leading space is kept, which decode() drops at the beginning of a text.
        """
        token = self.backend.id_to_token(token_id)
        if token is None or token_id in self._added:
            return (token or "").encode()
        if self._is_byte_level:
            return bytes(_BYTES[char] for char in token) if _BYTES.keys() >= set(token) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _overlap(one: str, other: str) -> bool:
    """Whether a text could hold both with letters in common."""
    sizes = range(1, min(len(one), len(other)))
    ends = (one[:size] == other[-size:] or one[-size:] == other[:size] for size in sizes)
    return one in other or other in one or any(ends)
