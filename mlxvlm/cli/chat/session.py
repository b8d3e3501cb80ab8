"""A conversation: what was said, what is attached, how answers are sampled. Knows the engine, no terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import unquote

from mlxvlm.cli.chat.words import is_file, is_url
from mlxvlm.cli.chat_tools import ChatTools, OnCalls
from mlxvlm.cli.interrupts import on_interrupt
from mlxvlm.cli.printable import printable
from mlxvlm.cli.tool_options import tool_answer
from mlxvlm.engine.request import Completion, Delta, Request, Usage
from mlxvlm.engine.stream import collect
from mlxvlm.messages import ImageOptions, ImagePart, Message, TextPart, system
from mlxvlm.processors.images import load_image

if TYPE_CHECKING:
    from PIL import Image

    from mlxvlm.agent.web_search import Citation
    from mlxvlm.engine.engine import Engine
    from mlxvlm.engine.params import SamplingParams

_PATIENCE = 3  # Ctrl-Cs in one answer: the first ends it at the next step, the last leaves at once
_NAME_CHARS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Decoded once, when it is attached: later turns fetch nothing, and a bad one is known before it is asked about.

    source: a URL, a data: URL, or the absolute path of a file.
    """

    source: str = field(repr=False)
    image: Image.Image = field(repr=False)

    @classmethod
    def open(cls, source: str) -> Picture:
        """Raises ImageError."""
        image = load_image(source)
        if is_file(source):
            return cls(str(Path(source).expanduser().absolute()), image)
        return cls(source if is_url(source) else f"data:application/octet-stream;base64,{source}", image)

    def __str__(self) -> str:
        """Its name and size."""
        name = self.source[:11] + "..." if self.source.startswith("data:") else self.source.rpartition("/")[2]
        if self.source.startswith("file:"):
            name = unquote(name)
        return f"{printable(name)[-_NAME_CHARS:] or 'picture'} ({self.image.width} x {self.image.height})"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, its texts and pictures in order."""

    role: Literal["user", "assistant"]
    parts: tuple[str | Picture, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    def message(self) -> Message:
        """As the engine takes it."""
        parts = (TextPart(part) if isinstance(part, str) else ImagePart(part.image) for part in self.parts)
        return Message(self.role, tuple(parts))


Show: TypeAlias = Callable[[str], None]


@dataclass
class Session:
    """turns: what is kept; a failed turn never is. pending: pictures for the next message.

    sampling: of the next answer; start: what \\temperature default and its kin go back to.
    """

    engine: Engine
    model: str
    about: str
    start: SamplingParams
    image_options: ImageOptions = field(default_factory=ImageOptions)
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    pending: list[Picture] = field(default_factory=list)
    last: Completion | None = None
    sampling: SamplingParams = field(init=False)
    tools: ChatTools | None = None
    cited: list[Citation] = field(default_factory=list)  # by the last answer

    def __post_init__(self) -> None:
        self.sampling = self.start

    def compose(self, text: str) -> Turn:
        """A question about the pictures that wait for one; they stay until it is answered."""
        return Turn("user", (*self.pending, *([text] if text else [])))

    def answer(
        self, question: Turn, show: Show, kept: int | None = None, on_calls: OnCalls = lambda calls: None
    ) -> Completion:
        """Asks after the first `kept` turns (None: all of them), and keeps question and answer in place of the rest.

        on_calls: told of the tools that the model uses. Their results are not kept, what it made of them is.

        Ctrl-C ends the answer with what there is; one without a word is not kept. Raises MlxvlmError, and keeps
        everything as it was.
        """
        earlier = self.turns[:kept]
        turns = [turn.message() for turn in (*earlier, question)]
        messages = [*([system(self.system)] if self.system else []), *turns]
        deltas: list[Delta] = []
        begun = False
        request = Request(messages, self.sampling, image_options=self.image_options)
        rounds = None if self.tools is None else self.tools.rounds(self.engine, request, on_calls)
        asked = self.engine.submit(request) if rounds is None else tool_answer(self.engine, rounds)
        with asked as stream, on_interrupt(stream.cancel, _PATIENCE):
            for delta in stream:
                # Templates write the space after "Assistant:" themselves in the turns before.
                text = delta.text if begun else delta.text.lstrip()
                begun = begun or bool(text)
                deltas.append(delta)
                if text:
                    show(text)
        completion = collect(deltas)
        if completion.text.strip() or completion.finish_reason != "cancelled":
            self.turns = [*earlier, question, Turn("assistant", (completion.text.strip(),))]
            self.pending = [picture for picture in self.pending if picture not in question.pictures]
            self.last = completion
            self.cited = [] if rounds is None else rounds.citations
        return completion

    @property
    def sources(self) -> list[str]:
        """What the last answer cites, each once, as lines."""
        return [f"{title}: {url}" for title, url in dict.fromkeys((each.title, each.url) for each in self.cited)]

    def clear(self) -> None:
        """Forgets what was said and attached, not the settings."""
        self.turns, self.pending, self.last = [], [], None


def figures(usage: Usage) -> str:
    """An answer's counts and speed on one line."""
    cached = f", {usage.cached_tokens} of them cached" if usage.cached_tokens else ""
    return (
        f"{usage.completion_tokens} tokens, {usage.completion_tokens_per_s:.1f} tok/s | "
        f"first token {usage.time_to_first_token_s:.2f} s | prompt {usage.prompt_tokens} tokens{cached}"
    )
