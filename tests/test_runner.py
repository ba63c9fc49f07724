"""Evaluation end to end with tiny real models on toy images in the real layouts, and scoring of hand-made answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import test_sem
from data.types import Claim, Mask, Query, Record, Target
from evaluation.catalog import Suite
from evaluation.metrics import SCORERS, Figure
from evaluation.metrics.base import RELEASED, STANDARD
from evaluation.metrics.overlap import OverlapScorer
from evaluation.metrics.semantic import SemanticScorer
from evaluation.prefetch import run_in_background
from evaluation.protocols import FORCED, GENERATED, PROTOCOLS, TWO_PASS, Reply
from evaluation.report.markdown import as_table
from evaluation.results import EvaluationResults
from evaluation.runner import evaluate, source_options
from evaluation.score import SuiteScore
from evaluation.suites import find_suites
from tests.records import OWN
from tests.tiny_assistant import CLASSES, tiny, toy_world
from utils import dist
from utils.config import Recipe, from_dict
from utils.log import log
from utils.masks import rle_to_mask

SUITES = ["ade20k|val", "refcoco|unc|val", "ReasonSeg|val"]
ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), "ade20k", "refcoco", "reason_seg")


@pytest.fixture(scope="module")
def assistant():
    return tiny("lasagna", eager=8)


def lines(folder: Path, suite: str) -> list[dict]:
    path = folder / "predictions" / f"{suite.replace('|', '_')}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(folder: Path) -> EvaluationResults:
    return EvaluationResults.from_json(json.loads((folder / "results.json").read_text()))


def values(results: EvaluationResults) -> dict[tuple[str, str, str], float | None]:
    named = {name: suite.figures for name, suite in results.suites.items()}
    return {(name, f.metric, f.variant): f.value for name, figures in named.items() for f in figures}


def from_predictions(folder: Path) -> dict[str, list[Figure]]:
    """The figures of every suite from its JSON lines alone."""
    found = {}
    for name, metric in zip(SUITES, ("semantic", "overlap", "overlap"), strict=True):
        scorer = SCORERS[metric]()
        for line in lines(folder, name):
            scorer.add(line["counts"])
        found[name] = scorer.figures()
    return found


def figures(results: EvaluationResults) -> dict[str, list[Figure]]:
    return {name: suite.figures for name, suite in results.suites.items()}


@pytest.mark.parametrize("protocol", [GENERATED, FORCED])
def test_every_suite_gives_named_figures_and_batching_changes_nothing(world, assistant, tmp_path, protocol):
    runs = {}
    for size in (1, 3):
        out = tmp_path / str(size)
        runs[size] = evaluate(
            assistant, SUITES, world, protocol, 0, out, batch_size=size, max_new_tokens=6, classes=CLASSES
        )
    assert not runs[1].missing and values(runs[1]) == pytest.approx(values(runs[3]), abs=1e-5)  # rounding of floats
    for name in SUITES:
        single, batched = lines(tmp_path / "1", name), lines(tmp_path / "3", name)
        assert len(single) == runs[1].suites[name].images == 3
        for one, other in zip(single, batched, strict=True):
            assert [a["text"] for a in one["answers"]] == [a["text"] for a in other["answers"]]
            assert one["image"] == other["image"]
        assert runs[1].suites[name].protocol == protocol
        for figure in runs[1].suites[name].figures:
            assert figure.variant in (STANDARD, RELEASED) and figure.value is not None
    assert read_results(tmp_path / "1") == runs[1]
    assert from_predictions(tmp_path / "1") == figures(runs[1])
    present = [f for f in runs[1].suites["ade20k|val"].figures if f.metric == "present_accuracy"]
    assert len(present) == (protocol == GENERATED)  # a forced answer names the classes itself


def test_predicted_masks_are_written_at_the_size_of_the_image(world, assistant, tmp_path):
    evaluate(assistant, ["refcoco|unc|val"], world, FORCED, 1, tmp_path)
    (line,) = lines(tmp_path, "refcoco|unc|val")
    height, width = line["answers"][0]["masks"][0]["size"]
    for answer, (_, _, _, predicted, _) in zip(line["answers"], line["counts"]["overlaps"], strict=True):
        (mask,) = answer["masks"]
        assert int(rle_to_mask(mask, (height, width)).sum()) == predicted


def test_images_are_encoded_once_however_many_questions(world, assistant):
    seen = []
    encode = assistant.model.vlm.encode_images
    assistant.model.vlm.encode_images = lambda pixels, *rest: (seen.append(len(pixels)), encode(pixels, *rest))[1]
    try:
        results = evaluate(assistant, ["refcoco|unc|val"], world, GENERATED, batch_size=2, max_new_tokens=4)
    finally:
        del assistant.model.vlm.encode_images
    assert seen == [2, 1]
    assert results.suites["refcoco|unc|val"].queries > 3


def test_nothing_predicted_is_a_score_of_zero_not_a_crash(world):
    results = evaluate(tiny("lasagna"), SUITES, world, GENERATED, 2, max_new_tokens=2, classes=CLASSES)
    scores = results.summary()
    assert scores["ade20k|val"]["mIoU"] == scores["refcoco|unc|val"]["cIoU"] == scores["ReasonSeg|val"]["gIoU"] == 0.0
    assert scores["ade20k|val"]["present_accuracy"] == 0.0 and scores["ade20k|val"]["absent_accuracy"] == 1.0
    assert results.suites["ade20k|val"].unfinished == 2
    assert "unfinished" in as_table(results)


def test_a_class_at_a_time_is_scored_like_a_list(world):
    results = evaluate(tiny("lisa", eager=5), ["ade20k|val"], world, GENERATED, 1, max_new_tokens=6, classes=CLASSES)
    suite = results.suites["ade20k|val"]
    assert suite.queries == len(suite.class_iou) > 5 and suite.parse_failures == 0


def test_missing_data_are_named_and_the_others_are_evaluated(world, assistant):
    results = evaluate(assistant, ["cityscapes", "ReasonSeg|val"], world, FORCED, 1)
    assert list(results.suites) == ["ReasonSeg|val"] and "cityscapes" in results.missing["cityscapes|val"]
    assert str(world) in as_table(results)


def test_whatever_one_process_cannot_open_all_learn_of(world, assistant, monkeypatch):
    """Each of them must gather, whatever was raised, or the others would wait."""
    opened = Suite.open

    def damaged(self, *args, **options):
        if self.group == "refer":
            raise error
        return opened(self, *args, **options)

    monkeypatch.setattr(Suite, "open", damaged)
    chosen = ["refcoco|unc|val", "ReasonSeg|val"]
    error: Exception = RuntimeError("half a file")
    results = evaluate(assistant, chosen, world, FORCED, 1)
    assert results.missing == {"refcoco|unc|val": "RuntimeError: half a file"}
    assert list(results.suites) == ["ReasonSeg|val"]
    error = NameError("a slip")
    gathered: list = []
    monkeypatch.setattr(dist, "all_gather", lambda value: [gathered.append(value) or value])
    with pytest.raises(NameError, match="a slip"):
        evaluate(assistant, chosen, world, FORCED, 1)
    assert gathered == [("NameError: a slip", True)]
    monkeypatch.setattr(dist, "all_gather", lambda value: [value, ("NameError: a slip", True)])
    with pytest.raises(RuntimeError, match="another process cannot open it: NameError: a slip"):
        evaluate(assistant, ["ReasonSeg|val"], world, FORCED, 1)


def test_whatever_ends_the_answers_of_one_process_ends_those_of_all(world, assistant, monkeypatch):

    def full_memory(*_):
        raise RuntimeError("out of memory")

    gathered: list = []
    monkeypatch.setattr(dist, "all_gather", lambda value: [gathered.append(value) or value])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setitem(PROTOCOLS, FORCED, full_memory)
        evaluate(assistant, ["ReasonSeg|val"], world, FORCED, 1)
    assert [text for _, text in gathered] == [False, "RuntimeError: out of memory"]
    other = (SuiteScore("overlap"), "RuntimeError: out of memory")
    monkeypatch.setattr(
        dist, "all_gather", lambda value: [value, other] if isinstance(value[0], SuiteScore) else [value]
    )
    with pytest.raises(RuntimeError, match=r"ReasonSeg\|val: another process failed: RuntimeError: out of memory"):
        evaluate(assistant, ["ReasonSeg|val"], world, FORCED, 1)


def test_training_mode_comes_back(world, assistant):
    assistant.model.train()
    evaluate(assistant, ["ReasonSeg|val"], world, FORCED, 1)
    assert assistant.model.training
    assistant.model.eval()


def test_unknown_protocols_and_suites_are_refused(world, assistant):
    with pytest.raises(ValueError, match=r"no protocol 'forced'.*have: generate, teacher_forced"):
        evaluate(assistant, ["ReasonSeg|val"], world, "forced")
    with pytest.raises(ValueError, match="no suite"):
        evaluate(assistant, ["ReasonSegg|val"], world)


def test_program_prints_and_writes_and_names_missing_suites(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the launcher's variables that it sets go again
    command = ["--version", str(OWN / "lasagna"), "--vision-tower", str(OWN / "lasagna" / "clip")]
    command += ["--dataset_dir", str(world), "--limit", "1", "--out", str(tmp_path), "--max_new_tokens", "4"]
    command += ["--eval_only", "--batch_size", "2", "--classes", CLASSES]
    assert test_sem.main([*command, "--suites", "ade20k"]) == 0
    said = capsys.readouterr().out
    assert "mIoU" in said and "standard" in said and "as_released" in said and "generate" in said
    assert "ade20k|val" in json.loads((tmp_path / "generate" / "results.json").read_text())["suites"]
    assert (
        test_sem.main([*command, "--val_dataset_list", "ade20k,cocostuff", "--protocol", FORCED, "--lora_r", "8"]) == 1
    )
    said = capsys.readouterr().out
    assert "cocostuff|val: not evaluated" in said and "--lora_r has no meaning here" in said
    with pytest.raises(SystemExit, match=r"unknown argument '--suite_names'; did you mean"):
        test_sem.main([*command, "--suite_names", "ade20k"])
    with pytest.raises(SystemExit, match=r"cannot load .*nowhere"):
        test_sem.main(["--version", str(tmp_path / "nowhere" / "x.y")])
    assert test_sem.main(["--list"]) == 0 and "ReasonSeg|test" in capsys.readouterr().out


def test_own_suites_are_scored_and_scored_again_without_touching_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    world = toy_world(tmp_path / "world", "folder", "coco", "jsonl")
    file, out = tmp_path / "suites.yaml", tmp_path / "out"
    coco = {"annotations": "coco/annotations/panoptic_val2017.json", "images": "coco/val2017"}
    own = [
        {"name": "kitchen", "source": "folder|val", "metric": "semantic", "options": {"folder": "my_folder"}},
        {"name": "objects", "source": "coco", "metric": "semantic", "options": coco},
        {
            "name": "named",
            "source": "coco",
            "metric": "generalised",
            "options": {**coco, "serve": "refer", "absent": 1},
        },
        {"name": "asked|val", "source": "jsonl", "metric": "premise", "options": {"file": "my_queries/val.jsonl"}},
        {"name": "gone", "source": "jsonl", "metric": "overlap", "options": {"file": "none.jsonl"}},
    ]
    file.write_text(yaml.safe_dump({"eval": {"custom": own}}))
    command = ["--version", str(OWN / "gsva"), "--vision-tower", str(OWN / "gsva" / "clip"), "--limit", "1"]
    command += ["--dataset_dir", str(world), "--out", str(out), "--protocol", FORCED, "--suite_file", str(file)]
    assert test_sem.main(command) == 1  # gone is missing
    results = read_results(out / FORCED)
    assert list(results.suites) == ["kitchen", "objects", "named", "asked|val"]
    assert "none.jsonl" in results.missing["gone"]
    assert results.suites["named"].protocol == TWO_PASS
    capsys.readouterr()
    assert test_sem.main(["--from", str(out / FORCED / "predictions")]) == 0
    again = capsys.readouterr().out
    assert "asked|val" in again and "mIoU" in again
    assert test_sem.main(["--list", "--suite_file", str(file)]) == 0 and "kitchen" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no suite 'kitchn' \(did you mean 'kitchen'\?\)"):
        test_sem.main([*command, "--suites", "kitchn"])


WITH_DATA_OF_ITS_OWN = """
import os, sys, test_sem
test_sem.main(["--dataset_dir", sys.argv[1 + int(os.environ["RANK"])], *sys.argv[3:]])
"""


def test_two_processes_give_what_one_gives(world, tmp_path):
    """Also where only one of them has the data of a suite, which is then missing for both."""
    chosen, out = ["ade20k|val", "ReasonSeg|val"], tmp_path / "two"
    program, less = tmp_path / "evaluate.py", tmp_path / "less"
    program.write_text(WITH_DATA_OF_ITS_OWN)
    less.mkdir()
    for folder in world.iterdir():
        if folder.name != "refer_seg":
            (less / folder.name).symlink_to(folder)
    command = [program, world, less, "--version", OWN / "lasagna", "--vision_tower", OWN / "lasagna" / "clip"]
    command += ["--suites", "ade20k|val", "refcoco|unc|val", "ReasonSeg|val", "--protocol", FORCED]
    command += ["--classes", CLASSES, "--out", out]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *launcher, *map(str, command)], cwd=ROOT, env=env, check=True)
    two = read_results(out / FORCED)
    one = evaluate(tiny("lasagna"), chosen, world, FORCED, classes=CLASSES)
    assert values(one) == values(two)
    assert list(two.missing) == ["refcoco|unc|val"] and str(less) in two.missing["refcoco|unc|val"]
    for name in chosen:
        assert one.suites[name].images == two.suites[name].images == 3  # uneven: two and one
        parts = sorted((out / FORCED / "predictions").glob(f"{name.replace('|', '_')}*.jsonl"))
        indices = [json.loads(line)["index"] for part in parts for line in part.read_text().splitlines()]
        assert len(parts) == 2 and sorted(indices) == [0, 1, 2]


# Scoring of hand-made answers: 2 x 4 pixels, class 0 on the left, class 1 on the right, the last column ignored.

NAMES = ("wall", "blue sky", "door")
LEFT = np.array([[True, True, False, False]] * 2)
RIGHT = np.array([[False, False, True, False]] * 2)
RECORD = Record(
    Path("x.png"),
    "classes",
    (Target("wall", lambda: LEFT), Target("blue sky", lambda: RIGHT)),
    NAMES,
    ignore=lambda: ~(LEFT | RIGHT),
)
LIST = Query("", (), (0, 1), NAMES)


def logits(*masks: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.where(mask, 1.0, -1.0)).float() for mask in masks])


def semantic(claims: list[Claim], masks: torch.Tensor, query: Query = LIST) -> dict:
    scorer = SemanticScorer()
    scorer.add(scorer.count(RECORD, [query], [Reply("", tuple(claims), masks)], GENERATED))
    return {(figure.metric, figure.variant): figure.value for figure in scorer.figures()}


def test_a_perfect_answer_scores_one_and_ignored_pixels_do_not_count():
    everywhere_right = RIGHT | ~(LEFT | RIGHT)
    got = semantic([Claim("bluesky", 0), Claim("door", None), Claim("wall", 1)], logits(everywhere_right, LEFT))
    assert got["mIoU", STANDARD] == got["pixel_accuracy", STANDARD] == 1.0
    assert got["present_accuracy", STANDARD] == got["absent_accuracy", STANDARD] == 1.0
    assert got["mIoU", RELEASED] == pytest.approx((4 / 6 + 2 / 4) / 2)  # the ignored column is class 0, claimed as sky


def test_unanswered_pixels_are_wrong_in_standard_and_class_zero_as_released():
    got = semantic([Claim("wall", None)], torch.zeros(0, 2, 4))
    assert got["mIoU", STANDARD] == 0.0 and got["present_accuracy", STANDARD] == 0.0
    assert got["mIoU", RELEASED] == pytest.approx((6 / 8 + 0) / 2)  # class 0: left, ignored, and the sky's two pixels


def test_duplicates_count_by_maximum_in_standard_and_the_last_replaces_as_released():
    claims = [Claim("wall", 0), Claim("wall", 1), Claim("blue sky", 2)]
    masks = logits(LEFT, np.zeros_like(LEFT), RIGHT | LEFT)
    masks[2] *= 0.5
    got = semantic(claims, masks)
    assert got["mIoU", STANDARD] == 1.0
    assert got["pixel_accuracy", RELEASED] == pytest.approx(4 / 8)  # sky over the wall; the ignored column is class 0


def test_a_misspelt_name_is_a_failure_in_standard_and_the_nearest_class_as_released():
    scorer = SemanticScorer()
    counts = scorer.count(RECORD, [LIST], [Reply("", (Claim("wal", 0),), logits(LEFT))], GENERATED)
    assert counts["unmatched"] == 1
    scorer.add(counts)
    got = {(figure.metric, figure.variant): figure.value for figure in scorer.figures()}
    assert got["mIoU", STANDARD] == 0.0 and got["mIoU", RELEASED] > 0.3


def test_absent_classes_that_get_a_mask_are_wrong_and_only_asked_ones_are_counted():
    got = semantic([Claim("door", 0)], logits(LEFT))
    assert got["absent_accuracy", STANDARD] == 0.0
    alone = semantic([Claim("", 0)], logits(LEFT), Query("", (), (0,), ("wall",)))
    assert alone["present_accuracy", STANDARD] == 1.0 and alone["absent_accuracy", STANDARD] is None


def test_phrases_are_scored_against_their_own_masks_and_refusals_are_empty():
    record = Record(Path("x.png"), "refer", (Target("a", lambda: LEFT), Target("b", None)))
    queries = [Query("", (Mask(0), "."), (0,), ("a",)), Query("", (Mask(1), "."), (1,), ("b",))]
    replies = [Reply("", (Claim("", 0),), logits(LEFT | RIGHT)), Reply("", (Claim("b", None),), torch.zeros(0, 2, 4))]
    counts = OverlapScorer.count(record, queries, replies, GENERATED)
    assert counts["overlaps"] == [[4, 6, 4, 6, 0], [0, 0, 0, 0, 1]]


def test_each_class_of_a_list_that_is_in_the_image_is_a_query_for_overlaps():
    claims = Claim("door", 0), Claim("BlueSky", 1), Claim("wall", None)
    counts = OverlapScorer.count(RECORD, [LIST], [Reply("", claims, logits(LEFT, LEFT | RIGHT))], GENERATED)
    assert counts["overlaps"] == [[0, 4, 4, 0, 1], [2, 6, 2, 6, 0]]  # wall refused; the door's mask is nobody's


def test_failures_are_counted():
    score = SuiteScore("overlap")
    answers = [{"finished": False, "unread": 2}, {"finished": True, "unread": 0}]
    score.add({"answers": answers, "counts": {"unmatched": 3, "kind": "refer", "overlaps": []}, "seconds": 0.5})
    assert (score.images, score.queries, score.parse_failures, score.unfinished) == (1, 2, 5, 1)


def test_training_and_scoring_share_the_class_list(world):
    mixture = {"data": {"mixture": [{"task": "t", "sets": [{"source": "ade20k", "options": {"classes": "list.txt"}}]}]}}
    recipe, (suite,) = from_dict(Recipe, mixture), find_suites(["ade20k"])
    assert source_options(recipe, suite) == {"classes": "list.txt"}
    assert source_options(recipe, suite, CLASSES) == {"classes": "toy_classes/ade20k.txt"}
    assert source_options(Recipe(), suite) == {}


def test_background_work_is_in_order_and_is_finished_before_an_error_is_raised():
    threads, done = set(), []

    def note(item: int) -> None:
        threads.add(threading.get_ident())
        if item == 13:
            raise ValueError("thirteen")
        done.append(item)

    run_in_background(note, range(10))
    assert done == list(range(10)) and len(threads) == 1 and threading.get_ident() not in threads

    def made():
        yield from range(10, 13)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run_in_background(note, made())
    assert done == list(range(13))  # nothing that was made is lost
    with pytest.raises(ValueError, match="thirteen"):
        run_in_background(note, range(13, 100))
    assert len(done) < 20  # and nothing more is made for long


def test_a_model_that_never_stops_is_bounded_counted_and_reported(world, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    results = evaluate(tiny("lisa"), ["ReasonSeg|val"], world, GENERATED, 2, max_new_tokens=2)
    suite = results.suites["ReasonSeg|val"]
    assert suite.unfinished == suite.queries == 2
    assert "2 of 2 answers do not end within max_new_tokens=2" in caplog.text
