"""What a request cost, of all its choices together."""

from __future__ import annotations

from collections.abc import Sequence

from mlxvlm.api.answers import CompletionTokensDetails, PromptTokensDetails, Usage
from mlxvlm.engine import request


def total_usage(usages: Sequence[request.Usage]) -> Usage:
    """Of at least one choice. The prompt counts once, as the first choice had it; choices run side by side."""
    first = usages[0]
    tokens = sum(each.completion_tokens for each in usages)
    total_s = max(each.total_s for each in usages)
    completion_s = max(each.completion_s for each in usages)
    steps = sum(max(each.completion_tokens - 1, 0) for each in usages)
    return Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=tokens,
        total_tokens=first.prompt_tokens + tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=first.cached_tokens, image_tokens=first.image_tokens),
        completion_tokens_details=CompletionTokensDetails(),
        avg_tok_per_sec=_rate(first.prompt_tokens + tokens, total_s),
        avg_prompt_tok_per_sec=first.prompt_tokens_per_s,
        avg_compl_tok_per_sec=_rate(steps, completion_s),
        total_time_sec=total_s,
        total_prompt_time_sec=max(each.prompt_s for each in usages),
        total_completion_time_sec=completion_s,
        time_to_first_token_sec=min(each.time_to_first_token_s for each in usages),
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
