"""Rows of questions and answers about drawn pictures. Pure functions of a random.Random; no torch.

A row holds the pictures, what was said before (system turn, earlier turns) and several branches: ways in
which the conversation goes on. Training packs a row into one sequence in which every branch sees the pictures
and itself. A row with one branch is a plain conversation; `to_messages` gives it in the chat format.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import demo_words as words
from demo_scene import COLORS, SHAPES, Picture, Scene, Thing, draw_picture, draw_scene, paint
from demo_words import PLACE_PHRASES, noun_phrase, sentence, style

BOS, END, IMAGE = "<|im_start|>", "<end_of_utterance>", "<image>"
TRAIN_SEEDS = range(1 << 40)
HELD_OUT_SEEDS = range(1 << 41, 1 << 42)  # never drawn in training


@dataclass(frozen=True, slots=True)
class Turn:
    question: str
    answer: str
    skill: str
    num_images: int = 0
    text_first: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    pictures: tuple[Picture, ...]
    branches: tuple[tuple[Turn, ...], ...]
    system: str | None = None
    context: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Mix:
    """How often what is asked: the curriculum's only knob."""

    odds: tuple[float, ...] = (0.33, 0.36, 0.29)  # of 1, 2, 3 shapes in a picture; the rest is empty
    num_branches: int = 9  # more than fit: rows come out full
    skills: dict[str, float] = field(
        default_factory=lambda: {
            "describe": 1.2, "color": 1.3, "shape": 1.0, "where": 1.3, "at": 1.3, "count": 1.5, "exists": 1.5,
            "background": 0.6, "json": 0.8,
        }
    )  # fmt: skip
    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "single": 0.59, "two": 0.23, "text": 0.05, "text_first": 0.06, "next_picture": 0.035,
            "after_talk": 0.035,
        }
    )  # fmt: skip


FOCUS = Mix(
    odds=(0.1, 0.45, 0.45),
    skills={"describe": 0.5, "color": 3.0, "shape": 2.0, "where": 3.0, "at": 1.0, "count": 0.5, "exists": 0.4,
            "background": 0.2, "json": 0.3},
    kinds={"single": 0.86, "two": 0.08, "text": 0.02, "text_first": 0.02, "next_picture": 0.01,
           "after_talk": 0.01},
)  # fmt: skip
ABSENCE = Mix(  # what is not there: learnt only after what is there
    odds=(0.25, 0.4, 0.3),
    skills={"describe": 0.6, "color": 0.8, "shape": 0.4, "where": 0.8, "at": 1.0, "count": 2.5, "exists": 4.0,
            "background": 0.2, "json": 0.4},
    kinds={"single": 0.66, "two": 0.25, "text": 0.03, "text_first": 0.03, "next_picture": 0.015,
           "after_talk": 0.015},
)  # fmt: skip
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "Answer briefly.",
    "You describe pictures.", "Be short and exact.", "You are a friendly robot.",
    "Answer the question about the picture.",
)  # fmt: skip


def ask_one(rng: random.Random, scene: Scene, mix: Mix) -> Turn:
    if not scene.things:
        return Turn(*words.nothing(rng, scene), "empty")
    while True:
        skill = rng.choices(tuple(mix.skills), tuple(mix.skills.values()))[0]
        pair = words.SKILLS[skill](rng, scene)
        if pair is not None:
            return Turn(*pair, skill)


def _follow_it(rng: random.Random, thing: Thing, first: str) -> tuple[str, str]:
    """'it' is the thing of the first question."""
    if first == "where" or (first == "shape" and rng.random() < 0.3):
        return rng.choice(("And what color is it?", "What color is it?", "Which color?")), f"It is {thing.color}."
    text = rng.choice(("And where is it?", "Where is it?", "Where?", "And where?"))
    return text, f"It is {PLACE_PHRASES[thing.place]}."


def _two_turns(rng: random.Random, scene: Scene, mix: Mix) -> tuple[Turn, ...]:
    """A second question whose meaning hangs on the first, or an independent one."""
    roll = rng.random()
    plain = [t for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]
    if roll < 0.4 or not plain:
        first, second = ask_one(rng, scene, mix), ask_one(rng, scene, mix)
        return first, Turn(second.question, second.answer, "turn2")
    thing = rng.choice(plain)
    kind = rng.choice(("color", "where"))
    answers = {
        "color": lambda t: f"The {t.shape} is {t.color}.",
        "where": lambda t: f"The {t.shape} is {PLACE_PHRASES[t.place]}.",
    }
    asked = words.COLOR_OF if kind == "color" else words.WHERE
    first = Turn(style(rng, rng.choice(asked).replace("{x}", thing.shape)), answers[kind](thing), kind)
    others = [t for t in plain if t is not thing]
    if roll < 0.7 and others:
        other = rng.choice(others)
        text = rng.choice(("And the {x}?", "What about the {x}?", "And what about the {x}?", "The {x}?"))
        return first, Turn(style(rng, text.replace("{x}", other.shape)), answers[kind](other), "turn2")
    if roll < 0.78:
        text = style(rng, rng.choice(("And the background?", "What about the background?")))
        return first, Turn(text, f"The background is {scene.background}.", "turn2")
    question, answer = _follow_it(rng, thing, kind)
    return first, Turn(style(rng, question), answer, "turn2")


