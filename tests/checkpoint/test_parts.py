"""Loading a rank's share: the same tensors as the whole's, and no more bytes read or held than its part."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxvlm.checkpoint.bind import narrowed
from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.estimate import memory_need
from mlxvlm.checkpoint.isq import make_plan
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.quantize import quantize_folder
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.errors import UnsupportedModelError, UsageError
from mlxvlm.families import family_of
from mlxvlm.models.base import Inputs, RowState, VisionLanguageModel
from mlxvlm.models.shares import Cut, Rank, Share, column_units, narrow
from tests.checkpoint.layouts import write
from tests.checkpoint.sharing import TEXT, Tensors, assert_same, built, share_of, silent, tensors_of, wide
from tests.checkpoint.wide import CASES, write_wide
from tests.models.test_shares import Sum, together

Log = pytest.LogCaptureFixture
BAR = 1.05  # of a rank's part of what is shared, and all of what is not
HEADER_BYTES = 200_000  # more than all headers, configs and indices together


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {family: write_wide(root / family, family, config=wide(family)) for family in CASES}


def cut_of(whole: VisionLanguageModel, index: int, count: int) -> Tensors:
    """The slow twin: a share of a model that was loaded whole."""
    narrowed(whole, share_of(index, count))
    return tensors_of(whole)


@pytest.mark.parametrize("isq", [None, "4@32", "8@64"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", CASES)
def test_a_share_is_cut_from_the_whole(family: str, count: int, isq: str | None, folders: dict[str, Path]) -> None:
    """Bit for bit, whichever comes first: cutting or quantising."""
    for index in range(count):
        found = tensors_of(built(folders[family], share_of(index, count), isq=isq))
        assert_same(found, cut_of(built(folders[family], isq=isq), index, count))


@pytest.mark.parametrize("isq", [None, "4@32"])
@pytest.mark.parametrize("family", CASES)
def test_shares_together_are_the_whole(family: str, isq: str | None, tmp_path: Path) -> None:
    """Laid beside each other, biases of sums added up, and what is not cut the same on all ranks."""
    folder = write_wide(tmp_path / "m", family, config=wide(family, attention_bias=True, mlp_bias=True))
    whole = tensors_of(built(folder, isq=isq))
    shares = [tensors_of(built(folder, share_of(index, 4), isq=isq)) for index in range(4)]
    num_cut = 0
    for name, array in whole.items():
        parts = [np.array(share[name]) for share in shares if name in share]
        axes = [axis for axis, size in enumerate(array.shape) if parts[0].shape[axis] != size]
        if axes:
            num_cut += 1
            assert len(parts) == 4
            assert np.array_equal(np.concatenate(parts, axes[0]), array), name
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            assert np.array_equal(sum(parts), array), name
        else:
            assert all(np.array_equal(part, array) for part in parts), name
    assert num_cut > len(whole) / 4


@pytest.mark.parametrize("kind", ["4@32", "3@64", "mxfp4"])
@pytest.mark.parametrize("family", CASES)
def test_a_share_of_a_quantised_checkpoint(family: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """In MLX-community's names and layout."""
    folder = tmp_path / "packed"
    quantize_folder(str(folders[family]), folder, recipe_of(LoadOptions(isq=kind)), "float32", silent)
    for index, count in ((0, 2), (1, 2), (0, 4), (3, 4)):
        found = tensors_of(built(folder, share_of(index, count)))
        assert any(name.endswith(".scales") for name in found)
        assert_same(found, cut_of(built(folder), index, count))


UNEVEN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one rank": ("llama4", 1, {}),
    "three ranks": ("llama4", 3, {}),
    "more ranks than kv heads": ("llava_next", 4, {"num_key_value_heads": 2}),
    "biases of sums": ("idefics3", 2, {"attention_bias": True, "mlp_bias": True}),
    "no groups": ("mllama", 2, {"intermediate_size": 99}),
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_shares_that_differ(kind: str, tmp_path: Path) -> None:
    family, count, text = UNEVEN[kind]
    folder = write_wide(tmp_path / "m", family, mx.bfloat16, wide(family, **text))
    for index in range(count):
        found = built(folder, share_of(index, count), dtype="bfloat16")
        assert_same(tensors_of(found), cut_of(built(folder, dtype="bfloat16"), index, count))


def test_experts_under_our_own_names(folders: dict[str, Path], tmp_path: Path) -> None:
    """Stored apart, [E, out, in], as MLX-community has them."""
    weights = tensors_of(built(folders["llama4"]))
    folder = write(tmp_path / "m", folders["llama4"], weights)
    for quantised in (None, "4@32"):
        found = tensors_of(built(folder, share_of(1, 4), isq=quantised))
        assert_same(found, tensors_of(built(folders["llama4"], share_of(1, 4), isq=quantised)))


