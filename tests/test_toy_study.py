"""The miniature study: what is trained and evaluated, what is repeated and what is not, and the page."""

import fcntl
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.types import Mask, Record, Target, Turn
from evaluation.suites import SUITES
from systems.base import build_system
from toy.study import __main__ as miniature
from toy.study import page, sheet
from toy.study.exam_parts import LIST_PARTS, LIST_SUITE, PARTS
from toy.study.questions import DatasetQuestions, ListQuestions
from toy.study.rows import ABLATION, ROWS, SYSTEM, Trial, trials
from toy.world.layouts import LAYOUTS
from utils.config import Recipe, from_dict, load_yaml, override

TINY = ["--steps", "1", "--patience", "1", "--batch_size", "1"]
TINY += ["--images", "40", "--most", "1", "--jobs", "1"]
ABLATED = "lasagna-any-order"


def empty_mask() -> np.ndarray:
    return np.zeros((2, 2), bool)


def recipe(row):
    values = load_yaml(row.config)
    for change in row.changes:
        values = override(values, change)
    return from_dict(Recipe, values)


def test_rows_are_all_systems_from_one_base_and_one_strategy_less_each():
    recipes = {row.name: recipe(row) for row in ROWS}
    assert {recipes[row.name].system for row in ROWS if row.kind == SYSTEM} == {
        *("lisa", "lasagna", "gsva", "pixellm", "sesame", "unified")
    }
    assert {one.model.version for one in recipes.values()} == {"assets/toy/llava"}
    assert len({(one.train.lr, one.model.lora) for one in recipes.values()}) == 1
    tasks = {name: build_system(one.system, one.options).task for name, one in recipes.items()}
    switches = ("random_list", "sequence_augmentation", "order_following")
    full = vars(tasks["lasagna"])["lists"].options
    for row in ROWS:
        if row.kind == ABLATION:
            options = vars(tasks[row.name])["lists"].options
            assert sum(getattr(options, name) != getattr(full, name) for name in switches) == 1


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind == SYSTEM], ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["classes", "refer"])
def test_an_answer_names_what_the_question_does_by_the_same_tokens(row, kind):
    """The toy vocabulary has whole words with the blank before them: ",road" is spelled otherwise than " road", and a
    small model does not learn that they are the same (GSVA's masks came late). A piece of text gets its own blank."""
    one, names = recipe(row), ("sky", "road", "bus")
    targets = tuple(Target(name, empty_mask) for name in names)
    record = Record(Path("photo.jpg"), kind, targets, vocabulary=(*names, "sea"))
    task = build_system(one.system, one.options).task
    for seed in range(40):
        for turn in (turn for dialogue in task.converse(record, np.random.default_rng(seed)) for turn in dialogue):
            for text in (part for part in turn.answer if isinstance(part, str)):
                for word in re.finditer(rf"\b({'|'.join(names)})\b", text):
                    assert word.start() == 0 or text[word.start() - 1] == " ", text


def test_evaluated_suites_exist_and_are_rendered():
    asked = {suite for part in PARTS for suite in part.suites}
    assert asked <= set(SUITES)
    assert set(miniature.LAYOUTS) <= set(LAYOUTS)
    have = {(part.name, suite) for part in PARTS for suite in part.suites}
    shown = {(column.part, column.suite) for column in page.MAIN if column.part != page.SPEED}
    assert shown <= have and {(one.part, one.suite) for one in sheet.SHEET} <= have


@pytest.mark.parametrize(("absent", "number"), [(0.0, 2), (1.0, 4), (2.0, 6), (9.0, 8)])
def test_lists_hold_the_present_and_some_absent_classes(absent, number):
    names = ("sky", "tree", "road", "house", "car", "boat", "bus", "lamp")
    present = tuple(Target(name, empty_mask) for name in ("car", "tree"))
    record = Record(Path("a.jpg"), "classes", present, vocabulary=names)
    lasagna, lisa = (build_system(name).task for name in ("lasagna", "lisa"))
    (query,) = ListQuestions(lasagna, absent).queries(record)
    assert len(query.phrases) == number and {"car", "tree"} <= set(query.phrases)
    assert [name for name in names if name in query.phrases] == list(query.phrases)
    one_by_one = ListQuestions(lisa, absent).queries(record)
    assert [one.phrases[0] for one in one_by_one] == list(query.phrases)  # every system is asked the same


