"""Results as one self-contained page: next to the published figures, by suite, with images and failures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.types import IMAGE_PLACEHOLDER
from evaluation.metrics.base import RELEASED, STANDARD, Figure, Interval
from evaluation.prediction_schema import Answer, Prediction, reading
from evaluation.predictions import predictions, settings_of
from evaluation.report.draw import Layer, Panel, overlay, scale_image, scale_mask
from evaluation.report.examples import EVERYWHERE, Example, best_and_worst, examples, query_ious
from evaluation.report.published import SOURCE_NAMES, Published, published
from evaluation.results import EvaluationResults, SuiteResult
from evaluation.suites import SUITES
from utils.config import SuiteConfig
from utils.files import write_atomically

EXAMPLES = 4  # images shown as best, and as worst
WIDTH = 360  # of their images, in pixels
BINS = 10  # of a histogram
FAILURES = 20  # in the list of failures
PAGE = Path(__file__).parent / "page"
POLICY = (  # the page may load nothing and send nothing
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)


def write_report(
    results: EvaluationResults,
    paths: Sequence[str | Path],
    folder: Path,
    custom: Sequence[SuiteConfig] = (),
    image_folders: Sequence[Path] = EVERYWHERE,
) -> Path:
    """Writes index.html into `folder` and returns its path. paths: files or folders of predictions.

    image_folders: the folders below which images and data may be read. EVERYWHERE is for the user's own predictions:
    those of others may name any file. Where the data are unchanged, the examples show the truth next to predictions.

    Everything in a file of predictions is somebody else's text: it is escaped, and the page may load nothing.
    """
    suites = results.suites
    # The folder may hold predictions of suites that an earlier run evaluated.
    settings = {name: values for name, values in settings_of(paths).items() if name in suites}
    lines_of = predictions(paths) if suites else {}
    sections = []
    for name, suite in suites.items():
        lines = lines_of.get(name, [])
        with reading(name):
            best, worst = choose_examples(lines, settings.get(name), custom, image_folders)
            sections.append(section(name, suite, lines, best, worst))
    missing = "".join(f"<p>{esc(name)}: not evaluated. {esc(why)}</p>" for name, why in results.missing.items())
    page = page_of(
        "Results",
        f"{origin(results, list(settings.values()))}{choices(suites)}{overview(suites)}{missing}{''.join(sections)}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    write_atomically(file, page, errors="xmlcharrefreplace")  # half a surrogate pair, which JSON can hold, is no UTF-8
    return file


def page_of(title: str, content: str) -> str:
    """A page that needs no other file."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta HTTP-EQUIV="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{(PAGE / 'style.css').read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>{title}</h1>{content}"
        f"<script>{(PAGE / 'script.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def origin(results: EvaluationResults, settings: Sequence[dict[str, Any]]) -> str:
    """What was evaluated, and how far the figures may be compared."""
    first = settings[0] if settings else {}
    facts = [f"{key} {first[key]}" for key in ("system", "weights", "precision") if key in first]
    if results.protocol:
        facts.append(f"protocol {results.protocol}")
    parts = [f"<p>{esc(' · '.join(facts))}</p>"] if facts else []
    if results.limit:
        parts.append(f'<p class="bad">Only the first {results.limit} images of each suite were asked about.</p>')
    parts.append(
        '<p class="soft">All figures in per cent. Published ones are those of full-size models on the whole sets,'
        " scored by the released programs: the scoring “as released” under the same protocol is what compares.</p>"
    )
    return "".join(parts)


def choices(suites: Mapping[str, Any]) -> str:
    """The filter: a suite, a group, or all."""
    groups = dict.fromkeys(filter(None, map(group_of, suites)))
    options = [
        ("", "all"),
        *((f"group:{name}", f"all of {name}") for name in groups),
        *zip(suites, suites, strict=True),
    ]
    entries = "".join(f'<option value="{esc(value)}">{esc(label)}</option>' for value, label in options)
    select = f'<label>Suite <select id="suite">{entries}</select></label>'
    return f'<nav>{select}<output id="shown" class="soft"></output></nav>'


def overview(suites: dict[str, SuiteResult]) -> str:
    """One row per suite and metric, next to the best published figure: the suite's first metric, and those that
    somebody published."""
    rows = []
    for name, suite in suites.items():
        models = published().get(name, [])
        figures = [figure for figure in suite.figures if figure.variant == STANDARD]
        for place, figure in enumerate(figures):
            metric = figure.metric
            with_metric = [model for model in models if metric in model.values]
            if place > 0 and not with_metric:
                continue
            best_cell = ""
            if with_metric:
                best = max(with_metric, key=lambda model: model.values[metric])
                best_cell = f"{best.values[metric]:.1f}<small>{esc(best.model)}, {esc(best.protocol)}</small>"
            rows.append(
                f'<tr data-suite="{esc(name)}" data-group="{group_of(name)}"><td><a href="#{esc(name)}">{esc(name)}</a>'
                f'<td>{esc(metric)}<td>{esc(suite.protocol)}<td class="n">{in_per_cent(figure.value, figure.interval)}'
                f'<td class="n">{best_cell}'
                f'<td class="n">{suite.images}<td class="n">{suite.queries}'
                f'<td class="n">{suite.parse_failures}<td class="n">{suite.unfinished}'
            )
    titles = ("suite", "metric", "protocol", "measured", "best published", "images", "queries")
    return table([*titles, "not understood", "cut off"], rows, left=3) if rows else ""


def choose_examples(
    lines: Sequence[Prediction],
    settings: dict[str, Any] | None,
    custom: Sequence[SuiteConfig],
    image_folders: Sequence[Path],
) -> tuple[list[Example], list[Example]]:
    """The best images of a suite and the worst."""
    best, worst = best_and_worst(lines, EXAMPLES)
    shown = examples([*best, *worst], settings, custom, image_folders)
    return shown[: len(best)], shown[len(best) :]


def section(
    name: str, suite: SuiteResult, lines: Sequence[Prediction], best: Sequence[Example], worst: Sequence[Example]
) -> str:
    """Everything about one suite."""
    title = "Images by share of right pixels" if suite.class_iou else "Phrases or objects by IoU"
    cards = (
        histogram(title, [iou for line in lines for iou in query_ious(line)]),
        decisions(presence(lines)),
        classes(suite.class_iou),
    )
    parts = [
        f"<h2>{esc(name)}</h2>",
        f'<p class="soft">{suite.images} images, {suite.queries} queries, {suite.seconds:.0f} s;'
        f" {suite.parse_failures} claims not understood, {suite.unfinished} answers cut off.</p>",
        "".join(f'<p class="bad">{esc(note)}</p>' for note in suite.notes),
        comparison(suite, published().get(name, [])),
        f'<div class="cards">{"".join(cards)}</div>',
        gallery("Best", best),
        gallery("Worst", worst),
        failures(lines),
    ]
    return f'<section data-suite="{esc(name)}" data-group="{group_of(name)}">{"".join(parts)}</section>'


def comparison(suite: SuiteResult, models: Sequence[Published]) -> str:
    """One row per model, one column per metric: the measured figures in both variants, then the published models."""
    own: dict[str, dict[str, Figure]] = {STANDARD: {}, RELEASED: {}}
    for figure in suite.figures:
        own[figure.variant][figure.metric] = figure
    metrics = dict.fromkeys(metric for row in (*own.values(), *(model.values for model in models)) for metric in row)
    rows = []
    for variant, figures in own.items():
        if figures:
            shown = {name: in_per_cent(figure.value, figure.interval) for name, figure in figures.items()}
            cells = "".join(f'<td class="n">{shown.get(name, "")}' for name in metrics)
            label = "standard" if variant == STANDARD else "as released"
            rows.append(f'<tr class="own"><td>measured<td><td>{esc(suite.protocol)}<td>{label}{cells}')
    for model in models:
        cells = "".join(f'<td class="n">{model.values[m]:.1f}' if m in model.values else "<td>" for m in metrics)
        source = f"{esc(model.paper)}<small>{esc(SOURCE_NAMES[model.source])}</small>"
        note = f"<small>{esc(model.note)}</small>" if model.note else ""
        rows.append(f"<tr><td>{esc(model.model)}{note}<td>{source}<td>{esc(model.protocol)}<td>as released{cells}")
    return table(["model", "published in", "protocol", "scoring", *metrics], rows, left=4)


def histogram(title: str, values: Sequence[float]) -> str:
    """The number of values in each tenth of 0 to 1."""
    if not values:
        return ""
    counts, edges = np.histogram(values, bins=BINS, range=(0, 1))
    bars = "".join(
        f'<div title="{low:.1f} to {high:.1f}: {count}">{count or ""}'
        f'<i style="height:{80 * count / max(1, counts.max()):.1f}%"></i>{low:.1f}</div>'
        for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    )
    return card(title, f'<div class="histogram">{bars}</div>')


def presence(lines: Sequence[Prediction]) -> list[int] | None:
    """Sums of `presence_cells`: present right, present, absent right, absent. None where answers were teacher-forced,
    or where nothing in the questions was absent."""
    cells = [line["counts"]["presence"] for line in lines if line["counts"].get("presence")]
    for line in lines:
        if line["counts"].get("forced"):
            continue
        for _, _, truth, predicted, rejected in line["counts"].get("rows", {}).get(STANDARD, ()):
            claimed = predicted > 0 and not rejected
            cells.append((int(claimed), 1, 0, 0) if truth else (0, 0, int(not claimed), 1))
    total = np.sum(cells, axis=0).tolist() if cells else [0, 0, 0, 0]
    return total if total[3] else None


def decisions(total: Sequence[int] | None) -> str:
    """A table of present and absent against what the answers say."""
    if total is None:
        return ""
    present_right, present, absent_right, absent = total

    def cell(count: int, whole: int, colour: str) -> str:
        share = count / whole if whole else 0.0
        return f'<td style="background:rgba(var(--{colour}),{0.75 * share:.2f})"><b>{count}</b>{100 * share:.1f} %'

    rows = (
        f"<tr><th>present{cell(present_right, present, 'right')}{cell(present - present_right, present, 'wrong')}",
        f"<tr><th>absent{cell(absent - absent_right, absent, 'wrong')}{cell(absent_right, absent, 'right')}",
    )
    head = "<tr><th>it is<th>given a mask<th>refused or not mentioned"
    return card("Present or absent", f'<table class="confusion">{head}{"".join(rows)}</table>')


def classes(values: dict[str, float | None]) -> str:
    """One bar per class, best first; classes that occur nowhere come last."""
    if not values:
        return ""
    places = {name: place for place, name in enumerate(values)}
    ranked = sorted(values, key=lambda name: (values[name] is None, -(values[name] or 0)))
    rows = []
    for name in ranked:
        iou = values[name]
        percent = f"{100 * iou:.1f}" if iou is not None else "-"
        rows.append(
            f'<div data-place="{places[name]}" data-iou="{-1 if iou is None else iou}">'
            f'<span title="{esc(name)}">{esc(name)}</span><u><i style="width:{100 * (iou or 0):.1f}%"></i></u>'
            f'<b class="n">{percent}</b></div>'
        )
    button = '<button data-sort="place">in the list\'s order</button>'
    return card(f"IoU of each class {button}", f'<div class="classes">{"".join(rows)}</div>', "full")


def gallery(title: str, shown: Sequence[Example]) -> str:
    """A row of examples."""
    if not shown:
        return ""
    return f'<h3>{title}</h3><div class="examples">{"".join(map(figure_of, shown))}</div><br>'


def figure_of(example: Example) -> str:
    """An image with its predicted and true masks, question and answer; only text where the image is not there."""
    said = f'<div class="said">{words(example.line["answers"])}</div>'
    caption = f"<b>{100 * example.iou:.1f}</b> {esc(Path(example.line['image']).name)}"
    if example.panel is None:
        return f"<figure><p>{esc(example.problem)}</p><figcaption>{caption}{said}</figcaption></figure>"
    panel = example.panel
    sides = [("predicted", panel.predicted)] + ([("true", panel.true)] if panel.true else [])
    images = "".join(f"<div>{inline(panel.image, layers, side)}{side}</div>" for side, layers in sides)
    note = f" · {esc(panel.note)}" if panel.note else ""
    below = f"{legend(panel)}<figcaption>{caption}{note}{said}</figcaption>"
    return f'<figure><div class="pair">{images}</div>{below}</figure>'


def legend(panel: Panel) -> str:
    """Each name of a panel's masks with its colour."""
    entries = dict.fromkeys((layer.name, layer.colour) for layer in (*panel.predicted, *panel.true) if layer.name)
    chips = "".join(f'<span><i style="background:rgb{colour}"></i>{esc(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{chips}</div>' if chips else ""


def inline(image: np.ndarray, layers: Sequence[Layer], alt: str) -> str:
    """The image with its masks as an `img` element that holds the file."""
    small = scale_image(image, min(WIDTH, image.shape[1]))
    fitted = [Layer(scale_mask(layer.mask, small.shape[:2]), layer.name, layer.colour) for layer in layers]
    file = io.BytesIO()
    Image.fromarray(overlay(small, fitted)).save(file, "JPEG", quality=85)
    return f'<img alt="{alt} masks" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def failures(lines: Sequence[Prediction]) -> str:
    """The first answers that were cut off, or claim a mask that does not exist or something not asked for."""
    rows = []
    for line in lines:
        for answer in line["answers"]:
            why = []
            if not answer["finished"]:
                why.append("cut off")
            if answer["unread"]:
                why.append("claims a mask that it did not write")
            if why:
                rows.append((why, line, [answer]))
        if line["counts"]["unmatched"]:
            rows.append(([f"{line['counts']['unmatched']} claims name nothing asked for"], line, line["answers"]))
    if not rows:
        return ""
    cells = [
        f"<tr><td>{esc(', '.join(why))}<td>{esc(Path(line['image']).name)}<td>{words(answers)}"
        for why, line, answers in rows[:FAILURES]
    ]
    more = f", the first {FAILURES}" if len(rows) > FAILURES else ""
    content = table(["why", "image", "question and answer"], cells, left=3)
    return f"<details><summary>Answers cut off or not understood: {len(rows)}{more}</summary>{content}</details>"


def table(titles: Sequence[str], rows: Sequence[str], left: int) -> str:
    """Rows below their titles. The first `left` columns hold words, the others numbers; it scrolls where too wide."""
    head = "".join(f"<th{'' if place < left else ' class=n'}>{esc(title)}" for place, title in enumerate(titles))
    return f'<div class="wide"><table><thead><tr>{head}<tbody>{"".join(rows)}</table></div>'


def card(title: str, content: str, kind: str = "") -> str:
    """A box with a title. kind: a class of style.css."""
    return f'<div class="card {kind}"><h3>{title}</h3><div class="wide">{content}</div></div>'


def in_per_cent(value: float | None, interval: Interval | None = None, sign: str = "") -> str:
    """A figure in per cent, with its interval below. sign: `+` of differences."""
    if value is None:
        return "-"
    below = ""
    if interval:
        low, high = interval
        below = f"<small>{100 * low:{sign}.1f} to {100 * high:{sign}.1f}</small>"
    return f"{100 * value:{sign}.1f}{below}"


def words(answers: Sequence[Answer]) -> str:
    """Questions and answers as text."""
    texts = [f"{answer['question'].replace(IMAGE_PLACEHOLDER, '').strip()} → {answer['text']}" for answer in answers]
    return esc(" | ".join(texts))


def group_of(name: str) -> str:
    """The group of a suite of the catalog, "" of another."""
    return SUITES[name].group if name in SUITES else ""


def esc(value: object) -> str:
    """Text in which a browser finds no HTML."""
    return html.escape(str(value))
