"""Canvases, tiles and placeholder counts of pictures of any size, against plain re-statements of each reference.

The twins compute with fractions. Where a reference's own floats may fall short of a whole number both answers pass, as
tables made by the reference (test_<family>.py) say which it is.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxvlm.checkpoint.load import open_model
from mlxvlm.models.mllama import VisionConfig, visible_images
from mlxvlm.models.qwen2_vl import mrope_positions
from mlxvlm.processors import idefics3, llama4, llava, mllama, qwen2_vl
from mlxvlm.processors.base import Processor, Prompt
from tests.golden import GOLDENS
from tests.models.test_qwen2_vl import slow_positions
from tests.processors.sizes import FLOAT32_NOISE, any_pictures, any_size, ceilings, floors, prompt_of

Size = tuple[int, int]


def opened(name: str) -> Any:
    return open_model(str(GOLDENS / name)).processor


def pictures(sizes: list[Size]) -> list[Image.Image]:
    return [Image.new("RGB", (width, height)) for height, width in sizes]


def marked(processor: Processor, prompt: Prompt) -> list[str]:
    """The prompt's tokens by name."""
    backend = processor.tokenizer.backend
    return [backend.id_to_token(token) for token in prompt.token_ids]


def tile_canvases(tile: int, most: int) -> list[Size]:
    """(height, width) of every rectangle of at most `most` tiles."""
    return [(n // w * tile, w * tile) for n in range(most, 0, -1) for w in range(1, n + 1) if n % w == 0]


def least_change(height: int, width: int, canvases: list[Size], is_float32: bool) -> Size:
    """The canvas that enlarges least, else shrinks least, the smallest of those that do equally."""

    def scale(canvas: Size) -> float:
        exact = float(min(Fraction(canvas[0], height), Fraction(canvas[1], width)))
        return float(np.float32(exact)) if is_float32 else exact

    enlarging = [canvas for canvas in canvases if scale(canvas) >= 1]
    chosen = min(map(scale, enlarging)) if enlarging else max(map(scale, canvases))
    equal = sorted((canvas for canvas in canvases if scale(canvas) == chosen), key=math.prod)
    assert [math.prod(canvas) for canvas in equal[1:2]] != [math.prod(equal[0])]
    return equal[0]


def fits(found: Size, picture: Size, canvas: Size, tile: int, noise: Fraction = Fraction(0)) -> bool:
    """Whether `found` is a picture with its aspect kept in a canvas, enlarged to no more than one tile a side."""
    targets = [min(max(side, tile), limit) for side, limit in zip(picture, canvas, strict=True)]
    scales = [Fraction(target, side) for target, side in zip(targets, picture, strict=True)]
    for tight, free in ((0, 1), (1, 0)):
        # Of two equal scales either may come out smaller.
        if scales[tight] - scales[free] > Fraction(1, 10**6):
            continue
        sides = {max(1, min(side, targets[free])) for side in floors(picture[free] * scales[tight], noise)}
        if found[tight] == targets[tight] and found[free] in sides:
            return True
    return False


class TestLlama4:
    """`Llama4ImageProcessor`, `_prompt_split_image`."""

    @any_size
    @pytest.mark.parametrize(("tile", "most"), [(336, 16), (20, 7)])
    def test_canvas_and_size(self, height: int, width: int, tile: int, most: int) -> None:
        settings = llama4.ImageSettings(tile, most)
        canvas = llama4.best_canvas(height, width, settings)
        assert canvas == least_change(height, width, tile_canvases(tile, most), is_float32=True)
        found = llama4.fitted_size(height, width, canvas, settings)
        assert fits(found, (height, width), canvas, tile, FLOAT32_NOISE)

    @any_pictures
    def test_prompt(self, sizes: list[Size]) -> None:
        processor = LLAMA4
        prompt = prompt_of(processor, pictures(sizes))
        tile, most, count = 20, 6, processor.tokens_per_tile
        expected: list[str] = []
        for image, size in zip(prompt.images, sizes, strict=True):
            rows, columns = (side // tile for side in least_change(*size, tile_canvases(tile, most), True))
            tiles = rows * columns
            assert image.layout == (rows, columns)
            assert len(image.pixels) == tiles + (tiles > 1)
            expected.append("<|image_start|>")
            for _ in range(rows if tiles > 1 else 0):
                for column in range(columns):
                    expected += ["<|tile_x_separator|>"] * (column > 0) + ["<|patch|>"] * count
                expected.append("<|tile_y_separator|>")
            expected += ["<|image|>", *["<|patch|>"] * count, "<|image_end|>"]
        names = marked(processor, prompt)
        start = names.index("<|image_start|>")
        assert names[start : start + len(expected)] == expected
        assert names.count("<|patch|>") == sum(len(image.pixels) * count for image in prompt.images)


class TestMllama:
    """`MllamaImageProcessorPil`, `convert_aspect_ratios_to_ids`, `get_cross_attention_token_mask`."""

    @any_size
    @pytest.mark.parametrize(("tile", "most"), [(560, 4), (24, 9)])
    def test_canvas_and_size(self, height: int, width: int, tile: int, most: int) -> None:
        rows, columns = mllama.best_arrangement(height, width, tile, most)
        canvas = (rows * tile, columns * tile)
        assert canvas == least_change(height, width, tile_canvases(tile, most), is_float32=False)
        assert fits(mllama.fitted_size(height, width, canvas, tile), (height, width), canvas, tile)

    def test_the_tables_order_is_the_processors(self) -> None:
        """A picture's row in the tower's tables is its arrangement's place, from 1."""
        assert list(VisionConfig.supported_aspect_ratios) == mllama.arrangements(4)

    @any_pictures
    def test_prompt_and_what_its_tokens_see(self, sizes: list[Size]) -> None:
        processor = MLLAMA
        prompt = prompt_of(processor, pictures(sizes))
        for image, size in zip(prompt.images, sizes, strict=True):
            canvas = least_change(*size, tile_canvases(24, 4), is_float32=False)
            assert image.layout == (canvas[0] // 24, canvas[1] // 24)
            assert len(image.pixels) == 4
            # A black tile is not 0 once it is normalised.
            assert [bool(tile.any()) for tile in image.pixels] == [n < math.prod(image.layout) for n in range(4)]
        places = [place for place, token in enumerate(prompt.token_ids) if token == processor.image_token_id]
        assert [image.span for image in prompt.images] == [(place, place + 1) for place in places]
        sees = visible_images(places, len(prompt.token_ids))
        for place in range(len(prompt.token_ids)):
            # The pictures of one turn stand side by side: from the last on, all are seen.
            assert sees[place].tolist() == [place >= start for start in places]


def qwen_sides(height: int, width: int, step: int, least: int, most: int) -> list[set[int]]:
    """`smart_resize` in steps, with whole numbers only; both neighbours where a root is a whole number."""
    halves = [divmod(2 * side + step, 2 * step) for side in (height, width)]
    # Halves go to the even number.
    rounded = [steps - (rest == 0 and steps % 2) for steps, rest in halves]
    area = rounded[0] * rounded[1] * step * step
    if least <= area <= most:
        return [{side} for side in rounded]
    found = []
    for side, other in ((height, width), (width, height)):
        square = Fraction(side * (most if area > most else least), other * step * step)
        root = math.isqrt(math.floor(square))
        is_whole = root * root == square
        if area > most:
            found.append({max(1, root), max(1, root - is_whole)})
        else:
            found.append({root, root + 1} if is_whole else {root + 1})
    return found


class TestQwen2VL:
    """`smart_resize`, `Qwen2VLProcessor`, `get_rope_index`."""

    @any_size
    @pytest.mark.parametrize(
        "settings",
        [
            qwen2_vl.ImageSettings(),
            qwen2_vl.ImageSettings(min_pixels=3136, max_pixels=12_845_056),
            qwen2_vl.ImageSettings(min_pixels=900, max_pixels=5000, patch=5, merge=3),
        ],
    )
    def test_size(self, height: int, width: int, settings: qwen2_vl.ImageSettings) -> None:
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(qwen2_vl.ImageError, match="too long"):
                qwen2_vl.fitted_size(height, width, settings)
            return
        step = settings.step
        possible = qwen_sides(height, width, step, settings.min_pixels, settings.max_pixels)
        found = qwen2_vl.fitted_size(height, width, settings)
        assert all(side % step == 0 and side // step in sides for side, sides in zip(found, possible, strict=True))

    @any_pictures
    def test_prompt_and_positions(self, sizes: list[Size]) -> None:
        sizes = [size for size in sizes if max(size) <= 200 * min(size)] or [(1, 1)]
        processor = QWEN2_VL
        prompt = prompt_of(processor, pictures(sizes))
        layout: list[Any] = []
        end = 0
        for image, size in zip(prompt.images, sizes, strict=True):
            height, width = qwen2_vl.fitted_size(*size, processor.settings)
            assert image.layout == (height // 4, width // 4)  # patches of 4 pixels
            merged = (height // 8, width // 8)
            assert image.span[1] - image.span[0] == math.prod(merged)
            layout += [image.span[0] - end, merged]
            end = image.span[1]
        layout.append(len(prompt.token_ids) - end)
        placeholders = sum(end - start for start, end in (image.span for image in prompt.images))
        assert prompt.token_ids.count(processor.image_token_id) == placeholders
        positions, delta = mrope_positions(prompt, 2)
        assert (positions.tolist(), delta) == slow_positions(layout)


class TestIdefics3:
    """`get_resize_output_image_size`, `resize_for_vision_encoder`, `Idefics3Processor`."""

    @any_size
    @pytest.mark.parametrize(("longest", "tile"), [(1456, 364), (2048, 512), (1536, 384), (48, 16), (100, 16)])
    def test_sizes(self, height: int, width: int, longest: int, tile: int) -> None:
        found = idefics3.scaled_size(height, width, longest)
        long, short = (1, 0) if width >= height else (0, 1)
        shorts = floors(Fraction(longest * min(height, width), max(height, width)))
        assert found[long] == longest
        assert found[short] in {max(1, side + side % 2) for side in shorts}
        tiled = idefics3.tiled_size(*found, tile)
        long, short = (1, 0) if found[1] >= found[0] else (0, 1)
        assert tiled[long] == -(-found[long] // tile) * tile
        shorts = floors(Fraction(tiled[long] * found[short], found[long]))
        assert tiled[short] in {-(-side // tile) * tile for side in shorts}

    @any_pictures
    def test_prompt(self, sizes: list[Size]) -> None:
        processor = IDEFICS3
        prompt = prompt_of(processor, pictures(sizes))
        text = processor.tokenizer.backend.decode(list(prompt.token_ids), skip_special_tokens=False)
        fake, frame = "<fake_token_around_image>", "<image>" * processor.tokens_per_frame
        for image, size in zip(prompt.images, sizes, strict=True):
            height, width = idefics3.tiled_size(*idefics3.scaled_size(*size, 48), 16)
            rows, columns = height // 16, width // 16
            assert image.layout == (rows, columns)
            assert len(image.pixels) == rows * columns + 1
            expected = ""
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    expected += f"{fake}<row_{row}_col_{column}>{frame}"
                expected += "\n"
            expected += f"\n{fake}<global-img>{frame}{fake}"
            assert expected in text
            text = text.replace(expected, "", 1)
        assert "<image>" not in text


def best_pinpoint(height: int, width: int, canvases: list[Size]) -> Size:
    """`select_best_resolution` as it is told: most of the picture, then least waste, then the first."""
    best, most, least = canvases[0], 0, math.inf
    for canvas in canvases:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = math.prod(canvas) - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = canvas, effective, wasted
    return best


def unpadded_tokens(height: int, width: int, grid: Size, whole: int) -> int:
    """`pack_image_features` on a grid whose cells are numbers: cut the padding, end every row, put the whole first."""
    cells = np.arange(math.prod(grid)).reshape(grid)
    if width / height > grid[1] / grid[0]:
        kept = int(round(height * (grid[1] / width), 7))
        padding = (grid[0] - kept) // 2
        cells = cells[padding : grid[0] - padding]
    else:
        kept = int(round(width * (grid[0] / height), 7))
        padding = (grid[1] - kept) // 2
        cells = cells[:, padding : grid[1] - padding]
    return whole + np.pad(cells, ((0, 0), (0, 1))).size


class TestLlava:
    """`get_resize_output_image_size`; `select_best_resolution`, `get_patch_output_size`, `unpad_image`."""

    @any_size
    @pytest.mark.parametrize("edge", [18, 224, 336])
    def test_short_edge(self, height: int, width: int, edge: int) -> None:
        long = edge * max(height, width) // min(height, width)
        assert llava.short_edge_size(height, width, edge) == ((edge, long) if height <= width else (long, edge))

    @any_size
    @pytest.mark.parametrize("name", ["336 14", "12 4"])
    def test_canvas_size_and_tokens(self, height: int, width: int, name: str) -> None:
        side, patch = map(int, name.split())
        canvases = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
        if side == 12:
            canvases = [(12, 24), (24, 12), (24, 24), (36, 12), (12, 48)]
        canvas = llava.best_canvas(height, width, canvases)
        assert canvas == best_pinpoint(height, width, canvases)
        scale = min(Fraction(canvas[0], height), Fraction(canvas[1], width))
        found = llava.fitted_size(height, width, *canvas)
        for length, original, limit in zip(found, (height, width), canvas, strict=True):
            assert length in {min(ceiling, limit) for ceiling in ceilings(original * scale)}
        grid = (canvas[0] // patch, canvas[1] // patch)
        tower = llava.Tower(side, patch, has_class_token=True, drops_first=True)
        layout = (canvas[0] // side, canvas[1] // side, *llava.padding_patches(height, width, *grid))
        tokens = llava.AnyRes(tower, tuple(canvases), 3).num_tokens(layout)
        assert tokens == unpadded_tokens(height, width, grid, (side // patch) ** 2)

    @any_pictures
    def test_prompt_of_tiles(self, sizes: list[Size]) -> None:
        processor = LLAVA_NEXT
        prompt = prompt_of(processor, pictures(sizes))
        for image, size in zip(prompt.images, sizes, strict=True):
            canvas = best_pinpoint(*size, [(12, 24), (24, 12), (24, 24), (36, 12), (12, 48)])
            assert image.layout[:2] == (canvas[0] // 12, canvas[1] // 12)
            assert len(image.pixels) == 1 + math.prod(canvas) // 144
            start, end = image.span
            assert end - start == unpadded_tokens(*size, (canvas[0] // 4, canvas[1] // 4), 9)
            assert set(prompt.token_ids[start:end]) == {processor.image_token_id}
        counts = sum(end - start for start, end in (image.span for image in prompt.images))
        assert prompt.token_ids.count(processor.image_token_id) == counts

    @any_pictures
    def test_prompt_of_squares(self, sizes: list[Size]) -> None:
        prompt = prompt_of(LLAVA, pictures(sizes))
        assert [len(image.pixels) for image in prompt.images] == [1] * len(sizes)
        assert [end - start for start, end in (image.span for image in prompt.images)] == [16] * len(sizes)


# Built once: hypothesis calls a test many times.
LLAMA4: llama4.Llama4Processor = opened("llama4_norms")
MLLAMA: mllama.MllamaProcessor = opened("mllama_tiles")
QWEN2_VL: qwen2_vl.Qwen2VLProcessor = opened("qwen2_vl_tied")
IDEFICS3: idefics3.Idefics3Processor = opened("idefics3_split")
LLAVA_NEXT: llava.LlavaProcessor = opened("llava_next_tiles")
LLAVA: llava.LlavaProcessor = opened("llava_clip")
