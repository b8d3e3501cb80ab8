"""What only an Apple GPU can show. Skipped elsewhere."""

from __future__ import annotations

import pytest

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine import device
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from tests.golden import Case

pytestmark = pytest.mark.metal


def test_greedy_tokens_equal_the_reference(case: Case) -> None:
    source = case.open()
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
    with Engine(lambda progress: source.build(LoadOptions("float32"), progress), source.processor, config) as engine:
        for scenario in case.scenarios:
            expected = case.expected(scenario)["greedy"]
            sampling = SamplingParams(max_tokens=len(expected), ignore_eos=True)
            assert list(engine.generate(Request(case.messages(scenario), sampling)).token_ids) == expected, scenario


def test_the_device_tells_its_limits() -> None:
    machine = device.report()
    assert machine.is_gpu
    assert machine.memory_bytes > machine.working_set_bytes > 0
