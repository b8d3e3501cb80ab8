"""What a line means: a command of the table, a dropped picture, or a question. Knows the session, no terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from mlxvlm.agent.web_search import check_search
from mlxvlm.cli.chat import transcript
from mlxvlm.cli.chat.session import Picture, Session, Turn, figures
from mlxvlm.cli.chat.words import SPACES, is_dropped, last_word, split_sources
from mlxvlm.cli.options import size_text
from mlxvlm.cli.sampling_options import check_seed
from mlxvlm.engine.params import SamplingParams
from mlxvlm.errors import InputError, UsageError

MARKS = ("\\", "/")  # either begins a command
_DEFAULT, _OFF = "default", ("off", "none")
_LEAVING = ("exit", "quit")  # what people type to leave, also without a mark; behind a space it is a message


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a door does about a line, in this order.

    note: lines to show. pictures: attached just now. ask: a question to answer, after the first `kept` turns.
    """

    note: str = ""
    pictures: tuple[Picture, ...] = ()
    ask: Turn | None = None
    kept: int | None = None
    leave: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """run takes what follows the name, without spaces around it."""

    run: Callable[[Session, str], Outcome]
    arguments: str
    help: str
    takes_path: bool = False


def take(session: Session, line: str) -> Outcome:
    """Carries out a command, or says what to ask. Raises MlxvlmError, with the session as it was."""
    text = line.strip(SPACES)
    if not text:
        return Outcome(f"Type a question about {_listed(session.pending)}." if session.pending else "")
    if line.startswith(MARKS):
        name, argument = _split(line)
        if name in COMMANDS:
            return COMMANDS[name].run(session, argument)
    if line.rstrip(SPACES).lower() in _LEAVING:
        return Outcome(leave=True)
    if is_dropped(line):
        return _image(session, text)
    if line.startswith(MARKS):
        raise _unknown(line)
    return Outcome(ask=session.compose(text))


def _split(line: str) -> tuple[str, str]:
    """A command's name in the table's spelling, and its argument."""
    name, *rest = line[1:].split(maxsplit=1) or [""]
    name = name.lower().replace("_", "").replace("-", "")
    return _ALIASES.get(name, name), rest[0].strip(SPACES) if rest else ""


def _unknown(line: str) -> UsageError:
    name = line.split(maxsplit=1)[0]
    return UsageError(f"there is no command {name[:40]}: {_guess(line)} (to send it as a message, begin with a space)")


def _guess(line: str) -> str:
    name = _split(line)[0]
    near = [each for each in COMMANDS if name and each.startswith(name)] or get_close_matches(name, COMMANDS, n=1)
    return f"did you mean {line[0]}{near[0]}?" if near else f"{line[0]}help lists them"


def _listed(pictures: list[Picture]) -> str:
    return ", ".join(map(str, pictures))


def _image(session: Session, argument: str) -> Outcome:
    """All pictures or none: a bad one leaves what was attached before."""
    if not argument:
        waiting = _listed(session.pending)
        return Outcome(f"For the next message: {waiting}" if waiting else "\\image PATH or URL ... [QUESTION]")
    sources, question = split_sources(argument)
    pictures = tuple(Picture.open(source) for source in sources)
    session.pending += pictures
    return Outcome(pictures=pictures, ask=session.compose(question) if question else None)


def _help(session: Session, argument: str) -> Outcome:
    line = argument if argument.startswith(MARKS) else f"\\{argument}"
    name = _split(line)[0]
    if argument and name not in COMMANDS:
        raise UsageError(f"there is no command {line.split()[0][:40]}: {_guess(line)}")
    names = [name] if argument else list(COMMANDS)
    heads = {name: f"\\{name} {COMMANDS[name].arguments}".rstrip() for name in names}
    width = max(map(len, heads.values()))
    lines = [f"{heads[name]:<{width}}  {COMMANDS[name].help}" for name in names]
    return Outcome("\n".join(lines))


def _system(session: Session, argument: str) -> Outcome:
    if argument:
        session.system = "" if argument.lower() in _OFF else argument
    return Outcome(f"System: {session.system}" if session.system else "No system message.")


def _clear(session: Session, argument: str) -> Outcome:
    session.clear()
    return Outcome("A new conversation; the settings stay.")


def _undo(session: Session, argument: str) -> Outcome:
    """Attached pictures are the last thing done, if there are any."""
    if session.pending:
        note = f"No longer attached: {_listed(session.pending)}"
        session.pending = []
        return Outcome(note)
    if not session.turns:
        return Outcome("Nothing was said yet.")
    asked = _last_question(session)
    text = session.turns[asked].text if session.turns[asked:] else ""
    session.turns = session.turns[:asked]
    return Outcome(f"Taken back: {' '.join(text.split())[:60] or 'the last turn'}")


def _retry(session: Session, argument: str) -> Outcome:
    if not session.turns:
        raise InputError("there is no question to answer again")
    asked = _last_question(session)
    if session.turns[asked].role != "user":
        raise InputError("there is no question to answer again")
    return Outcome(ask=session.turns[asked], kept=asked)


def _last_question(session: Session) -> int:
    """Where the last exchange begins; a transcript may hold turns that are none."""
    places = [place for place, turn in enumerate(session.turns) if turn.role == "user"]
    return places[-1] if places else 0


