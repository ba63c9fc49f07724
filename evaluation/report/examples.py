"""The best and worst pictures of a suite, from its predictions: the data are opened again for the truth beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sources import Source
from data.types import IMAGE_PLACEHOLDER
from data.views import read_image
from evaluation.metrics.counts import STANDARD
from evaluation.metrics.matched import BOTH
from evaluation.predictions import LEFT_OUT, Prediction, predictions, settings_of
from evaluation.report.draw import Layer, Panel, colour_of, grid
from evaluation.report.panels import replay
from evaluation.suites import find_suites
from utils.config import EvalConfig, SuiteConfig
from utils.masks import rle_to_mask
from utils.plain import leaves

EVERYWHERE = (Path(Path.cwd().anchor),)  # for predictions that this process has just written
MOST_MASKS = 1000  # of a picture that is shown


@dataclass(frozen=True)
class Example:
    """A picture with what its suite counts, 0 to 1; without the data `panel` has no truth, without the picture it is
    None, and `trouble` says why."""

    iou: float
    line: Prediction
    panel: Panel | None
    trouble: str = ""


def query_ious(line: Prediction) -> list[float]:
    """IoU of each phrase or object of a picture (one that is missed or too much: 0); of a class list the share of right
    pixels. Nothing there and nothing predicted is 1. [] where no masks are counted."""
    counts = line["counts"]
    if "classes" in counts:
        cells = np.array(counts[STANDARD], dtype=np.int64).reshape(-1, 3)
        return [float(cells[cells[:, 0] == cells[:, 1], 2].sum() / cells[:, 2].sum())] if len(cells) else []
    if "pairs" in counts:
        return [_iou(row) if kind == BOTH else 0.0 for kind, row, _ in counts["pairs"]]
    return [_iou(row) for row in counts.get("overlaps") or counts.get("rows", {}).get(STANDARD) or []]


def best_and_worst(lines: Sequence[Prediction], number: int) -> tuple[list[Prediction], list[Prediction]]:
    """Up to `number` pictures each, best first and worst first; none is in both."""
    scored = [line for line in lines if query_ious(line)]
    ranked = sorted(scored, key=lambda line: (np.mean(query_ious(line)), line["index"]))
    worst = ranked[:number]
    return ranked[len(worst) :][::-1][:number], worst


def examples(
    lines: Sequence[Prediction],
    settings: dict[str, Any] | None,
    custom: Sequence[SuiteConfig] = (),
    pictures: Sequence[Path] = EVERYWHERE,
) -> list[Example]:
    """Pictures of one suite ready to be shown. settings: what its predictions were made with (`journal.made_with`).

    pictures: the folders below which pictures and data may be read; a file of predictions may name any path.
    """
    source = reopen_sources(settings, custom, pictures) if settings and lines else None
    return [_example(line, source, pictures) for line in lines]


def sample_grid(folder: Path, how: EvalConfig) -> np.ndarray:
    """(H, W, 3) uint8: the first `how.num_examples` pictures of the first suite, from an evaluation's folder."""
    folder = folder / "predictions"
    name = find_suites(how.suites, how.custom)[0].name
    answered = (line for line in predictions([folder])[name] if LEFT_OUT not in line["counts"])
    lines = sorted(answered, key=lambda line: line["index"])[: how.num_examples]
    shown = examples(lines, settings_of([folder]).get(name), how.custom, EVERYWHERE)
    return grid([example.panel for example in shown if example.panel])


def reopen_sources(
    settings: dict[str, Any], custom: Sequence[SuiteConfig] = (), pictures: Sequence[Path] = EVERYWHERE
) -> Source | None:
    """The data that predictions were made on; None where they are gone, are others now, or are not below `pictures`."""
    try:
        options = settings["options"]
        if not allowed(settings["data"], pictures) or (pictures != EVERYWHERE and leaves(options)):
            return None
        (suite,) = find_suites([settings["suite"]], custom)
        source = suite.open(settings["data"], options)
        return source if len(source) == settings["records"] else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def allowed(path: str | Path, folders: Sequence[Path]) -> bool:
    """Whether a path lies in one of the folders as it is spelt; links inside them are their owner's own."""
    place = Path(path)
    if ".." in place.parts:
        return False
    tops = [top for folder in folders for top in (folder.absolute(), folder.resolve())]
    return any(place.absolute().is_relative_to(top) for top in tops)


def _example(line: Prediction, source: Source | None, pictures: Sequence[Path]) -> Example:
    iou, known = float(np.mean(query_ious(line) or [0.0])), all("targets" in one for one in line["answers"])
    try:
        masks = sum(len(one["masks"]) for one in line["answers"])
        if masks > MOST_MASKS:
            raise ValueError(f"{masks} masks are not shown, more than the limit of {MOST_MASKS}")
        record = source[line["index"]] if source is not None and known else None
        image = line["image"] if record is None else record.image
        if not allowed(image, pictures):
            raise ValueError(f"{image} is not shown: it is not below a folder given for pictures (--dataset_dir)")
        return Example(iou, line, _predicted_only(line) if record is None else replay(record, line["answers"]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        return Example(iou, line, None, str(error))


def _predicted_only(line: Prediction) -> Panel:
    image, layers, colours = read_image(line["image"]), [], {}
    for answer in line["answers"]:
        named = {mask: phrase for phrase, mask in answer["claims"] if mask is not None}
        alone = answer["asked"][0] if len(answer["asked"]) == 1 else ""
        for index, rle in enumerate(answer["masks"]):
            mask = rle_to_mask(rle, image.shape[:2]).astype(bool)
            name = named.get(index) or alone
            colour = colours.setdefault(name or f"mask {len(layers)}", colour_of(len(colours)))
            layers.append(Layer(mask, name, colour))
    questions = " | ".join(answer["question"].replace(IMAGE_PLACEHOLDER, "").strip() for answer in line["answers"])
    return Panel(image, questions, " | ".join(answer["text"] for answer in line["answers"]), layers, ())


def _iou(row: Sequence[int]) -> float:
    return row[0] / row[1] if row[1] else 1.0
