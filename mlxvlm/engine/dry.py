"""DRY, "don't repeat yourself": penalties for tokens that would go on with a repetition. Knows a row's tokens only.

Source: p-e-w, text-generation-webui pull request 5677.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.params import SamplingParams

# Longer repetitions count as this long: at the usual base the penalty has 15 digits by then.
MAX_MATCH = 64
_MAX_PENALTY = 1e30  # float32 goes to 3e38


def penalties(
    history: NDArray[np.int64], params: SamplingParams, is_breaker: Callable[[int], bool]
) -> Mapping[int, float]:
    """What to subtract from the logits of tokens, by id.

    A token that followed an earlier copy of the last n tokens costs multiplier * base ** (n - allowed_length), for the
    longest such n of at least allowed_length; a copy does not reach over a breaker.
    """
    longest: dict[int, int] = {}
    ends = np.arange(len(history) - 1)  # where copies of the last `length` tokens end
    for length in range(1, min(MAX_MATCH, len(history) - 1) + 1):
        token = history[-length]
        if is_breaker(int(token)):
            break
        ends = ends[ends >= length - 1]
        ends = ends[history[ends - (length - 1)] == token]
        if not ends.size:
            break
        if length >= params.dry_allowed_length:
            longest |= dict.fromkeys(history[ends + 1].tolist(), length)
    over = {token: length - params.dry_allowed_length for token, length in longest.items()}
    return {token: min(params.dry_multiplier * params.dry_base**more, _MAX_PENALTY) for token, more in over.items()}
