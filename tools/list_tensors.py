"""Lists a model's tensors as transformers names them, for tools/check_tensors.py; nothing is allocated.

    python tools/list_tensors.py CONFIG.json FOLDER

Writes FOLDER/memory.json (a state_dict, which save_original_format=False stores too) and FOLDER/saved.json (what
save_pretrained writes, its conversion mapping run backwards). Needs the `goldens` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel, remove_tied_weights_from_state_dict

Tensors = dict[str, torch.Tensor]


def meta_model(config: dict[str, Any]) -> PreTrainedModel:
    """A model of shapes without memory."""
    given = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config["model_type"], **given))
    assert isinstance(model, PreTrainedModel)
    return model


def saved_tensors(model: PreTrainedModel) -> Tensors:
    """The steps of `save_pretrained`: tied copies go, then names and shapes are turned back into the hub's."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    reverted: Tensors = revert_weight_conversion(model, tensors)
    return reverted


def write(path: Path, tensors: Tensors) -> None:
    listed = {name: {"shape": list(tensor.shape), "dtype": "BF16"} for name, tensor in tensors.items()}
    path.write_text(json.dumps(listed, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    model = meta_model(json.loads(args.config.read_text()))
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "memory.json", model.state_dict())
    write(args.folder / "saved.json", saved_tensors(model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
