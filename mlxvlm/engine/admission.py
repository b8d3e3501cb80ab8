"""Which prompts can be answered, and which rows fit into memory. Knows sizes in bytes, not tensors.

A row's bytes are reserved before it starts and given back at its end, so that what runs never outgrows the budget. What
is reserved is the worst case of what kv_cache allocates, and an estimate of what one unit of vision or prefill needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mlxvlm.engine.kv_cache import capacity_for, length_class
from mlxvlm.errors import ContextLengthError, InputError, MemoryBudgetError, ModelError
from mlxvlm.processors.base import Prompt

ANSWER_STEP = 1024  # tokens that an answer without a limit reserves at a time
# Estimates, in values of the model's type. Measured on the CPU backend: the towers of CLIP-L, SigLIP-base and
# SigLIP-so400m hold 31 to 58 values for each value of the pixels, 45 to 75 where attention writes its scores to memory.
_TOWER_VALUES = 80
_PREFILL_VALUES = 24  # for each value of the hidden states: residual, norm, attention's five, the MLP's 3 of 4 widths
_SCORE_COPIES = 3  # scores, masked scores and probabilities, where attention writes them to memory
# For each logit of a row's step: float32, with copies that are penalised, scaled, ranked. Measured on the CPU backend:
# 9 with a temperature, 42 with top_p and top_logprobs, 103 with everything at once; what one row wants, all rows take.
_LOGITS_BYTES = 112
_CHECKED_BYTES = 32  # beside that, for each logit of a checked position; measured: 26 with everything at once


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model's tensors take."""

    kv_token: int  # bytes of one position in all layers
    num_layers: int
    hidden: int  # values of one position's hidden state
    itemsize: int  # bytes of a value
    vocab_size: int
    score_heads: int  # heads whose scores are written to memory; 0 where attention is fused
    state_bytes: Callable[[Prompt], int]  # of a row's RowState
    prefill_chunk: int
    vision_batch: int  # pixel values that go through the tower at once
    unpacked_token: int = 0  # bytes of one position of one layer, where a chunk's attention unpacks keys and values
    checked: int = 0  # positions of a pass over guessed tokens, each of which has logits


@dataclass(frozen=True, slots=True)
class Need:
    """What one row takes at most."""

    length: int  # positions in the KV cache at its end
    held: int  # bytes beside them, from its start to its end
    work: int  # bytes at the peak of one unit of its vision or prefill, or of a pass over guesses


class Admission:
    """The budget, and who has reserved what of it. Of the engine thread."""

    def __init__(self, budget: int, base: int, sizes: Sizes) -> None:
        """`base` bytes are taken for good: the weights, and what else was there before. Raises ModelError."""
        if base >= budget:
            raise ModelError(
                f"the model takes {_size(base)}, but the memory budget is {_size(budget)}: quantise the model "
                "(--isq), or raise the budget (--max-memory)"
            )
        self.budget = budget
        self.base = base
        self._sizes = sizes
        self._rows: dict[int, Need] = {}
        self._is_shared = False  # whether those rows have been more than one
        self.reserved = 0  # bytes beside `base`

    def need(self, prompt: Prompt, max_tokens: int, rerun: int = 0) -> Need:
        """Of a prompt and an answer of at most `max_tokens`; so many tokens of both may be run as a prompt again."""
        sizes, length = self._sizes, max(len(prompt.token_ids), rerun)
        pixels = [image.pixels.size for image in prompt.images]
        # Features wait beside the embeddings that they are written into.
        embedded = (2 if pixels else 1) * length * sizes.hidden * sizes.itemsize
        held = embedded + 4 * sum(pixels) + sizes.state_bytes(prompt) + _LOGITS_BYTES * sizes.vocab_size
        batch = max(min(sum(pixels), sizes.vision_batch), max(pixels, default=0))
        chunk = min(length, sizes.prefill_chunk)
        scores = _SCORE_COPIES * sizes.score_heads * chunk * length
        values = _PREFILL_VALUES * chunk * sizes.hidden + scores
        work = max(
            _TOWER_VALUES * batch * sizes.itemsize,
            values * sizes.itemsize + sizes.unpacked_token * length,
            _CHECKED_BYTES * sizes.vocab_size * sizes.checked,
        )
        # The last token of an answer is never fed.
        return Need(len(prompt.token_ids) + max_tokens - 1, held, work)

    def bytes_of(self, needs: Collection[Need], is_shared: bool = False) -> int:
        """The most that rows take together; units of work come one at a time.

        A row that is left of several (`is_shared`) keeps their buffer, with a slot too many.
        """
        if not needs:
            return 0
        lengths = [need.length for need in needs]
        if len(lengths) == 1 and not is_shared:
            positions = capacity_for(lengths[0])
        else:
            # A row pays for two slots as long as its class allows: a group has up to twice as many slots as rows, and
            # its capacity is that of the longest row it ever had. Shorter classes on the way there take less.
            positions = sum(2 << length_class(length) for length in lengths)
        kv = positions * self._sizes.kv_token
        # A buffer that grows is copied, one layer after the other.
        copied = kv // self._sizes.num_layers
        return kv + copied + sum(need.held for need in needs) + max(need.work for need in needs)

    @property
    def spare(self) -> int:
        """Bytes that nobody has reserved: what is kept between requests must not exceed them."""
        return self.budget - self.base - self.reserved

    def check(self, need: Need) -> None:
        """Raises MemoryBudgetError for a row that could not even run alone."""
        total = self.bytes_of([need])
        if self.base + total > self.budget:
            raise MemoryBudgetError(
                f"the request needs up to {_size(total)} for {need.length} tokens, beside {_size(self.base)} of the "
                f"model, but the memory budget is {_size(self.budget)}: lower max_tokens, shorten the prompt, send "
                "smaller images, or raise the budget (--max-memory)"
            )

    def reserve(self, owner: int, need: Need) -> bool:
        """Whether a row, new or grown, fits beside the others; its bytes are then its own."""
        others = [other for key, other in self._rows.items() if key != owner]
        is_shared = self._is_shared or bool(others)
        total = self.bytes_of([*others, need], is_shared)
        if self.base + total > self.budget:
            return False
        self._rows[owner] = need
        self.reserved, self._is_shared = total, is_shared
        return True

    def release(self, owner: int) -> None:
        """A row has ended."""
        if self._rows.pop(owner, None) is not None:
            self._is_shared = self._is_shared and bool(self._rows)
            self.reserved = self.bytes_of(self._rows.values(), self._is_shared)


def check(prompt: Prompt, image_token_id: int, vocab_size: int, max_context: int) -> None:
    """Raises InputError for a prompt that the model can't read."""
    length = len(prompt.token_ids)
    if not length:
        raise InputError("the prompt is empty")
    # MLX reads beyond an embedding's end without a word. A placeholder's own row is never used.
    foreign = {i for i in prompt.token_ids if not 0 <= i < vocab_size} - {image_token_id}
    if foreign:
        raise InputError(
            f"the prompt has token id {min(foreign)}, but the model's vocabulary ends at {vocab_size}: "
            "the tokenizer is not this model's"
        )
    if length >= max_context:
        images = prompt.token_ids.count(image_token_id) if prompt.images else 0
        of_images = f" ({images} of them for images)" if images else ""
        raise ContextLengthError(
            f"the prompt has {length} tokens{of_images}, but the model's context is {max_context}: "
            f"shorten it{' or send fewer images' if images else ''}"
        )
    if prompt.images and prompt.images[-1].span[1] == length:
        # Decoding starts from the last token's own embedding.
        raise InputError("the prompt ends with an image: the chat template must add text after it")


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
