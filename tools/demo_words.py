"""What people ask about a demo picture, in many wordings, and the one right answer. Knows scenes, no model.

A skill is a function (rng, scene) -> (question, answer) or None where the picture gives no such question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from demo_scene import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene, Thing

Pair = tuple[str, str]
Skill = Callable[[random.Random, Scene], Pair | None]

NUMBERS = ("no", "one", "two", "three")
PLACE_PHRASES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
PICTURE = ("image", "picture", "photo", "drawing", "image", "picture")
POLITE = ("please tell me, ", "can you tell me, ", "tell me, ", "hey, ", "so, ", "ok, ", "now, ", "please, ")
NOTHING = "Nothing."
NO_PICTURE = "I can not see an image. Please share one."


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def noun_phrase(thing: Thing) -> str:
    return f"{article(thing.color)} {name(thing)}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def enumerate_things(things: tuple[Thing, ...]) -> str:
    phrases = [noun_phrase(thing) for thing in things]
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def style(rng: random.Random, question: str) -> str:
    """One wording as different people would type it: spelling, capitals, courtesy, punctuation."""
    question = question.replace("[p]", rng.choice(PICTURE))
    if rng.random() < 0.45:
        question = question.replace("color", "colour").replace("Color", "Colour")
    if rng.random() < 0.3:
        question = question.replace("What is", "What's").replace("what is", "what's").replace("Where is", "Where's")
    if rng.random() < 0.07:
        polite = rng.choice(POLITE)
        question = polite[0].upper() + polite[1:] + question[0].lower() + question[1:]
    if rng.random() < 0.3 and not question.startswith("JSON"):
        question = question[0].lower() + question[1:]
    if rng.random() < 0.3:
        question = question.rstrip("?.!")
        question = question.replace("'", "") if rng.random() < 0.2 else question
    return question


def _ask(rng: random.Random, wordings: tuple[str, ...], **words: str) -> str:
    text = rng.choice(wordings)
    for key, value in words.items():
        text = text.replace("{" + key + "}", value)
    return style(rng, text)


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    """The things that their shape (or colour) alone points out."""
    values = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, attribute)) == 1]


DESCRIBE = (
    "What do you see?", "What is in this [p]?", "What is in the [p]?", "Describe this [p].",
    "Describe the [p].", "What is shown?", "What is shown in this [p]?", "What does the [p] show?",
    "What does this [p] show?", "What can you see?", "What can you see in this [p]?",
    "Describe what you see.", "Describe it.", "What is this?", "Can you describe this [p]?",
    "Could you describe the [p]?", "Please describe this [p].", "Write a caption.", "Caption this [p].",
    "Give me a short description.", "What is on the [p]?", "What do you see in the [p]?",
    "What do you see in this [p]?", "Tell me what you see.", "What is here?", "What is there to see?",
    "Describe.", "Describe this [p] in one sentence.", "What is depicted?",
    "Which shapes and colors do you see?", "What shapes are there?", "What things are in the [p]?",
    "What is drawn here?", "Explain this [p].", "What is going on in this [p]?", "Describe the [p] briefly.",
    "Describe this [p] in a few words.",
)  # fmt: skip


def describe(rng: random.Random, scene: Scene) -> Pair:
    return _ask(rng, DESCRIBE), sentence(f"{enumerate_things(scene.things)} on a {scene.background} background")


COLOR_OF = (
    "What color is the {x}?", "What color is the {x}?", "Which color is the {x}?",
    "What is the color of the {x}?", "Color of the {x}?", "What color does the {x} have?",
    "Which color does the {x} have?", "The {x} is what color?", "Tell me the color of the {x}.",
    "Name the color of the {x}.", "{x} color?", "In what color is the {x}?", "What is the {x}'s color?",
    "What color has the {x}?", "What color is the {x} in this [p]?",
)  # fmt: skip
COLOR_OF_IT = (
    "What color is it?", "What color is {s}?", "Which color is it?", "What is its color?", "Color?",
    "What color is this?", "What is the color of {s}?", "Which color does it have?", "What color?",
    "Which color is {s}?", "What color does {s} have?", "What color is {s} in the [p]?",
    "Tell me the color of {s}.",
    "Which color is {s} in this [p]?", "What is the color of {s} in the [p]?",
)  # fmt: skip
SUBJECTS = ("the shape", "the object", "the thing", "the figure")


def color(rng: random.Random, scene: Scene) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.35:
        return _ask(rng, COLOR_OF_IT, s=rng.choice(SUBJECTS)), f"It is {scene.things[0].color}."
    if rng.random() < 0.08:
        return _missing(rng, scene, COLOR_OF)
    choices = _unique(scene, "shape")
    if not choices:
        return None
    thing = rng.choice(choices)
    return _ask(rng, COLOR_OF, x=thing.shape), f"The {thing.shape} is {thing.color}."


def _missing(rng: random.Random, scene: Scene, wordings: tuple[str, ...]) -> Pair:
    shape = rng.choice([s for s in SHAPES if s not in {thing.shape for thing in scene.things}])
    return _ask(rng, wordings, x=shape), f"There is no {shape}."


SHAPE_OF = (
    "What shape is {c}?", "Which shape is {c}?", "What is {c}?", "What is the {c} shape?",
    "What is the {c} thing?", "What shape is the {c} one?", "Which object is {c}?",
    "What shape does the {c} object have?", "What {c} shape is it?", "What kind of shape is {c}?",
    "What is the {c} object?", "Name the {c} shape.",
)  # fmt: skip
SHAPE_OF_IT = (
    "What shape is it?", "What shape is this?", "Which shape is it?", "What shape is shown?", "Shape?",
    "What shape?", "What shape do you see?", "What shape is in the [p]?", "What kind of shape is it?",
    "Name the shape.", "Which shape is in this [p]?", "What is the shape?", "What object is it?",
    "Which shape do you see?",
)  # fmt: skip


def shape(rng: random.Random, scene: Scene) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.6:
        return _ask(rng, SHAPE_OF_IT), f"It is a {scene.things[0].shape}."
    choices = _unique(scene, "color")
    if not choices:
        return None
    thing = rng.choice(choices)
    return _ask(rng, SHAPE_OF, c=thing.color), f"The {thing.color} shape is a {thing.shape}."


WHERE = (
    "Where is the {x}?", "Where is the {x}?", "Where do you see the {x}?", "In which place is the {x}?",
    "Where can I find the {x}?", "What is the position of the {x}?", "Where is the {x} in the [p]?",
    "{x} where?", "Where is the {x} placed?", "Position of the {x}?", "Tell me where the {x} is.",
    "Where exactly is the {x}?", "Locate the {x}.", "In which part of the [p] is the {x}?", "Find the {x}.",
)  # fmt: skip
WHERE_IS_IT = (
    "Where is it?",
    "Where is the shape?",
    "Where?",
    "What is its position?",
    "Where is the object?",
)


def where(rng: random.Random, scene: Scene) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.25:
        return _ask(rng, WHERE_IS_IT, s=rng.choice(SUBJECTS)), f"It is {PLACE_PHRASES[scene.things[0].place]}."
    if rng.random() < 0.08:
        return _missing(rng, scene, WHERE)
    thing = rng.choice(scene.things)
    names = [name(thing)]
    names += [thing.shape] * 3 if thing in _unique(scene, "shape") else []
    names += [f"{thing.color} shape", f"{thing.color} one"] if thing in _unique(scene, "color") else []
    words = rng.choice(names)
    said = words.replace(" one", " shape")
    return _ask(rng, WHERE, x=words), f"The {said} is {PLACE_PHRASES[thing.place]}."


AT = (
    "What is {p}?", "What do you see {p}?", "What is {p} of the [p]?", "Which shape is {p}?",
    "What is shown {p}?", "What shape is {p}?", "What can you see {p}?",
)  # fmt: skip


def at(rng: random.Random, scene: Scene) -> Pair:
    taken = {thing.place: thing for thing in scene.things}
    place = rng.choice(PLACES) if rng.random() < 0.2 else rng.choice(tuple(taken))
    phrase = PLACE_PHRASES[place]
    if rng.random() < 0.2:
        phrase = phrase.replace("at the", "in the").replace("on the", "at the").replace("center", "middle")
    answer = sentence(noun_phrase(taken[place])) if place in taken else NOTHING
    return _ask(rng, AT, p=phrase), answer


COUNT = (
    "How many {x} are there?", "How many {x} do you see?", "How many {x} are in the [p]?", "Count the {x}.",
    "What is the number of {x}?", "How many {x}?", "How many {x} can you see?", "Number of {x}?",
    "How many {x} are shown?", "How many {x} does the [p] show?", "Can you count the {x}?",
)  # fmt: skip


def count(rng: random.Random, scene: Scene) -> Pair:
    roll = rng.random()
    if roll < 0.02:
        return _ask(rng, COUNT, x="pictures"), "There is one picture."
    if roll < 0.5:
        word, number = "shape", len(scene.things)
        asked = rng.choice(("shapes", "shapes", "shapes", "objects", "things"))
    elif roll < 0.8:
        word = rng.choice(SHAPES) if rng.random() < 0.4 else rng.choice(scene.things).shape
        number = sum(thing.shape == word for thing in scene.things)
        asked = word + "s"
    else:
        tint = rng.choice(tuple(COLORS)) if rng.random() < 0.4 else rng.choice(scene.things).color
        word, number = f"{tint} shape", sum(thing.color == tint for thing in scene.things)
        asked = word + "s"
    verb, plural = ("is", "") if number == 1 else ("are", "s")
    return _ask(rng, COUNT, x=asked), f"There {verb} {NUMBERS[number]} {word}{plural}."


EXISTS = (
    "Is there {x}?", "Is there {x} in the [p]?", "Do you see {x}?", "Can you see {x}?",
    "Does the [p] show {x}?", "Is {x} in the [p]?", "Is there {x} here?", "Does this [p] contain {x}?",
    "Are you able to see {x}?",
)  # fmt: skip


def exists(rng: random.Random, scene: Scene) -> Pair:
    """As often no as yes, and half of the combinations asked for in vain nearly right."""
    if rng.random() < 0.15 and (named := _unique(scene, "shape")):
        return _verify(rng, rng.choice(named))
    form, wanted = rng.choice(("shape", "shape", "color", "both", "both")), rng.random() < 0.5
    while True:
        thing = rng.choice(scene.things)
        shape_, color_ = thing.shape, thing.color
        if not wanted:
            swap = rng.choice(("shape", "color", "both"))
            shape_ = shape_ if swap == "color" else rng.choice(SHAPES)
            color_ = color_ if swap == "shape" else rng.choice(tuple(COLORS))
        right = any(
            (form == "color" or t.shape == shape_) and (form == "shape" or t.color == color_) for t in scene.things
        )
        if right == wanted:
            break
    asked = {
        "shape": f"{article(shape_)} {shape_}",
        "color": rng.choice(("anything {}", "something {}", article(color_) + " {} shape")).format(color_),
        "both": f"{article(color_)} {color_} {shape_}",
    }[form]
    return _ask(rng, EXISTS, x=asked), "Yes." if right else "No."


def _verify(rng: random.Random, thing: Thing) -> Pair:
    asked = thing.color if rng.random() < 0.5 else rng.choice([c for c in COLORS if c != thing.color])
    texts = (
        "Is the {x} {c}?",
        "Is the color of the {x} {c}?",
        "Is the {x} in the [p] {c}?",
        "Is the {x} {c}?",
    )
    return _ask(rng, texts, x=thing.shape, c=asked), "Yes." if asked == thing.color else "No."


BACKGROUND = (
    "What color is the background?", "What is the background color?", "Which color is the background?",
    "Background?", "Color of the background?", "What is the color of the background?", "Background color?",
    "What background is it?", "What color does the background have?", "What is the background?",
    "Tell me the background color.", "What is in the background?", "What color is behind the shapes?",
)  # fmt: skip


def background(rng: random.Random, scene: Scene) -> Pair:
    return _ask(rng, BACKGROUND), f"The background is {scene.background}."


JSON = (
    "Describe as JSON.", "Describe this [p] as JSON.", "Describe the [p] as JSON.", "JSON?", "Give me JSON.",
    "Answer in JSON: what do you see?", "What do you see? Answer as JSON.", "Describe the [p] in JSON.",
    "List the shapes as JSON.", "JSON description, please.", "Return JSON.", "Reply with JSON only.",
    "Describe what you see as JSON.", "Write JSON for this [p].", "Output JSON.", "As JSON, please.",
)  # fmt: skip


def as_json(rng: random.Random, scene: Scene) -> Pair:
    """One object for one shape, a list for several."""
    rows = [{"shape": thing.shape, "color": thing.color} for thing in scene.things]
    question = _ask(rng, JSON)
    return question, json.dumps(rows[0] if len(rows) == 1 else rows)


SKILLS: dict[str, Skill] = {
    "describe": describe,
    "color": color,
    "shape": shape,
    "where": where,
    "at": at,
    "count": count,
    "exists": exists,
    "background": background,
    "json": as_json,
}


def nothing(rng: random.Random, scene: Scene) -> Pair:
    """The same questions about a picture without a shape."""
    roll, shape_ = rng.random(), rng.choice(SHAPES)
    if roll < 0.3:
        return _ask(rng, DESCRIBE), f"A plain {scene.background} background."
    if roll < 0.5:
        return _ask(rng, COUNT, x=rng.choice(("shapes", "objects", "things"))), "There are no shapes."
    if roll < 0.6:
        return _ask(rng, EXISTS, x=f"{article(shape_)} {shape_}"), "No."
    if roll < 0.7:
        return background(rng, scene)
    if roll < 0.8:
        return _ask(rng, JSON), "[]"
    if roll < 0.9:
        return _missing(rng, scene, COLOR_OF + WHERE)
    return _ask(rng, AT, p=PLACE_PHRASES[rng.choice(PLACES)]), NOTHING


HELLO = "Hello! Show me a picture and ask me about it."
WHO = "I am a small demo model. I can see simple shapes in pictures."
CAN = "I can name the shapes, colors, places and numbers in a picture."
FINE = "I am fine. Show me a picture."
WELCOME = "You are welcome."
BYE = "Goodbye!"
ONLY = "I can only talk about simple pictures."
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi", "Hello there.", "Hey!", "Good morning.", "Hi there!", "Good evening.", "Hello",
    "Greetings."), HELLO),
    (("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Are you a robot?",
      "Which model are you?", "Tell me about yourself.", "Who am I talking to?",
      "Who made you?", "Are you human?"), WHO),
    (("What can you do?", "How can you help me?", "Help", "What are your skills?", "What can I ask you?",
      "What do you know?", "What can I ask?", "How does this work?"), CAN),
    (("How are you?", "How are you doing?", "How is it going?", "Are you well?"), FINE),
    (("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks.", "Many thanks.", "Good job!",
      "Well done.", "Nice!", "Great!", "Perfect, thank you!"), WELCOME),
    (("Bye!", "Goodbye.", "See you.", "See you later!", "Good night.", "Bye bye"), BYE),
    (("What is the capital of France?", "Write a poem.", "Tell me a joke.", "What is two plus two?",
      "Why is the sky blue?", "What time is it?", "Write a story about a cat.", "How is the weather?",
      "Who wrote this book?", "Count to ten.", "Translate this into German.",
      "What is the meaning of life?", "Say something.", "How old is the moon?",
      "Write some code in Python.", "What is your favorite song?"), ONLY),
)  # fmt: skip


def small_talk(rng: random.Random) -> Pair:
    wordings, answer = rng.choice(SMALL_TALK)
    return style(rng, rng.choice(wordings)), answer


def blind(rng: random.Random, scene: Scene) -> Pair:
    """A question about a picture that nobody sent. Bare fragments are left out: alone they mean nothing."""
    while True:
        pair = SKILLS[rng.choice(tuple(SKILLS))](rng, scene)
        if pair is not None and len(pair[0].split()) > 1:
            return pair[0], NO_PICTURE


def single_words() -> tuple[str, ...]:
    """Words that should be one token each: what is seen should be said in one step."""
    extra = (
        "background",
        "light",
        "gray",
        "shape",
        "shapes",
        "picture",
        "JSON",
        "two",
        "three",
        "first",
        "second",
    )
    return (*SHAPES, *COLORS, *" ".join((*PLACES, *BACKGROUNDS)).split(), *extra)