def branch_single(rng: random.Random, scene: Scene, mix: Mix) -> tuple[Turn, ...]:
    roll = rng.random()
    if roll < 0.2:
        return _two_turns(rng, scene, mix)
    if roll < 0.22:
        thanks = Turn(style(rng, rng.choice(("Thanks!", "Thank you.", "Great, thanks."))), words.WELCOME, "talk")
        return ask_one(rng, scene, mix), thanks
    return (ask_one(rng, scene, mix),)


ORDINALS = (("first", "second"), ("first", "second"), ("first", "last"), ("1st", "2nd"))
WHAT_IN = (
    "What is in the {n} [p]?", "What does the {n} [p] show?", "Describe the {n} [p].",
    "What do you see in the {n} [p]?", "What is shown in the {n} [p]?", "And the {n} [p]?", "The {n} [p]?",
    "What can you see in the {n} one?", "What is in the {n} one?",
)  # fmt: skip
WHAT_IN_ALL = (
    "What is in the [p]s?", "What do you see?", "Describe both [p]s.", "Describe the [p]s.",
    "What do the [p]s show?", "What is in these [p]s?", "What is shown?", "Describe these two [p]s.",
    "What do both [p]s show?", "What do you see in the two [p]s?", "Compare the [p]s.",
    "Compare the two [p]s.",
)  # fmt: skip
BOTH = (
    "Do both [p]s show {x}?",
    "Is there {x} in both [p]s?",
    "Do both [p]s contain {x}?",
    "Do you see {x} in both [p]s?",
)
WHICH = (
    "Which [p] shows {x}?", "Which [p] contains {x}?", "In which [p] is {x}?", "Which one shows {x}?",
    "Where is {x}, in the first or in the second [p]?", "Which [p] has {x}?", "In which [p] do you see {x}?",
)  # fmt: skip
SAME = ("Do both [p]s show the same shape?", "Are the shapes the same?", "Is it the same shape in both [p]s?",
        "Do the [p]s show the same shape?")  # fmt: skip


def _one_of_two(rng: random.Random, scenes: tuple[Scene, Scene]) -> Turn:
    index = rng.randrange(2)
    number, scene = rng.choice(ORDINALS)[index], scenes[index]
    roll = rng.random()
    if roll < 0.5:
        return Turn(style(rng, rng.choice(WHAT_IN).replace("{n}", number)), _content(scene), "two")
    tail = rng.choice((f" in the {number} [p]?", f" of the {number} [p]?"))
    if roll < 0.65:
        text = rng.choice(("What color is the background", "What is the background", "What is the background color"))
        return Turn(style(rng, text + tail), f"The background is {scene.background}.", "two")
    tail = f" in the {number} [p]?"
    thing = rng.choice(scene.things)
    if len(scene.things) == 1 and rng.random() < 0.6:
        if rng.random() < 0.5:
            return Turn(style(rng, "What color is the shape" + tail), f"It is {thing.color}.", "two")
        text = rng.choice(("What shape is", "Which shape is", "What shape do you see"))
        return Turn(style(rng, text + tail), f"It is a {thing.shape}.", "two")
    if sum(o.shape == thing.shape for o in scene.things) > 1:
        return _one_of_two(rng, scenes)
    asks_place = rng.random() < 0.3
    answer = f"The {thing.shape} is {PLACE_PHRASES[thing.place] if asks_place else thing.color}."
    return Turn(style(rng, ("Where" if asks_place else "What color") + f" is the {thing.shape}" + tail), answer, "two")


def _content(scene: Scene) -> str:
    return sentence(words.enumerate_things(scene.things))


def _compare(rng: random.Random, scenes: tuple[Scene, Scene]) -> Turn:
    thing = rng.choice((*scenes[0].things, *scenes[1].things))
    shape, color = thing.shape, thing.color
    if rng.random() < 0.3:
        shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    form = rng.choice(("shape", "shape", "color", "both"))
    noun = {"shape": shape, "color": f"{color} shape", "both": f"{color} {shape}"}[form]
    hits = [
        any((form == "color" or t.shape == shape) and (form == "shape" or t.color == color) for t in scene.things)
        for scene in scenes
    ]
    asked = f"{words.article(noun)} {noun}"
    if rng.random() < 0.4:
        return Turn(style(rng, rng.choice(BOTH).replace("{x}", asked)), "Yes." if all(hits) else "No.", "two_yes_no")
    answers = {
        (True, True): "Both pictures.",
        (True, False): "The first picture.",
        (False, True): "The second picture.",
        (False, False): "Neither picture.",
    }
    return Turn(style(rng, rng.choice(WHICH).replace("{x}", asked)), answers[hits[0], hits[1]], "two")


