"""The panels of the strip at the top of the README, each the answer to one question."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.sources import build_source
from data.types import Record
from evaluation.predictor import Predictor
from evaluation.report.draw import Layer, overlay, scale_image, scale_mask, wrap_text
from utils.images import read_image

WIDTH, MARGIN, FONT_SIZE, LINE = 340, 12, 17, 26  # of a panel, in pixels
INK, QUIET, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
COLOURS = [(220, 60, 60), (50, 110, 220), (240, 170, 30), (60, 160, 90), (150, 80, 190), (40, 180, 190)]
CLASSES, ABSENT = 3, 2  # names of a class list that are in the image, and that are not
REFUSED = 3  # names of the list that must all be refused


def run(args: argparse.Namespace) -> int:
    """Asks, chooses, draws and writes args.out; returns the exit status."""
    predictor = Predictor.from_pretrained(args.version)
    root = Path(args.dataset_dir)
    makers: list[tuple[str, str, Callable[[Predictor, Record], HeroPanel]]] = [
        ("ade20k", "val", class_list),
        ("refcoco|unc|val", "", phrase),
        ("ReasonSeg|val", "", phrase),
        ("ade20k", "val", refusal),
    ]
    shown: list[HeroPanel] = []
    for name, split, make in makers:
        panels = [make(predictor, record) for record in records(root, name, split, args.images)]
        fresh = [panel for panel in panels if not any(np.array_equal(panel.image, other.image) for other in shown)]
        shown.append(max(fresh, key=lambda panel: panel.quality))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    strip(shown).save(args.out)
    print(f"{args.out}: mean IoU {', '.join(f'{panel.quality:.2f}' for panel in shown)}")
    return 0


@dataclass(frozen=True)
class HeroPanel:
    """One question with its answer. words: (text, colour, struck out) in reading order."""

    image: np.ndarray  # (H, W, 3) uint8
    question: str
    words: list[tuple[str, tuple[int, int, int], bool]]
    layers: list[Layer]
    quality: float  # mean IoU with the truth; 0 where the answer is wrong about presence


def records(root: Path, name: str, split: str, number: int) -> Iterator[Record]:
    source = build_source(name, root, **({"split": split} if split else {}))
    yield from (source[index] for index in range(min(number, len(source))))


def class_list(predictor: Predictor, record: Record) -> HeroPanel:
    """The largest classes of the image and some that are not in it, in one question."""
    truth = {target.phrase: target.mask() for target in record.targets if target.mask is not None}
    largest = sorted(truth, key=lambda name: -truth[name].sum())[:CLASSES]
    names = sorted([*largest, *[name for name in record.vocabulary if name not in truth][:ABSENT]])
    segments = predictor.classes(record.image, names)
    words, layers, overlaps = [], [], []
    for index, segment in enumerate(segments):
        colour = COLOURS[index % len(COLOURS)]
        if segment.mask is not None:
            layers.append(Layer(segment.mask, segment.phrase, colour))
        words.append((segment.phrase, colour if segment.present else QUIET, not segment.present))
        overlaps.append(iou(segment.mask, truth.get(segment.phrase)))
    return HeroPanel(read_image(record.image), "which of these are there?", words, layers, min(overlaps))


def phrase(predictor: Predictor, record: Record) -> HeroPanel:
    """The first phrase or query of the image."""
    target = record.targets[0]
    (segment, *_) = predictor(record.image, [target.phrase])
    layers = [Layer(segment.mask, "", COLOURS[0])] if segment.mask is not None else []
    words = [("here", COLOURS[0], False)] if layers else [("not there", QUIET, False)]
    truth = target.mask() if target.mask is not None else None
    return HeroPanel(read_image(record.image), target.phrase, words, layers, iou(segment.mask, truth))


def refusal(predictor: Predictor, record: Record) -> HeroPanel:
    """A list of classes of which none is in the image. LaSagnA takes a single name for a phrase, never absent."""
    present = {target.phrase for target in record.targets}
    names = sorted([name for name in reversed(record.vocabulary) if name not in present][:REFUSED])
    segments = predictor.classes(record.image, names)
    layers = [Layer(segment.mask, "", COLOURS[0]) for segment in segments if segment.mask is not None]
    words = [(segment.phrase, COLOURS[0] if segment.present else QUIET, not segment.present) for segment in segments]
    right = float(not any(segment.present for segment in segments))
    busy = min(1.0, len(present) / 10)  # of the images answered rightly, the one with the most to mistake it for
    return HeroPanel(read_image(record.image), f"{', '.join(names)}?", words, layers, right * busy)


def iou(predicted: np.ndarray | None, truth: np.ndarray | None) -> float:
    """1 where both are absent, 0 where one is."""
    if predicted is None or truth is None:
        return float(predicted is truth)
    return float((predicted & truth).sum() / max(1, (predicted | truth).sum()))


def strip(panels: Sequence[HeroPanel]) -> Image.Image:
    """The panels side by side: question above, answer below."""
    side = max(round(panel.image.shape[0] * WIDTH / panel.image.shape[1]) for panel in panels)
    font = ImageFont.load_default(FONT_SIZE)
    questions = [wrap_text(f"“{panel.question}”", WIDTH, font=font) for panel in panels]
    top = MARGIN + LINE * max(map(len, questions))
    page = Image.new("RGB", (len(panels) * (WIDTH + MARGIN) + MARGIN, top + side + 2 * LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for column, panel in enumerate(panels):
        left = MARGIN + column * (WIDTH + MARGIN)
        for number, line in enumerate(questions[column]):
            draw.text((left, MARGIN + number * LINE), line, fill=INK, font=font)
        image = scale_image(panel.image, WIDTH)
        fitted = [Layer(scale_mask(layer.mask, image.shape[:2]), "", layer.colour) for layer in panel.layers]
        page.paste(Image.fromarray(overlay(image, fitted)), (left, top))
        x, y = left, top + side + 6
        for text, colour, struck in panel.words:
            width = draw.textlength(text, font=font)
            if x > left and x + width > left + WIDTH:
                x, y = left, y + LINE
            draw.text((x, y), text, fill=colour, font=font)
            if struck:
                draw.line((x, y + FONT_SIZE * 0.65, x + width, y + FONT_SIZE * 0.65), fill=colour, width=2)
            x += width + MARGIN
    return page
