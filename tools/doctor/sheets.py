"""Sample sheets: images with their masks, and next to them the exact words that each system would train on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.sources import Source
from data.templates import Template
from data.tokenizer_family import TokenizerFamily
from data.types import Record
from evaluation.report.draw import Layer, colour_of, with_legend
from systems.base import System
from tools.doctor.words import row_text
from utils.images import read_image

SIDE, COLUMN, MARGIN, FONT = 384, 960, 10, 13  # width of an image and of the words, blank edge, font size, in pixels
LINE, MOST_LINES = FONT + 4, 90
INK, GREY, PAPER = (25, 25, 25), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True)
class Speaker:
    """A system, the template that its training rows go through, and the tokenizer's family."""

    system: System
    template: Template
    family: TokenizerFamily


def write_sheet(
    name: str, source: Source, speakers: Sequence[Speaker], *, count: int, out: Path, rng: np.random.Generator
) -> Path:
    """Samples `count` records; writes <out>/<name>.png, and <out>/<name>.txt with all the words."""
    indices = sorted(rng.choice(len(source), min(count, len(source)), replace=False).tolist())
    opening = speakers[0].template.first.partition("{question}")[0]
    bands = [render_words(f"{name}. Every row begins: {opening}", [], opening)]
    texts: list[str] = []
    for index in indices:
        record = source[index]
        # Each speaker has the same random numbers, so that all of them ask about the same targets where they can.
        words = [(s.system.name, words_of(record, s, np.random.default_rng((index, 1)))) for s in speakers]
        title = f"record {index}: {record.image}"
        bands.append(side_by_side(render_record(record), render_words(title, words, opening)))
        texts += [f"=== {title}", *(line for entry in words for line in as_text(*entry)), ""]
    out.mkdir(parents=True, exist_ok=True)
    path = out / (re.sub(r"[^\w.+-]+", "_", name) + ".png")
    Image.fromarray(stack(bands)).save(path)
    path.with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
    return path


def words_of(record: Record, speaker: Speaker, rng: np.random.Generator) -> list[str]:
    """One text per training row."""
    system = speaker.system
    return [
        row_text(dialogue, system.tokens, speaker.template, speaker.family)
        for dialogue in system.task.converse(record, rng)
    ]


def as_text(name: str, rows: list[str]) -> list[str]:
    """The rows of one system under a headline."""
    if not rows:
        return [f"--- {name}: nothing"]
    return [f"--- {name}: {len(rows)} {'row' if len(rows) == 1 else 'rows'}", *rows]


def render_record(record: Record) -> np.ndarray:
    """(H, SIDE, 3) uint8: the image with the masks of its targets and a legend, which also names the absent ones."""
    image = read_image(record.image)
    size = (SIDE, max(1, round(image.shape[0] * SIDE / image.shape[1])))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    layers: list[Layer] = []
    colours: dict[int | str, tuple[int, int, int]] = {}  # targets with one mask, several phrases for a thing, share one
    for target in record.targets:
        mask = np.zeros(image.shape[:2], bool) if target.mask is None else target.mask()
        colour = colours.setdefault(id(target.mask) if target.mask else target.phrase, colour_of(len(colours)))
        fitted = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        name = target.phrase if target.mask is not None else f"{target.phrase} (absent)"
        layers.append(Layer(fitted, name, colour))
    return with_legend(small, layers)


def render_words(title: str, words: list[tuple[str, list[str]]], opening: str) -> np.ndarray:
    """(H, COLUMN, 3) uint8: the rows of each system without the opening that all share, at most MOST_LINES lines."""
    lines = [(line, GREY) for line in wrap(title)]
    for name, rows in words:
        headline, *texts = as_text(name, rows)
        lines.append((headline, GREY))
        for text in texts:
            lines += [(line, INK) for part in text.removeprefix(opening).strip().split("\n") for line in wrap(part)]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], ("... the rest is in the text file", GREY)]
    page = Image.new("RGB", (COLUMN, LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (line, ink) in enumerate(lines):
        draw.text((0, number * LINE), line, fill=ink, font=font())
    return np.asarray(page)


def wrap(text: str) -> list[str]:
    """Lines that fit the column; a line may break after a blank or a token, and inside a word that fills a line."""
    lines = [""]
    for piece in re.findall(r".{1,80}?(?:[ >]|$)|.{80}", text):
        if lines[-1] and font().getlength(lines[-1] + piece.rstrip()) > COLUMN:
            lines.append("")
        lines[-1] += piece
    return lines


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two images on white, with a margin around each and a grey line at the bottom."""
    height = max(len(left), len(right)) + 2 * MARGIN
    column = left.shape[1] + 2 * MARGIN  # where `right` starts
    page = np.full((height, column + right.shape[1] + MARGIN, 3), 255, np.uint8)
    page[MARGIN : MARGIN + len(left), MARGIN : MARGIN + left.shape[1]] = left
    page[MARGIN : MARGIN + len(right), column : column + right.shape[1]] = right
    page[-1] = GREY
    return page


def stack(bands: list[np.ndarray]) -> np.ndarray:
    """The bands, of any widths, one below the other on white."""
    page = np.full((sum(map(len, bands)), max(band.shape[1] for band in bands), 3), 255, np.uint8)
    top = 0
    for band in bands:
        page[top : top + len(band), : band.shape[1]] = band
        top += len(band)
    return page


@cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own; a FreeTypeFont where Pillow was built with FreeType."""
    return ImageFont.load_default(FONT)
