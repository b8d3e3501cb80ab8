"""What a request may ask of its pictures, and how many it may bring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mlxvlm.errors import ContextLengthError, InputError
from mlxvlm.families import family_of
from mlxvlm.messages import ImageOptions, user
from mlxvlm.processors.files import ProcessorFiles, context_length
from mlxvlm.processors.qwen2_vl import ImageSettings, build, fitted_size
from tests.golden import GOLDENS

QWEN = GOLDENS / "qwen2_vl_tied"
CHECKPOINTS = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
# Qwen2VLImageProcessorPil(min_pixels=1024, max_pixels=40000, patch_size=4, merge_size=2), called with these bounds:
# width, height, bounds, rows and columns of patches.
REFERENCE = [
    (216, 21, {}, (6, 54)),
    (156, 245, {"min_pixels": 16754, "max_pixels": 51767}, (62, 40)),
    (72, 49, {"min_pixels": 7158, "max_pixels": 18870}, (18, 26)),
    (273, 76, {"min_pixels": 8209}, (20, 68)),
    (105, 283, {"min_pixels": 11594, "max_pixels": 40435}, (70, 26)),
    (281, 8, {"min_pixels": 17084, "max_pixels": 53158}, (6, 194)),
    (167, 33, {"max_pixels": 48259}, (8, 42)),
    (73, 279, {"min_pixels": 18597, "max_pixels": 53048}, (70, 18)),
]


def read(folder: Path) -> ProcessorFiles:
    config = json.loads((folder / "config.json").read_text())
    return ProcessorFiles.read(folder, config)


def picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@pytest.mark.parametrize(("width", "height", "bounds", "grid"), REFERENCE)
def test_bounds_of_a_request_give_the_references_sizes(
    width: int, height: int, bounds: dict[str, int], grid: tuple[int, int]
) -> None:
    settings = ImageSettings(min_pixels=1024, max_pixels=40000, patch=4).bounded(ImageOptions(**bounds))
    rows, columns = grid
    assert fitted_size(height, width, settings) == (4 * rows, 4 * columns)


def test_a_request_changes_its_own_pictures_only() -> None:
    processor = build(read(QWEN))
    messages = [user("a", [picture(40, 30)])]
    plain = processor(messages)
    small = processor(messages, None, ImageOptions(min_pixels=1, max_pixels=256))
    large = processor(messages, None, ImageOptions(min_pixels=4000, max_pixels=6000))
    sizes = [len(prompt.images[0].pixels) for prompt in (small, plain, large)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    assert len({prompt.images[0].digest for prompt in (small, plain, large)}) == 3
    assert processor(messages).token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImageOptions(min_pixels=0), "min_pixels is 0; it is a number of pixels, from 1 to"),
        (ImageOptions(min_pixels=10**400), "min_pixels is 1000000.*; it is a number of pixels"),
        (ImageOptions(max_pixels=-1), "max_pixels is -1;"),
        (ImageOptions(max_pixels=2.5), "max_pixels is 2.5;"),  # type: ignore[arg-type]
        (ImageOptions(max_pixels=True), "max_pixels is True;"),
        (ImageOptions(max_pixels="9"), "max_pixels is '9';"),  # type: ignore[arg-type]
        (ImageOptions(1000, 999), "min_pixels 1000 is more than max_pixels 999"),
        (ImageOptions(max_pixels=1), r"min_pixels \d+ is more than max_pixels 1: give both"),
    ],
)
def test_bounds_that_cant_be(options: ImageOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(read(QWEN))([user("a", [picture(40, 30)])], None, options)


def test_a_picture_is_not_blown_up_beyond_the_context() -> None:
    options = ImageOptions(min_pixels=10**12, max_pixels=10**12)
    with pytest.raises(ContextLengthError, match="lower min_pixels or max_pixels"):
        build(read(QWEN))([user("a", [picture(40, 30)])], None, options)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "qwen" not in name])
def test_families_with_sizes_of_their_own_refuse_bounds(name: str) -> None:
    files = read(GOLDENS / name)
    processor = family_of(files.config).processor_module().build(files)
    with pytest.raises(InputError, match="min_pixels and max_pixels can't be set"):
        processor([user("a", [picture(9, 9)])], None, ImageOptions(max_pixels=100))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pictures_stop_where_the_context_is_full(name: str) -> None:
    """The sources after the one that no longer fits are not even looked at."""
    files = read(GOLDENS / name)
    processor = family_of(files.config).processor_module().build(files)
    one = processor([user("a", [picture(30, 20)])])
    count = one.token_ids.count(processor.image_token_id)
    assert processor.max_context == context_length(files.config)
    processor.max_context = 2 * count
    sources = [picture(30, 20), picture(30, 20), "/no/such/picture.png"]
    expected = rf"^2 of 3 image\(s\) alone take {2 * count} tokens, but the model's context is {2 * count}: send fewer"
    with pytest.raises(ContextLengthError, match=expected):
        processor([user("a", sources)])
