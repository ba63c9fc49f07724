"""The benchmark of evaluation runs, compares the answers of both paths and writes its figures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from benchmarks.shapes import BACKBONES

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "eval_speed.py"
TINY = ["--vocabulary", "64", "--width", "64", "--layers", "2", "--tower_side", "56"]
TINY += ["--tower_width", "64", "--tower_layers", "3", "--sam_side", "64", "--sam_width", "64", "--sam_layers", "1"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_speed_is_measured_on_equal_answers(tmp_path, backbone):
    program = runpy.run_path(str(SCRIPT))
    report_path = tmp_path / "speed.json"
    words = [
        *TINY,
        "--backbone",
        backbone,
        "--queries",
        "1",
        "3",
        "--classes",
        "12",
        "--repeats",
        "1",
        "--new_tokens",
        "6",
    ]
    assert program["main"]([*words, "--json", str(report_path)]) == 0
    report = json.loads(report_path.read_text())
    assert set(report["queries_per_picture"]) == {"1", "3"} and report["setup"]["width"] == 64
    for row in report["queries_per_picture"].values():
        assert row["seconds"] > 0 and row["peak_mib"] > 0
        assert row["speedup"] == pytest.approx(row["one_by_one_seconds"] / row["seconds"], rel=0.05)
        assert row["masks"] > 0 and row["largest_logit_difference"] < 1e-3
    assert [row["masks"] for row in report["queries_per_picture"].values()] == [1, 3]  # every answer has one
    row = report["class_lists"]["12"]
    assert 2 * row["passes"] < row["tokens"] and row["masks"] == 1 and row["largest_logit_difference"] < 1e-3
    assert report["embedding_cache"]["seen_seconds"] > 0 and report["embedding_cache"]["mib"] > 0