@pytest.mark.parametrize("family", CASES)
def test_what_each_rank_holds(family: str, folders: dict[str, Path]) -> None:
    """The first one all modules, the others layers, last norm and head."""
    whole = built(folders[family])
    paths, names = whole.quant_paths, tensors_of(whole).keys()
    assert tensors_of(built(folders[family], share_of(0, 2))).keys() == names
    kept = (f"{paths.decoder}.layers.", f"{paths.decoder}.norm.", f"{paths.head}.")
    found = tensors_of(built(folders[family], share_of(1, 2)))
    assert found.keys() == {name for name in names if name.startswith(kept)}
    is_tied = family in ("qwen2_vl", "smolvlm")
    assert any(name.startswith(f"{paths.head}.") for name in found) != is_tied


def sizes(tensors: Mapping[str, mx.array], cuts: Mapping[str, Cut], kept: set[str]) -> tuple[int, int]:
    """Bytes of what is shared, and of what a rank that holds the names `kept` has whole."""
    shared = sum(array.nbytes for name, array in tensors.items() if name.rpartition(".")[0] in cuts)
    own = sum(array.nbytes for name, array in tensors.items() if name.rpartition(".")[0] not in cuts and name in kept)
    return shared, own


@pytest.mark.parametrize("isq", [None, "4@32"])
@pytest.mark.parametrize("family", CASES)
def test_the_estimate_of_a_share(family: str, isq: str | None, folders: dict[str, Path]) -> None:
    folder = str(folders[family])
    for index in range(2):
        need = memory_need(folder, recipe=recipe_of(LoadOptions(isq=isq)), rank=Rank(index, 2))
        held = tensors_of(built(folders[family], share_of(index, 2), isq=isq))
        assert need.weights_bytes == sum(array.nbytes for array in held.values())
        assert need.disk_bytes == sum(
            array.nbytes for array in tensors_of(built(folders[family], share_of(index, 2))).values()
        )
        assert {spec.num_kv_heads for spec in need.kv_specs} == {2}
        assert need.loading_bytes < memory_need(folder).loading_bytes
    for name, uqff in (("model.gguf", None), (folder, "none.uqff")):
        with pytest.raises(UsageError, match="GGUF and UQFF files can't be shared"):
            memory_need(name, from_uqff=uqff, rank=Rank(0, 2))
    with pytest.raises(UsageError, match="can't be shared by 9 ranks"):
        memory_need(folder, rank=Rank(0, 9))


def system_bytes_read() -> int:
    """What this process asked the system for; mapped pages are not in it."""
    text = Path("/proc/self/io").read_text() if Path("/proc/self/io").is_file() else "rchar: 0"
    return int(re.findall(r"rchar: (\d+)", text)[0])