def test_multi_target_questions_are_asked_once_for_all_targets():
    targets = tuple(Target(name, empty_mask) for name in ("cup", "spoon", "pot"))
    turns = [Turn("what is on the table?", (Mask(2), Mask(0))), Turn("where is the spoon?", ("it: ", Mask(1)))]
    record = Record(Path("a.jpg"), "multi", targets, dialogues=tuple((turn,) for turn in turns))
    first, second = DatasetQuestions().queries(record)
    assert first.targets == (2, 0) and first.phrases == ("pot", "cup") and "what is on the table?" in first.question
    assert second.targets == (1,)


def results(*, steps=3, **rows):
    """Results with two figures per trial of a row."""
    table = {}
    for name, figures in rows.items():
        made = [
            {
                "seed": seed,
                "exam": {"whole": {LIST_SUITE: {"mIoU": value}}, "own": {}},
                "training": {"step": [1, 3]},
                "speed": {"phrase_ms": ms},
            }
            for seed, (value, ms) in enumerate(figures)
        ]
        table[name] = {"title": name, "kind": SYSTEM, "trials": made}
    return {"settings": {"steps": steps}, "rows": table}


def test_table_marks_the_best_and_what_is_not_there():
    columns = (page.MAIN[0], page.Column("ms", page.SPEED, "", "phrase_ms"), page.Column("?", "own", "no", "mIoU"))
    lines = page.markdown_table(results(a=[(0.5, 80.4)], b=[(0.25, 20.0)])["rows"], columns).splitlines()
    assert lines[0] == "|  | mIoU, all 22 asked | ms | ? |"
    assert lines[2:] == ["| a | **0.50** | 80 | - |", "| b | 0.25 | **20** | - |"]
    equal = page.markdown_table(results(a=[(0.501, 1.0)], b=[(0.502, 1.0)])["rows"], columns)
    assert "**" not in equal
    seeds = page.markdown_table(results(a=[(0.5, 80.4), (0.25, 79.0)], b=[(0.4, 20.0), (0.4, 21.0)])["rows"], columns)
    assert seeds.splitlines()[2:] == ["| a | 0.50 / 0.25 | 80 / 79 | - |", "| b | **0.40 / 0.40** | **20 / 21** | - |"]
    transposed = page.markdown_table(
        results(a=[(0.5, 80.4)], b=[(0.25, 20.0)])["rows"], columns, transpose=True
    ).splitlines()
    assert transposed[0] == "|  | a | b |" and transposed[2] == "| mIoU, all 22 asked | **0.50** | 0.25 |"


def test_page_keeps_written_words_and_replaces_the_measured_ones(tmp_path):
    doc, figure = tmp_path / "docs" / "miniature.md", tmp_path / "lists.png"
    Image.new("RGB", (4, 4)).save(figure)
    page.update_page(doc, results(a=[(0.5, 1.0)]), [figure])
    text = doc.read_text()
    doc.write_text(text.replace(page.BEGIN, f"Words before.\n{page.BEGIN}") + "Words after.\n")
    page.update_page(doc, results(a=[(0.75, 1.0)]), [figure])
    text = doc.read_text()
    assert "Words before." in text and text.endswith("Words after.\n")
    assert "0.75" in text and "0.50" not in text and "![miniature_lists](miniature_lists.png)" in text
    assert (doc.parent / "miniature_lists.png").is_file()
    doc.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the lines"):
        page.update_page(doc, results(a=[(0.75, 1.0)]), [figure])


