"""Packs rows into tensors: every branch of a row sees what is shared (pictures, earlier turns) and itself.

Sharing the picture among six questions makes a training step several times cheaper than six plain rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from demo_data import BOS, END, IMAGE, Row, Turn
from demo_model import IMAGE_SIDE, IMAGE_TEXT, IMAGE_TOKENS, PATCH
from demo_scene import BACKGROUNDS, COLORS, PLACES, SHAPES, Picture, patch_owner
from PIL import Image
from tokenizers import Tokenizer

MAX_LENGTH = 208
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded to L tokens, N pictures. Labels of the pictures are there for auxiliary losses."""

    ids: torch.Tensor  # [B, L]
    positions: torch.Tensor  # [B, L]; each branch starts where the shared part ends
    mask: torch.Tensor  # [B, 1, L, L] float, 0 or -inf-like
    labels: torch.Tensor  # [B, L] the NEXT token where an answer is due, else IGNORE
    weights: torch.Tensor  # [B, L] float: a word of a short answer weighs more than one of a long answer
    features: torch.Tensor  # [B, L] row of [N * IMAGE_TOKENS] features to put there, or -1
    pixels: torch.Tensor  # [N, 3, side, side]
    patches: torch.Tensor  # [N, 3, P] classes of each patch: shape, color, place (last class: none)
    backgrounds: torch.Tensor  # [N]
    answers: list[tuple[str, torch.Tensor]]  # (skill, flat positions in [B * L]) for every labelled turn


def squash(image: Image.Image) -> np.ndarray:
    """float32 [3, side, side] in [-1, 1]: what the reference's image processor makes without tiling."""
    width, height = image.size
    edge = 4 * IMAGE_SIDE
    if width >= height:
        width, height = edge, int(edge / (width / height))
        height += height % 2
    else:
        width, height = int(edge * (width / height)), edge
        width += width % 2
    lanczos = Image.Resampling.LANCZOS
    small = image.resize((width, height), lanczos).resize((IMAGE_SIDE, IMAGE_SIDE), lanczos)
    return (np.asarray(small, np.float32) / 255 - 0.5).transpose(2, 0, 1) / 0.5


def patch_classes(picture: Picture) -> np.ndarray:
    """[3, P] int: shape, colour and place of the thing in each patch."""
    owner = patch_owner(picture.scene, IMAGE_SIDE, PATCH).reshape(-1)
    things = picture.scene.things
    shape = [SHAPES.index(t.shape) for t in things]
    color = [tuple(COLORS).index(t.color) for t in things]
    place = [PLACES.index(t.place) for t in things]
    tables = ([len(SHAPES), *shape], [len(COLORS), *color], [len(PLACES), *place])
    return np.stack([np.asarray(table)[owner] for table in tables])


def row_pieces(row: Row) -> tuple[list[tuple[str, str]], list[list[tuple[str, str]]]]:
    """(shared, branches) of (text, skill): skill is "" for what is read and a name for what is answered.

    Pieces end where the tokenizer splits anyway, so that joined pieces and joined text give the same ids.
    """
    shared = [(BOS + (f"System: {row.system}{END}\n" if row.system else ""), "")]
    for turn in row.context:
        shared += turn_pieces(turn)
    lead = {branch[0].num_images if not branch[0].text_first else 0 for branch in row.branches}
    count = lead.pop()
    if count:
        shared.append(("User:" + IMAGE * count, ""))
    branches = []
    for branch in row.branches:
        pieces = turn_pieces(branch[0])
        if count:
            pieces[0] = (pieces[0][0].removeprefix("User:" + IMAGE * count), "")
        for turn in branch[1:]:
            pieces += turn_pieces(turn)
        branches.append(pieces)
    return shared, branches


def turn_pieces(turn: Turn) -> list[tuple[str, str]]:
    marks = IMAGE * turn.num_images
    if turn.text_first:
        asked = f"User: {turn.question}{marks}"
    else:
        asked = f"User:{marks}{turn.question}" if marks else f"User: {turn.question}"
    return [(asked + END + "\nAssistant:", ""), (f" {turn.answer}{END}", turn.skill), ("\n", "")]


