"""Models from checkpoints for the registry. Knows memory's sizes and how to open a model, not who asks."""

from __future__ import annotations

from mlxvlm.agent.formats import tool_format
from mlxvlm.checkpoint.load import open_model
from mlxvlm.errors import ModelError, UsageError
from mlxvlm.ranks.place import Member
from mlxvlm.runner import start
from mlxvlm.server.registry import LoadedModel, ModelSpec, Progress

_ROOM_FOR_ROWS = 1.2  # times the weights: keys, values and what is computed with


class CheckpointLoader:
    """A Loader; MLX is first imported in its threads. member: of ranks that run a model together."""

    def __init__(self, member: Member | None = None) -> None:
        self._member = member

    def check(self, spec: ModelSpec) -> None:
        from mlxvlm.checkpoint.build import recipe_of

        recipe_of(spec.options)

    def fits(self, spec: ModelSpec) -> bool:
        """False also where the size can't be told: then the model gets the memory for itself."""
        from mlxvlm.checkpoint.build import recipe_of
        from mlxvlm.checkpoint.estimate import memory_need
        from mlxvlm.engine import device

        budget = spec.limits.get("max_memory_bytes") or device.default_budget()
        try:
            files = {name: spec.source.get(name) for name in ("revision", "mmproj", "from_uqff")}
            options = spec.options
            need = memory_need(
                spec.model, dtype=options.dtype, recipe=recipe_of(options), requantize=options.requantize, **files
            )
        except (ModelError, UsageError):
            return False
        room = budget - device.memory().active_bytes
        return max(need.weights_bytes * _ROOM_FOR_ROWS, need.loading_bytes) <= room

    def load(self, spec: ModelSpec, progress: Progress) -> LoadedModel:
        source = open_model(spec.model, **spec.source)
        draft = None if spec.draft_model is None else open_model(spec.draft_model)
        tools = tool_format(source.processor.template, source.processor.tokenizer)
        engine = start(source, spec.options, progress, draft_model=draft, member=self._member, **spec.limits)
        return LoadedModel(spec.name, engine, tools)
