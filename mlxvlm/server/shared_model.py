"""The registry of a model that several ranks run together: it is loaded once and stays. Knows no ranks."""

from __future__ import annotations

from collections.abc import Sequence

from mlxvlm.errors import UsageError
from mlxvlm.server.registry import ModelSpec, Registry


class SharedModel(Registry):
    """A Registry of one model, which nothing unloads."""

    async def unload(self, name: str) -> None:
        """Raises UsageError."""
        raise UsageError(
            f"{self.resolve(name)} is shared by several ranks and can't be unloaded: end the server instead"
        )

    async def re_isq(self, name: str, isq: str | int | None) -> None:
        """Raises UsageError."""
        raise UsageError(
            f"{self.resolve(name)} is shared by several ranks and stays as it is: start them with another --isq"
        )


def check_shared(specs: Sequence[ModelSpec], idle_unload_s: float | None) -> None:
    """Raises UsageError for what several ranks can't serve."""
    if len(specs) != 1:
        raise UsageError("several ranks run one model together: give one -m, and other models a server of their own")
    if idle_unload_s is not None:
        raise UsageError("a model that several ranks share is never unloaded: leave --idle-unload out")
