"""Sample sheets: pictures with their masks, and beside them the exact words that each system would train on."""

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
from data.types import Record
from data.views import read_image
from evaluation.report.draw import Layer, colour_of, with_legend
from systems.base import System
from tools.doctor.words import spoken

SIDE, COLUMN, MARGIN, FONT = 384, 960, 10, 13  # widths of a picture and of the words, in pixels
LINE, MOST_LINES = FONT + 4, 90
INK, GREY, PAPER = (25, 25, 25), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True)
class Speaker:
    """A system and the template that its training rows go through."""

    system: System
    template: Template


def write_sheet(
    name: str, source: Source, speakers: Sequence[Speaker], *, count: int, out: Path, rng: np.random.Generator
) -> Path:
    """Draws `count` records; writes <out>/<name>.png, and <out>/<name>.txt with all the words."""
    chosen = sorted(rng.choice(len(source), min(count, len(source)), replace=False).tolist())
    opening = speakers[0].template.first.partition("{question}")[0]
    bands, texts = [written(f"{name}. Every row begins: {opening}", [], opening)], []
    for index in chosen:
        record = source[index]
        said = [(s.system.name, words_of(record, s, np.random.default_rng((index, 1)))) for s in speakers]
        bands.append(side_by_side(pictured(record), written(f"record {index}: {record.image}", said, opening)))
        texts += [f"=== record {index}: {record.image}", *(line for entry in said for line in as_text(*entry)), ""]
    out.mkdir(parents=True, exist_ok=True)
    path = out / (re.sub(r"[^\w.+-]+", "_", name) + ".png")
    Image.fromarray(stacked(bands)).save(path)
    path.with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
    return path


def words_of(record: Record, speaker: Speaker, rng: np.random.Generator) -> list[str]:
    """One text a training row."""
    system = speaker.system
    return [spoken(dialogue, system.tokens, speaker.template) for dialogue in system.task.converse(record, rng)]


def as_text(name: str, rows: list[str]) -> list[str]:
    return [f"--- {name}: {len(rows)} row{'s' * (len(rows) > 1)}" if rows else f"--- {name}: nothing", *rows]


def pictured(record: Record) -> np.ndarray:
    """The picture, `SIDE` wide, with the masks of its targets and a legend; absent ones are named without a mask."""
    image = read_image(record.image)
    size = (SIDE, max(1, round(image.shape[0] * SIDE / image.shape[1])))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    layers, colours = [], {}
    for target in record.targets:
        mask = np.zeros(image.shape[:2], bool) if target.mask is None else target.mask()
        colour = colours.setdefault(id(target.mask) if target.mask else target.phrase, colour_of(len(colours)))
        fitted = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        layers.append(Layer(fitted, target.phrase + " (absent)" * (target.mask is None), colour))
    return with_legend(small, layers)


def written(title: str, said: list[tuple[str, list[str]]], opening: str) -> np.ndarray:
    """The words as a picture, without the opening that all rows share; what is too long is in the text file."""
    lines = [(line, GREY) for line in wrapped(title)]
    for name, rows in said:
        head, *rows = as_text(name, rows)
        lines.append((head, GREY))
        for row in rows:
            lines += [(line, INK) for part in row.removeprefix(opening).strip().split("\n") for line in wrapped(part)]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], ("... the rest is in the text file", GREY)]
    page = Image.new("RGB", (COLUMN, LINE * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (line, ink) in enumerate(lines):
        draw.text((0, number * LINE), line, fill=ink, font=font())
    return np.asarray(page)


def wrapped(text: str) -> list[str]:
    """Lines that fit the column; a line may break after a blank or a token, and inside a word that fills a line."""
    lines = [""]
    for piece in re.findall(r".{1,80}?(?:[ >]|$)|.{80}", text):
        if lines[-1] and font().getlength(lines[-1] + piece.rstrip()) > COLUMN:
            lines.append("")
        lines[-1] += piece
    return lines


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    page = np.full(
        (max(len(left), len(right)) + 2 * MARGIN, left.shape[1] + right.shape[1] + 3 * MARGIN, 3), 255, np.uint8
    )
    page[MARGIN : MARGIN + len(left), MARGIN : MARGIN + left.shape[1]] = left
    page[MARGIN : MARGIN + len(right), left.shape[1] + 2 * MARGIN : left.shape[1] + 2 * MARGIN + right.shape[1]] = right
    page[-1] = GREY
    return page


def stacked(bands: list[np.ndarray]) -> np.ndarray:
    page = np.full((sum(map(len, bands)), max(band.shape[1] for band in bands), 3), 255, np.uint8)
    top = 0
    for band in bands:
        page[top : top + len(band), : band.shape[1]] = band
        top += len(band)
    return page


@cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT)
