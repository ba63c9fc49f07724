"""Renders one object as a small sprite: colour, coverage, and the part that each pixel shows."""

from dataclasses import dataclass

import cv2
import numpy as np

from toy.world.shapes import COLORS, MAIN, NATURAL, OBJECTS, Shape

ZOOM = 3  # sprites are rendered at this multiple of their size and shrunk, which smooths their edges
SUBPIXEL = 4  # fractional bits of OpenCV's coordinates
PADDING = 2  # pixels around the shape, for its outline


@dataclass(frozen=True)
class Sprite:
    """A rendered object: premultiplied RGB (h, w, 3) 0-255, coverage (h, w) 0-1, 1 + part index (h, w) uint8."""

    rgb: np.ndarray
    coverage: np.ndarray
    labels: np.ndarray


def draw_object(name: str, *, color: str, across: float, rng: np.random.Generator) -> Sprite:
    """Render `name` with its longer side about `across` pixels; pose, proportions and shade vary with `rng`."""
    shape = OBJECTS[name]
    transform, width, height = _pose(shape, across, rng)
    canvas = np.zeros((height * ZOOM, width * ZOOM, 3), np.uint8)
    labels = np.zeros((height * ZOOM, width * ZOOM), np.uint8)
    tones = {paint: _vary(rgb, rng) for paint, rgb in {**NATURAL, MAIN: COLORS[color]}.items()}
    for layer in shape.layers:
        tone = tones[layer.paint]
        outline = tuple(0.62 * channel for channel in tone)
        points = [_to_fixed(polygon, transform) for polygon in layer.polygons]
        code = 1 + shape.parts.index(layer.part)
        cv2.polylines(canvas, points, True, outline, ZOOM, cv2.LINE_8, SUBPIXEL)
        cv2.polylines(labels, points, True, code, ZOOM, cv2.LINE_8, SUBPIXEL)
        for polygon in points:
            cv2.fillPoly(canvas, [polygon], tone, cv2.LINE_8, SUBPIXEL)
            cv2.fillPoly(labels, [polygon], code, cv2.LINE_8, SUBPIXEL)
    return _shrink(canvas, labels, width, height, rng)


def _pose(shape: Shape, across: float, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """A (2, 3) map from shape coordinates to sprite pixels, and the sprite's width and height."""
    aspect = shape.aspect * rng.uniform(0.88, 1.14)
    half = 0.5 * across * np.array([min(1.0, aspect), min(1.0, 1 / aspect)])
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    tilt = np.radians(rng.uniform(-7, 7))
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    linear = turn @ np.diag(half * (mirror, 1))
    reach = np.abs(np.concatenate([polygon @ linear.T for layer in shape.layers for polygon in layer.polygons])).max(0)
    width, height = (int(2 * np.ceil(side + PADDING)) for side in reach)
    return np.column_stack([linear, (width / 2, height / 2)]), width, height


def _to_fixed(polygon: np.ndarray, transform: np.ndarray) -> np.ndarray:
    pixels = (polygon @ transform[:, :2].T + transform[:, 2]) * ZOOM - 0.5
    return np.round(pixels * (1 << SUBPIXEL)).astype(np.int32)


def _vary(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(np.clip(np.array(rgb) * rng.uniform(0.9, 1.06) + rng.uniform(-8, 8, 3), 0, 255).tolist())


def _shrink(canvas: np.ndarray, labels: np.ndarray, width: int, height: int, rng: np.random.Generator) -> Sprite:
    rgb = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    covered = (labels > 0).astype(np.float32)
    coverage = cv2.resize(covered, (width, height), interpolation=cv2.INTER_AREA)
    slope = rng.uniform(-0.16, 0.16, 2)
    across, down = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    light = 1 + slope[0] * across[None, :] + slope[1] * down[:, None]
    return Sprite(
        rgb * light[..., None].astype(np.float32), coverage, labels[ZOOM // 2 :: ZOOM, ZOOM // 2 :: ZOOM].copy()
    )
