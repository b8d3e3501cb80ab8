"""Picks the sample pictures: clean held-out drawings on which a demo model answers every first question.

python tools/demo_examples.py --model mlxvlm/demo --out examples/pictures     # prints questions and answers
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from demo_data import HELD_OUT_SEEDS
from demo_eval import Item, Reference, quiet
from demo_scene import Scene, draw_scene, paint_clean
from demo_words import PLACE_PHRASES, article, enumerate_things, sentence
from PIL import Image

# (width, height, number of shapes, background): what the sample set should show
WANTED = (
    (320, 320, 1, "white"), (400, 300, 2, "light blue"), (300, 400, 1, "black"),
    (384, 256, 3, "white"), (384, 384, 2, "light yellow"), (256, 384, 2, "white"),
    (400, 240, 3, "light green"), (256, 256, 1, "gray"),
)  # fmt: skip


def questions(scene: Scene) -> list[tuple[str, str]]:
    """What people ask first, with the right answers."""
    things, seen = scene.things, enumerate_things(scene.things)
    verb, plural = ("is", "") if len(things) == 1 else ("are", "s")
    described = sentence(f"{seen} on a {scene.background} background")
    pairs = [(text, described) for text in ("What do you see?", "What is in this image?", "Describe this image.")]
    pairs += [("what's in the picture", described), ("What is this?", described)]
    pairs.append(
        (
            "How many shapes are there?",
            f"There {verb} {('one', 'two', 'three')[len(things) - 1]} shape{plural}.",
        )
    )
    pairs.append(("What color is the background?", f"The background is {scene.background}."))
    for thing in things:
        pairs.append((f"What color is the {thing.shape}?", f"The {thing.shape} is {thing.color}."))
        pairs.append((f"what colour is the {thing.shape}", f"The {thing.shape} is {thing.color}."))
        pairs.append((f"Where is the {thing.shape}?", f"The {thing.shape} is {PLACE_PHRASES[thing.place]}."))
        pairs.append((f"Is there {article(thing.color)} {thing.color} {thing.shape}?", "Yes."))
        pairs.append((f"What shape is {thing.color}?", f"The {thing.color} shape is a {thing.shape}."))
    rows = [f'{{"shape": "{thing.shape}", "color": "{thing.color}"}}' for thing in things]
    pairs.append(("Describe this image as JSON.", rows[0] if len(rows) == 1 else "[" + ", ".join(rows) + "]"))
    if len(things) == 1:
        pairs.append(("What shape is it?", f"It is a {things[0].shape}."))
        pairs.append(("What color is it?", f"It is {things[0].color}."))
    return pairs


def candidate(seed: int, wanted: tuple[int, int, int, str]) -> Scene | None:
    width, height, number, background = wanted
    scene = draw_scene(random.Random(seed), tuple(float(i == number - 1) for i in range(number)))
    distinct = all(len({getattr(t, name) for t in scene.things}) == number for name in ("shape", "color"))
    if not distinct or scene.background != background or any(thing.outline for thing in scene.things):
        return None
    if number == 1 and scene.things[0].radius < 0.2:
        return None
    return replace(scene, size=(width, height))


def knows(reference: Reference, image: Image.Image, pairs: list[tuple[str, str]]) -> bool:
    for question, answer in pairs:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        item = Item((image,), [{"role": "user", "content": parts}], answer, "")
        if reference.answer(item)[0].strip() != answer:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    reference = Reference(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    seed, tried = HELD_OUT_SEEDS[3_000_000], 0
    used: set[tuple[str, str]] = set()
    for wanted in WANTED:
        while True:
            seed += 1
            scene = candidate(seed, wanted)
            if scene is None or {(t.shape, t.color) for t in scene.things} & used:
                continue
            tried += 1
            image, pairs = paint_clean(scene), questions(scene)
            if knows(reference, image, pairs):
                break
        used |= {(t.shape, t.color) for t in scene.things}
        name = "-".join(f"{t.color}-{t.shape}" for t in scene.things) + ".png"
        image.save(args.out / name, optimize=True)
        print(f"\n`{name}` ({image.width}x{image.height})\n\n| question | answer |\n|---|---|")
        print("\n".join(f"| {question} | {answer} |" for question, answer in pairs))
    print(f"\n{tried} candidates for {len(WANTED)} pictures")


if __name__ == "__main__":
    main()
