"""The training itself: forward pass over packed rows, losses, optimiser, the three phases."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from demo_data import ABSENCE, FOCUS, Mix, Row, make_row, row_seed
from demo_pack import IGNORE, Batch, Packer, patch_classes, squash
from demo_scene import BACKGROUNDS, COLORS, PLACES, SHAPES, draw_picture
from torch import nn
from transformers import Idefics3ForConditionalGeneration


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps of each phase and the sizes of a step."""

    vision_steps: int = 900
    focus_steps: int = 1500
    absence_steps: int = 2500
    steps: int = 7500  # whole model, focus and absence phases included
    warmup: int = 100
    rows: int = 16
    pictures: int = 48  # a step of the vision phase
    lr: float = 2.5e-3
    muon_lr: float = 0.02
    log_every: int = 100

    def scaled(self, share: float) -> Plan:
        names = ("vision_steps", "focus_steps", "absence_steps", "steps")
        return Plan(**{name: max(20, round(getattr(self, name) * share)) for name in names})


class Teacher(nn.Module):
    """Throw-away heads that name what each patch shows. Without them shapes stay at chance for very long."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = (len(SHAPES) + 1, len(COLORS) + 1, len(PLACES) + 1)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, seen: torch.Tensor, patches: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
        """seen [N, P, D], patches [N, 3, P], backgrounds [N] -> scalar."""
        losses = [
            nn.functional.cross_entropy(head(seen).flatten(0, 1), patches[:, i].flatten())
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum() + 0.5 * nn.functional.cross_entropy(self.background(seen.mean(1)), backgrounds)


class Student:
    """The model, seen as training needs it: pieces rather than one forward."""

    def __init__(self, model: Idefics3ForConditionalGeneration, packer: Packer) -> None:
        self.model = model
        encode = packer.encode
        self.words = [[encode(" " + word) for word in names] for names in (SHAPES, tuple(COLORS), PLACES)]

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, side, side] -> [N, P, D]"""
        side = pixels.shape[-1] // self.model.config.vision_config.patch_size
        mask = torch.ones(len(pixels), side, side, dtype=torch.bool)
        return self.model.model.vision_model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state

    def hidden(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """features [N, 16, D] -> hidden states [B, L, D]"""
        embeds = self.model.model.text_model.embed_tokens(batch.ids)
        rows = features.flatten(0, 1).to(embeds.dtype)[batch.features.clamp(min=0)]
        embeds = torch.where(batch.features[..., None] >= 0, rows, embeds)
        out = self.model.model.text_model(
            inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        )
        return out.last_hidden_state

    def logits(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """[number of labels, V], in the order of batch.labels' flat positions."""
        hidden = self.hidden(batch, features)[batch.labels != IGNORE]
        return self.model.lm_head(hidden).float()

    def alignment(self, features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Pulls an image token towards the embeddings of the words for what it shows: the text model can then
        match pictures with words from the first step on."""
        side = int(patches.shape[-1] ** 0.5)
        blocks = patches.view(len(patches), 3, side // 2, 2, side // 2, 2).transpose(3, 4).flatten(4).flatten(2, 3)
        table = self.model.model.text_model.embed_tokens.weight
        seen = nn.functional.normalize(features.float(), dim=-1).flatten(0, 1)
        loss = seen.new_zeros(())
        for i, words in enumerate(self.words):
            vectors = torch.stack([table[list(ids)].mean(0) for ids in words])
            target = blocks[:, i].masked_fill(blocks[:, i] == len(words), 99).amin(-1).flatten()
            scores = 14 * seen @ nn.functional.normalize(vectors, dim=-1).T
            loss = loss + nn.functional.cross_entropy(
                scores, target.masked_fill(target == 99, IGNORE), ignore_index=IGNORE
            )
        return loss


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the rest, one schedule for both."""

    def __init__(self, modules: list[nn.Module], plan: Plan) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in modules:
            for name, weight in module.named_parameters():
                inner = weight.ndim == 2 and "layers." in name and "embed" not in name
                (matrices if inner else others).append(weight)
        self.weights = matrices + others
        adam = torch.optim.AdamW(others, plan.lr, (0.9, 0.98), weight_decay=0.05)
        muon = torch.optim.Muon(matrices, plan.muon_lr, weight_decay=0.05, momentum=0.95, ns_steps=5)
        self.parts = ((adam, plan.lr), (muon, plan.muon_lr))

    def step(self, loss: torch.Tensor, share: float) -> None:
        for part, base in self.parts:
            part.zero_grad(set_to_none=True)
            for group in part.param_groups:
                group["lr"] = base * share
        loss.backward()
        nn.utils.clip_grad_norm_([w for w in self.weights if w.grad is not None], 1.0)
        for part, _ in self.parts:
            part.step()


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def _flip(pixels: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirrors pictures left to right; every shape survives it, places change sides."""
    side = int(patches.shape[-1] ** 0.5)
    mirrored = patches.view(*patches.shape[:2], side, side).flip(-1).flatten(2).clone()
    places = torch.tensor([PLACES.index(_swap(p)) for p in PLACES] + [len(PLACES)])
    mirrored[:, 2] = places[mirrored[:, 2]]
    return pixels.flip(-1), mirrored


def _swap(place: str) -> str:
    return place.replace("left", "*").replace("right", "left").replace("*", "right")


def _vision_batches(seed: int, plan: Plan) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A third fresh pictures, the others older, half of all mirrored: drawing costs more than learning."""
    rng, pool = random.Random(row_seed(seed, 0, phase=1)), []
    while True:
        for _ in range(plan.pictures // 3 if pool else plan.pictures):
            picture = draw_picture(random.Random(row_seed(seed, len(pool), phase=2)), (0.25, 0.35, 0.4))
            ground = tuple(BACKGROUNDS).index(picture.scene.background)
            pool.append((torch.from_numpy(squash(picture.image)), torch.from_numpy(patch_classes(picture)), ground))
        fresh = pool[-plan.pictures // 3 :]
        chosen = fresh + rng.choices(pool, k=plan.pictures - len(fresh))
        pixels, patches = (torch.stack([item[i] for item in chosen]) for i in (0, 1))
        half = len(chosen) // 2
        flipped = _flip(pixels[half:], patches[half:])
        yield (
            torch.cat((pixels[:half], flipped[0])),
            torch.cat((patches[:half], flipped[1])),
            torch.tensor([item[2] for item in chosen]),
        )


def pretrain_vision(student: Student, teacher: Teacher, plan: Plan, seed: int) -> None:
    """Phase 1: the vision tower alone learns to name its patches."""
    optimizer = Optimizer([student.model.model.vision_model, teacher], plan)
    start, mean = time.process_time(), 0.0
    for step, (pixels, patches, grounds) in zip(range(plan.vision_steps), _vision_batches(seed, plan), strict=False):
        with _autocast():
            loss = teacher(student.look(pixels), patches, grounds)
        optimizer.step(loss, min(1.0, (step + 1) / plan.warmup))
        mean += (loss.item() - mean) * max(0.02, 1 / (step + 1))
        if (step + 1) % plan.log_every == 0:
            print(f"vision {step + 1} loss {mean:.3f} cpu {time.process_time() - start:.0f}s", flush=True)


def _share(step: int, plan: Plan) -> float:
    """Warm-up, then half a cosine to zero."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / max(1, plan.steps - plan.warmup)))


def _rows(seed: int, step: int, plan: Plan) -> list[Row]:
    """What is there, then what is not there, then everything as it will be asked."""
    later = step - plan.focus_steps
    mix, share = (FOCUS, 0.75) if later < 0 else (ABSENCE, 0.45 if later < plan.absence_steps else 0.1)
    rows = []
    for index in range(step * plan.rows, (step + 1) * plan.rows):
        rng = random.Random(row_seed(seed, index, phase=3))
        rows.append(make_row(rng, mix if rng.random() < share else Mix()))
    return rows


def answer_loss(logits: torch.Tensor, batch: Batch, even: bool) -> torch.Tensor:
    """Mean over answer tokens. Even: long answers, full of what is seen, teach most, as they should at first.
    Otherwise weighted, or lists of JSON would drown every yes and no."""
    chosen = batch.labels != IGNORE
    if even:
        return nn.functional.cross_entropy(logits, batch.labels[chosen])
    losses = nn.functional.cross_entropy(logits, batch.labels[chosen], reduction="none")
    return (losses * batch.weights[chosen]).sum() / batch.weights.sum()


def fit(student: Student, teacher: Teacher, packer: Packer, plan: Plan, seed: int) -> None:
    """Phases 2 and 3: the whole model."""
    model = student.model
    held = [make_row(random.Random(row_seed(seed, i, phase=4)), Mix()) for i in range(64)]
    optimizer = Optimizer([model, teacher], plan)
    start, mean = time.process_time(), 0.0
    for step in range(plan.steps):
        batch = packer.batch(_rows(seed, step, plan))
        fade = 1 - step / plan.steps
        with _autocast():
            seen = student.look(batch.pixels)
            features = model.model.connector(seen)
            even = step < plan.focus_steps
            loss = answer_loss(student.logits(batch, features), batch, even)
            extra = 0.1 * teacher(seen, batch.patches, batch.backgrounds)
            extra = extra + 0.1 * student.alignment(features, batch.patches)
        optimizer.step(loss + fade * extra, _share(step, plan))
        mean += (loss.item() - mean) * max(0.02, 1 / (step + 1))
        if (step + 1) % plan.log_every == 0:
            print(f"step {step + 1} loss {mean:.3f} cpu {time.process_time() - start:.0f}s", flush=True)
        if (step + 1) % (5 * plan.log_every) == 0:
            scores = watch(student, packer, held)
            print("   " + " ".join(f"{skill} {share:.2f}" for skill, share in scores.items()), flush=True)


@torch.no_grad()
def watch(student: Student, packer: Packer, rows: list[Row]) -> dict[str, float]:
    """Share of answers right in every token: greedy decoding's exact match, in one forward pass a batch."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for i in range(0, len(rows), 16):
        batch = packer.batch(rows[i : i + 16])
        with _autocast():
            logits = student.logits(batch, student.model.model.connector(student.look(batch.pixels)))
        right = torch.zeros(batch.labels.numel(), dtype=torch.bool)
        chosen = (batch.labels != IGNORE).flatten()
        right[chosen] = logits.argmax(-1) == batch.labels.flatten()[chosen]
        for skill, at in batch.answers:
            hits[skill].append(bool(right[at].all()))
            hits["all"].append(hits[skill][-1])
    return {skill: sum(values) / len(values) for skill, values in sorted(hits.items())}