@pytest.mark.parametrize("isq", [None, "4@32"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", CASES)
def test_bytes_of_a_share(family: str, count: int, isq: str | None, tmp_path: Path, caplog: Log) -> None:
    config = wide(family, num_hidden_layers=8, vocab_size=512)
    folder = write_wide(tmp_path / "m", family, config=config)
    stored, whole = tensors_of(built(folder)), tensors_of(built(folder, isq=isq))
    cuts = narrow(family_of(config).build_model(config), Rank(0, count), lambda part: part)
    for index in range(count):
        caplog.clear()
        before = system_bytes_read()
        with caplog.at_level(logging.INFO):
            found = tensors_of(built(folder, share_of(index, count), isq=isq))
        asked = system_bytes_read() - before
        (read,) = [record.args[0] for record in caplog.records if "tensors were read" in record.msg]  # type: ignore[index]
        shared, own = sizes(stored, cuts, {name.replace(".scales", ".weight") for name in found})
        assert read <= (shared / count + own) * BAR
        assert asked <= read + HEADER_BYTES
        shared, own = sizes(whole, cuts, set(found))
        assert sum(array.nbytes for array in found.values()) <= (shared / count + own) * BAR


@pytest.mark.parametrize("isq", [None, "4"])
def test_peak_of_a_share_is_the_share_and_an_expert(isq: str | None, tmp_path: Path) -> None:
    config = wide("llama4", hidden_size=256, intermediate_size=512, num_local_experts=16, num_hidden_layers=2)
    folder = write_wide(tmp_path / "m", "llama4", config=config)
    largest = max(array.nbytes for array in read_weights(folder).values())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    size = sum(array.nbytes for array in tensors_of(built(folder, share_of(1, 2), isq=isq)).values())
    assert mx.get_peak_memory() - before <= size + largest // 16


@pytest.mark.parametrize("isq", [None, "4@32"])
def test_what_is_bound_is_evaluated(isq: str | None, folders: dict[str, Path]) -> None:
    """Lazy arrays can't be read in another thread."""
    found = tensors_of(built(folders["llama4"], share_of(1, 2), isq=isq))
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(np.array, found.values()))


def test_progress_is_that_of_the_share(folders: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    source = open_model(str(folders["llama4"]))
    source.build(LoadOptions(isq="4"), lambda done, total: steps.append((done, total)), share_of(1, 4))
    full = sum(array.nbytes for array in tensors_of(built(folders["llama4"], share_of(1, 4))).values())
    assert steps[-1] == (full, full)


class TestGroups:
    """What is quantised has the same groups on all ranks, and no rank has a part of one."""

    CONFIG = wide("idefics3", head_dim=16, intermediate_size=96)  # of two ranks' columns: 64 and 48

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_wide(tmp_path / "m", "idefics3", config=self.CONFIG)

    def test_plans_fit_all_ranks(self) -> None:
        def groups(count: int) -> tuple[int | None, int | None]:
            model = family_of(self.CONFIG).build_model(self.CONFIG)
            specs = make_plan(model, recipe_of(LoadOptions(isq="4@64")), column_units(model, count)).specs
            layer = "model.text_model.layers.0."
            found = [specs.get(f"{layer}{name}") for name in ("self_attn.o_proj", "mlp.down_proj")]
            return tuple(spec and spec.group_size for spec in found)  # type: ignore[return-value]

        assert [groups(count) for count in (1, 2, 3, 4)] == [(64, 32), (64, 32), (32, 32), (32, None)]

    @pytest.mark.parametrize("count", [2, 4])
    def test_what_fits_no_group_is_told_by_all(self, count: int, folder: Path, caplog: Log) -> None:
        """The twin: cut in full, then quantised by MLX's own nn.quantize."""
        options = LoadOptions(isq="4@64")
        lines = set()
        for index in range(count):
            caplog.clear()
            found = tensors_of(built(folder, share_of(index, count), isq="4@64"))
            lines.add(tuple(record.getMessage() for record in caplog.records if "not quantised" in record.msg))
            twin = built(folder)
            specs = make_plan(twin, recipe_of(options), column_units(twin, count)).specs
            cut_of(twin, index, count)

            def choose(path: str, module: nn.Module, specs: Mapping[str, QuantSpec] = specs) -> Any:
                spec = specs.get(path)
                return {"bits": spec.bits, "group_size": spec.group_size} if spec else False

            nn.quantize(twin, class_predicate=choose)
            assert_same(found, tensors_of(twin))
        assert len(lines) == 1
        assert bool(lines.pop()) == (count == 4)

    def test_a_group_that_would_be_cut_is_named(self, folder: Path, tmp_path: Path) -> None:
        packed = tmp_path / "packed"
        quantize_folder(str(folder), packed, recipe_of(LoadOptions(isq="4@64")), "float32", silent)
        for index in range(4):
            with pytest.raises(
                UnsupportedModelError,
                match=r"layers\.0\.\S+ is quantised in groups of \d\d columns, which 4 ranks would cut: use 2, or the",
            ):
                built(packed, share_of(index, 4))
        assert built(packed, share_of(1, 2))


@pytest.mark.parametrize("family", CASES)
def test_loaded_shares_compute_the_whole(family: str, folders: dict[str, Path]) -> None:
    """Of the same embeddings, as the first rank hands them to the others."""
    embeds = mx.random.normal((1, 5, TEXT["hidden_size"]), key=mx.random.key(0))
    mx.eval(embeds)

    def run(index: int | None) -> tuple[np.ndarray, np.ndarray]:
        share = None if index is None else Share(Rank(index, 2), total.of(index))
        model = built(folders[family], share)
        specs = [
            replace(spec, num_kv_heads=spec.num_kv_heads // (1 if share is None else 2)) for spec in model.kv_specs
        ]
        hidden = model(Inputs(embeds, rows=[RowState()]), KVPass([KVGroup.single(specs, 0)], embeds.shape[1]).layers)
        is_tied = family in ("qwen2_vl", "smolvlm")  # by the first rank's embeddings
        return np.array(hidden), np.array(hidden if index and is_tied else model.logits(hidden))

    hidden, logits = run(None)
    total = Sum(2)
    (first, part), (second, other) = together(2, run)
    np.testing.assert_allclose(first, hidden, atol=2e-4, rtol=1e-4)
    np.testing.assert_array_equal(first, second)
    found = part if part.shape == logits.shape else np.concatenate([part, other], -1)
    np.testing.assert_allclose(found, logits, atol=2e-3, rtol=1e-3)
