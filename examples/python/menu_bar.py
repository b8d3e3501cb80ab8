"""A menu-bar app that describes the picture on the clipboard: pip install rumps; python examples/python/menu_bar.py."""

import threading
from collections.abc import Callable
from typing import Any

import mlxvlm


class Describer:
    """The engine's part: everything slow is in threads, and `show` is called there with each text so far."""

    def __init__(self, model: str, show: Callable[[str], None]) -> None:
        self.show, self.engine = show, mlxvlm.load(model, max_memory_bytes=8 << 30)

    def describe(self, picture: Any) -> threading.Thread:
        (thread := threading.Thread(target=self._describe, args=(picture,), daemon=True)).start()
        return thread

    def _describe(self, picture: Any) -> None:
        text = ""
        try:
            for delta in self.engine.stream("What do you see?", picture, max_tokens=100):
                text += delta.text
                self.show(text)
        except mlxvlm.MlxvlmError as error:
            self.show(str(error))


if __name__ == "__main__":
    import rumps
    from PIL import ImageGrab
    from PyObjCTools import AppHelper  # the menu belongs to the main thread

    answer = rumps.MenuItem("No picture yet")
    show = lambda text: AppHelper.callAfter(setattr, answer, "title", text)  # noqa: E731
    describer = Describer("HuggingFaceTB/SmolVLM-256M-Instruct", show)
    ask = rumps.MenuItem("Describe the clipboard", lambda _: describer.describe(ImageGrab.grabclipboard()))
    rumps.events.before_quit.register(describer.engine.close)
    rumps.App("mlxvlm", title="👁", menu=[ask, answer]).run()
