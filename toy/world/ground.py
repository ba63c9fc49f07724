"""The background of a scene: two or three bands of stuff with uneven borders and a texture each."""

from functools import cache

import cv2
import numpy as np

TILE = 320  # side of the texture tiles from which backgrounds are cropped
TONES: dict[str, tuple[int, int, int]] = {
    "sky": (150, 200, 240),
    "grass": (112, 176, 84),
    "water": (44, 112, 164),
    "sand": (226, 202, 150),
    "road": (112, 112, 116),
    "mountain": (138, 110, 92),
}
STUFF: tuple[str, ...] = tuple(TONES)
FLAT = tuple(name for name in STUFF if name not in ("sky", "mountain"))


def draw_ground(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Background RGB (size, size, 3) float32 0-255, band index (size, size) uint8, band names from the top."""
    names = _choose_bands(rng)
    bands = _stack_bands(names, size, rng)
    image = np.empty((size, size, 3), np.float32)
    for index, name in enumerate(names):
        tone = np.array(TONES[name]) * rng.uniform(0.9, 1.08) + rng.uniform(-8, 8, 3)
        top, left = rng.integers(0, TILE - size, 2)
        texture = _texture(name)[top : top + size, left : left + size] * rng.uniform(0.7, 1.2)
        where = bands == index
        image[where] = tone.astype(np.float32) + texture[where][:, None]
    light = np.linspace(rng.uniform(-12, 12), rng.uniform(-12, 12), size, dtype=np.float32)
    return image + light[:, None, None], bands, names


def _choose_bands(rng: np.random.Generator) -> tuple[str, ...]:
    """Sky on top of most scenes, a mountain under it in some, one or two kinds of ground below."""
    grounds = [FLAT[i] for i in rng.permutation(len(FLAT))]
    sky = ["sky"] if rng.random() < 0.85 else []
    mountain = ["mountain"] if rng.random() < 0.3 else []
    room = 3 - len(sky) - len(mountain)
    count = 1 if room == 1 or (sky and rng.random() < 0.45) else 2
    return tuple(sky + mountain + grounds[:count])


def _stack_bands(names: tuple[str, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    shares = rng.uniform(0.8, 1.3, len(names))
    edges = np.cumsum(shares / shares.sum())[:-1] * size
    rows = np.arange(size)[:, None]
    bands = np.zeros((size, size), np.uint8)
    for edge, below in zip(edges, names[1:], strict=True):
        border = edge + (_ridge(size, rng) if below == "mountain" else _wave(size, rng))
        bands += rows >= border[None, :]
    return bands


def _wave(size: int, rng: np.random.Generator) -> np.ndarray:
    """A gentle border: three sines of random phase."""
    x = np.linspace(0, 2 * np.pi, size)
    return sum(rng.uniform(1, 4) / k * np.sin(k * x * rng.uniform(0.7, 1.3) + rng.uniform(0, 6.3)) for k in (1, 2, 4))


def _ridge(size: int, rng: np.random.Generator) -> np.ndarray:
    """Peaks and valleys: the border of a mountain range."""
    count = int(rng.integers(5, 9))
    knots = np.linspace(0, size - 1, count) + np.r_[0, rng.uniform(-6, 6, count - 2), 0]
    heights = np.where(np.arange(count) % 2, rng.uniform(-17, -9, count), rng.uniform(3, 9, count))
    return np.interp(np.arange(size), knots, heights)


@cache
def _texture(name: str) -> np.ndarray:
    """A (TILE, TILE) float32 relief around zero, the same in every process."""
    rng = np.random.default_rng(STUFF.index(name))
    coarse = cv2.resize(rng.normal(size=(10, 10)).astype(np.float32), (TILE, TILE), interpolation=cv2.INTER_CUBIC)
    fine = rng.normal(size=(TILE, TILE)).astype(np.float32)
    y, x = np.mgrid[0:TILE, 0:TILE].astype(np.float32)
    if name == "sky":
        clouds = cv2.resize(rng.normal(size=(16, 6)).astype(np.float32), (TILE, TILE), interpolation=cv2.INTER_CUBIC)
        return 3 * coarse + 22 * np.clip(clouds - 0.5, 0, 1)
    if name == "grass":
        return 6 * coarse + 26 * cv2.blur(fine, (1, 5))
    if name == "water":
        return 5 * coarse + 16 * np.sin(y * 0.75 + 2.2 * np.sin(x * 0.11) + 3 * coarse)
    if name == "sand":
        return 5 * coarse + 22 * cv2.blur(fine, (2, 2))
    if name == "road":
        dash = ((y % 40) < 4) & (((x + 17 * (y // 40)) % 36) < 20)
        return 3 * coarse + 5 * fine + 95 * dash
    return 8 * coarse + 14 * np.sin((x + y) * 0.35 + 4 * coarse) + 12 * cv2.blur(fine, (3, 3))
