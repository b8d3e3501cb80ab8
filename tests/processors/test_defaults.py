"""What image settings are where preprocessor_config.json leaves them out: transformers 5.23's, by class."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlxvlm.families import family_of
from mlxvlm.processors import idefics3, llama4, llava, mllama, qwen2_vl
from mlxvlm.processors.files import ProcessorFiles, read_json
from mlxvlm.processors.transforms import CLIP_MEAN, CLIP_STD
from tests.golden import GOLDENS

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
SWITCHES = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 0.00392156862745098}
BILINEAR, BICUBIC, LANCZOS = 2, 3, 1
# The reference's class, and its attributes but for sizes, which must be the tiny tower's.
WRITTEN_OUT: dict[str, dict[str, Any]] = {
    # Llama4ImageProcessor
    "llama4_norms": {**HALF, **SWITCHES, "resample": BILINEAR, "resize_to_max_canvas": False},
    # MllamaImageProcessorPil
    "mllama_tiles": {**HALF, **SWITCHES, "resample": BILINEAR, "do_pad": True, "max_image_tiles": 4},
    # Qwen2VLImageProcessorPil
    "qwen2_vl_tied": {**CLIP, **SWITCHES, "resample": BICUBIC},
    # Idefics3ImageProcessorPil, SmolVLMImageProcessorPil
    "idefics3_split": {**HALF, **SWITCHES, "resample": LANCZOS, "do_image_splitting": True},
    "smolvlm2_tied": {**HALF, **SWITCHES, "resample": LANCZOS, "do_image_splitting": True},
    # CLIPImageProcessorPil, SiglipImageProcessorPil, LlavaNextImageProcessorPil
    "llava_clip": {**CLIP, **SWITCHES, "resample": BICUBIC, "do_center_crop": True},
    "llava_siglip": {**HALF, **SWITCHES, "resample": BICUBIC},
    "llava_next_tiles": {**CLIP, **SWITCHES, "resample": BICUBIC},
}


def digest(folder: Path, image_processor: dict[str, Any]) -> bytes:
    """Covers every setting and the picture's pixels."""
    config = read_json(folder / "config.json")
    files = replace(ProcessorFiles.read(folder, config), image_processor=image_processor)
    processor: Any = family_of(config).processor_module().build(files)
    return bytes(processor.prepare_image(Image.new("RGB", (30, 20)))[2])


@pytest.mark.parametrize("name", list(WRITTEN_OUT))
def test_left_out_settings(name: str) -> None:
    folder, written = GOLDENS / name, WRITTEN_OUT[name]
    given = read_json(folder / "preprocessor_config.json")
    sizes = {key: value for key, value in given.items() if key not in written}
    assert digest(folder, sizes) == digest(folder, {**sizes, **written})
    # Each of the numbers counts.
    assert digest(folder, sizes) != digest(folder, {**sizes, **written, "image_std": [0.25, 0.5, 0.5]})


def test_llama4_sizes() -> None:
    assert asdict(llama4.ImageSettings.from_config({})) == {
        "tile": 336,
        "max_tiles": 16,
        "fill_canvas": False,
        "resample": BILINEAR,
    }


def test_mllama_sizes() -> None:
    assert asdict(mllama.ImageSettings.from_config({})) == {"tile": 224, "max_tiles": 4, "resample": BILINEAR}


def test_qwen2_vl_sizes() -> None:
    assert asdict(qwen2_vl.ImageSettings.from_config({})) == {
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
        "patch": 14,
        "merge": 2,
        "do_resize": True,
        "resample": BICUBIC,
    }


def test_idefics3_sizes() -> None:
    assert asdict(idefics3.ImageSettings.from_config({})) == {
        "longest_edge": 1456,
        "fixed_size": None,
        "tile": 364,
        "do_resize": True,
        "do_split": True,
        "resample": LANCZOS,
    }


def test_llava_sizes() -> None:
    tower = llava.Tower(224, 32, has_class_token=True, drops_first=True)
    clip = llava.SingleView.from_config({}, tower)
    assert (clip.shortest_edge, clip.fixed_size, clip.crop, clip.pad_color) == (224, None, (224, 224), None)
    siglip = llava.SingleView.from_config({"image_processor_type": "SiglipImageProcessor"}, tower)
    assert (siglip.shortest_edge, siglip.fixed_size, siglip.crop, siglip.pad_color) == (None, (224, 224), None, None)


def test_llava_next_sizes() -> None:
    tower = llava.Tower(336, 14, has_class_token=True, drops_first=True)
    found = llava.AnyRes.from_config({"size": {"shortest_edge": 336}, "crop_size": 336}, tower, None)
    assert found.pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
