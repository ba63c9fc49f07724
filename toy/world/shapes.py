"""Silhouettes of the toy objects: every shape is a few flat polygons in the square [-1, 1]^2, with y pointing down."""

from dataclasses import dataclass

import numpy as np

Polygon = np.ndarray  # (N, 2) float, x and y in [-1, 1]

COLORS: dict[str, tuple[int, int, int]] = {  # RGB of an object's main part
    "red": (214, 40, 40),
    "green": (30, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (248, 222, 40),
    "purple": (135, 45, 175),
    "orange": (248, 132, 20),
    "white": (244, 244, 242),
    "black": (36, 36, 40),
}
NATURAL: dict[str, tuple[int, int, int]] = {  # fixed colours of the other parts
    "wood": (122, 82, 48),
    "tile": (112, 66, 58),
    "rubber": (62, 62, 66),
    "metal": (158, 162, 168),
    "glass": (178, 216, 236),
    "cream": (242, 234, 208),
    "skin": (236, 188, 150),
    "leaf": (62, 122, 58),
    "shadow": (66, 56, 56),
}
MAIN = "main"  # in place of a key of NATURAL: the object's own colour


@dataclass(frozen=True)
class PartLayer:
    """Polygons of one part in one colour (MAIN or a key of NATURAL), painted over the previous layers."""

    part: str
    paint: str
    polygons: tuple[Polygon, ...]


@dataclass(frozen=True)
class Shape:
    """Layers from back to front; `aspect` is width / height of the object."""

    layers: tuple[PartLayer, ...]
    aspect: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.part for layer in self.layers))


def _box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)


def _disc(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360) -> Polygon:
    angle = np.radians(np.linspace(start, stop, 24))
    return np.stack([x + rx * np.cos(angle), y + (ry or rx) * np.sin(angle)], axis=1)


def _sector(start: float, stop: float) -> Polygon:
    return np.vstack([_disc(0, 0, 0.97, start=start, stop=stop), (0, 0)])


def _poly(*points: tuple[float, float]) -> Polygon:
    return np.array(points, dtype=float)


def _layer(part: str, paint: str, *polygons: Polygon) -> PartLayer:
    return PartLayer(part, paint, polygons)


def _petals(count: int, y: float, spread: float, radius: float) -> tuple[Polygon, ...]:
    turns = np.arange(count) * 2 * np.pi / count - np.pi / 2
    return tuple(_disc(spread * np.cos(t), y + 0.75 * spread * np.sin(t), radius, 0.75 * radius) for t in turns)


