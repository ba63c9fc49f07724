"""Renders answers: masks over the image in one colour per name, a legend, grids of input, answer, prediction, truth."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GOLDEN_ANGLE = 0.618033988749895  # in turns of the hue circle: consecutive hues are far apart, whatever their number
OPACITY = 0.5
INK = (30, 30, 30)
PAPER = (255, 255, 255)
FONT_SIZE = 13  # this and the next two in pixels
MARGIN = 6
LINE = FONT_SIZE + 5

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Layer:
    """One mask to be shown: (H, W) bool, its name in the legend ("" for none) and its colour."""

    mask: np.ndarray
    name: str
    colour: Colour


@dataclass(frozen=True)
class Panel:
    """One row of a grid: the image, question and answer, predicted and true masks, a remark such as the IoU."""

    image: np.ndarray  # (H, W, 3) uint8
    question: str
    answer: str
    predicted: Sequence[Layer]
    true: Sequence[Layer]
    note: str = ""


def colour_of(index: int) -> Colour:
    """The colour of the name number `index`: hues far apart, brightness in three steps."""
    hue = (index * GOLDEN_ANGLE) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if index % 2 else 0.65, (1.0, 0.8, 0.9)[index % 3])
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(image: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """(H, W, 3) uint8: the image with each mask half transparent and outlined; later layers are on top."""
    shown = image.astype(np.float32)
    for layer in layers:
        if layer.mask.shape != image.shape[:2]:
            raise ValueError(f"mask {layer.name!r} is {layer.mask.shape}, the image {image.shape[:2]}")
        colour = np.array(layer.colour, np.float32)
        shown[layer.mask] = (1 - OPACITY) * shown[layer.mask] + OPACITY * colour
        shown[outline(layer.mask)] = colour
    return shown.round().astype(np.uint8)


def with_legend(image: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """The overlay with a strip of colours and names below it, each name once."""
    shown = overlay(image, layers)
    entries = dict.fromkeys((layer.name, layer.colour) for layer in layers if layer.name)
    if not entries:
        return shown
    width = shown.shape[1]
    font = _font()
    places = []
    x = y = MARGIN
    for name, colour in entries:
        step = FONT_SIZE + 4 + round(font.getlength(name)) + 2 * MARGIN
        if x > MARGIN and x + step > width:
            x, y = MARGIN, y + LINE
        places.append((x, y, name, colour))
        x += step
    strip = Image.new("RGB", (width, y + LINE + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(strip)
    for x, y, name, colour in places:
        draw.rectangle((x, y + 1, x + FONT_SIZE - 2, y + FONT_SIZE - 1), fill=colour, outline=INK)
        draw.text((x + FONT_SIZE + 4, y - 1), name, fill=INK, font=font)
    return np.concatenate([shown, np.asarray(strip)])


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that touch its outside; what lies beyond the image's border is not outside."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def grid(panels: Sequence[Panel], side: int = 260) -> np.ndarray:
    """(H, W, 3) uint8: one row per panel with columns input, answer, predicted, true, each `side` pixels wide."""
    if not panels:
        raise ValueError("a grid needs at least one panel")
    rows = [_title(side, ("input", "question and answer", "predicted", "true"))]
    for panel in panels:
        image = scale_image(panel.image, side)
        shown = [image, _words(panel, side)]
        for layers in (panel.predicted, panel.true):
            fitted = [Layer(scale_mask(layer.mask, image.shape[:2]), layer.name, layer.colour) for layer in layers]
            shown.append(with_legend(image, fitted))
        rows.append(_side_by_side(shown))
    return np.concatenate(rows)


def scale_image(image: np.ndarray, side: int) -> np.ndarray:
    """The (H, W, 3) image scaled to a width of `side` pixels."""
    size = (side, max(1, round(image.shape[0] * side / image.shape[1])))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def scale_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A (H, W) bool mask scaled to another size, by the nearest pixel."""
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))


def _words(panel: Panel, width: int) -> np.ndarray:
    """Question, answer and note, wrapped to a width; as high as they need."""
    parts = [(panel.question, (90, 90, 90)), (panel.answer, INK), (panel.note, (160, 60, 0))]
    room = width - 2 * MARGIN
    lines = [(line, ink) for text, ink in parts if text for line in [*wrap_text(text, room), ""]]
    page = Image.new("RGB", (width, LINE * len(lines) + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (line, ink) in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE), line, fill=ink, font=_font())
    return np.asarray(page)


def wrap_text(text: str, width: float, most: int = 14, font: Font | None = None) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks and after tokens such as <ins>. Of more than `most` lines the
    last become [...]. font: by default that of the sheets."""
    font = font or _font()
    lines = [""]
    for piece in re.findall(r"[^\s>]*>\s*|[^\s>]+\s*", text.strip()):
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    lines = [line.strip() for line in lines]
    return lines if len(lines) <= most else [*lines[: most - 1], "[...]"]


def _title(side: int, names: Sequence[str]) -> np.ndarray:
    page = Image.new("RGB", (side * len(names) + MARGIN * (len(names) + 1), LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for column, name in enumerate(names):
        draw.text((MARGIN + column * (side + MARGIN), MARGIN // 2), name, fill=INK, font=_font())
    return np.asarray(page)


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images in a row on white, with margins; each gets the height of the highest."""
    height = max(image.shape[0] for image in images) + MARGIN
    width = sum(image.shape[1] for image in images) + MARGIN * (len(images) + 1)
    page = np.full((height, width, 3), 255, np.uint8)
    x = MARGIN
    for image in images:
        page[: image.shape[0], x : x + image.shape[1]] = image
        x += image.shape[1] + MARGIN
    return page


@cache
def _font() -> Font:
    return ImageFont.load_default(FONT_SIZE)
