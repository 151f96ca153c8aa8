"""Procedural clips with known factors, to ask a representation what it knows.

Up to three textured shapes drift over a still background, all of the same outline and texture and with one velocity. A
fence stands before them, behind them, or nowhere. The world is a torus: what leaves on one side comes in on the other,
so that no single frame says where things go or how fast.

    shape, texture, number     what a frame shows
    direction, speed           what only several frames show
    occlusion                  which of two things is in front
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mimo.data.shapes import background, draw_shape

FACTORS: dict[str, tuple[str, ...]] = {  # name: its classes
    "shape": ("disc", "ring", "triangle", "square"),
    "texture": ("plain", "stripes", "checker", "rings"),
    "speed": ("slow", "medium", "fast"),
    "direction": ("right", "right down", "down", "left down", "left", "left up", "up", "right up"),
    "occlusion": ("none", "in front", "behind"),  # of the shapes: no fence, before the fence, behind it
    "number": ("one", "two", "three"),
}
BLOCK = math.lcm(*map(len, FACTORS.values()))  # so many clips on end have every class of a factor equally often
SPLITS = ("train", "test")
SIDES = (1, 2, 3, 4)  # of the classes of shape, as mimo.data.shapes counts them
SPEEDS = (0.02, 0.05, 0.1)  # of the classes of speed, in shorter sides per frame
RADIUS = (0.15, 0.2)  # of a shape, in shorter sides
FENCE = (3, 0.09)  # posts, and the width of each in sides


class FactorClips:
    """Clips of which every factor is known. Clip `index` has the same factors for every seed; place, size, colours,
    background, exact speed and direction are drawn from (split, index, seed).

    Every BLOCK clips on end, from a multiple of BLOCK on, have each class of each factor equally often, in an order
    that is drawn for each factor by itself.

    A sample holds `video`, `factors` int64 [6] in the order of FACTORS and, with `label`, that factor as `label`.

    Args:
        num_frames, height, width: shape of a sample.
        split: "train" or "test": clips of the two are drawn from streams of their own.
        length: clips per epoch.
        label: the factor that is the class of a clip; None: clips have no class.
        fixed: factors that have one class in every clip, by name: {"number": "one"}.
    """

    num_actions: int | None = None
    has_actions = False
    decodes = False

    def __init__(
        self,
        *,
        num_frames: int,
        height: int,
        width: int,
        split: str = "train",
        length: int = 400 * BLOCK,
        label: str | None = None,
        fixed: Mapping[str, str] | None = None,
    ):
        if min(num_frames, height, width, length) < 1:
            raise ValueError(f"{length} clips of {num_frames} x {height} x {width}: expected all >= 1")
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        if label is not None and label not in FACTORS:
            raise ValueError(f"label={label!r}: expected one of {', '.join(FACTORS)}")
        self.num_frames, self.height, self.width, self.length = num_frames, height, width, length
        self.fixed = dict(fixed or {})
        for name, kind in self.fixed.items():
            if name not in FACTORS or kind not in FACTORS[name]:
                known = FACTORS.get(name)
                expected = f"one of {', '.join(known)}" if known else f"a factor, one of {', '.join(FACTORS)}"
                raise ValueError(f"factors: {name}={kind}: expected {expected}")
        self.split, self.label = split, label
        self.num_classes = None if label is None else len(FACTORS[label])

    @property
    def has_labels(self) -> bool:
        return self.label is not None

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"factors {self.split} {index}"

    def factors(self, index: int) -> dict[str, int]:
        """Name -> class of clip `index`."""
        block, place = divmod(index, BLOCK)
        drawn = dict(zip(FACTORS, _block(SPLITS.index(self.split), block)[place].tolist(), strict=True))
        return drawn | {name: FACTORS[name].index(kind) for name, kind in self.fixed.items()}

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]:
        factors = self.factors(index)
        rng = np.random.default_rng((SPLITS.index(self.split), seed, index))
        sample: dict[str, Any] = {
            "video": draw_clip(self.num_frames, self.height, self.width, factors, rng),
            "factors": np.array([*factors.values()]),
        }
        return sample if self.label is None else sample | {"label": np.int64(factors[self.label])}

    def sources(self) -> list[Path]:
        return []

    def settings(self) -> dict:
        return {"split": self.split, "label": self.label} | ({"fixed": self.fixed} if self.fixed else {})

    def check_readable(self) -> None:
        """Nothing is read."""

    def evaluation_order(self) -> list[int]:
        return list(range(self.length))  # balanced as it is

    def __repr__(self) -> str:
        fixed = "".join(f", {name}={kind}" for name, kind in self.fixed.items())
        return f"FactorClips({self.length} procedural clips, {self.split}{fixed})"


def mirrored(factors: np.ndarray) -> np.ndarray:
    """The factors [..., 6] of clips as a mirror shows them, left and right exchanged: another direction."""
    place = [*FACTORS].index("direction")
    turned = factors.copy()
    turned[..., place] = (4 - factors[..., place]) % 8
    return turned


def draw_clip(
    num_frames: int, height: int, width: int, factors: Mapping[str, int], rng: np.random.Generator
) -> np.ndarray:
    """One clip, uint8 [num_frames, height, width, 3], with the given class of every factor; the rest is drawn."""
    frames = np.repeat(background(height, width, rng)[None], num_frames, axis=0)  # [F, H, W, 3] fp32
    side, time = min(height, width), np.arange(num_frames)[:, None]
    angle = np.pi / 4 * (factors["direction"] + rng.uniform(-0.2, 0.2))  # clockwise from the right, as y goes down
    speed = side * SPEEDS[factors["speed"]] * rng.uniform(0.9, 1.1)
    travelled = speed * time * np.array([np.sin(angle), np.cos(angle)])  # [F, 2]
    texture = FACTORS["texture"][factors["texture"]]
    occlusion = FACTORS["occlusion"][factors["occlusion"]]
    if occlusion == "in front":
        _draw_fence(frames, rng)
    for start in _places(1 + factors["number"], height, width, rng):
        radius = side * rng.uniform(*RADIUS)
        angles = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.1, 0.1) * np.arange(num_frames, dtype=np.float32)
        light = rng.uniform(170, 255, 3).astype(np.float32)
        draw_shape(
            frames,
            np.mod(start + travelled, (height, width)),
            angles.astype(np.float32),
            radius,
            SIDES[factors["shape"]],
            texture,
            radius * rng.uniform(0.8, 1.1),
            light,
            light * rng.uniform(0.0, 0.4, 3).astype(np.float32),
            wrap=True,
        )
    if occlusion == "behind":
        _draw_fence(frames, rng)
    return (frames + 0.5).astype(np.uint8)


@lru_cache(maxsize=1024)
def _block(split: int, block: int) -> np.ndarray:
    """The factors of BLOCK clips on end, int64 [BLOCK, 6]."""
    columns = []
    for number, classes in enumerate(FACTORS.values()):
        rng = np.random.default_rng(np.random.SeedSequence((split, block), spawn_key=(number,)))
        columns.append(rng.permutation(np.arange(BLOCK) % len(classes)))
    return np.stack(columns, axis=1)


def _places(count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (y, x) that are as far from each other as the best of 30 draws, float64 [count, 2]: the first one lies
    anywhere, the torus being alike everywhere."""
    size = np.array([height, width])
    drawn = rng.uniform(0, size, (30, count, 2))
    if count == 1:
        return drawn[0]
    apart = np.abs(drawn[:, :, None] - drawn[:, None])  # [30, count, count, 2]
    squared = np.square(np.minimum(apart, size - apart)).sum(-1)
    closest = np.where(np.eye(count, dtype=bool), np.inf, squared).min((1, 2))
    return drawn[closest.argmax()]


def _draw_fence(frames: np.ndarray, rng: np.random.Generator) -> None:
    """Posts of one colour over all of the picture, upright or lying, at the same place in every frame."""
    posts, share = FENCE
    across = int(rng.integers(2))  # the axis that posts are counted along: 0 lying, 1 upright
    size = frames.shape[1 + across]
    spacing = size / posts
    place = np.arange(size) + 0.5 - rng.uniform(0, spacing)
    distance = np.abs(np.mod(place + spacing / 2, spacing) - spacing / 2)  # from the middle of the nearest post
    cover = np.clip(0.5 + share * size / 2 - distance, 0, 1).astype(np.float32)  # [size]
    cover = cover[:, None, None] if across == 0 else cover[None, :, None]
    color = rng.uniform(190, 255, 3)
    color[rng.integers(3)] = rng.uniform(0, 60)  # unlike the dull background
    frames += cover * (color.astype(np.float32) - frames)
