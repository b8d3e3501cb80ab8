"""A YAML file that says which layers get which quantisation. Knows ranges and patterns, not models.

Source: mistral.rs `topology/mod.rs`. Keys are a range of decoder layers `0-8` (its end not included), one layer `16`,
or a pattern `/regex/` that is searched in tensor names; values hold `isq`, a type's name or `none`. A pattern goes
before a range, and of two that match the later one counts.

    0-8:
      isq: Q3K
    16:
      isq: none
    /visual.*fc1/:
      isq: 8
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.errors import UsageError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MAX_BYTES = 1 << 20  # a topology is a page of text


@dataclass(frozen=True, slots=True)
class Entry:
    """One key. spec: None leaves what it names as it is in the checkpoint."""

    layers: range | None
    pattern: re.Pattern[str] | None
    spec: QuantSpec | None


@dataclass(frozen=True, slots=True)
class Topology:
    """The entries in the file's order."""

    entries: tuple[Entry, ...] = ()

    def find(self, path: str, layer: int | None) -> Entry | None:
        """The entry for the module at `path`, whose decoder layer is `layer` if it is in one."""
        by_pattern = [entry for entry in self.entries if entry.pattern and entry.pattern.search(f"{path}.weight")]
        by_range = [entry for entry in self.entries if entry.layers is not None and layer in entry.layers]
        return next(reversed(by_pattern or by_range), None)

    @classmethod
    def read(cls, path: Path) -> Topology:
        """Raises UsageError that names the file and the line."""
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise UsageError(f"{path} is too large for a topology file")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the topology file {path} can't be read: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Topology:
        """As read(); `name` stands for the file in errors."""
        import yaml  # costs every start a twentieth of a second, and few have a topology

        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{name}, line {mark.line + 1}" if mark else name
            raise UsageError(f"{where}: no YAML: {getattr(error, 'problem', None) or error}") from error
        except RecursionError as error:
            raise UsageError(f"{name}: nested too deeply") from error
        if root is None:
            raise UsageError(f"{name} is empty: give layers and their types, like `0-8: {{isq: Q4K}}`")
        return cls(tuple(_entry(key, value, name) for key, value in _items(root, name)))


def _items(node: Any, name: str) -> list[tuple[Any, Any]]:
    if node.id != "mapping":
        raise _wrong(name, node, "layers and what they get are expected here, like `0-8: {isq: Q4K}`")
    seen: set[str] = set()
    for key, _ in node.value:
        if key.id != "scalar":
            raise _wrong(name, key, "a key is a plain word")
        if key.value in seen:
            raise _wrong(name, key, f"{key.value!r} is there twice")
        seen.add(key.value)
    return list(node.value)


def _entry(key: Any, value: Any, name: str) -> Entry:
    layers, pattern = _key(key, name)
    is_bare = value.id == "scalar" and not value.value
    fields = {} if is_bare else {field.value: (field, node) for field, node in _items(value, name)}
    for field, (node, _) in fields.items():
        # `device` is for machines whose memories are apart; here the GPU reads the CPU's.
        if field not in ("isq", "device"):
            raise _wrong(name, node, f"{field!r} is unknown; there are isq and device")
    if "isq" not in fields:
        return Entry(None, None, None)
    node = fields["isq"][1]
    if node.id != "scalar":
        raise _wrong(name, node, "isq is a type's name, like Q4K")
    if node.value.lower() == "none":
        return Entry(layers, pattern, None)
    try:
        return Entry(layers, pattern, parse_type(node.value))
    except UsageError as error:
        raise _wrong(name, node, str(error)) from error


def _key(node: Any, name: str) -> tuple[range | None, re.Pattern[str] | None]:
    text = node.value
    if len(text) > 1 and text.startswith("/") and text.endswith("/"):
        try:
            return None, re.compile(text[1:-1])
        except (re.error, RecursionError) as error:
            raise _wrong(name, node, f"{text} is no regular expression: {error}") from error
    match = _RANGE.fullmatch(text)
    if match is None:
        raise _wrong(name, node, f"{text!r} is no range like 0-8, layer like 16, or pattern like /lm_head/")
    start = int(match[1])
    end = int(match[2]) if match[2] else start + 1
    if end <= start:
        raise _wrong(name, node, f"the range {text} is empty: its end is not included")
    return range(start, end), None


def _wrong(name: str, node: Any, problem: str) -> UsageError:
    return UsageError(f"{name}, line {node.start_mark.line + 1}: {problem}")
