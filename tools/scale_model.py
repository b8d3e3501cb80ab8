"""What several Macs would need and take for a model, as Markdown tables: computed, nothing is run.

    python tools/scale_model.py FOLDER [FOLDER ...] [--isq 4] [--macs 1 2 4 8]

A FOLDER holds a published config.json. Weights are those of the config's own model in bfloat16, shared and quantised by
the very functions that load; times are bytes and operations over the rates below, one after the other. docs/scale.md
tells where the rates are from, and what is assumed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from scale_cost import Link, Shape, seconds

from mlxvlm.checkpoint.bind import planned
from mlxvlm.checkpoint.estimate import bound_bytes, need_of
from mlxvlm.checkpoint.isq import AS_IT_IS, Recipe
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.families import family_of
from mlxvlm.models.shares import Rank, Share

CHUNK_TOKENS = 2048
CONTEXT_TOKENS = 8192  # held by each row of a decode step
USABLE = 3 / 4  # of a Mac's memory, which macOS lets a GPU keep resident
REACHED = 0.8  # of the memory's bandwidth, assumed


@dataclass(frozen=True)
class Mac:
    """bandwidth: of memory, bytes/s. operations: that a prefill reaches, 1/s. memories: sizes sold, GB."""

    name: str
    bandwidth: float
    operations: float
    memories: Sequence[int]


# Memory: Apple's technical specifications. Operations: 91.5 tokens/s of a prompt of 2,048 through 123 * 10^9 weights in
# 4 bits on an M3 Ultra (github.com/ml-explore/mlx/pull/3094), and by peak rates (18.4 / 28.4) of that on an M4 Max.
MACS = (
    Mac("M3 Ultra", 819e9, 22.5e12, (96, 256, 512)),
    Mac("M4 Max", 546e9, 14.6e12, (36, 48, 64, 128)),
)
# See docs/scale.md for the sources of each.
LINKS = (
    Link("JACCL", 5e-6, 6.3e9, 25e-6, is_mesh=True),
    Link("TCP, Thunderbolt", 300e-6, 3e9),
    Link("TCP, 10 Gb Ethernet", 300e-6, 1.18e9),
)
MESH_MACS = 4  # with a cable between any two; more make a ring
ITEMSIZE = 2  # of activations, bfloat16


@dataclass(frozen=True)
class Part:
    """What a rank has of a model's decoder. reads: bytes by how often a token needs them; operations: of one token."""

    always_bytes: int
    expert_bytes: int
    head_bytes: int
    operations: float
    kv_bytes_per_token: int
    memory_bytes: int

    def read_bytes(self, rows: int, chance: float) -> float:
        """Of a decode step: experts as often as any of the rows is likely to need them."""
        experts = self.expert_bytes * (1 - (1 - chance) ** rows)
        return self.always_bytes + self.head_bytes + experts + rows * CONTEXT_TOKENS * self.kv_bytes_per_token


class Model:
    """A config, and a type that its weights are quantised to; None for 16 bits."""

    def __init__(self, config: dict[str, Any], kind: str | None) -> None:
        self.config, self.text = config, config.get("text_config", config)
        self.recipe = AS_IT_IS if kind is None else Recipe(parse_type(kind))
        self.kind = "16 bits" if kind is None else f"--isq {kind}"
        self.part = lru_cache(self._part)

    @cached_property
    def weights(self) -> Mapping[str, mx.array]:
        model = family_of(self.config).build_model(self.config)
        return {name: array.astype(mx.bfloat16) for name, array in tree_flatten(model.parameters())}

    @property
    def chance(self) -> float:
        """Of an expert to be one of a token's."""
        return float(self.text.get("num_experts_per_tok", 1) / self.text.get("num_local_experts", 1))

    @cached_property
    def shape(self) -> Shape:
        """Of text: layers that only pictures pass are left out."""
        model = family_of(self.config).build_model(self.config)
        has_head = any(name.startswith(f"{model.quant_paths.head}.") for name in self.weights)
        return Shape(len(model.kv_specs), self.text["hidden_size"], model.vocab_size, has_head, ITEMSIZE)

    def _part(self, index: int, count: int) -> Part:
        model = family_of(self.config).build_model(self.config)
        paths, rank = model.quant_paths, Rank(index, count)
        plan, named, _ = planned(model, dict(self.weights), self.recipe, Share(rank, lambda part: part))
        sizes = {name: bound_bytes(name, named, mx.bfloat16, plan.specs) for name in named}
        pictures = {name.partition(".cross_attn")[0] + "." for name in named if ".cross_attn." in name}
        layers = [
            name
            for name in named
            if name.startswith(f"{paths.decoder}.layers.") and not name.startswith(tuple(pictures))
        ]
        experts = [name for name in layers if named[name].ndim == 3]
        head = f"{paths.head}." if self.shape.has_head else f"{paths.decoder}.embed_tokens."
        heads = [name for name in named if name.startswith(head)]
        need = need_of(self.config, self.weights, "bfloat16", self.recipe, rank=rank)
        active = sum(named[name].size * (self.chance if name in experts else 1) for name in layers)
        return Part(
            sum(sizes[name] for name in layers) - sum(sizes[name] for name in experts),
            sum(sizes[name] for name in experts),
            sum(sizes[name] for name in heads),
            2 * active,
            need.kv_bytes_per_token,
            need.weights_bytes + CONTEXT_TOKENS * need.kv_bytes_per_token,
        )

    def memory_bytes(self, count: int) -> list[int]:
        """Of rank 0, and of the last."""
        return [self.part(index, count).memory_bytes for index in sorted({0, count - 1})]

    def step_s(self, mac: Mac, link: Link, count: int, rows: int) -> float:
        """Of a decode step of rows with a full context each."""
        parts = [self.part(index, count) for index in sorted({0, count - 1})]
        computed = max(part.read_bytes(rows, self.chance) for part in parts) / (REACHED * mac.bandwidth)
        return computed + (seconds(self.shape.step(rows, count), link, count) if count > 1 else 0.0)

    def chunk_s(self, mac: Mac, link: Link, count: int) -> float:
        """Of a prompt's chunk."""
        part = self.part(count - 1, count)
        read = (part.always_bytes + part.expert_bytes) / (REACHED * mac.bandwidth)
        computed = max(CHUNK_TOKENS * part.operations / mac.operations, read)
        return computed + (seconds(self.shape.chunk(CHUNK_TOKENS), link, count) if count > 1 else 0.0)