def _set(field: str, kind: type, session: Session, argument: str) -> Outcome:
    """Of the sampling: shows a setting, or changes it from the next answer on."""
    if argument:
        change: dict[str, Any] = {field: _value(field, kind, session, argument)}
        session.sampling = replace(session.sampling, **change)
    value = getattr(session.sampling, field)
    return Outcome(f"{field} {'not set' if value is None else value}")


def _value(field: str, kind: type, session: Session, argument: str) -> Any:
    if argument.lower() == _DEFAULT:
        return getattr(session.start, field)
    may_be_off = getattr(SamplingParams(), field) is None
    if argument.lower() in _OFF and may_be_off:
        return None
    try:
        value: Any = kind(argument)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        words = f", {_DEFAULT} or {_OFF[0]}" if may_be_off else f" or {_DEFAULT}"
        raise UsageError(f"{field} is {what}{words}, not {argument[:40]!r}") from error
    SamplingParams(**{field: value}).check(1)
    if field == "seed":
        check_seed(value)
    return value


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise UsageError(f"\\{name} needs a file's name, like \\{name} chat.json")
    typed = last_word(argument)[0] if argument[0] in "'\"" else argument.replace("\\ ", " ")
    return Path(typed).expanduser().absolute()


def _save(session: Session, argument: str) -> Outcome:
    path = _path(argument, "save")
    transcript.save(path, session.model, session.system, session.turns)
    return Outcome(f"Saved {len(session.turns)} turns in {path}")


def _load(session: Session, argument: str) -> Outcome:
    path = _path(argument, "load")
    system, turns = transcript.load(path)
    session.clear()
    session.system, session.turns = system, turns
    pictures = [str(picture) for turn in turns for picture in turn.pictures]
    return Outcome(f"Loaded {len(turns)} turns{' with ' if pictures else ''}{', '.join(pictures)}")


def _stats(session: Session, argument: str) -> Outcome:
    stats, memory = session.engine.stats(), session.engine.memory()
    lines = [f"turns           {len(session.turns)}"]
    if session.last is not None:
        usage = session.last.usage
        used = usage.prompt_tokens + usage.completion_tokens
        lines.append(f"context         {used} of {session.engine.config.max_context} tokens")
        lines.append(f"last answer     {figures(usage)}")
    prefix = stats.prefix_cache
    lines += [
        f"pictures        {sum(len(turn.pictures) for turn in session.turns)}, {stats.encoded_images} encoded so far",
        f"prefix cache    {prefix.hits} hits, {prefix.misses} misses, {size_text(prefix.nbytes)}",
        f"memory          {size_text(memory.active_bytes)}, {size_text(memory.peak_bytes)} at the peak",
    ]
    return Outcome("\n".join(lines))


def _model(session: Session, argument: str) -> Outcome:
    return Outcome(f"{session.model}: {session.about}")


def _search(session: Session, argument: str) -> Outcome:
    """Also where the chat was begun without one."""
    if session.tools is None:
        raise UsageError("this chat has no tools")
    if argument.lower() not in ("on", "off", ""):
        raise UsageError(f"\\search is on or off, not {argument[:40]!r}")
    if argument:
        if argument.lower() == "on":
            check_search(session.tools.search_url)
        session.tools.searches = argument.lower() == "on"
    return Outcome(f"Web search is {'on' if session.tools.searches else 'off'}.")


def _tools(session: Session, argument: str) -> Outcome:
    names = session.tools.names if session.tools is not None else []
    return Outcome("\n".join(names) or "The model has no tools: \\search on, or --mcp-config FILE.")


def _exit(session: Session, argument: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS = {
    "image": Command(_image, "PICTURE... [QUESTION]", "a path or URL, for this question or the next", takes_path=True),
    "system": Command(_system, "[TEXT | off]", "what the model is told first"),
    "retry": Command(_retry, "", "answer the last question again"),
    "undo": Command(_undo, "", "take the attached pictures, or the last question and answer, back"),
    "clear": Command(_clear, "", "begin a new conversation"),
    "temperature": Command(partial(_set, "temperature", float), "[T | default]", "0 takes the likeliest token"),
    "topk": Command(partial(_set, "top_k", int), "[K | default]", "keep the K likeliest tokens (0: all)"),
    "topp": Command(partial(_set, "top_p", float), "[P | default]", "keep the likeliest that sum up to P (1: all)"),
    "minp": Command(
        partial(_set, "min_p", float), "[P | default]", "keep those at least P times as likely as the best"
    ),
    "max": Command(partial(_set, "max_tokens", int), "[N | default | off]", "the longest answer, in tokens"),
    "seed": Command(partial(_set, "seed", int), "[N | default | off]", "the same seed gives the same answer"),
    "search": Command(_search, "[on | off]", "let the model search the web"),
    "tools": Command(_tools, "", "what the model may use"),
    "save": Command(_save, "FILE", "write the conversation as JSON, in OpenAI's shape", takes_path=True),
    "load": Command(_load, "FILE", "go on with a saved conversation", takes_path=True),
    "stats": Command(_stats, "", "tokens, caches, memory"),
    "model": Command(_model, "", "what answers"),
    "help": Command(_help, "[COMMAND]", "this list"),
    "exit": Command(_exit, "", "leave; Ctrl-D does too"),
}
_ALIASES = {"quit": "exit", "?": "help", "maxtokens": "max"}
