"""The figures of all rows as tables, and the page that shows them between prose written by hand."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.study.rows import ABLATION, ROWS, SYSTEM, Trial
from utils.files import write_atomically
from utils.run_log import read_log

BEGIN, END = "<!-- measured: begin (scripts/miniature.py --write_doc) -->", "<!-- measured: end -->"
SPEED = "speed"  # stands for a part of the evaluation


@dataclass(frozen=True)
class Column:
    """Where a figure of a table comes from: part of the evaluation (or SPEED), suite, metric."""

    title: str
    part: str
    suite: str
    metric: str

    def values(self, row: dict[str, Any]) -> list[float]:
        """The figure of every seed."""
        found = (self._of(trial) for trial in row["trials"])
        return [value for value in found if value is not None]

    def value(self, row: dict[str, Any]) -> float | None:
        """The mean over the seeds; None where there is none."""
        values = self.values(row)
        return statistics.mean(values) if values else None

    def cell(self, row: dict[str, Any]) -> str:
        """The figures of all seeds, in their order."""
        return " / ".join(f"{value:.0f}" if self.part == SPEED else f"{value:.2f}" for value in self.values(row)) or "-"

    def _of(self, trial: dict[str, Any]) -> float | None:
        if self.part == SPEED:
            return trial["speed"].get(self.metric)
        return trial["exam"].get(self.part, {}).get(self.suite, {}).get(self.metric)


ADE, REFER, GREFER = "ade20k|val", "refcoco|unc|val", "grefcoco|unc|val"
PREMISE, REASON, MUSE = "fprefcoco|berkeley_exclude_unified|val", "ReasonSeg|val", "muse|val"
MAIN = (
    Column("mIoU, all 22 asked", "whole", ADE, "mIoU"),
    Column("mIoU, half absent", "half", ADE, "mIoU"),
    Column("RefCOCO cIoU", "own", REFER, "cIoU"),
    Column("ReasonSeg gIoU", "own", REASON, "gIoU"),
    Column("gRefCOCO gIoU", "own", GREFER, "gIoU"),
    Column("N-acc", "own", GREFER, "N-acc"),
    Column("T-acc", "own", GREFER, "T-acc"),
    Column("FP-RefCOCO See", "own", PREMISE, "See"),
    Column("Segment", "own", PREMISE, "Segment"),
    Column("MUSE gIoU", "shipped", MUSE, "gIoU"),
    Column("ms per phrase", SPEED, "", "phrase_ms"),
    Column("ms per label set", SPEED, "", "list_ms"),
)
LISTS = {"present": "none absent", "half": "half absent", "double": "two thirds absent", "whole": "all 22"}
LIST_FIGURES = (
    *(Column(f"mIoU, {words}", part, ADE, "mIoU") for part, words in LISTS.items()),
    Column("present found (all 22)", "whole", ADE, "present_accuracy"),
    Column("absent refused (all 22)", "whole", ADE, "absent_accuracy"),
    Column("absent refused (half)", "half", ADE, "absent_accuracy"),
)
# Figures shown of the other benchmarks: those of the first metric here that the suite has.
METRICS = {"See": ("See", "Segment"), "N-acc": ("gIoU", "N-acc", "T-acc"), "mIoU": ("mIoU",), "Pr@0.5": ("cIoU",)}


def collect_results(out: Path, done: Sequence[Trial]) -> dict[str, Any]:
    """All results of finished trials: {"settings", "rows": name -> {"title", "kind", "trials": one per seed}}."""
    speed_file = out / "speed.json"
    speed = read_json(speed_file) if speed_file.is_file() else {}
    rows: dict[str, Any] = {}
    for trial in done:
        row = rows.setdefault(trial.row.name, {"title": trial.row.title, "kind": trial.row.kind, "trials": []})
        row["trials"].append(
            {
                "seed": trial.seed,
                "exam": read_json(out / trial.name / "exam.json"),
                "training": training_curves(out / trial.name / "train"),
                "speed": speed.get(trial.name, {}),
            }
        )
    return {"settings": read_json(out / "settings.json"), "rows": in_order(rows)}


def with_earlier(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """The results and those rows and seeds of `file` that they lack, where both were made with the same settings."""
    earlier = read_json(file) if file.is_file() else results
    if earlier["settings"] != results["settings"]:
        return results
    rows = {**earlier["rows"], **results["rows"]}
    for name in earlier["rows"].keys() & results["rows"].keys():
        trials = {trial["seed"]: trial for part in (earlier, results) for trial in part["rows"][name]["trials"]}
        rows[name] = {**rows[name], "trials": [trials[seed] for seed in sorted(trials)]}
    return {**results, "rows": in_order(rows)}


def in_order(rows: dict[str, Any]) -> dict[str, Any]:
    return {row.name: rows[row.name] for row in ROWS if row.name in rows}


def training_curves(run: Path) -> dict[str, Any]:
    """The losses of a run at each logged step, and the revision that it was trained with."""
    lines = read_log(run / "log.jsonl")
    steps = {line["step"]: line for line in lines if line["kind"] == "train"}  # the last line of a repeated step counts
    starts = read_json(run / "meta.json")
    curves = {name: [line[name] for line in steps.values()] for name in ("ce", "bce", "dice")}
    return {"step": list(steps), **curves, "revision": starts[-1]["revision"]}


def all_tables(results: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    rows = results["rows"]
    systems = {name: row for name, row in rows.items() if row["kind"] == SYSTEM}
    ablation = {name: row for name, row in rows.items() if row["kind"] == ABLATION}
    steps = ", ".join(f"{row['title']} {trained_steps(row)}" for row in rows.values())
    parts = [
        f"Steps trained: {steps}.",
        "### Every system on everything",
        markdown_table(systems, MAIN),
        "### Class lists",
        markdown_table(systems, LIST_FIGURES),
    ]
    if ablation and "lasagna" in rows:
        full = {"lasagna": {**rows["lasagna"], "title": "all three strategies"}}
        parts += ["### LaSagnA's three strategies", markdown_table({**full, **ablation}, LIST_FIGURES)]
    parts += ["### The other benchmarks", markdown_table(systems, other_columns(systems), transpose=True)]
    return "\n\n".join(parts) + "\n"


def trained_steps(row: dict[str, Any]) -> str:
    return " / ".join(str(trial["training"]["step"][-1]) for trial in row["trials"])


def other_columns(systems: dict[str, dict[str, Any]]) -> list[Column]:
    """Columns for the benchmarks that are not in the main table."""
    in_main = {(column.part, column.suite) for column in MAIN}
    if not systems:
        return []
    (first, *_), columns = next(iter(systems.values()))["trials"], []
    for suite, figures in first["exam"].get("own", {}).items():
        if ("own", suite) in in_main:
            continue
        metrics = next((names for first, names in METRICS.items() if first in figures), ("gIoU",))
        columns += [Column(f"{suite.split('|')[0]} {metric}", "own", suite, metric) for metric in metrics]
    return columns


def markdown_table(rows: dict[str, dict[str, Any]], columns: Sequence[Column], *, transpose: bool = False) -> str:
    """Rows by title, the best value of a column in bold where values differ (the least of times).

    transpose: one line per column instead.
    """
    best = {column: best_cell(rows, column) for column in columns}
    cells = [[emphasize(column.cell(row), best[column]) for column in columns] for row in rows.values()]
    left, above = [row["title"] for row in rows.values()], [column.title for column in columns]
    if transpose:
        left, above, cells = above, left, list(zip(*cells, strict=True))
    lines = [
        ["", *above],
        ["---", *["---:"] * len(above)],
        *([name, *line] for name, line in zip(left, cells, strict=True)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def emphasize(cell: str, best: str | None) -> str:
    return f"**{cell}**" if cell == best else cell


def best_cell(rows: dict[str, dict[str, Any]], column: Column) -> str | None:
    """The best cell of a column as it is printed; None where all are equal."""
    values = [(value, column.cell(row)) for row in rows.values() if (value := column.value(row)) is not None]
    if len({cell for _, cell in values}) < 2:
        return None
    best = min(values) if column.part == SPEED else max(values)
    return best[1]


def update_page(page: Path, results: dict[str, Any], figures: Sequence[Path]) -> None:
    """Replace what is between the two marks of a page by tables and images; the prose around them stays."""
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Five papers in miniature\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}: put them where the tables should be")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page.with_suffix(".json"), json.dumps(results) + "\n")
    names = [f"miniature_{figure.name}" for figure in figures]
    for figure, name in zip(figures, names, strict=True):
        shutil.copy(figure, page.parent / name)
    settings = " ".join(f"--{name} {value}" for name, value in results["settings"].items())
    images = "\n\n".join(f"![{Path(name).stem}]({name})" for name in names)
    middle = f"\n\nMade with `{settings}`.\n\n{all_tables(results)}\n{images}\n\n"
    page.write_text(f"{before}{BEGIN}{middle}{END}{after}", encoding="utf-8")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
