"""Pictures and chats of the goldens: small, odd-sized, and the same bytes in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from goldens_json import write_json
from PIL import Image, ImageDraw

Message = dict[str, Any]

SEE = "What do you see?"


def canvas(width: int, height: int, steps: int = 6) -> Image.Image:
    """A stepped gradient: few distinct values, so that pictures and stored pixels compress well."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    ramps = (x / max(width - 1, 1), y / max(height - 1, 1), (x + y) / max(width + height - 2, 1))
    planes = [np.floor(ramp * (steps - 0.01)) * (255 // steps) + 9 * i for i, ramp in enumerate(ramps)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8), "RGB")


def wide() -> Image.Image:
    image = canvas(90, 19)
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 4, 31, 15), fill=(250, 240, 30))
    draw.polygon(((60, 16), (68, 2), (84, 15)), fill=(20, 40, 200))
    return image


def tall() -> Image.Image:
    image = canvas(19, 70, steps=4)
    draw = ImageDraw.Draw(image)
    draw.ellipse((3, 8, 15, 26), fill=(230, 30, 40))
    draw.line((0, 69, 18, 40), fill=(255, 255, 255), width=3)
    return image


def tiny() -> Image.Image:
    values = np.arange(5 * 4 * 3) * 71 % 256
    return Image.fromarray(values.reshape(4, 5, 3).astype(np.uint8), "RGB")


def rgba() -> Image.Image:
    """Alpha has all kinds of values: 0, 255 and between."""
    image = canvas(33, 33, steps=5).convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    draw = ImageDraw.Draw(alpha)
    draw.ellipse((4, 4, 20, 20), fill=0)
    draw.rectangle((16, 18, 30, 31), fill=120)
    image.putalpha(alpha)
    return image


def palette() -> Image.Image:
    """Five palette entries, one of them half and one fully transparent."""
    image = Image.new("P", (40, 31), 0)
    image.putpalette([200, 20, 20, 30, 160, 60, 20, 60, 220, 240, 220, 40, 10, 10, 10])
    draw = ImageDraw.Draw(image)
    for index in range(1, 5):
        draw.rectangle((index * 7, index * 3, index * 7 + 9, index * 3 + 14), fill=index)
    image.info["transparency"] = bytes((255, 128, 255, 0, 255))
    return image


def gray() -> Image.Image:
    image = canvas(50, 29, steps=8).convert("L")
    ImageDraw.Draw(image).rectangle((8, 7, 35, 20), fill=245)
    return image


def photo() -> Image.Image:
    image = canvas(48, 30, steps=3)
    ImageDraw.Draw(image).ellipse((2, 4, 20, 24), fill=(240, 120, 10))
    return image


def write_pictures(folder: Path) -> dict[str, str]:
    """Saves all pictures; returns name -> file name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {draw.__name__: draw() for draw in (wide, tall, tiny, rgba, palette, gray)}
    files = {name: f"{name}.png" for name in drawn}
    for name, image in drawn.items():
        image.save(folder / files[name], optimize=True, **_transparency(image))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to see it upright
    files["exif"] = "exif.jpg"
    photo().save(folder / files["exif"], quality=80, exif=exif)
    return files


def _transparency(image: Image.Image) -> dict[str, Any]:
    return {"transparency": image.info["transparency"]} if image.mode == "P" else {}


def text(value: str) -> Message:
    return {"type": "text", "text": value}


def picture(name: str) -> Message:
    return {"type": "image", "image": name}


def turn(role: str, *parts: Message) -> Message:
    return {"role": role, "content": list(parts)}


LONG = (
    'The ferry "Åsa" left at 7:45 with 36 crates, 128 bricks and 2 goats; nobody\'s seen her since. '
    "Below deck:\n\n - red rope\n - maps of 東京 and Žižkov 🗺️\n\n"
    "We'll wait. How many animals went along? 🐐🐐"
)


def chats() -> dict[str, list[Message]]:
    one = {f"one_{name}": [turn("user", picture(name), text(SEE))] for name in PICTURES}
    both = turn("user", picture("wide"), text("This one,"), picture("rgba"), text("or that one? 🤔"))
    again = [
        turn("user", picture("tall"), text(SEE)),
        turn("assistant", text("A red ball.")),
        turn("user", picture("tiny"), text("And now?")),
    ]
    return {
        "text_only": [turn("user", text("Crème brûlée? 🍮"))],
        **one,
        "two_images": [both],
        "text_first": [turn("user", text("Look: "), picture("palette"), text(" Which colours?"))],
        "multi_turn": again,
        "system_turn": [
            turn("system", text("Answer in one word.")),
            turn("user", picture("gray"), text("Dark or light?")),
        ],
        "long_text": [turn("user", text(LONG))],
    }


PICTURES = ("wide", "tall", "tiny", "rgba", "palette", "gray", "exif")


def write_scenarios(folder: Path) -> dict[str, Any]:
    scenarios = {
        "images": write_pictures(folder / "images"),
        "full_logits": ["text_only", "one_wide"],
        "batch": ["text_only", "one_tall", "two_images"],
        "scenarios": chats(),
    }
    write_json(folder / "scenarios.json", scenarios, compact_below=1)
    return scenarios
