"""Draws the demo model's pictures: a few plain shapes on a plain background. Knows no questions and no model.

Everything is a pure function of a `random.Random`: the same seed gives the same scene and the same pixels
(for one version of Pillow and of its JPEG library).
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "heart")

# Several natural shades of each colour, the plain CSS names among them: people draw with those.
COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 30, 30), (200, 20, 40), (230, 60, 50), (220, 20, 60)),
    "orange": ((255, 140, 0), (255, 165, 0), (240, 125, 20), (250, 150, 40)),
    "yellow": ((255, 255, 0), (255, 220, 0), (245, 205, 30), (255, 215, 0), (250, 235, 60)),
    "green": ((0, 128, 0), (0, 160, 60), (40, 180, 70), (0, 255, 0), (60, 200, 60), (34, 139, 34)),
    "blue": ((0, 0, 255), (30, 80, 220), (30, 60, 180), (65, 105, 225), (40, 120, 240), (30, 144, 255)),
    "purple": ((128, 0, 128), (140, 50, 190), (110, 40, 160), (160, 32, 240), (138, 43, 226)),
    "pink": ((255, 105, 180), (255, 150, 190), (255, 192, 203), (240, 130, 180), (255, 120, 170)),
    "black": ((0, 0, 0), (25, 25, 25), (40, 40, 45)),
    "white": ((255, 255, 255), (245, 245, 245), (250, 250, 245)),
}

BACKGROUNDS: dict[str, tuple[RGB, ...]] = {
    "white": ((255, 255, 255), (255, 255, 255), (248, 248, 248), (250, 250, 252)),
    "black": ((0, 0, 0), (20, 20, 20), (12, 12, 16)),
    "gray": ((128, 128, 128), (160, 160, 160), (190, 190, 190), (105, 105, 105), (211, 211, 211)),
    "light blue": ((173, 216, 230), (190, 220, 250), (200, 225, 245), (135, 206, 250)),
    "light green": ((190, 235, 190), (200, 240, 205), (144, 238, 144), (175, 230, 170)),
    "light yellow": ((255, 250, 205), (255, 245, 180), (255, 255, 224), (255, 248, 190)),
    "pink": ((255, 192, 203), (250, 205, 220), (255, 200, 215)),
    "blue": ((30, 60, 140), (0, 0, 128), (20, 40, 110), *COLORS["blue"]),
    "red": COLORS["red"],
    "green": COLORS["green"],
    "yellow": COLORS["yellow"],
    "orange": COLORS["orange"],
    "purple": COLORS["purple"],
}
BACKGROUND_ODDS = (6.0, 2.0, 2.0, 1.5, 1.5, 1.5, 1.0, 1.0, 0.6, 0.6, 0.6, 0.5, 0.5)

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

# (width, height): wide, tall and square, small and large.
SIZES = (
    (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (224, 224), (200, 120), (120, 200), (320, 240),
    (240, 320), (160, 120), (180, 240), (150, 100), (256, 144), (144, 256), (300, 200),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. Coordinates are fractions of the picture, `radius` of its shorter side."""

    shape: str
    color: str
    place: str
    rgb: RGB
    center: tuple[float, float]
    radius: float
    angle: float  # radians
    outline: RGB | None


@dataclass(frozen=True, slots=True)
class Scene:
    size: tuple[int, int]
    background: str
    background_rgb: RGB
    things: tuple[Thing, ...]  # in reading order: top left first


@dataclass(frozen=True, slots=True)
class Picture:
    scene: Scene
    image: Image.Image


def _shade(rng: random.Random, shades: tuple[RGB, ...], spread: int = 8) -> RGB:
    r, g, b = (min(255, max(0, c + rng.randint(-spread, spread))) for c in rng.choice(shades))
    return r, g, b


def _contrast(a: RGB, b: RGB) -> float:
    return math.dist(a, b)


def _color(rng: random.Random, background: str, background_rgb: RGB) -> tuple[str, RGB]:
    """A colour that a person would also tell from the background."""
    while True:
        name = rng.choice(tuple(COLORS))
        rgb = _shade(rng, COLORS[name])
        if name != background and _contrast(rgb, background_rgb) >= 100:
            return name, rgb


