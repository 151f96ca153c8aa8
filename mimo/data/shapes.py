"""Moving textured shapes: clips for machines that hold no video. Motion follows from two or three frames.

Each clip has a smooth still background and a few anti-aliased shapes with their own two-colour texture. A shape keeps
its speed and spin; it bounces off the walls or crosses the picture.
"""

from __future__ import annotations

import itertools

import numpy as np

TEXTURES = ("plain", "stripes", "checker", "dots", "rings")
SIDES = (1, 2, 3, 4, 5, 6)


def moving_shapes(
    num_frames: int,
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    shapes: tuple[int, int] = (1, 3),
    speed: tuple[float, float] = (0.02, 0.07),
    textures: tuple[str, ...] = TEXTURES,
    sides: tuple[int, ...] = SIDES,
    color: tuple[float, float, float] | None = None,
) -> np.ndarray:
    """Draws one clip, uint8 [num_frames, height, width, 3], from `rng` alone.

    Args:
        shapes: least and greatest number of shapes.
        speed: range of speeds, in shorter sides per frame.
        textures: those to draw from: "plain", "stripes", "checker", "dots", "rings".
        sides: outlines to draw from: 1 is a disc, 2 a ring, 3 and more a regular polygon.
        color: red, green and blue in 0..255 of every shape; None draws a light one per shape.
    """
    frames = np.repeat(background(height, width, rng)[None], num_frames, axis=0)  # [F, H, W, 3] fp32
    side = min(height, width)
    for _ in range(rng.integers(shapes[0], shapes[1] + 1)):
        radius = side * rng.uniform(0.11, 0.22)
        centers = _path(num_frames, height, width, radius, side * rng.uniform(*speed), rng)
        angles = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.2, 0.2) * np.arange(num_frames, dtype=np.float32)
        outline = sides[rng.integers(len(sides))]
        texture, period = textures[rng.integers(len(textures))], np.float32(radius) * rng.uniform(0.5, 1.0)
        light = np.asarray(rng.uniform(140, 255, 3) if color is None else color, dtype=np.float32)
        dark = light * rng.uniform(0.0, 0.7, 3).astype(np.float32)
        draw_shape(frames, centers, angles.astype(np.float32), radius, outline, texture, period, light, dark)
    return (frames + 0.5).astype(np.uint8)


def background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Four corner colours, blended, with a faint long wave: [H, W, 3] in 0..255."""
    corners = rng.uniform(20, 150, (2, 2, 3)).astype(np.float32)
    v = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    u = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    blend = (1 - v) * ((1 - u) * corners[0, 0] + u * corners[0, 1]) + v * ((1 - u) * corners[1, 0] + u * corners[1, 1])
    waves, phase = (
        rng.uniform(0.5, 1.5, 2).astype(np.float32),
        np.float32(rng.uniform(0, 6.28)),
    )
    return blend + 15 * np.sin(2 * np.pi * (waves[0] * v + waves[1] * u) + phase).astype(np.float32)


def _path(num_frames: int, height: int, width: int, radius: float, speed: float, rng) -> np.ndarray:
    """Centres (y, x) in pixels, [F, 2]."""
    direction = rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.sin(direction), np.cos(direction)])
    time = np.arange(num_frames)[:, None]
    room = np.array([height, width]) - 2 * radius
    start = rng.uniform(0, 1, 2) * room
    if rng.random() < 0.3:  # crosses the picture: through the start at a random time, free to leave
        return radius + start + velocity * (time - rng.integers(0, num_frames))
    phase = np.mod(start + velocity * time, 2 * room)  # bounces: a triangle wave between the walls
    return radius + np.where(phase > room, 2 * room - phase, phase)


def draw_shape(
    frames: np.ndarray,
    centers: np.ndarray,
    angles: np.ndarray,
    radius: float,
    sides: int,
    texture: str,
    period: float,
    light: np.ndarray,
    dark: np.ndarray,
    *,
    wrap: bool = False,
) -> None:
    """Paints one shape into frames [F, H, W, 3], working on a window of S x S pixels around its centre.

    Args:
        centers: (y, x) in pixels, [F, 2]. angles: fp32 [F], how far the shape is turned.
        radius, period: of the shape and of its texture, in pixels.
        sides, texture: see `moving_shapes`.
        light, dark: the two colours of the texture, fp32 [3].
        wrap: what leaves the picture on one side comes in on the other; else it is cut off.
    """
    height, width = frames.shape[1:3]
    radius = np.float32(radius)
    size = int(np.ceil(2 * radius)) + 3
    origins = np.floor(centers - radius - 1).astype(int)  # [F, 2]
    offsets = (origins - centers).astype(np.float32)
    grid = np.arange(size, dtype=np.float32) + 0.5
    y = (offsets[:, :1] + grid)[:, :, None]  # [F, S, 1], relative to the centre
    x = (offsets[:, 1:] + grid)[:, None, :]  # [F, 1, S]
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x  # turning coordinates, [F, S, S]

    alpha = np.clip(0.5 - _distance(u, v, radius, sides), 0, 1)[..., None]
    mix = np.asarray(_texture(u, v, texture, np.float32(2 * np.pi / period)))[..., None]
    paint = dark + (light - dark) * mix  # [F, S, S, 3]

    shifts = (-1, 0, 1) if wrap else (0,)
    for f, down, right in itertools.product(range(len(frames)), shifts, shifts):
        top, left = origins[f, 0] + down * height, origins[f, 1] + right * width
        y0, y1, x0, x1 = max(top, 0), min(top + size, height), max(left, 0), min(left + size, width)
        if y0 < y1 and x0 < x1:
            window = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
            view = frames[f, y0:y1, x0:x1]
            view += alpha[f][window] * (paint[f][window] - view)


def _distance(u: np.ndarray, v: np.ndarray, radius: float | np.float32, sides: int) -> np.ndarray:
    """Signed distance in pixels to a disc (1), a ring (2) or a regular polygon; negative inside."""
    if sides > 2:
        turns = 2 * np.pi / sides * np.arange(sides, dtype=np.float32)
        walls = (np.float32(np.cos(t)) * u + np.float32(np.sin(t)) * v for t in turns)
        farthest = next(walls)
        for wall in walls:
            farthest = np.maximum(farthest, wall)
        return farthest - radius * np.float32(np.cos(np.pi / sides))
    distance = np.sqrt(u * u + v * v)
    return distance - radius if sides == 1 else np.abs(distance - np.float32(0.7) * radius) - np.float32(0.28) * radius


def _texture(u: np.ndarray, v: np.ndarray, kind: str, k: np.float32) -> np.ndarray:
    """Share of the lighter colour, 0..1, with soft edges; k: 2 pi over the period."""
    if kind == "plain":
        return np.ones_like(u)
    if kind == "stripes":
        wave = np.sin(k * u)
    elif kind == "checker":
        wave = np.sin(k * u) * np.sin(k * v) * 2
    elif kind == "dots":
        wave = np.cos(k * u) + np.cos(k * v) - np.float32(0.6)
    else:
        wave = np.sin(k * np.sqrt(u * u + v * v))
    return np.clip(0.5 + 1.5 * wave, 0, 1)
