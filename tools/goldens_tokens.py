"""Tiny byte-level BPE tokenizers in the manner of Llama 3, Qwen2 and SmolLM, trained on a few sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from goldens_pictures import chats
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
SENTENCES = (
    "Here is a red ball and there is a blue one on the table.",
    "The house has a green door; the door has a handle.",
    "User: what is in the image? Assistant: an orange and a pear.",
    "the ship, the sea, the shore, the end",
)


@dataclass(frozen=True)
class TokenizerSpec:
    """`leading` specials come before the bytes (ids from 0), `trailing` ones after the merges."""

    style: str  # "llama3", "qwen2" or "smol"
    merges: int
    leading: tuple[str, ...]
    trailing: tuple[str, ...]
    bos: str
    phrases: tuple[str, ...] = ()  # trained in many copies, so that their pieces are merged
    all_bytes: bool = False  # else only printable ASCII and the bytes of our own texts: a third of the rows


def corpus() -> list[str]:
    said = [
        part["text"]
        for chat in chats().values()
        for message in chat
        for part in message["content"]
        if part["type"] == "text"
    ]
    return [*SENTENCES, *said]


def byte_letters(texts: list[str]) -> list[str]:
    """The letters that byte-level BPE writes for the bytes of printable ASCII and of these texts."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ascii_text = "".join(map(chr, range(32, 127))) + "\n"
    return sorted(
        {letter for line in [ascii_text, *texts] for word, _ in level.pre_tokenize_str(line) for letter in word}
    )


def splitter(style: str) -> Any:
    pattern = {"llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}.get(style)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    else:
        split = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    return pre_tokenizers.Sequence([split, level])


def train(spec: TokenizerSpec) -> Tokenizer:
    texts = corpus()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if spec.all_bytes else byte_letters(texts)
    tokenizer = Tokenizer(models.BPE(ignore_merges=spec.style == "llama3"))
    if spec.style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(spec.style)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(spec.leading) + len(alphabet) + spec.merges,
        special_tokens=[special(token) for token in spec.leading],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(phrase for phrase in spec.phrases for _ in range(50))], trainer)
    tokenizer.add_special_tokens([special(token) for token in spec.trailing])
    tokenizer.post_processor = after(tokenizer, spec)
    return tokenizer


def special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def after(tokenizer: Tokenizer, spec: TokenizerSpec) -> Any:
    """Llama 3 adds its BOS here; SmolLM has it in the chat template only, Qwen2 has none."""
    level = processors.ByteLevel(trim_offsets=False)
    if spec.style != "llama3":
        return level
    template = processors.TemplateProcessing(
        single=f"{spec.bos} $A",
        pair=f"{spec.bos} $A {spec.bos}:1 $B:1",
        special_tokens=[(spec.bos, tokenizer.token_to_id(spec.bos))],
    )
    return processors.Sequence([level, template])


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return int(found)
