"""Results as one page that needs nothing else: beside the published numbers, by suite, with pictures and failures."""

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
from evaluation.metrics.counts import RELEASED, STANDARD
from evaluation.prediction_schema import reading
from evaluation.predictions import Prediction, predictions, settings_of
from evaluation.report.draw import Layer, Panel, overlay, scale_image, scale_mask
from evaluation.report.examples import EVERYWHERE, Example, best_and_worst, examples, query_ious
from evaluation.report.published import SEEN, Published, published
from evaluation.suites import SUITES
from utils.config import SuiteConfig
from utils.files import write_atomically

SHOWN, WIDTH, BINS, FAILURES = 4, 360, 10, 20  # pictures best and worst, their width, bars, failures listed
PAGE = Path(__file__).parent / "page"
POLICY = (  # nothing is loaded and nothing sent: what is inside the page is all there is
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)


def write_report(
    results: dict[str, Any],
    paths: Sequence[str | Path],
    folder: Path,
    custom: Sequence[SuiteConfig] = (),
    pictures: Sequence[Path] = EVERYWHERE,
) -> Path:
    """Writes index.html into `folder`. results: as `evaluate` returns them; paths: files or folders of predictions.

    pictures: the folders below which pictures and data may be read, EVERYWHERE for predictions of one's own: those of
    others may name any file. Where the data are as they were, the examples show what is true beside what is predicted.

    Everything in a file of predictions is somebody else's text: it is escaped, and the page may load nothing.
    """
    suites = results["suites"]
    settings = {
        name: one for name, one in settings_of(paths).items() if name in suites
    }  # others may be left from before
    lines = predictions(paths) if suites else {}
    sections = []
    for name, suite in suites.items():
        with reading(name):
            shown = shown_of(lines.get(name, []), settings.get(name), custom, pictures)
            sections.append(section(name, suite, lines.get(name, []), *shown))
    missing = "".join(f"<p>{esc(name)}: not evaluated. {esc(why)}</p>" for name, why in results["missing"].items())
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Results</title>'
        f'<meta HTTP-EQUIV="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{(PAGE / 'style.css').read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>Results</h1>{origin(results, list(settings.values()))}{choices(suites)}{overview(suites)}{missing}"
        f"{''.join(sections)}<script>{(PAGE / 'script.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    write_atomically(file, page, errors="xmlcharrefreplace")  # half a surrogate pair, as JSON can hold, is no UTF-8
    return file


def origin(results: dict[str, Any], settings: Sequence[dict[str, Any]]) -> str:
    """What was evaluated, and how far the figures may be compared."""
    known = [f"{key} {one[key]}" for one in settings[:1] for key in ("system", "weights", "precision") if key in one]
    if results.get("protocol"):
        known.append(f"protocol {results['protocol']}")
    parts = [f"<p>{esc(' · '.join(known))}</p>"] if known else []
    if results.get("limit"):
        parts.append(
            f'<p class="bad">Only the first {esc(results["limit"])} pictures of each suite were asked about.</p>'
        )
    parts.append(
        '<p class="soft">All figures in per cent. Published ones are those of full-size models on the whole sets,'
        " scored by the released programs: the scoring “as released” under the same protocol is what compares.</p>"
    )
    return "".join(parts)


def choices(suites: dict[str, Any]) -> str:
    """The filter: a suite, a group, or all."""
    groups = dict.fromkeys(filter(None, map(group_of, suites)))
    options = [
        ("", "all"),
        *((f"group:{name}", f"all of {name}") for name in groups),
        *zip(suites, suites, strict=True),
    ]
    listed = "".join(f'<option value="{esc(value)}">{esc(label)}</option>' for value, label in options)
    select = f'<label>Suite <select id="suite">{listed}</select></label>'
    return f'<nav>{select}<output id="shown" class="soft"></output></nav>'


def overview(suites: dict[str, Any]) -> str:
    """One row a suite: its first figure, and those that somebody published, beside the best published ones."""
    rows = []
    for name, suite in suites.items():
        known = published().get(name, [])
        figures = [figure for figure in suite["figures"] if figure["variant"] == STANDARD]
        for figure in [f for i, f in enumerate(figures) if i == 0 or any(f["metric"] in p.values for p in known)]:
            metric = figure["metric"]
            best = max((p for p in known if metric in p.values), key=lambda p: p.values[metric], default=None)
            beside = f"{best.values[metric]:.1f}<small>{esc(best.model)}, {esc(best.protocol)}</small>" if best else ""
            rows.append(
                f'<tr data-suite="{esc(name)}" data-group="{group_of(name)}"><td><a href="#{esc(name)}">{esc(name)}</a>'
                f'<td>{esc(metric)}<td>{esc(figure["protocol"])}<td class="n">{measured_figures(figure)}'
                f'<td class="n">{beside}'
                f'<td class="n">{suite["pictures"]}<td class="n">{suite["queries"]}'
                f'<td class="n">{suite["parse_failures"]}<td class="n">{suite["unfinished"]}'
            )
    titles = ("suite", "metric", "protocol", "measured", "best published", "pictures", "queries")
    return table([*titles, "not understood", "cut off"], rows, left=3) if rows else ""