def _centers(rng: random.Random, cells: list[int], size: tuple[int, int]) -> list[tuple[float, float]]:
    """Anywhere well inside the cells, never so close that shapes would overlap."""
    jitter, edge, apart = 0.1, 0.145, 0.28 * min(size)
    while True:
        centers = []
        for cell in cells:
            x, y = (part / 3 + 1 / 6 + rng.uniform(-jitter, jitter) for part in (cell % 3, cell // 3))
            centers.append((min(1 - edge, max(edge, x)), min(1 - edge, max(edge, y))))
        gaps = (
            math.hypot((x - u) * size[0], (y - v) * size[1]) for i, (x, y) in enumerate(centers) for u, v in centers[:i]
        )
        if all(gap >= apart for gap in gaps):
            return centers


def _radius(rng: random.Random, size: tuple[int, int], centers: list[tuple[float, float]], index: int) -> float:
    """At random within the room between the edges and the next shape."""
    width, height = size
    (x, y), short = centers[index], min(size)
    room = min(x * width, y * height, (1 - x) * width, (1 - y) * height) / short - 0.02
    if len(centers) == 1:
        return rng.uniform(0.12, max(0.125, min(0.46, room)))
    others = centers[:index] + centers[index + 1 :]
    nearest = min(math.hypot((x - u) * width, (y - v) * height) for u, v in others) / short
    return rng.uniform(0.115, max(0.125, min(0.34, room, 0.45 * nearest)))


def draw_scene(rng: random.Random, odds: tuple[float, ...] = (0.4, 0.35, 0.25)) -> Scene:
    """1 + i shapes with odds[i], no two of the same shape and colour, in different cells of a 3x3 grid.

    Odds that leave something to 1 leave it to empty pictures.
    """
    background = rng.choices(tuple(BACKGROUNDS), BACKGROUND_ODDS)[0]
    background_rgb = _shade(rng, BACKGROUNDS[background], 4)
    count = rng.choices(range(len(odds) + 1), (max(0.0, 1 - sum(odds)), *odds))[0]
    cells = [4] if count == 1 and rng.random() < 0.3 else sorted(rng.sample(range(9), count))
    size = rng.choice(SIZES)
    centers = _centers(rng, cells, size)
    kinds: set[tuple[str, str]] = set()
    things = []
    for index, cell in enumerate(cells):
        while True:
            shape = rng.choice(SHAPES)
            color, rgb = _color(rng, background, background_rgb)
            if (shape, color) not in kinds:
                break
        kinds.add((shape, color))
        radius = _radius(rng, size, centers, index)
        outline = (0, 0, 0) if rng.random() < 0.5 else (rgb[0] // 2, rgb[1] // 2, rgb[2] // 2)
        angle = rng.uniform(-0.26, 0.26) if rng.random() < 0.5 else 0.0
        edge = outline if rng.random() < 0.1 else None
        things.append(Thing(shape, color, PLACES[cell], rgb, centers[index], radius, angle, edge))
    return Scene(size, background, background_rgb, tuple(things))


def _unit_outline(shape: str) -> list[tuple[float, float]]:
    """The shape's corners around (0, 0), y down, within a circle of about radius 1."""
    if shape == "circle":
        return [(math.cos(t * math.tau / 48), math.sin(t * math.tau / 48)) for t in range(48)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)]
    if shape == "star":
        radii = (1.08, 0.44)
        angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
        return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]
    points = []
    for i in range(40):
        t = i * math.tau / 40
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16.5, -(y + 2.5) / 15))
    return points


def _corners(thing: Thing, size: tuple[int, int]) -> list[tuple[float, float]]:
    width, height = size
    r = thing.radius * min(width, height)
    cos, sin = math.cos(thing.angle) * r, math.sin(thing.angle) * r
    cx, cy = thing.center[0] * width, thing.center[1] * height
    return [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in _unit_outline(thing.shape)]


def _background(rng: random.Random, scene: Scene, size: tuple[int, int]) -> Image.Image:
    """Plain, or a faint gradient, or faint stripes: never so strong that the name would change."""
    image = Image.new("RGB", size, scene.background_rgb)
    style = rng.random()
    if style < 0.6:
        return image
    draw = ImageDraw.Draw(image)
    step = rng.choice((-14, -10, 10, 14))
    period = max(2, size[1] // rng.randint(4, 12))
    for y in range(size[1]):
        share = y / size[1] if style < 0.8 else (y // period) % 2
        color = tuple(min(255, max(0, round(c + step * share))) for c in scene.background_rgb)
        draw.line([(0, y), (size[0], y)], fill=color)
    return image


def _camera(rng: random.Random, image: Image.Image) -> Image.Image:
    """What cameras and files do to a picture: blur, noise, JPEG."""
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    if rng.random() < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), (image.height, image.width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(45, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def _draw_things(image: Image.Image, scene: Scene) -> None:
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        width = max(1, min(image.size) // 64) if thing.outline else 1
        corners = _corners(thing, image.size)
        draw.polygon(corners, fill=thing.rgb, outline=thing.outline or thing.rgb, width=width)


def paint(rng: random.Random, scene: Scene) -> Image.Image:
    """RGB picture of scene.size; half of them drawn large and shrunk, which smooths the edges."""
    scale = 2 if rng.random() < 0.5 else 1
    image = _background(rng, scene, (scene.size[0] * scale, scene.size[1] * scale))
    _draw_things(image, scene)
    if scale > 1:
        image = image.resize(scene.size, Image.Resampling.BOX)
    return _camera(rng, image)


def paint_clean(scene: Scene) -> Image.Image:
    """The scene with smooth edges on an even background, as a drawing program would save it."""
    image = Image.new("RGB", (scene.size[0] * 4, scene.size[1] * 4), scene.background_rgb)
    _draw_things(image, scene)
    return image.resize(scene.size, Image.Resampling.LANCZOS)


def draw_picture(rng: random.Random, odds: tuple[float, ...] = (0.4, 0.35, 0.25)) -> Picture:
    scene = draw_scene(rng, odds)
    return Picture(scene, paint(rng, scene))


def patch_owner(scene: Scene, side: int = 64, patch: int = 8) -> np.ndarray:
    """[side/patch, side/patch] int: 1 + index of the thing that shows most in each patch, 0 for none."""
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for index, thing in enumerate(scene.things):
        points = [(x * side / scene.size[0], y * side / scene.size[1]) for x, y in _corners(thing, scene.size)]
        draw.polygon(points, fill=index + 1)
    grid = side // patch
    if not scene.things:
        return np.zeros((grid, grid), np.int64)
    blocks = np.asarray(canvas).reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid, grid, -1)
    counts = np.stack([(blocks == k + 1).sum(-1) for k in range(len(scene.things))], -1)
    return np.where(counts.max(-1) >= 6, counts.argmax(-1) + 1, 0)
