"""Comparing two results: paired intervals, refusal of what does not compare, a page with both masks and the truth."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import test_sem
from evaluation.compare import compare, comparison_table
from evaluation.judge import judge
from evaluation.metrics.intervals import of_ratios
from evaluation.protocols import FORCED, GENERATED
from evaluation.runner import evaluate
from tests.test_judge import true_answers, write
from tests.test_report import BROWSER, FLAGS, Tags
from tests.tiny_assistant import CLASSES, tiny, toy_world

REFER, LIST = "refcoco|unc|val", "ade20k|val"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), "ade20k", "refcoco", val_images=3)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory) -> tuple[Path, Path]:
    """The truth, and the truth without some of it."""
    folder = tmp_path_factory.mktemp("results")
    answers = [answer for name in (REFER, LIST) for answer in true_answers(name, world)]
    worse = [{**answer, "masks": answer["masks"][: place % 3]} for place, answer in enumerate(answers)]
    places = []
    for name, entries in (("truth", answers), ("worse", worse)):
        file = write(folder / f"{name}.jsonl", entries)
        places.append(folder / name)
        judge([file], [REFER, LIST], world, classes=CLASSES, out_dir=places[-1])
    return places[0], places[1]


def test_pairs_leave_out_what_both_have_in_common():
    """B is always a little better than A, on images that differ a lot: only the paired interval shows it."""
    rng = np.random.default_rng(0)
    hard = rng.random(60)
    first, second = (of_ratios({"x": (part, np.ones(60))}) for part in (hard, hard + 0.05 + 0.01 * rng.random(60)))
    low, high = first.differences(second)["x"]
    assert 0.05 < low < high < 0.06
    assert first.intervals()["x"][1] > second.intervals()["x"][0]  # apart they overlap
    assert first.differences(first)["x"] == (0.0, 0.0)
    with pytest.raises(ValueError, match="nothing to pair"):
        first.differences(of_ratios({"x": (hard[:9], np.ones(9))}))


def test_every_figure_has_both_values_and_their_difference(results):
    compared = compare(*results)
    assert {suite.name for suite in compared.suites} == {LIST, REFER} and not compared.missing
    for suite in compared.suites:
        assert len(suite.first) == 3 and suite.only_first == suite.only_second == 0
        main = suite.figures[0]
        assert main.first == 1.0 and main.value == main.second - 1.0 < 0
        low, high = main.interval
        assert low <= main.value <= high <= 0
    refer = next(suite for suite in compared.suites if suite.name == REFER)
    assert refer.differing[0].first == 1.0 and refer.differing[0].second == 0.0
    assert refer.queries == len(refer.differing) > 3
    again = next(suite for suite in compare(results[1], results[0]).suites if suite.name == REFER)
    assert [figure.value for figure in again.figures] == [
        None if figure.value is None else -figure.value for figure in refer.figures
    ]


def test_the_same_results_do_not_differ(results):
    for suite in compare(results[0], results[0]).suites:
        assert {figure.value for figure in suite.figures} <= {0.0, None}
        assert not any(figure.is_clear for figure in suite.figures)
        assert all(query.first == query.second for query in suite.differing)


def test_a_figure_that_only_one_has_is_shown(tmp_path):
    """Say of answers in words, against answers without."""
    name = "fprefcoco|berkeley_exclude_unified|val"
    world = toy_world(tmp_path / "world", "fprefcoco", val_images=2)
    words = true_answers(name, world)
    places = []
    for place, answers in enumerate((words, [{**answer, "text": ""} for answer in words])):
        places.append(tmp_path / str(place))
        judge([write(tmp_path / f"{place}.jsonl", answers)], [name], world, out_dir=places[-1])
    (one,), (other,) = compare(*places).suites, compare(*reversed(places)).suites
    assert {(f.metric, f.variant): (f.first, f.second) for f in one.figures} == {
        (f.metric, f.variant): (f.second, f.first) for f in other.figures
    }
    for suite in (one, other):
        found = {figure.metric: figure for figure in suite.figures if figure.variant == "standard"}
        assert found["See"].interval == (0.0, 0.0)
        assert {found["Say"].first is None, found["Say"].second is None} == {True, False}
        assert found["Say"].value is found["Say"].interval is None
    assert "Say" in page_of(world, (places[0], places[1]), tmp_path / "page").read_text()


def test_what_does_not_compare_is_refused(world, results, tmp_path):
    evaluate(tiny("gsva"), [REFER], world, FORCED, 0, tmp_path / "forced", workers=0)
    with pytest.raises(ValueError, match=r"protocols differ \(external, teacher_forced\)"):
        compare(results[0], tmp_path / "forced", [REFER])
    lists, phrases = (_only(results[0], tmp_path / name, name) for name in ("ade20k", "refcoco"))
    with pytest.raises(ValueError, match="no suite in common"):
        compare(lists, phrases)
    with pytest.raises(ValueError, match="neither has predictions of ReasonSeg"):
        compare(lists, phrases, ["ReasonSeg|val"])
    other = shutil.copytree(results[1], tmp_path / "other")
    file = other / "predictions" / "refcoco_unc_val.run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": "0" * 32}))
    with pytest.raises(ValueError, match="made on other annotations"):
        compare(results[0], other)
    with pytest.raises(SystemExit, match=r"test_sem\.py: .*made on other annotations"):
        test_sem.main(["--compare", str(results[0]), str(other)])


def test_as_released_figures_of_other_rules_and_missing_answers_are_said(world, tmp_path):
    answers = true_answers(REFER, world)
    places = []
    for name, entries, system in (("all", answers, None), ("half", answers[::2], "gsva")):
        places.append(tmp_path / name)
        judge([write(tmp_path / f"{name}.jsonl", entries)], [REFER], world, out_dir=places[-1], system=system)
    (suite,) = compare(*places).suites
    assert {figure.variant for figure in suite.figures} == {"standard"}
    assert [note[:12] for note in suite.notes] == ["B: missing, ", "as-released "]
    assert suite.notes[0] in comparison_table(compare(*places))
    assert {figure.variant for figure in compare(places[0], places[0]).suites[0].figures} == {"standard", "as_released"}


def test_a_file_comes_with_those_of_other_processes(results, tmp_path):
    file = results[0] / "predictions" / "refcoco_unc_val.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    (tmp_path / file.name).write_text(first)
    (tmp_path / "refcoco_unc_val.1.jsonl").write_text("".join(others))
    (suite,) = compare(file, tmp_path / file.name).suites
    assert len(suite.first) == 3 and not suite.only_first


def _only(results: Path, folder: Path, stem: str) -> Path:
    (folder / "predictions").mkdir(parents=True)
    for file in (results / "predictions").glob(f"{stem}*"):
        shutil.copy2(file, folder / "predictions")
    return folder


def test_images_that_one_has_not_answered_are_counted(world, results, tmp_path):
    evaluate(tiny("gsva"), [REFER], world, GENERATED, 2, tmp_path / "two", workers=0, max_new_tokens=2)
    evaluate(tiny("gsva"), [REFER], world, GENERATED, 3, tmp_path / "three", workers=0, max_new_tokens=2)
    (suite,) = compare(tmp_path / "two", tmp_path / "three").suites
    assert len(suite.first) == 2 and (suite.only_first, suite.only_second) == (0, 1)
    assert {figure.value for figure in suite.figures} <= {0.0, None}


def page_of(world: Path, results: tuple[Path, Path], folder: Path, *more: str) -> Path:
    words = ["--compare", *map(str, results), "--out", str(folder), *more]
    assert test_sem.main(words) == 0
    return folder / "index.html"


def test_the_page_shows_both_masks_and_the_truth(world, results, tmp_path, capsys):
    page = page_of(world, results, tmp_path, "--dataset_dir", str(world)).read_text()
    said = capsys.readouterr().out
    assert "B - A" in said and "paired 95 % interval" in said and "*" in said
    tags = Tags(page)
    alts = [a["alt"] for tag, a in tags.seen if tag == "img"]
    assert alts and alts.count("A masks") == alts.count("B masks") == alts.count("true masks")
    assert [a["data-suite"] for tag, a in tags.seen if tag == "section"]
    assert "common images" in page and "http" not in page and sum(tag == "script" for tag, _ in tags.seen) == 1


def test_images_outside_the_named_folder_are_not_shown(world, results, tmp_path):
    page = page_of(world, results, tmp_path).read_text()
    assert not [tag for tag, _ in Tags(page).seen if tag == "img"] and "not shown" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
def test_the_page_opens_in_a_browser_without_complaints(world, results, tmp_path):
    file = page_of(world, results, tmp_path / "page", "--dataset_dir", str(world))
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert ">2 of 2 suites</output>" in done.stdout
