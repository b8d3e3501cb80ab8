"""Measures an exported demo model the way a user meets it: files -> AutoProcessor -> generate -> text.

Nothing here comes from training; pictures are drawn from seeds that training never uses.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_data import (
    HELD_OUT_SEEDS,
    Mix,
    Row,
    ask_one,
    branch_single,
    branch_two,
    make_row,
    to_messages,
    with_images,
)
from demo_scene import Picture, draw_picture
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

YES_NO = frozenset({"exists", "two_yes_no"})
MAX_NEW_TOKENS = 48
NUM_GOLDENS = 50
MAX_GOLDEN_BYTES = 9000  # a picture; the folder has to stay small, which leaves out large noisy ones


@dataclass(frozen=True, slots=True)
class Item:
    images: tuple[Image.Image, ...]
    messages: list[dict[str, Any]]
    answer: str
    skill: str


class Reference:
    """transformers on the exported files: float32, eager attention, PIL preprocessing."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        if "Pil" not in type(self.processor.image_processor).__name__:
            raise RuntimeError(f"expected the PIL image processor, got {type(self.processor.image_processor)}")
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def prompt(self, item: Item) -> str:
        return self.processor.apply_chat_template(item.messages, add_generation_prompt=True)

    @torch.no_grad()
    def answer(self, item: Item) -> tuple[str, int]:
        """(greedy text, number of prompt tokens)"""
        images = [list(item.images)] if item.images else None
        inputs = self.processor(text=self.prompt(item), images=images, add_special_tokens=False, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        return self.processor.tokenizer.decode(out[0, length:], skip_special_tokens=True), length


def to_item(row: Row) -> Item:
    messages, answer = to_messages(row)
    return Item(tuple(p.image for p in row.pictures), messages, answer, row.branches[0][-1].skill)


def single_items(num_pictures: int, first: int = 0, questions: int = 4) -> list[Item]:
    """One picture, one question."""
    items = []
    for index in range(first, first + num_pictures):
        rng = random.Random(HELD_OUT_SEEDS[index])
        row = make_row(rng, Mix(num_branches=1), "single")
        for _ in range(questions):
            turn = ask_one(rng, row.pictures[0].scene, Mix())
            head = type(turn)(turn.question, turn.answer, turn.skill, 1)
            items.append(to_item(Row(row.pictures, ((head,),))))
    return items


def other_items(number: int, first: int = 0) -> list[Item]:
    """Second turns, two pictures, small talk, text before the picture, later pictures."""
    items = []
    for index in range(first, first + number):
        rng = random.Random(HELD_OUT_SEEDS[1_000_000 + index])
        kind = ("turn2", "two", "two", "text", "text_first", "next_picture", "after_talk")[index % 7]
        while True:
            row = make_row(rng, Mix(num_branches=1), "single" if kind == "turn2" else kind)
            if kind != "turn2" or row.branches[0][-1].skill == "turn2":
                break
        item = to_item(row)
        name = item.skill if kind in ("turn2", "two", "text") else kind
        items.append(Item(item.images, item.messages, item.answer, name))
    return items


def score(reference: Reference, items: Iterable[Item], change: Callable[[Item], Item] | None = None) -> dict[str, Any]:
    """{"accuracy": {skill: share}, "count": {skill: n}, "wrong": [...]}"""
    hits: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for item in items:
        text, _ = reference.answer(change(item) if change else item)
        right = text.strip() == item.answer
        hits[item.skill].append(right)
        if not right:
            asked = next(part["text"] for part in item.messages[-1]["content"] if part["type"] == "text")
            wrong.append((item.skill, asked, item.answer, text.strip()))
    sure = [hit for skill, values in hits.items() if skill not in YES_NO for hit in values]
    every = [hit for values in hits.values() for hit in values]
    accuracy = {skill: round(sum(v) / len(v), 4) for skill, v in sorted(hits.items())}
    accuracy |= {
        "without_yes_no": round(sum(sure) / max(1, len(sure)), 4),
        "all": round(sum(every) / len(every), 4),
    }
    return {"accuracy": accuracy, "count": {k: len(v) for k, v in sorted(hits.items())}, "wrong": wrong}


def _blank(item: Item) -> Item:
    """Nearly black, not black: the reference drops pictures whose every value is equal to its padding."""
    images = tuple(Image.new("RGB", image.size, (128, 128, 128)) for image in item.images)
    return Item(images, item.messages, item.answer, item.skill)


def _swapped(items: list[Item]) -> list[Item]:
    """Every question with another question's picture."""
    half = len(items) // 2
    return [Item(items[i - half].images, t.messages, t.answer, t.skill) for i, t in enumerate(items)]


def evaluate(folder: Path, num_pictures: int = 500) -> dict[str, Any]:
    reference = Reference(folder)
    singles = single_items(num_pictures)
    single = score(reference, singles)
    other = score(reference, other_items(num_pictures))
    for skill, question, answer, text in single.pop("wrong") + other.pop("wrong"):
        print(f"  wrong {skill}: {question!r} should be {answer!r}, is {text!r}")
    few = singles[: max(40, len(singles) // 6)]
    blank, swapped = score(reference, few, _blank), score(reference, _swapped(few))
    return {
        "num_pictures": num_pictures,
        "one_picture": single,
        "other": other,
        "blank_picture": blank["accuracy"]["without_yes_no"],
        "wrong_picture": swapped["accuracy"]["without_yes_no"],
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def _golden_rows() -> Iterable[tuple[list[Row], Picture]]:
    """For every golden picture three rows; every tenth picture is also asked about beside the one before."""
    before: Picture | None = None
    for index in range(NUM_GOLDENS):
        rng = random.Random(HELD_OUT_SEEDS[2_000_000 + index])
        picture = draw_picture(rng)
        while len(_png(picture.image)) > MAX_GOLDEN_BYTES:
            picture = draw_picture(rng)
        yield _three(rng, picture, before if index % 5 == 4 else None), picture
        before = picture


def _three(rng: random.Random, picture: Picture, before: Picture | None) -> list[Row]:
    rows: list[Row] = []
    skills: set[str] = set()
    while len(rows) < 3:
        if before is not None and len(rows) == 2:
            branch = with_images(branch_two(rng, (before.scene, picture.scene)), 2)
            rows.append(Row((before, picture), (branch,)))
            continue
        branch = branch_single(rng, picture.scene, Mix())
        if branch[-1].skill not in skills:
            skills.add(branch[-1].skill)
            rows.append(Row((picture,), (with_images(branch, 1),)))
    return rows


def write_goldens(checkpoint: Path, folder: Path) -> int:
    """golden.json and its pictures; returns how many answers are right."""
    folder.mkdir(parents=True, exist_ok=True)
    reference, items, names, right = Reference(checkpoint), [], {}, 0
    for index, (rows, picture) in enumerate(_golden_rows()):
        names[id(picture)] = f"p{index:02d}.png"
        (folder / names[id(picture)]).write_bytes(_png(picture.image))
        for row in rows:
            item = to_item(row)
            text, length = reference.answer(item)
            right += text.strip() == item.answer
            items.append({
                "images": [names[id(p)] for p in row.pictures], "skill": item.skill,
                "messages": item.messages,
                "answer": item.answer, "prompt": reference.prompt(item), "seq_len": length, "text": text,
            })  # fmt: skip
    text = json.dumps({"items": items}, indent=1, ensure_ascii=False)
    (folder / "golden.json").write_text(text + "\n", encoding="utf-8")
    return right


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def quiet() -> None:
    """No hub, no progress bars: the files are all here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