def test_a_folder_has_one_worker_and_one_setting(tmp_path):
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another miniature study"):
            miniature.main([str(tmp_path)])
    (tmp_path / "settings.json").write_text(
        json.dumps({"steps": 9, "patience": 4, "batch_size": 8, "images": 6000, "most": 0})
    )
    with pytest.raises(SystemExit, match="--steps 9"):
        miniature.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        miniature.main([str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit, match="no results"):
        miniature.main([str(tmp_path / "empty"), "--write_doc"])


def test_every_system_has_all_seeds_and_an_ablation_the_first():
    made = trials(ROWS, (3, 5))
    assert [one.row for one in made if one.seed == 3] == list(ROWS)
    assert {one.row for one in made if one.seed == 5} == {row for row in ROWS if row.kind == SYSTEM}
    assert len({one.name for one in made}) == len(made)


def test_a_training_is_a_recipe_that_stops_when_its_own_benchmark_gets_no_better(tmp_path):
    args = miniature.parse([str(tmp_path), "--patience", "3", "--steps", "200"])
    for trial in trials(ROWS, args.seeds):
        _, _, config, *flags = miniature.TrialRunner(args)._training(trial)
        values = load_yaml(config)
        for change in flags[flags.index("--set") + 1 :: 2]:
            values = override(values, change)
        one = from_dict(Recipe, values)
        assert (one.train.seed, one.train.patience, one.train.total_steps) == (trial.seed, 3, 200)
        (suite,) = one.eval.suites
        assert suite in SUITES and one.validates_after(100) and one.ends_epoch(100)
    flags = miniature.TrialRunner(miniature.parse([str(tmp_path), "--patience", "0"]))._training(trial)
    assert "eval.validate=false" in flags


def test_rows_of_an_earlier_study_stay_where_the_settings_are_the_same(tmp_path):
    doc = tmp_path / "miniature.md"
    page.update_page(doc, results(gsva=[(0.5, 1.0)], lisa=[(0.25, 1.0)]), [])
    newer = page.with_earlier(results(gsva=[(0.75, 1.0)]), doc.with_suffix(".json"))
    assert list(newer["rows"]) == ["lisa", "gsva"]  # in the order of the table
    assert [page.MAIN[0].cell(row) for row in newer["rows"].values()] == ["0.25", "0.75"]
    other_seed = results(gsva=[(0.75, 1.0)])
    other_seed["rows"]["gsva"]["trials"][0]["seed"] = 1
    assert page.MAIN[0].cell(page.with_earlier(other_seed, doc.with_suffix(".json"))["rows"]["gsva"]) == "0.50 / 0.75"
    assert list(page.with_earlier(results(steps=4, gsva=[(0.75, 1.0)]), doc.with_suffix(".json"))["rows"]) == ["gsva"]


class Scripted(miniature.TrialRunner):
    """Trials whose training and exam are one-line programs."""

    def _training(self, trial):
        return ["-c", f"import sys; print('trains'); sys.exit({trial.row.recipe == 'bad'})"]

    def _evaluation(self, trial):
        return ["-c", f"open({str(self._exam_file(trial))!r}, 'w').write('{{}}')"]


def test_finished_rows_are_left_alone_and_a_failing_one_stops_no_other(tmp_path):
    args = miniature.parse([str(tmp_path), "--jobs", "2"])
    names = ("done", "bad", "good")
    done, bad, good = (Trial(replace(ROWS[0], name=name, recipe=name), 0) for name in names)
    (tmp_path / done.name).mkdir(parents=True)
    (tmp_path / done.name / "exam.json").write_text("as it was")
    assert Scripted(args).run([done, bad, good]) == [bad.name]
    assert (tmp_path / done.name / "exam.json").read_text() == "as it was"
    assert not (tmp_path / done.name / "log.txt").exists()
    assert (tmp_path / good.name / "exam.json").is_file() and not (tmp_path / bad.name / "exam.json").exists()


@pytest.mark.slow
def test_from_rendering_the_world_to_table_and_images(tmp_path, capsys):
    """One ablation, for real: one step, one image; the second call finds nothing to do."""
    command = [str(tmp_path), "--only", ABLATED, "--seeds", "0", *TINY]
    folder = tmp_path / ABLATED / "seed0"
    assert miniature.main(command) == 0, (folder / "log.txt").read_text()[-3000:]
    made = json.loads((tmp_path / "results.json").read_text())
    (trial,) = made["rows"][ABLATED]["trials"]
    exam = trial["exam"]
    assert set(exam) == {part.name for part in LIST_PARTS}
    assert all(figures[LIST_SUITE]["pictures"] == 1 for figures in exam.values())
    assert trial["training"]["step"] == [1]
    assert {"lists.png", "losses.png"} <= {file.name for file in tmp_path.glob("*.png")}
    (row,) = (row for row in ROWS if row.name == ABLATED)
    (file,) = sheet.write_answer_sheet(tmp_path, [Trial(row, 0)])
    assert Image.open(file).width > 2 * sheet.SIDE
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert miniature.main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "Class lists" in capsys.readouterr().out
