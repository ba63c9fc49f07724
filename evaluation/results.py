"""The results of an evaluation, and their form in results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.metrics.base import STANDARD, Figure
from evaluation.report.markdown import as_markdown
from utils.files import write_atomically
from utils.log import log


@dataclass
class SuiteResult:
    """One suite: its figures and what a run went through to make them.

    protocol: how the answers came about, the same for all figures. left_out: images that could not be scored.
    parse_failures: claims that name nothing asked for, or a mask that does not exist. unfinished: answers cut off at
    the token limit. seconds: of answering, summed over processes. notes: sentences on what was done otherwise than the
    suite expects. details: what the suite's scorer adds (`Scorer.details`), such as `class_iou`.
    """

    figures: list[Figure]
    protocol: str
    images: int
    left_out: int = 0
    queries: int = 0
    parse_failures: int = 0
    unfinished: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def class_iou(self) -> dict[str, float | None]:
        """IoU per class of a suite of class lists, None of a class that occurs nowhere; {} of other suites."""
        return self.details.get("class_iou", {})

    def values(self, variant: str = STANDARD) -> dict[str, float | None]:
        """Metric -> value, of one variant."""
        return {figure.metric: figure.value for figure in self.figures if figure.variant == variant}

    def to_json(self) -> dict[str, Any]:
        """The suite's entry in results.json; the file calls images `pictures`."""
        return {
            "figures": [{**vars(figure), "protocol": self.protocol} for figure in self.figures],
            "pictures": self.images,
            "left_out": self.left_out,
            "queries": self.queries,
            "parse_failures": self.parse_failures,
            "unfinished": self.unfinished,
            "seconds": self.seconds,
            "notes": self.notes,
            **self.details,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> SuiteResult:
        """The result from its entry in results.json. Raises KeyError or TypeError for something else."""
        rest = dict(entry)
        figures = []
        protocol = ""
        for figure in rest.pop("figures"):
            protocol = figure["protocol"]
            interval = None if figure["interval"] is None else (figure["interval"][0], figure["interval"][1])
            figures.append(Figure(figure["metric"], figure["variant"], figure["value"], interval))
        return cls(
            figures=figures,
            protocol=protocol,
            images=rest.pop("pictures"),
            left_out=rest.pop("left_out"),
            queries=rest.pop("queries"),
            parse_failures=rest.pop("parse_failures"),
            unfinished=rest.pop("unfinished"),
            seconds=rest.pop("seconds"),
            notes=rest.pop("notes"),
            details=rest,
        )


@dataclass
class EvaluationResults:
    """What `evaluate` and `rescore` return.

    missing: suite -> why it was not evaluated. protocol, limit: as `evaluate` was given them. sources: the files and
    folders of predictions that `rescore` read, None for an evaluation.
    """

    suites: dict[str, SuiteResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    protocol: str = ""
    limit: int = 0
    sources: list[str] | None = None

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Suite -> metric -> value, standard variant only: for a training log, and to choose the best checkpoint by."""
        return {name: suite.values() for name, suite in self.suites.items()}

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        suites = {name: suite.to_json() for name, suite in self.suites.items()}
        if self.sources is not None:
            return {"from": self.sources, "suites": suites, "missing": self.missing}
        return {"protocol": self.protocol, "limit": self.limit, "suites": suites, "missing": self.missing}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvaluationResults:
        """The results from the content of results.json."""
        return cls(
            suites={name: SuiteResult.from_json(entry) for name, entry in content["suites"].items()},
            missing=dict(content["missing"]),
            protocol=content.get("protocol", ""),
            limit=content.get("limit", 0),
            sources=content.get("from"),
        )


def _suites_in(file: Path) -> set[str]:
    """The suites of a results.json; none where there is no file, or one that cannot be read."""
    try:
        return set(json.loads(file.read_text(encoding="utf-8"))["suites"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_results(results: EvaluationResults, folder: Path) -> None:
    """Writes results.json, which holds everything, and results.md for readers. Logs which suites of an earlier
    evaluation are in neither from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    if dropped := _suites_in(folder / "results.json") - results.suites.keys():
        log.warning(
            "%s: results.json and the report no longer hold %s; their predictions stay, and --from %s scores all",
            *(folder, ", ".join(sorted(dropped)), folder / "predictions"),
        )
    write_atomically(folder / "results.md", as_markdown(results), errors="backslashreplace")
    write_atomically(folder / "results.json", json.dumps(results.to_json(), indent=1) + "\n")
