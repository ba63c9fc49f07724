"""results.json: its form, and that results read from it are those that were written."""

from __future__ import annotations

import json

from evaluation.metrics import Figure
from evaluation.metrics.base import RELEASED, STANDARD
from evaluation.results import EvaluationResults, SuiteResult, write_results

SUITE = SuiteResult(
    [Figure("mIoU", STANDARD, 0.5, (0.25, 0.75)), Figure("mIoU", RELEASED, None)],
    protocol="generate",
    images=2,
    left_out=1,
    queries=3,
    parse_failures=4,
    unfinished=1,
    seconds=1.5,
    notes=["1 left out"],
    details={"class_iou": {"sky": 0.5, "sea": None}},
)
ENTRY = {
    "figures": [
        {
            "metric": "mIoU",
            "variant": "standard",
            "value": 0.5,
            "interval": [0.25, 0.75],
            "protocol": "generate",
        },
        {"metric": "mIoU", "variant": "as_released", "value": None, "interval": None, "protocol": "generate"},
    ],
    "pictures": 2,
    "left_out": 1,
    "queries": 3,
    "parse_failures": 4,
    "unfinished": 1,
    "seconds": 1.5,
    "notes": ["1 left out"],
    "class_iou": {"sky": 0.5, "sea": None},
}


def test_the_form_of_results_json_is_pinned(tmp_path):
    evaluated = EvaluationResults({"a|val": SUITE}, {"b|val": "no data"}, protocol="generate", limit=2)
    content = {"protocol": "generate", "limit": 2, "suites": {"a|val": ENTRY}, "missing": {"b|val": "no data"}}
    write_results(evaluated, tmp_path)
    assert (tmp_path / "results.json").read_text() == json.dumps(content, indent=1) + "\n"
    rescored = EvaluationResults({"a|val": SUITE}, sources=["x.jsonl"])
    assert json.dumps(rescored.to_json()) == json.dumps(
        {"from": ["x.jsonl"], "suites": {"a|val": ENTRY}, "missing": {}}
    )


def test_results_are_read_as_they_were_written():
    for results in (
        EvaluationResults({"a|val": SUITE}, {"b|val": "no data"}, protocol="generate", limit=2),
        EvaluationResults({"a|val": SUITE}, sources=["x.jsonl"]),
    ):
        assert EvaluationResults.from_json(json.loads(json.dumps(results.to_json()))) == results


def test_the_summary_holds_the_standard_figures():
    assert EvaluationResults({"a|val": SUITE}).summary() == {"a|val": {"mIoU": 0.5}}
    assert SUITE.class_iou == {"sky": 0.5, "sea": None}


def test_suites_of_an_earlier_evaluation_that_are_dropped_are_named(tmp_path, caplog):
    write_results(EvaluationResults(suites={"ade20k|val": SUITE, "muse|val": SUITE}), tmp_path)
    write_results(EvaluationResults(suites={"muse|val": SUITE}), tmp_path)
    assert "no longer hold ade20k|val;" in caplog.text and len(caplog.records) == 1
