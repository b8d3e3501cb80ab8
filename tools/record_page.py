"""Takes the README's picture of the page: Chromium asks `mlxvlm serve -m demo`, and what it answers is what is shown.

    python tools/record_page.py OUT.png [--dark] [--chromium PATH] [--chromedriver PATH]

Needs the `browser` extra and runs in a checkout. Ends with an error, and no picture, where an answer is not the right
one or the conversation does not fit into the window.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.serve_demo import PICTURES, demo_server  # noqa: E402
from tests.server.browser import Page, chromium  # noqa: E402

WIDTH, HEIGHT, SCALE = 1200, 1020, 2  # of the window, CSS pixels, and the screen's pixels to each
COLORS = 128  # of the file: the page is mostly paper and ink
# Pictures, question, answer. The last conversation is the one to be seen.
CONVERSATIONS: tuple[tuple[tuple[tuple[str, ...], str, str], ...], ...] = (
    ((("pink-square-blue-star",), "Where is the star?", "The star is on the right."),),
    ((("green-star", "pink-heart"), "Which picture shows a heart?", "The second picture."),),
    (
        (
            ("white-triangle-black-star-purple-heart",),
            "What do you see?",
            "A white triangle, a black star and a purple heart on a light green background.",
        ),
        ((), "Where is the heart?", "The heart is at the bottom left."),
        (("yellow-circle-purple-square",), "What is in the second picture?", "A yellow circle and a purple square."),
    ),
)


def talk(page: Page) -> None:
    """Asks all of CONVERSATIONS; raises ValueError where the model is wrong."""
    for number, turns in enumerate(CONVERSATIONS):
        if number:
            page.one("#new-chat").click()
            page.wait(lambda: not page.find(".answer"), "a new conversation")
        for pictures, question, right in turns:
            if pictures:
                page.attach(*(PICTURES / f"{name}.png" for name in pictures))
            page.ask(question)
            answer = page.answers()[-1]
            if answer != right:
                raise ValueError(f"{question} {answer!r}, but right is {right!r}")


def photograph(page: Page) -> Image.Image:
    """The window, with no caret or button lit; raises ValueError where something is out of sight."""
    page.one("#composer textarea").click()  # takes the pointer off the buttons
    page.run("document.activeElement.blur()")
    if page.run("const it = document.querySelector('#scroller'); return it.scrollHeight > it.clientHeight"):
        raise ValueError("the conversation is taller than the window: raise HEIGHT")
    shot = page.browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--dark", action="store_true", help="in the page's dark colours")
    for name in ("chromium", "chromedriver"):
        parser.add_argument(f"--{name}", default=shutil.which(name), required=shutil.which(name) is None)
    args = parser.parse_args()
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": SCALE, "mobile": False}
    with (
        demo_server() as url,
        tempfile.TemporaryDirectory() as profile,
        chromium(args.chromium, args.chromedriver, Path(profile)) as browser,
    ):
        page = Page(browser, url)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if args.dark:
            dark = {"name": "prefers-color-scheme", "value": "dark"}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
        page.open()
        page.wait(lambda: page.texts("#model option") == ["demo"], "the model's name")
        talk(page)
        picture = photograph(page)
    # No dithering: it would speckle the paper, and pack badly.
    picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