def shown_of(
    lines: Sequence[Prediction],
    settings: dict[str, Any] | None,
    custom: Sequence[SuiteConfig],
    pictures: Sequence[Path],
) -> tuple[list[Example], list[Example]]:
    """The best pictures of a suite and the worst."""
    best, worst = best_and_worst(lines, SHOWN)
    shown = examples([*best, *worst], settings, custom, pictures)
    return shown[: len(best)], shown[len(best) :]


def section(
    name: str, suite: dict[str, Any], lines: Sequence[Prediction], best: Sequence[Example], worst: Sequence[Example]
) -> str:
    """Everything about one suite."""
    counted = "Pictures by share of right pixels" if "class_iou" in suite else "Phrases or objects by IoU"
    cards = (
        histogram(counted, [iou for line in lines for iou in query_ious(line)]),
        decisions(presence(lines)),
        classes(suite.get("class_iou", {})),
    )
    parts = [
        f"<h2>{esc(name)}</h2>",
        f'<p class="soft">{suite["pictures"]} pictures, {suite["queries"]} queries, {suite["seconds"]:.0f} s;'
        f" {suite['parse_failures']} claims not understood, {suite['unfinished']} answers cut off.</p>",
        "".join(f'<p class="bad">{esc(note)}</p>' for note in suite.get("notes", ())),
        comparison(suite, published().get(name, [])),
        f'<div class="cards">{"".join(cards)}</div>',
        gallery("Best", best),
        gallery("Worst", worst),
        failures(lines),
    ]
    return f'<section data-suite="{esc(name)}" data-group="{group_of(name)}">{"".join(parts)}</section>'


def comparison(suite: dict[str, Any], known: Sequence[Published]) -> str:
    """A row a model: this one by its scorings, then the published ones; a column a metric."""
    own: dict[str, dict[str, dict[str, Any]]] = {STANDARD: {}, RELEASED: {}}
    for figure in suite["figures"]:
        own[figure["variant"]][figure["metric"]] = figure
    protocol = suite["figures"][0]["protocol"] if suite["figures"] else ""
    metrics = dict.fromkeys(metric for row in (*own.values(), *(model.values for model in known)) for metric in row)
    rows = []
    for variant, figures in own.items():
        if figures:
            cells = "".join(f'<td class="n">{measured_figures(figures[m]) if m in figures else ""}' for m in metrics)
            label = "standard" if variant == STANDARD else "as released"
            rows.append(f'<tr class="own"><td>measured<td><td>{esc(protocol)}<td>{label}{cells}')
    for model in known:
        cells = "".join(f'<td class="n">{model.values[m]:.1f}' if m in model.values else "<td>" for m in metrics)
        seen = f"{esc(model.paper)}<small>{esc(SEEN[model.seen])}</small>"
        note = f"<small>{esc(model.note)}</small>" if model.note else ""
        rows.append(f"<tr><td>{esc(model.model)}{note}<td>{seen}<td>{esc(model.protocol)}<td>as released{cells}")
    return table(["model", "published in", "protocol", "scoring", *metrics], rows, left=4)


def histogram(title: str, values: Sequence[float]) -> str:
    """How many values lie in each tenth of 0 to 1."""
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
    """Present and given a mask, present, absent and given none, absent; None where answers were forced, or where
    nothing asked for was absent."""
    cells = [line["counts"]["presence"] for line in lines if line["counts"].get("presence")]
    for line in lines:
        rows = line["counts"].get("rows", {}).get(STANDARD, ()) if not line["counts"].get("forced") else ()
        for _, _, truth, predicted, rejected in rows:
            given = predicted > 0 and not rejected
            cells.append((int(given), 1, 0, 0) if truth else (0, 0, int(not given), 1))
    total = np.sum(cells, axis=0).tolist() if cells else [0, 0, 0, 0]
    return total if total[3] else None


def decisions(total: Sequence[int] | None) -> str:
    """What is present and absent against what was said of it."""
    if total is None:
        return ""
    here_right, here, absent_right, absent = total

    def cell(count: int, whole: int, colour: str) -> str:
        share = count / whole if whole else 0.0
        return f'<td style="background:rgba(var(--{colour}),{0.75 * share:.2f})"><b>{count}</b>{100 * share:.1f} %'

    rows = (
        f"<tr><th>present{cell(here_right, here, 'right')}{cell(here - here_right, here, 'wrong')}",
        f"<tr><th>absent{cell(absent - absent_right, absent, 'wrong')}{cell(absent_right, absent, 'right')}",
    )
    head = "<tr><th>it is<th>given a mask<th>refused or not mentioned"
    return card("Present or absent", f'<table class="confusion">{head}{"".join(rows)}</table>')


