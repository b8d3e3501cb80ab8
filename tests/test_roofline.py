"""What the roofline counts against sums over a config's matrices by hand; and that all of it can be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlxvlm.families import family_of
from tests.golden import GOLDENS
from tools.roofline import main

CONTEXT, CHUNK = 300, 8
NAMES = ("decode_step", "prefill_chunk", "vision")
FAMILIES = ("idefics3_split", "llama4_norms", "llava_clip", "llava_next_tiles", "mllama_tiles", "qwen2_vl_tied")


def counted(name: str, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    lengths = ("--context", str(CONTEXT), "--chunk", str(CHUNK))
    main([str(GOLDENS / name / "config.json"), *lengths, *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["idefics3_split", "llava_clip", "qwen2_vl_tied"])
def test_a_decoders_matrices(name: str, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((Path(GOLDENS) / name / "config.json").read_text())
    model = family_of(config).build_model(config)
    paths = (model.quant_paths.decoder, model.quant_paths.head)
    matrices, others = 0, 0
    for path, array in tree_flatten(model.parameters()):
        if path.startswith(paths) and path.endswith("weight") and array.ndim == 2:
            embeds = "embed_tokens" in path
            matrices += 0 if embeds and model.head is not None else array.size
        elif path.startswith(paths) and path.endswith("bias"):
            others += array.size
    spec, layers = model.kv_specs[0], len(model.kv_specs)
    heads = config.get("text_config", config)["num_attention_heads"]
    seen = CONTEXT + 1  # the new token too

    found = counted(name, capsys, "--rows", str(rows))["decode_step"]
    assert found["operations"] == rows * (2 * matrices + layers * 4 * heads * spec.head_dim * seen)
    kept = layers * 2 * spec.num_kv_heads * spec.head_dim * seen
    assert found["bytes"] == 2 * (matrices + others + rows * kept)  # bfloat16


def test_a_chunk_has_no_head_and_of_its_last_layer_keys_and_values_only(capsys: pytest.CaptureFixture[str]) -> None:
    found = counted("llava_clip", capsys)["prefill_chunk"]
    dims, hidden, heads, layers = 12, 16, 2, 2
    projections, rest = 3 * dims * dims, dims * dims + 3 * dims * hidden
    pairs = CHUNK * (CONTEXT + CHUNK / 2)
    assert found["operations"] == pytest.approx(
        2 * CHUNK * (layers * projections + (layers - 1) * rest) + (layers - 1) * 4 * heads * (dims // heads) * pairs
    )


def test_a_tower_reads_each_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP of 2 layers, of which the first and the embeddings are looked at: 16 patches of 4 x 4 x 3 and a class."""
    found = counted("llava_clip", capsys)["vision"]
    dims, hidden, patches, text = 8, 12, 16, 12
    layer = 4 * dims * dims + 2 * dims * hidden
    projector = 2 * dims * text + text * text  # two layers' features side by side
    attention = 4 * (patches + 1) ** 2 * dims
    assert found["operations"] == (
        2 * (patches * 4 * 4 * 3 * dims + (patches + 1) * layer + patches * projector) + attention
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_counted_can_be_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = counted(name, capsys, "--run")
    for part in NAMES:
        assert min(found[part].values()) > 0
        assert found[part]["share"] == found[part]["bare_s"] / found[part]["whole_s"]


def test_fewer_bits_are_fewer_bytes_and_as_many_operations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = json.loads((GOLDENS / "llava_clip" / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lengths = ("--context", str(CONTEXT), "--chunk", str(CHUNK))
    by_bits = []
    for bits in ("16", "4"):
        main([str(tmp_path / "config.json"), "--bits", bits, *lengths])
        by_bits.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    whole, packed = by_bits
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 153 * 64
    assert whole["decode_step"]["bytes"] - packed["decode_step"]["bytes"] == matrices * (16 - 4.5) / 8
    assert all(whole[part]["operations"] == packed[part]["operations"] for part in NAMES)


def test_a_picture_longer_than_the_context_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="a picture takes 16 tokens: give a --context of so many at least"):
        main([str(GOLDENS / "llava_clip" / "config.json"), "--context", "8"])