class Packer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = lru_cache(maxsize=50_000)(self._encode)
        self.tokenizer = tokenizer
        self.image_id = tokenizer.token_to_id(IMAGE)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text.replace(IMAGE, IMAGE_TEXT)).ids)

    def row(self, row: Row) -> dict[str, list[Any]]:
        """Lists of one row: ids, segment (0 shared, 1.. branches), position, answer ids and picture slots."""
        shared, branches = row_pieces(row)
        out: dict[str, list[Any]] = {"ids": [], "segment": [], "position": [], "slot": [], "answers": []}
        for segment, pieces in enumerate((shared, *branches)):
            length = sum(len(self.encode(text)) for text, _ in pieces)
            if segment > 1 and len(out["ids"]) + length > MAX_LENGTH:
                break
            self._append(out, segment, pieces)
        return out

    def _append(self, out: dict[str, list[Any]], segment: int, pieces: list[tuple[str, str]]) -> None:
        num_shared = out["segment"].count(0)
        seen = sum(slot >= 0 for slot, s in zip(out["slot"], out["segment"], strict=True) if s == 0)
        position = num_shared if segment else 0
        for text, skill in pieces:
            ids = self.encode(text)
            if skill:
                out["answers"].append((skill, range(len(out["ids"]) - 1, len(out["ids"]) + len(ids) - 1)))
            for token in ids:
                out["ids"].append(token)
                out["segment"].append(segment)
                out["position"].append(position)
                position += 1
                is_image = token == self.image_id
                out["slot"].append(seen if is_image else -1)
                seen += is_image

    def batch(self, rows: list[Row]) -> Batch:
        packed = [self.row(row) for row in rows]
        size = max(len(p["ids"]) for p in packed)
        size += -size % 8
        ids, positions = np.zeros((2, len(rows), size), np.int64)
        labels, features = np.full((2, len(rows), size), IGNORE, np.int64)
        features[:] = -1
        weights = np.zeros((len(rows), size), np.float32)
        segments = np.full((len(rows), size), -1)
        answers: list[tuple[str, torch.Tensor]] = []
        pictures: list[Picture] = []
        for i, (row, p) in enumerate(zip(rows, packed, strict=True)):
            n = len(p["ids"])
            ids[i, :n], positions[i, :n], segments[i, :n] = p["ids"], p["position"], p["segment"]
            slot = np.asarray(p["slot"])
            features[i, :n] = np.where(slot >= 0, slot + len(pictures) * IMAGE_TOKENS, -1)
            pictures += row.pictures
            for skill, span in p["answers"]:
                at = np.asarray(span)
                labels[i, at] = ids[i, at + 1]
                weights[i, at] = len(at) ** -0.5
                answers.append((skill, torch.from_numpy(at + i * size)))
        return Batch(
            *map(torch.from_numpy, (ids, positions)), _mask(segments),
            *map(torch.from_numpy, (labels, weights, features)),
            *self._pictures(pictures), answers,
        )  # fmt: skip

    @staticmethod
    def _pictures(pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = np.stack([squash(p.image) for p in pictures])
        patches = np.stack([patch_classes(p) for p in pictures])
        grounds = np.asarray([tuple(BACKGROUNDS).index(p.scene.background) for p in pictures])
        return torch.from_numpy(pixels), torch.from_numpy(patches), torch.from_numpy(grounds)


def _mask(segments: np.ndarray) -> torch.Tensor:
    """[B, 1, L, L]: earlier, and shared or of the same branch. Padding sees itself: no row of it is empty."""
    s = torch.from_numpy(segments)
    allowed = (s[:, None, :] == 0) | (s[:, None, :] == s[:, :, None])
    allowed &= torch.ones(s.shape[1], s.shape[1], dtype=torch.bool).tril()
    allowed |= torch.eye(s.shape[1], dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)[:, None]
