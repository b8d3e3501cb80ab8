"""What a request cost, of all its choices together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlxvlm.api.answers import CompletionTokensDetails, PromptTokensDetails, Usage
from mlxvlm.engine import request


def together(usages: Sequence[request.Usage]) -> request.Usage:
    """Of at least one choice. The prompt counts once, as the first choice had it; choices run side by side."""
    return replace(
        usages[0],
        completion_tokens=sum(each.completion_tokens for each in usages),
        prompt_s=max(each.prompt_s for each in usages),
        completion_s=max(each.completion_s for each in usages),
        time_to_first_token_s=min(each.time_to_first_token_s for each in usages),
        total_s=max(each.total_s for each in usages),
    )


def of_prompts(usages: Sequence[request.Usage], n: int) -> request.Usage:
    """Of several prompts side by side, with n choices each; choices of one prompt stand together."""
    groups = [together(usages[start : start + n]) for start in range(0, len(usages), n)]
    return replace(
        together(groups),
        prompt_tokens=sum(each.prompt_tokens for each in groups),
        image_tokens=sum(each.image_tokens for each in groups),
        cached_tokens=sum(each.cached_tokens for each in groups),
    )


def total_usage(usages: Sequence[request.Usage], n: int | None = None) -> Usage:
    """What is told of all choices together; n: of each prompt, None where there is one prompt."""
    spent = of_prompts(usages, n or len(usages))
    firsts = usages[:: n or len(usages)]
    total_tokens = spent.prompt_tokens + spent.completion_tokens
    steps = sum(max(each.completion_tokens - 1, 0) for each in usages)
    return Usage(
        prompt_tokens=spent.prompt_tokens,
        completion_tokens=spent.completion_tokens,
        total_tokens=total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=spent.cached_tokens, image_tokens=spent.image_tokens),
        completion_tokens_details=CompletionTokensDetails(),
        avg_tok_per_sec=_rate(total_tokens, spent.total_s),
        avg_prompt_tok_per_sec=_rate(spent.prompt_tokens - spent.cached_tokens, max(each.prompt_s for each in firsts)),
        avg_compl_tok_per_sec=_rate(steps, spent.completion_s),
        total_time_sec=spent.total_s,
        total_prompt_time_sec=spent.prompt_s,
        total_completion_time_sec=spent.completion_s,
        time_to_first_token_sec=spent.time_to_first_token_s,
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