def branch_two(rng: random.Random, scenes: tuple[Scene, Scene]) -> tuple[Turn, ...]:
    roll = rng.random()
    if roll < 0.12:
        seen = [words.enumerate_things(scene.things) for scene in scenes]
        answer = f"The first picture shows {seen[0]} and the second picture shows {seen[1]}."
        return (Turn(style(rng, rng.choice(WHAT_IN_ALL)), answer, "two"),)
    if roll < 0.55:
        return (_one_of_two(rng, scenes),)
    if roll < 0.9:
        return (_compare(rng, scenes),)
    if roll < 0.94 and all(len(scene.things) == 1 for scene in scenes):
        same = scenes[0].things[0].shape == scenes[1].things[0].shape
        return (Turn(style(rng, rng.choice(SAME)), "Yes." if same else "No.", "two_yes_no"),)
    if roll < 0.96:
        return (Turn(style(rng, rng.choice(words.COUNT).replace("{x}", "[p]s")), "There are two pictures.", "two"),)
    first = Turn(style(rng, rng.choice(WHAT_IN).replace("{n}", "first")), _content(scenes[0]), "two")
    text = rng.choice(("And the second?", "And the second [p]?", "And the other one?", "What about the second [p]?"))
    return first, Turn(style(rng, text), _content(scenes[1]), "two")


def branch_text(rng: random.Random) -> tuple[Turn, ...]:
    """Nothing to see: small talk, and questions about a picture that is not there."""
    turns = []
    for _ in range(1 if rng.random() < 0.7 else 2):
        if rng.random() < 0.5:
            turns.append(Turn(*words.small_talk(rng), "talk"))
        else:
            scene = draw_scene(rng)
            turns.append(Turn(*words.blind(rng, scene), "blind"))
    return tuple(turns)


def with_images(turns: tuple[Turn, ...], num_images: int, text_first: bool = False) -> tuple[Turn, ...]:
    head = turns[0]
    return (Turn(head.question, head.answer, head.skill, num_images, text_first), *turns[1:])


def _two_scenes(rng: random.Random) -> tuple[Scene, Scene]:
    """Half of them with a shape or a colour in common, or "both" would hardly ever be right."""
    odds, related = (0.75, 0.25) if rng.random() < 0.8 else (1.0,), rng.random() < 0.5
    first = draw_scene(rng, odds)
    while True:
        second = draw_scene(rng, odds)
        common = any(a.shape == b.shape or a.color == b.color for a in first.things for b in second.things)
        if common or not related:
            return first, second


def make_row(rng: random.Random, mix: Mix, kind: str | None = None) -> Row:
    kind = kind or rng.choices(tuple(mix.kinds), tuple(mix.kinds.values()))[0]
    system = rng.choice(SYSTEMS) if rng.random() < 0.1 else None
    n = mix.num_branches
    if kind == "text":
        return Row((), tuple(branch_text(rng) for _ in range(n)), system)
    if kind == "two":
        scenes = _two_scenes(rng)
        pair = (Picture(scenes[0], paint(rng, scenes[0])), Picture(scenes[1], paint(rng, scenes[1])))
        return Row(pair, tuple(with_images(branch_two(rng, scenes), 2) for _ in range(n)), system)
    picture = draw_picture(rng, mix.odds)
    text_first = kind == "text_first"
    n = max(1, n // 2) if text_first else n  # there every branch carries the picture's tokens itself
    branches = tuple(with_images(branch_single(rng, picture.scene, mix), 1, text_first) for _ in range(n))
    if kind == "next_picture":
        before = draw_picture(rng, mix.odds)
        return Row((before, picture), branches, system, with_images((ask_one(rng, before.scene, mix),), 1))
    if kind == "after_talk":
        return Row((picture,), branches, system, branch_text(rng)[:1])
    return Row((picture,), branches, system)


def row_seed(seed: int, index: int, phase: int = 0) -> int:
    """Training's seeds: no two of one run are equal, none is held out."""
    value = (seed << 36) + (phase << 32) + index
    if value not in TRAIN_SEEDS:
        raise ValueError(f"seed {seed} leaves the range of training seeds")
    return value


def _user_message(turn: Turn) -> dict[str, Any]:
    images = [{"type": "image"}] * turn.num_images
    text = [{"type": "text", "text": turn.question}]
    return {"role": "user", "content": text + images if turn.text_first else images + text}


def to_messages(row: Row, branch: int = 0) -> tuple[list[dict[str, Any]], str]:
    """(messages up to the last question, its right answer); the earlier turns carry their right answers."""
    messages: list[dict[str, Any]] = []
    if row.system:
        messages.append({"role": "system", "content": [{"type": "text", "text": row.system}]})
    turns = (*row.context, *row.branches[branch])
    for turn in turns:
        messages.append(_user_message(turn))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    messages.pop()
    return messages, turns[-1].answer


def scene_sentence(scene: Scene) -> str:
    """For people who read logs."""
    return ", ".join(f"{noun_phrase(t)} ({t.place})" for t in scene.things) + f" on {scene.background}"