def classes(values: dict[str, float | None]) -> str:
    """A bar a class, best first; those that occur nowhere last."""
    if not values:
        return ""
    places = {name: place for place, name in enumerate(values)}
    ranked = sorted(values, key=lambda name: (values[name] is None, -(values[name] or 0)))
    rows = "".join(
        f'<div data-place="{places[name]}" data-iou="{-1 if values[name] is None else values[name]}">'
        f'<span title="{esc(name)}">{esc(name)}</span><u><i style="width:{100 * (values[name] or 0):.1f}%"></i></u>'
        f'<b class="n">{"-" if values[name] is None else f"{100 * values[name]:.1f}"}</b></div>'
        for name in ranked
    )
    button = '<button data-sort="place">in the list\'s order</button>'
    return card(f"IoU of each class {button}", f'<div class="classes">{rows}</div>', "full")


def gallery(title: str, shown: Sequence[Example]) -> str:
    if not shown:
        return ""
    return f'<h3>{title}</h3><div class="examples">{"".join(map(figure_of, shown))}</div><br>'


def figure_of(example: Example) -> str:
    """A picture with its predicted and true masks, what was asked and said; a line of text where it is gone."""
    said = f'<div class="said">{words(example.line["answers"])}</div>'
    caption = f"<b>{100 * example.iou:.1f}</b> {esc(Path(example.line['image']).name)}"
    if example.panel is None:
        return f"<figure><p>{esc(example.trouble)}</p><figcaption>{caption}{said}</figcaption></figure>"
    panel = example.panel
    sides = [("predicted", panel.predicted)] + ([("true", panel.true)] if panel.true else [])
    pictures = "".join(f"<div>{inline(panel.image, layers, side)}{side}</div>" for side, layers in sides)
    note = f" · {esc(panel.note)}" if panel.note else ""
    below = f"{legend(panel)}<figcaption>{caption}{note}{said}</figcaption>"
    return f'<figure><div class="pair">{pictures}</div>{below}</figure>'


def legend(panel: Panel) -> str:
    entries = dict.fromkeys((layer.name, layer.colour) for layer in (*panel.predicted, *panel.true) if layer.name)
    chips = "".join(f'<span><i style="background:rgb{colour}"></i>{esc(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{chips}</div>' if chips else ""


def inline(image: np.ndarray, layers: Sequence[Layer], alt: str) -> str:
    """The picture with its masks, inside the page."""
    small = scale_image(image, min(WIDTH, image.shape[1]))
    fitted = [Layer(scale_mask(layer.mask, small.shape[:2]), layer.name, layer.colour) for layer in layers]
    file = io.BytesIO()
    Image.fromarray(overlay(small, fitted)).save(file, "JPEG", quality=85)
    return f'<img alt="{alt} masks" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def failures(lines: Sequence[Prediction]) -> str:
    """Answers that were cut off, or claim what is not there or was not asked; the first ones."""
    rows = []
    for line in lines:
        for answer in line["answers"]:
            troubles = {"cut off": not answer["finished"], "claims a mask that it did not write": answer["unread"]}
            if why := [trouble for trouble, found in troubles.items() if found]:
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
    listed = table(["why", "picture", "question and answer"], cells, left=3)
    return f"<details><summary>Answers cut off or not understood: {len(rows)}{more}</summary>{listed}</details>"


def table(titles: Sequence[str], rows: Sequence[str], left: int) -> str:
    """Rows below their titles, of which the first `left` are of words; it scrolls where it is too wide."""
    head = "".join(f"<th{'' if place < left else ' class=n'}>{esc(title)}" for place, title in enumerate(titles))
    return f'<div class="wide"><table><thead><tr>{head}<tbody>{"".join(rows)}</table></div>'


def card(title: str, content: str, kind: str = "") -> str:
    return f'<div class="card {kind}"><h3>{title}</h3><div class="wide">{content}</div></div>'


def measured_figures(figure: dict[str, Any]) -> str:
    """A figure in per cent, with its interval below."""
    if figure["value"] is None:
        return "-"
    between = "<small>{:.1f} to {:.1f}</small>".format(*(100 * end for end in figure["interval"] or (0, 0)))
    return f"{100 * figure['value']:.1f}{between if figure['interval'] else ''}"


def words(answers: Sequence[dict[str, Any]]) -> str:
    """Questions and answers as text."""
    said = [f"{answer['question'].replace(IMAGE_PLACEHOLDER, '').strip()} → {answer['text']}" for answer in answers]
    return esc(" | ".join(said))


def group_of(name: str) -> str:
    return SUITES[name].group if name in SUITES else ""


def esc(value: Any) -> str:
    return html.escape(str(value))