def link_of(link: Link, count: int) -> Link:
    """As so many Macs can be cabled."""
    if link.is_mesh and count > MESH_MACS:
        return Link(link.name, link.step_s, link.bandwidth, link.fixed_s)
    return link


def numbers(counts: Sequence[int]) -> str:
    return " | ".join(f"{count} Mac{'s' * (count > 1)}" for count in counts)


def memory_rows(models: Mapping[str, Model], counts: Sequence[int]) -> Iterator[str]:
    yield f"| memory of a Mac, GB: rank 0, others | {numbers(counts)} |"
    yield f"|---|{'---|' * len(counts)}"
    for name, model in models.items():
        cells = [", ".join(f"{size / 1e9:.0f}" for size in model.memory_bytes(count)) for count in counts]
        yield f"| {name} | {' | '.join(cells)} |"


def sent_rows(models: Mapping[str, Model], count: int) -> Iterator[str]:
    yield "| sent by a rank | messages a token | kB: 1 row | kB: 8 rows | messages a chunk | MB a chunk |"
    yield "|---|---|---|---|---|---|"
    for name, model in models.items():
        step, rows, chunk = model.shape.step(1, count), model.shape.step(8, count), model.shape.chunk(CHUNK_TOKENS)
        sizes = [sum(each.nbytes for each in messages) for messages in (step, rows, chunk)]
        cells = [len(step), f"{sizes[0] / 1e3:.0f}", f"{sizes[1] / 1e3:.0f}", len(chunk), f"{sizes[2] / 1e6:.0f}"]
        yield f"| {name} | {' | '.join(map(str, cells))} |"


def fits(model: Model, mac: Mac, count: int) -> bool:
    """On the largest of a kind."""
    return max(model.memory_bytes(count)) <= USABLE * 1e9 * max(mac.memories)


def time_rows(models: Mapping[str, Model], mac: Mac, counts: Sequence[int]) -> Iterator[str]:
    yield f"| {mac.name}: ms a token of 1 row, of 8 rows; s a chunk | link | {numbers(counts)} | fastest |"
    yield f"|---|---|{'---|' * len(counts)}---|"
    for name, model in models.items():
        for link in LINKS:
            cells = [_times(model, mac, link_of(link, count), count) for count in counts]
            cells.append(_fastest(model, mac, link, counts))
            yield f"| {name} | {link.name} | {' | '.join(cells)} |"


def _times(model: Model, mac: Mac, link: Link, count: int) -> str:
    if not fits(model, mac, count):
        return "no room"
    one, eight = (1e3 * model.step_s(mac, link, count, rows) for rows in (1, 8))
    return f"{one:.0f}, {eight:.0f}, {model.chunk_s(mac, link, count):.1f}"


def _fastest(model: Model, mac: Mac, link: Link, counts: Sequence[int]) -> str:
    """The numbers of Macs that take least for a token of one row, of eight, and for a chunk."""
    able = [count for count in counts if fits(model, mac, count)]
    links = {count: link_of(link, count) for count in able}
    ways = (
        lambda count: model.step_s(mac, links[count], count, 1),
        lambda count: model.step_s(mac, links[count], count, 8),
        lambda count: model.chunk_s(mac, links[count], count),
    )
    return ", ".join(str(min(able, key=way)) for way in ways) if able else ""


def read_rows(models: Mapping[str, Model], counts: Sequence[int]) -> Iterator[str]:
    yield f"| weights that a Mac reads, GB: 1 row, 8 rows | {numbers(counts)} |"
    yield f"|---|{'---|' * len(counts)}"
    for name, model in models.items():
        cells = []
        for count in counts:
            part = model.part(count - 1, count)
            kv_bytes = CONTEXT_TOKENS * part.kv_bytes_per_token
            read = [part.read_bytes(rows, model.chance) - rows * kv_bytes for rows in (1, 8)]
            cells.append(", ".join(f"{size / 1e9:.1f}" for size in read))
        yield f"| {name} | {' | '.join(cells)} |"


def short(name: str) -> str:
    """Of a published checkpoint's folder: Llama-4-Scout."""
    return re.sub(r"^.*__|-(17B|Vision|Instruct).*$", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--isq", nargs="+", default=["none", "4"], help="types, none for 16 bits (default: none 4)")
    parser.add_argument("--macs", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    models = {}
    for folder in args.folders:
        config = json.loads((folder / "config.json").read_text())
        for kind in args.isq:
            model = Model(config, None if kind == "none" else kind)
            models[f"{short(folder.name)}, {model.kind}"] = model
    tables = [memory_rows(models, args.macs), read_rows(models, args.macs), sent_rows(models, 2)]
    tables += [time_rows(models, mac, args.macs) for mac in MACS]
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
