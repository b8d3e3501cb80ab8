"""Reads cases made by tools/make_goldens.py: a tiny checkpoint and what transformers computes with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlxvlm.checkpoint.load import LoadOptions, ModelSource, open_model
from mlxvlm.families import FAMILIES
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import Prompt

GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Case:
    """One checkpoint folder beside `scenarios.json` and `images/`."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def _scenarios(self) -> dict[str, Any]:
        return json.loads((self.folder.parent / "scenarios.json").read_text())

    @cached_property
    def _truth(self) -> tuple[Path, dict[str, Any]]:
        """A re-saved checkpoint shares the goldens of its original."""
        golden = json.loads((self.folder / "golden.json").read_text())
        home = self.folder.parent / golden["same_as"] if "same_as" in golden else self.folder
        return home, json.loads((home / "golden.json").read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self._truth[0] / "golden.npz") as file:
            return {name: file[name] for name in file.files}

    @property
    def scenarios(self) -> list[str]:
        return list(self._truth[1]["scenarios"])

    @property
    def batch(self) -> list[str]:
        return self._truth[1]["batch"]

    @property
    def template(self) -> dict[str, Any]:
        """Variables that the chat template was rendered with, such as a fixed date."""
        return self._truth[1].get("template_kwargs", {})

    def expected(self, scenario: str) -> dict[str, Any]:
        return self._truth[1]["scenarios"][scenario]

    @property
    def is_resampled_by_pillow(self) -> bool:
        """Else by torchvision, for families whose reference has nothing else: some bytes differ by one level."""
        return str(self._truth[1]["hf_image_processor"]).endswith("Pil")

    def with_golden_pixels(self, scenario: str, prompt: Prompt) -> Prompt:
        """The prompt with the reference's own pixels, where the golden holds them."""
        expected = self.pixels(scenario) if prompt.images else None
        if expected is None:
            return prompt
        shape = prompt.images[0].pixels.shape[1:]
        ends = np.cumsum([len(image.pixels) for image in prompt.images])
        parts = np.split(expected.reshape(-1, *shape), ends[:-1])
        images = [replace(image, pixels=part) for image, part in zip(prompt.images, parts, strict=True)]
        return replace(prompt, images=tuple(images))

    def pixels(self, scenario: str) -> np.ndarray | None:
        """[1, frames, 3, h, w], or as the family's reference has them; None where the golden does not hold them."""
        entry = self.expected(scenario)
        if "pixels" in entry:
            parts = [self.pixels(other) for other in entry["pixels"]["of"]]
            return None if any(part is None for part in parts) else np.concatenate(parts, entry["pixels"]["axis"])
        indices = self.arrays.get(f"{scenario}/pixel_values")
        return None if indices is None else self.arrays["pixel_table"][indices]

    def messages(self, scenario: str) -> list[Message]:
        images = self._scenarios["images"]
        return [
            Message(
                turn["role"],
                tuple(
                    ImagePart(self.folder.parent / "images" / images[part["image"]])
                    if part["type"] == "image"
                    else TextPart(part["text"])
                    for part in turn["content"]
                ),
            )
            for turn in self._scenarios["scenarios"][scenario]
        ]

    def open(self) -> ModelSource:
        return open_model(str(self.folder))

    def build(self) -> VisionLanguageModel:
        return self.open().build(LoadOptions("float32"), lambda done, total: None)


def cases(root: Path) -> list[Case]:
    """The cases of families that this runtime has."""
    found = []
    for golden in sorted(root.glob("*/golden.json")):
        config = golden.parent / "config.json"
        if config.is_file() and json.loads(config.read_text())["model_type"] in FAMILIES:
            found.append(Case(golden.parent))
    return found
