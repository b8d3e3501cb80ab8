"""Records a chat with the demo model as an animated picture: what a user types and sees, in a pseudo-terminal.

    python tools/record_chat.py OUT.gif [--font FILE.ttf]

Needs the `test` extra (pexpect, pyte). Fonts: any monospaced TrueType file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import pexpect
import pyte
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 92, 18
SIZE = 14  # of the font, pixels
FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf"
FRAME_S, KEY_S, REST_S = 0.12, 0.05, 1.8  # of a picture, between keys, after an answer
LINES = (
    "\\image examples/pictures/pink-square-blue-star.png What do you see?",
    "Where is the star?",
    "\\image examples/pictures/pink-heart.png Describe as JSON.",
)
COLORS = {
    "default": "#d8dee9",
    "black": "#3b4252",
    "red": "#e06c75",
    "green": "#98c379",
    "brown": "#e5c07b",
    "blue": "#61afef",
    "magenta": "#c678dd",
    "cyan": "#56b6c2",
    "white": "#eceff4",
    "brightblack": "#7f8794",
}
PAPER = "#20242c"


class Recorder:
    """A terminal whose screen is drawn again and again."""

    def __init__(self, font: Path) -> None:
        self._font = ImageFont.truetype(font, SIZE)
        self._cell = (round(self._font.getlength("M")), SIZE + 4)
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.Stream(self._screen)
        self.frames: list[Image.Image] = []
        argv = ["-m", "mlxvlm", "chat", "-m", "demo", "--no-history"]
        # Nobody here tells where the cursor is, as terminals do when asked.
        env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._child = pexpect.spawn(sys.executable, argv, env=env, dimensions=(ROWS, COLUMNS), encoding="utf-8")

    def wait(self, text: str, seconds: float = 60.0) -> None:
        """Records until the screen's last line with something on it begins with `text`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.rest(FRAME_S)
            lines = [line for line in self._screen.display if line.strip()]
            if lines and lines[-1].startswith(text):
                return
        raise TimeoutError(f"{text!r} did not come:\n" + "\n".join(self._screen.display))

    def type(self, line: str) -> None:
        """As a person would."""
        for key in line:
            self._child.send(key)
            self.rest(KEY_S)
        self._child.send("\r")

    def rest(self, seconds: float) -> None:
        """Records what comes in so many seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                self._stream.feed(self._child.read_nonblocking(4096, left))
            except pexpect.TIMEOUT:
                break
        self.frames += [self._drawn()] * max(round(seconds / FRAME_S), 1)

    def _drawn(self) -> Image.Image:
        width, height = self._cell
        image = Image.new("RGB", (COLUMNS * width + 24, ROWS * height + 24), PAPER)
        draw = ImageDraw.Draw(image)
        for row in range(ROWS):
            for column in range(COLUMNS):
                char = self._screen.buffer[row][column]
                ink, paper = _color(char.fg, COLORS["default"]), _color(char.bg, PAPER)
                if char.reverse:
                    ink, paper = paper, ink
                place = (12 + column * width, 12 + row * height)
                if paper != PAPER:
                    draw.rectangle((*place, place[0] + width - 1, place[1] + height - 1), paper)
                if char.data != " ":
                    draw.text(place, char.data, ink, self._font)
        cursor = self._screen.cursor
        x, y = 12 + cursor.x * width, 12 + cursor.y * height
        if not cursor.hidden:
            draw.rectangle((x, y, x + 1, y + height), COLORS["default"])
        return image


def _color(name: str, default: str) -> str:
    """Of pyte's: a name, six digits, or "default"."""
    return default if name == "default" else COLORS.get(name, f"#{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.gif")
    parser.add_argument("--font", type=Path, default=Path(FONT))
    args = parser.parse_args()
    recorder = Recorder(args.font)
    recorder.wait(">")
    for line in LINES:
        recorder.type(line)
        recorder.rest(0.3)
        recorder.wait(">")
        recorder.rest(REST_S)
    frames = [frame.quantize(8, dither=Image.Dither.NONE) for frame in recorder.frames]
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=int(1000 * FRAME_S), loop=0)


if __name__ == "__main__":
    main()