_HOUSE = Shape(
    (
        _layer("wall", MAIN, _box(-0.8, -0.2, 0.8, 1)),
        _layer("roof", "tile", _box(0.35, -1, 0.6, -0.5), _poly((-1, -0.15), (0, -1), (1, -0.15))),
        _layer("door", "wood", _box(-0.55, 0.2, -0.1, 1)),
        _layer("wall", "glass", _box(0.2, 0.15, 0.6, 0.55)),
    ),
)
_CAR = Shape(
    (
        _layer(
            "body",
            MAIN,
            _poly((-1, 0.6), (-1, 0), (-0.6, -0.15), (-0.35, -1), (0.35, -1), (0.62, -0.15), (1, 0.05), (1, 0.6)),
        ),
        _layer(
            "window",
            "glass",
            _poly((-0.46, -0.15), (-0.26, -0.78), (-0.05, -0.78), (-0.05, -0.15)),
            _poly((0.06, -0.15), (0.06, -0.78), (0.27, -0.78), (0.48, -0.15)),
        ),
        _layer("wheels", "rubber", _disc(-0.55, 0.58, 0.25, 0.42), _disc(0.55, 0.58, 0.25, 0.42)),
        _layer("wheels", "metal", _disc(-0.55, 0.58, 0.1, 0.17), _disc(0.55, 0.58, 0.1, 0.17)),
    ),
    aspect=1.75,
)
_TREE = Shape(
    (
        _layer("trunk", "wood", _poly((-0.22, 1), (-0.14, 0.1), (0.14, 0.1), (0.22, 1))),
        _layer(
            "crown",
            MAIN,
            *(_disc(x, y, r) for x, y, r in ((-0.55, 0, 0.44), (0.55, 0, 0.44), (-0.3, -0.5, 0.48), (0.3, -0.5, 0.48))),
            _disc(0, 0.02, 0.46),
        ),
    ),
    aspect=0.9,
)
_FISH = Shape(
    (
        _layer("tail", MAIN, _poly((0.35, 0), (1, -0.75), (0.82, 0), (1, 0.75))),
        _layer("body", MAIN, _disc(-0.25, 0, 0.75, 0.78), _poly((-0.4, -0.6), (0.1, -1), (0.15, -0.5))),
        _layer("body", "cream", _disc(-0.62, -0.18, 0.15, 0.24)),
        _layer("body", "shadow", _disc(-0.65, -0.18, 0.07, 0.12), _poly((-0.22, -0.15), (0.02, 0.12), (-0.22, 0.38))),
    ),
    aspect=1.6,
)
_BOAT = Shape(
    (
        _layer("hull", "wood", _box(-0.07, -1, 0.05, 0.5)),
        _layer(
            "sail",
            "cream",
            _poly((0.1, -0.95), (0.85, 0.35), (0.1, 0.35)),
            _poly((-0.12, -0.7), (-0.65, 0.35), (-0.12, 0.35)),
        ),
        _layer("hull", MAIN, _poly((-1, 0.45), (1, 0.45), (0.65, 1), (-0.65, 1))),
    ),
)
_FLAG = Shape(
    (
        _layer("pole", "metal", _box(-0.85, -0.95, -0.65, 1), _disc(-0.75, -0.92, 0.2, 0.12)),
        _layer(
            "cloth",
            MAIN,
            _poly(
                (-0.65, -0.75), (-0.2, -0.9), (0.4, -0.65), (1, -0.8), (1, 0.15), (0.4, 0.3), (-0.2, 0.05), (-0.65, 0.2)
            ),
        ),
    ),
    aspect=0.85,
)
_BALL = Shape(
    (
        _layer("ball", MAIN, _disc(0, 0, 1)),
        _layer("ball", "cream", *(_sector(start, start + 44) for start in (-20, 100, 220))),
        _layer("ball", "shadow", _disc(0, 0, 0.13)),
    ),
)
_LAMP = Shape(
    (
        _layer("stand", "metal", _box(-0.09, -0.2, 0.09, 0.9), _disc(0, 0.88, 0.5, 0.12)),
        _layer("shade", MAIN, _poly((-0.4, -1), (0.4, -1), (0.9, 0), (-0.9, 0))),
    ),
    aspect=0.65,
)
_CLOCK = Shape(
    (
        _layer(
            "face", "metal", _poly((-0.75, 1), (-0.45, 0.5), (-0.2, 0.75)), _poly((0.75, 1), (0.45, 0.5), (0.2, 0.75))
        ),
        _layer("face", "metal", _disc(-0.55, -0.72, 0.3), _disc(0.55, -0.72, 0.3)),
        _layer("face", MAIN, _disc(0, 0.05, 0.85)),
        _layer("face", "cream", _disc(0, 0.05, 0.6)),
        _layer(
            "hands",
            "shadow",
            _box(-0.07, -0.45, 0.07, 0.1),
            _poly((-0.02, 0.1), (0.36, 0.3), (0.42, 0.18), (0.04, -0.02)),
        ),
    ),
)
_BOTTLE = Shape(
    (
        _layer(
            "body",
            MAIN,
            _poly((-0.8, 1), (-0.8, 0), (-0.35, -0.4), (-0.35, -0.72), (0.35, -0.72), (0.35, -0.4), (0.8, 0), (0.8, 1)),
        ),
        _layer("body", "cream", _box(-0.8, 0.25, 0.8, 0.65)),
        _layer("cap", "rubber", _box(-0.45, -1, 0.45, -0.7)),
    ),
    aspect=0.45,
)
_TENT = Shape(
    (
        _layer(
            "tent",
            "wood",
            _poly((-0.12, -1), (0.1, -0.85), (-0.95, 1), (-1, 0.95)),
            _poly((0.12, -1), (-0.1, -0.85), (0.95, 1), (1, 0.95)),
        ),
        _layer("tent", MAIN, _poly((0, -0.85), (0.95, 0.95), (-0.95, 0.95))),
        _layer("tent", "shadow", _poly((0, -0.35), (0.36, 0.95), (-0.36, 0.95))),
    ),
    aspect=1.3,
)
_AIRPLANE = Shape(
    (
        _layer("wing", "metal", _poly((-0.05, -0.05), (0.35, -0.75), (0.55, -0.75), (0.3, -0.05))),
        _layer("body", MAIN, _poly((0.55, -0.1), (0.8, -1), (1, -1), (0.95, 0.05))),
        _layer(
            "body",
            MAIN,
            _disc(-0.65, 0.05, 0.35, 0.32),
            _poly((-0.65, -0.27), (0.7, -0.2), (1, 0), (0.7, 0.25), (-0.65, 0.37)),
        ),
        _layer(
            "body",
            "glass",
            _disc(-0.8, -0.05, 0.1, 0.14),
            *(_disc(x, -0.02, 0.07, 0.1) for x in (-0.4, -0.15, 0.1, 0.35)),
        ),
        _layer("wing", "metal", _poly((-0.2, 0.15), (0.2, 0.15), (0.65, 1), (0.4, 1))),
    ),
    aspect=1.7,
)
_FLOWER = Shape(
    (
        _layer("stem", "leaf", _box(-0.08, -0.3, 0.08, 1)),
        _layer(
            "stem",
            "leaf",
            _poly((0, 0.75), (0.35, 0.3), (0.8, 0.25), (0.5, 0.7)),
            _poly((0, 0.9), (-0.35, 0.45), (-0.8, 0.4), (-0.5, 0.8)),
        ),
        _layer("petals", MAIN, *_petals(6, -0.42, 0.52, 0.32)),
        _layer("petals", "wood", _disc(0, -0.42, 0.3, 0.225)),
    ),
    aspect=0.75,
)
_PERSON = Shape(
    (
        _layer("body", "skin", _disc(-0.85, 0.22, 0.15, 0.08), _disc(0.85, 0.22, 0.15, 0.08)),
        _layer(
            "body", "rubber", _poly((-0.48, 0.3), (-0.5, 1), (-0.12, 1), (0, 0.45), (0.12, 1), (0.5, 1), (0.48, 0.3))
        ),
        _layer(
            "body",
            MAIN,
            _poly(
                (-0.4, -0.45),
                (0.4, -0.45),
                (1, 0.1),
                (0.75, 0.24),
                (0.48, 0.05),
                (0.5, 0.42),
                (-0.5, 0.42),
                (-0.48, 0.05),
                (-0.75, 0.24),
                (-1, 0.1),
            ),
        ),
        _layer("head", "skin", _disc(0, -0.7, 0.42, 0.3)),
        _layer("head", "wood", _disc(0, -0.76, 0.44, 0.25, 180, 360)),
    ),
    aspect=0.6,
)
_CHAIR = Shape(
    (
        _layer(
            "legs",
            "wood",
            _box(-0.85, 0.1, -0.65, 1),
            _box(0.65, 0.1, 0.85, 1),
            _box(-0.35, 0.1, -0.2, 0.8),
            _box(0.3, 0.1, 0.45, 0.8),
        ),
        _layer("back", MAIN, _box(-0.85, -1, -0.6, 0.15), _box(-0.05, -0.95, 0.12, 0.15), _box(0.6, -1, 0.85, 0.15)),
        _layer("back", MAIN, _box(-0.85, -0.95, 0.85, -0.62)),
        _layer("seat", MAIN, _poly((-0.8, 0), (0.8, 0), (1, 0.32), (-1, 0.32))),
    ),
    aspect=0.7,
)
_BUS = Shape(
    (
        _layer("body", MAIN, _poly((-1, 0.75), (-1, -0.9), (-0.9, -1), (0.9, -1), (1, -0.9), (1, 0.75))),
        _layer("windows", "glass", *(_box(x, -0.7, x + 0.34, -0.1) for x in (-0.88, -0.44, 0.0, 0.5))),
        _layer("body", "cream", _box(-1, 0.15, 1, 0.3)),
        _layer("wheels", "rubber", _disc(-0.58, 0.72, 0.18, 0.28), _disc(0.58, 0.72, 0.18, 0.28)),
        _layer("wheels", "metal", _disc(-0.58, 0.72, 0.07, 0.11), _disc(0.58, 0.72, 0.07, 0.11)),
    ),
    aspect=1.6,
)

OBJECTS: dict[str, Shape] = {
    "house": _HOUSE,
    "car": _CAR,
    "tree": _TREE,
    "fish": _FISH,
    "boat": _BOAT,
    "flag": _FLAG,
    "ball": _BALL,
    "lamp": _LAMP,
    "clock": _CLOCK,
    "bottle": _BOTTLE,
    "tent": _TENT,
    "airplane": _AIRPLANE,
    "flower": _FLOWER,
    "person": _PERSON,
    "chair": _CHAIR,
    "bus": _BUS,
}
PARTS: dict[str, tuple[str, ...]] = {name: shape.parts for name, shape in OBJECTS.items() if len(shape.parts) > 1}
