"""Results as one page that needs nothing else: tables, class IoU, histogram, best and worst pictures, failures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.types import IMAGE_PLACEHOLDER
from data.views import read_image
from evaluation.draw import Layer, colour_of, with_legend
from evaluation.journal import Line
from evaluation.metrics import STANDARD
from evaluation.tables import between, number
from utils.masks import rle_to_mask

SHOWN, WIDTH, BINS, FAILURES = 4, 320, 10, 20
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4a7fb5; height: .8em } .track { width: 18em; background: #eee }
.shown { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 320px } figcaption { font-size: 13px }
"""
SCRIPT = """
document.getElementById("suite").onchange = (event) => {
  for (const part of document.querySelectorAll("section"))
    part.hidden = event.target.value !== "" && part.dataset.suite !== event.target.value;
};
"""


def write_report(results: dict[str, Any], lines: dict[str, list[Line]], folder: Path) -> Path:
    """Writes index.html into `folder`. results: as `evaluate` returns them; lines: as `predictions` reads them."""
    choices = "".join(f"<option>{html.escape(name)}</option>" for name in results["suites"])
    sections = "".join(section(name, suite, lines.get(name, [])) for name, suite in results["suites"].items())
    missing = "".join(f"<p>{html.escape(f'{n}: not evaluated. {m}')}</p>" for n, m in results["missing"].items())
    page = (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Results</title><style>{STYLE}</style>'
        f'<h1>Results</h1><label>Suite <select id="suite"><option value="">all</option>{choices}</select></label>'
        f"{sections}{missing}<script>{SCRIPT}</script></html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    file.write_text(page, encoding="utf-8")
    return file


def section(name: str, suite: dict[str, Any], lines: Sequence[Line]) -> str:
    """Everything about one suite."""
    scored = sorted(((picture_iou(line), line) for line in lines if picture_iou(line) is not None), key=lambda x: x[0])
    worst = scored[:SHOWN]
    best = [pair for pair in scored[::-1][:SHOWN] if pair not in worst]
    parts = [
        f"<h2>{html.escape(name)}</h2>",
        f"<p>{suite['pictures']} pictures, {suite['queries']} queries, {suite['parse_failures']} claims not understood,"
        f" {suite['unfinished']} answers cut off.</p>",
        figures_table(suite["figures"]),
        bars("IoU of each class", suite.get("class_iou", {})),
        bars("Pictures by IoU", histogram([iou for iou, _ in scored]), shares=False),
        decisions([line["counts"]["presence"] for line in lines if line["counts"].get("presence")]),
        examples("Best", best),
        examples("Worst", worst),
        failures(lines),
    ]
    return f'<section data-suite="{html.escape(name)}">{"".join(parts)}</section>'


def picture_iou(line: Line) -> float | None:
    """Mean IoU of the phrases of a picture, or the share of right pixels of a class list; None where none counts."""
    counts = line["counts"]
    if "classes" in counts:
        cells = np.array(counts[STANDARD], dtype=np.int64).reshape(-1, 3)
        right = cells[cells[:, 0] == cells[:, 1], 2].sum()
        return float(right / cells[:, 2].sum()) if len(cells) else None
    rows = counts.get("overlaps") or counts.get("rows", {}).get(STANDARD) or []
    return float(np.mean([row[0] / row[1] if row[1] else 1.0 for row in rows])) if rows else None


def histogram(values: Sequence[float]) -> dict[str, float]:
    """How many values lie in each tenth of 0 to 1."""
    if not values:
        return {}
    counts, edges = np.histogram(values, bins=BINS, range=(0, 1))
    return {f"{low:.1f} to {low + 1 / BINS:.1f}": int(n) for low, n in zip(edges[:-1], counts, strict=True)}


def figures_table(figures: Sequence[dict[str, Any]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in ("metric", "variant", "protocol", "value", "95 % interval"))
    rows = [
        f"<tr><td>{figure['metric']}<td>{figure['variant']}<td>{figure['protocol']}"
        f'<td class="n">{number(figure["value"])}<td>{between(figure)}'
        for figure in figures
    ]
    return f"<table><tr>{titles}{''.join(rows)}</table>"


def bars(title: str, values: dict[str, float | None], *, shares: bool = True) -> str:
    """A bar a value, as long as the value (shares), or beside the largest."""
    if not values:
        return ""
    whole = 1.0 if shares else max(values.values()) or 1
    rows = [
        f'<tr><td>{html.escape(name)}<td class="n">{number(value) if shares else value}'
        f'<td><div class="track"><div class="bar" style="width:{100 * (value or 0) / whole:.1f}%"></div></div>'
        for name, value in values.items()
    ]
    return f"<h3>{title}</h3><table>{''.join(rows)}</table>"


def decisions(cells: Sequence[Sequence[int]]) -> str:
    """Present and absent classes against what was said of them."""
    if not cells:
        return ""
    here_right, here, absent_right, absent = np.sum(cells, axis=0).tolist()
    return (
        "<h3>Present or absent</h3><table><tr><th>class is<th>given a mask<th>refused or not mentioned"
        f'<tr><td>present<td class="n">{here_right}<td class="n">{here - here_right}'
        f'<tr><td>absent<td class="n">{absent - absent_right}<td class="n">{absent_right}</table>'
    )


def examples(title: str, scored: Sequence[tuple[float, Line]]) -> str:
    if not scored:
        return ""
    shown = "".join(
        f"<figure>{overlay_of(line)}<figcaption><b>{iou:.2f}</b> {words(line['answers'])}</figcaption></figure>"
        for iou, line in scored
    )
    return f'<h3>{title}</h3><div class="shown">{shown}</div>'


def overlay_of(line: Line) -> str:
    """The picture with all predicted masks, inside the page; a line of text where the picture is gone."""
    try:
        image = read_image(line["image"])
    except (OSError, ValueError) as error:
        return f"<p>{html.escape(str(error))}</p>"
    layers = []
    for answer in line["answers"]:
        named = {mask: phrase for phrase, mask in answer["claims"] if mask is not None}
        alone = answer["asked"][0] if len(answer["asked"]) == 1 else ""
        for index, rle in enumerate(answer["masks"]):
            mask = rle_to_mask(rle, image.shape[:2]).astype(bool)
            layers.append(Layer(mask, named.get(index) or alone, colour_of(len(layers))))
    shown = Image.fromarray(with_legend(image, layers))
    shown.thumbnail((WIDTH, 10 * WIDTH))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=85)
    return f'<img alt="predicted masks" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def failures(lines: Sequence[Line]) -> str:
    """Answers that were cut off or claim masks that are not there, the first ones."""
    bad = [answer for line in lines for answer in line["answers"] if answer["unread"] or not answer["finished"]]
    items = "".join(f"<li>{words([answer])}" for answer in bad[:FAILURES])
    return f"<h3>Answers cut off or not understood: {len(bad)}</h3><ul>{items}</ul>" if bad else ""


def words(answers: Sequence[dict[str, Any]]) -> str:
    """Questions and answers as text."""
    said = [f"{answer['question'].replace(IMAGE_PLACEHOLDER, '').strip()} → {answer['text']}" for answer in answers]
    return html.escape(" | ".join(said))
