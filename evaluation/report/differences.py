"""The comparison of two results as one self-contained page, in the look of the report: figures, then the queries on
which they differ most, with both masks and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.compare import Comparison, QueryDifference, SuiteComparison
from evaluation.metrics.base import STANDARD
from evaluation.prediction_schema import Prediction
from evaluation.report.draw import Panel
from evaluation.report.examples import Example, examples
from evaluation.report.html import card, choices, esc, group_of, in_per_cent, inline, legend, page_of, table, words
from utils.config import SuiteConfig
from utils.files import write_atomically

SHOWN = 12  # queries per suite


@dataclass(frozen=True)
class Pair:
    """One query with both answers."""

    query: QueryDifference
    first: Example
    second: Example


def write_comparison(
    comparison: Comparison, folder: Path, custom: Sequence[SuiteConfig] = (), image_folders: Sequence[Path] = ()
) -> Path:
    """Writes index.html into `folder` and returns its path. image_folders: the folders below which images and data may
    be read, since files of predictions may name any path."""
    suites = {suite.name: suite for suite in comparison.suites}
    sections = "".join(_section(suite, custom, image_folders) for suite in comparison.suites)
    missing = "".join(f"<p>{esc(name)}: not compared. {esc(why)}</p>" for name, why in comparison.missing.items())
    names = "".join(f"<p><b>{letter}</b> {esc(name)}</p>" for letter, name in zip("AB", comparison.names, strict=True))
    note = (
        '<p class="soft">All figures in per cent. Intervals are of the difference B - A over the choice of images, '
        "both read from the same resamples; a difference whose interval leaves out 0 is marked.</p>"
    )
    page = page_of("Comparison", f"{names}{note}{choices(suites)}{missing}{sections}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    write_atomically(file, page, errors="xmlcharrefreplace")
    return file


def _section(suite: SuiteComparison, custom: Sequence[SuiteConfig], image_folders: Sequence[Path]) -> str:
    differing = [query for query in suite.differing if query.first != query.second]
    shown = differing[:SHOWN]
    settings = suite.settings or None
    sides = [
        examples([lines[query.index] for query in shown], settings, custom, image_folders)
        for lines in (suite.first, suite.second)
    ]
    pairs = [Pair(*parts) for parts in zip(shown, *sides, strict=True)]
    better = sum(query.second > query.first for query in differing)
    count = (
        f"{len(suite.first)} common images, {suite.queries} common queries; B is better on {better}, A on "
        f"{len(differing) - better}, equal on {suite.queries - len(differing)}."
    )
    left = ""
    if suite.only_first or suite.only_second:
        left = (
            f'<p class="bad">Images that only one has answered do not count: {suite.only_first} of A, '
            f"{suite.only_second} of B.</p>"
        )
    gallery = "".join(map(_figure, pairs))
    heading = "Largest differences" if pairs else "No query differs"
    return (
        f'<section data-suite="{esc(suite.name)}" data-group="{group_of(suite.name)}"><h2>{esc(suite.name)}</h2>'
        f'<p class="soft">{esc(count)}</p>{left}{_figures(suite)}{card("Queries by difference", _histogram(suite))}'
        f'<h3>{heading}</h3><div class="examples">{gallery}</div></section>'
    )


def _figures(suite: SuiteComparison) -> str:
    rows = []
    for figure in suite.figures:
        variant = "standard" if figure.variant == STANDARD else "as released"
        mark = ' class="own"' if figure.is_clear else ""
        rows.append(
            f"<tr{mark}><td>{esc(figure.metric)}<td>{variant}<td>{esc(suite.protocol)}"
            f'<td class="n">{in_per_cent(figure.first)}<td class="n">{in_per_cent(figure.second)}'
            f'<td class="n">{in_per_cent(figure.value, figure.interval, sign="+")}'
        )
    return table(["metric", "scoring", "protocol", "A", "B", "B - A"], rows, left=3)


def _histogram(suite: SuiteComparison) -> str:
    """The number of queries by B - A, in ten steps from -1 to 1."""
    counts = [0] * 10
    for query in suite.differing:
        counts[min(9, int((query.second - query.first + 1) * 5))] += 1
    most = max(1, *counts)
    bars = "".join(
        f'<div title="{place / 5 - 1:+.1f} to {place / 5 - 0.8:+.1f}: {count}">{count or ""}'
        f'<i style="height:{80 * count / most:.1f}%"></i>{place / 5 - 1:+.1f}</div>'
        for place, count in enumerate(counts)
    )
    return f'<div class="histogram">{bars}</div>'


def _figure(pair: Pair) -> str:
    """The image with the masks of A, of B and the truth; only text where the image is not there."""
    query = pair.query
    caption = (
        f"<b>{100 * (query.second - query.first):+.1f}</b> A {100 * query.first:.1f}, B {100 * query.second:.1f} · "
        f"{esc(Path(pair.first.line['image']).name)}"
    )
    said = "".join(
        f'<div class="said">{letter}: {words(example.line["answers"])}</div>'
        for letter, example in zip("AB", (pair.first, pair.second), strict=True)
    )
    if pair.first.panel is None or pair.second.panel is None:
        problem = pair.first.problem or pair.second.problem
        return f"<figure><p>{esc(problem)}</p><figcaption>{caption}{said}</figcaption></figure>"
    first = _of_target(pair.first.panel, pair.first.line, query.target)
    second = _of_target(pair.second.panel, pair.second.line, query.target)
    sides = [("A", first.predicted), ("B", second.predicted)] + ([("true", first.true)] if first.true else [])
    images = "".join(f"<div>{inline(first.image, layers, side)}{side}</div>" for side, layers in sides)
    names = legend(replace(first, predicted=(*first.predicted, *second.predicted)))
    return f'<figure><div class="pair">{images}</div>{names}<figcaption>{caption}{said}</figcaption></figure>'


def _of_target(panel: Panel, line: Prediction, target: int | None) -> Panel:
    """The panel with the masks of one target alone, where it holds one per target."""
    targets = [number for answer in line["answers"] for number in answer.get("targets", ())]
    if target is None or not len(panel.predicted) == len(panel.true) == len(targets):
        return panel
    place = targets.index(target)
    return replace(panel, predicted=panel.predicted[place : place + 1], true=panel.true[place : place + 1])
