"""A fault of the data is never a score: empty masks, unlabelled images and unreadable records, in training, scoring
and whole evaluations."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test_sem
from data.collate import NothingToAsk, load_views, rasterize_masks
from data.sources import build_source
from data.types import Claim, EmptyMask, Mask, Query, Record, Refuse, Target
from evaluation import modes
from evaluation.metrics import SCORERS
from evaluation.metrics.counts import Overlaps
from evaluation.protocols import FORCED, Reply
from evaluation.report.html import write_report
from evaluation.report.markdown import as_table
from evaluation.results import EvaluationResults
from evaluation.runner import evaluate
from evaluation.score import rescore
from systems.base import SYSTEMS, ReleasedTruth, build_system
from tests.tiny_assistant import tiny
from utils.config import EvalConfig, from_dict
from utils.masks import CachedMask, polygons_to_mask

SIDE = 16
FIRST = [0, 0, 7, 0, 7, 7, 0, 7]  # two polygons of one object, which share a quarter of each
SECOND = [4, 4, 12, 4, 12, 12, 4, 12]


def nothing() -> np.ndarray:
    return np.zeros((SIDE, SIDE), bool)


def everything() -> np.ndarray:
    return np.ones((SIDE, SIDE), bool)


def square(size: int) -> np.ndarray:
    mask = nothing()
    mask[:size, :size] = True
    return mask


# The masks of a record


def test_an_empty_mask_of_a_present_thing_is_an_error_in_training_that_names_picture_phrase_and_annotation():
    where = "instances.json: annotation 7"
    record = Record(Path("a.jpg"), "refer", (Target("cup", CachedMask(nothing, where)), Target("pan", nothing)))
    with pytest.raises(EmptyMask, match=rf"a.jpg: the mask of 'cup' has no pixel.*\({where}\)"):
        rasterize_masks(record, [0], (SIDE, SIDE))
    with pytest.raises(
        EmptyMask, match=r"a.jpg: the mask of 'pan' has no pixel, although the data say that it is there$"
    ):
        rasterize_masks(record, [1], (SIDE, SIDE))


@pytest.mark.parametrize("metric", ["overlap", "generalised", "generalised_apart", "premise", "matched"])
def test_no_scorer_takes_an_empty_mask_of_a_present_thing_for_an_absent_one(metric):
    record = Record(Path("a.jpg"), "refer", (Target("cup", nothing),))
    query, silent = Query("q", (Mask(0),), (0,), ("cup",)), Reply("", (), torch.zeros(0, SIDE, SIDE))
    with pytest.raises(EmptyMask, match="'cup'"):
        SCORERS[metric].count(record, [query], [silent], "generate")


@pytest.mark.parametrize("metric", ["overlap", "generalised", "premise", "matched"])
def test_what_lies_wholly_in_ignored_pixels_leaves_nothing_to_score_and_ignored_pixels_count_nowhere(metric):
    record = Record(
        Path("a.jpg"),
        "refer",
        (Target("cup", partial(square, 4)), Target("pan", lambda: ~square(8)), Target("pot", None)),
        ignore=partial(square, 8),
    )
    queries = [Query("q", (), (index,), (name,)) for index, name in enumerate(("cup", "pan", "pot"))]
    masks = torch.from_numpy(np.stack([everything()])).float() - 0.5
    replies = [
        Reply("", (), masks[:0]),
        Reply("", (Claim("", 0),), masks),
        Reply("", (Claim("", None),), masks[:0]),
    ]
    scorer = SCORERS[metric]()
    scorer.add(SCORERS[metric].count(record, queries, replies, "generate"))
    found = {figure.metric: figure.value for figure in scorer.figures() if figure.variant == "standard"}
    assert found["gIoU"] == 1.0  # the pan without its ignored corner, and the pot that is rightly refused; no cup
    silent = SCORERS[metric]()
    silent.add(SCORERS[metric].count(record, queries[:1], replies[:1], "generate"))
    assert {f.value for f in silent.figures() if f.metric == "gIoU" and f.variant == "standard"} == {None}


def test_an_absent_thing_that_is_refused_is_no_missed_object():
    record = Record(Path("a.jpg"), "refer", (Target("cup", partial(square, 4)), Target("pot", None)))
    query, masks = Query("q", (), (0, 1), ("cup", "pot")), torch.from_numpy(square(4)[None]).float() - 0.5
    scorer = SCORERS["matched"]()
    scorer.add(SCORERS["matched"].count(record, [query], [Reply("", (Claim("", 0),), masks)], "generate"))
    assert scorer.details() == {"masks_both": 1, "masks_missed": 0, "masks_extra": 0}
    assert {figure.value for figure in scorer.figures() if figure.variant == "standard"} == {1.0}


@pytest.mark.parametrize("metric", list(SCORERS))
def test_a_scorer_that_was_given_nothing_says_so(metric):
    assert {figure.value for figure in SCORERS[metric]().figures()} <= {None}


def test_what_cannot_be_counted_is_no_zero():
    found = Overlaps()
    found.add((3, 4, 4, 3))
    assert found.released_generalised(count_false_masks=True)["N-acc"] is None
    assert Overlaps().released_generalised(count_false_masks=True)["T-acc"] is None


# What each release compares with (lisa.md 6, gsva.md 6.4, sesame.md 4.3)


def refer_world(root: Path) -> Path:
    """RefCOCO with one object of two polygons that overlap, and one of a single polygon."""
    folder, images = root / "refer_seg/refcoco", root / "refer_seg/images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(images / "a.jpg")
    shapes = {1: [FIRST, SECOND], 2: [FIRST]}
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": 1, "split": "val", "sentences": [{"sent": f"thing {n}"}]} for n in shapes
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "segmentation": one} for n, one in shapes.items()]
    image = {"id": 1, "file_name": "a.jpg", "height": SIDE, "width": SIDE}
    values = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (folder / "instances.json").write_text(json.dumps(values))
    return root


def lisa_validation(predicted: list[np.ndarray], summed: list[np.ndarray]) -> dict[str, float]:
    """gIoU and cIoU of class 1 by histograms, of uint8 truth that may hold 2 (lisa.md 4.4, 6)."""
    terms, intersections, unions = [], 0, 0
    for mask, truth in zip(predicted, summed, strict=True):
        mask, truth = mask.astype(int).ravel(), truth.astype(int).ravel()
        both = np.bincount(mask[mask == truth], minlength=3)[1]
        union = np.bincount(mask, minlength=3)[1] + np.bincount(truth, minlength=3)[1] - both
        terms.append(both / (union + 1e-5) + (union == 0))
        intersections, unions = intersections + both, unions + union
    return {"gIoU": sum(terms) / len(terms), "cIoU": intersections / (unions + 1e-10)}


def test_as_released_scores_are_what_a_release_that_sums_parts_computes(tmp_path):
    record = build_source("refcoco|unc|val", refer_world(tmp_path))[0]
    parts = [polygons_to_mask([shape], (SIDE, SIDE)).astype(np.uint8) for shape in (FIRST, SECOND)]
    assert record.targets[0].mask().sum() == ((parts[0] + parts[1]) > 0).sum()
    assert record.targets[1].released_mask is None  # one part: nothing differs
    queries = [Query("q", (), (index,), (target.phrase,)) for index, target in enumerate(record.targets)]
    predicted = [everything(), square(6)]
    replies = [Reply("", (Claim("", 0),), torch.from_numpy(mask[None]).float() - 0.5) for mask in predicted]

    def figures(released: ReleasedTruth) -> dict:
        scorer = SCORERS["overlap"]()
        scorer.add(SCORERS["overlap"].count(record, queries, replies, FORCED, released))
        return {(f.metric, f.variant): f.value for f in scorer.figures() if f.metric in ("gIoU", "cIoU")}

    lisa, union = figures(ReleasedTruth()), figures(ReleasedTruth(parts="union"))
    published = lisa_validation(predicted, [parts[0] + parts[1], parts[0]])
    for metric, value in published.items():
        assert lisa[metric, "as_released"] == pytest.approx(value, abs=1e-5)
        assert lisa[metric, "standard"] == union[metric, "standard"]
        assert union[metric, "as_released"] == pytest.approx(union[metric, "standard"], abs=1e-5)
        assert abs(lisa[metric, "as_released"] - lisa[metric, "standard"]) > 0.01
    named = build_source("refcoco|unc|val", tmp_path, overlap="exclude")[0]
    assert named.targets[0].released_mask is None  # then both variants have the release's truth


def test_every_system_says_what_its_release_compares_with():
    found = {name: build_system(name).released.truth for name in SYSTEMS}
    for name in ("lisa", "lasagna", "pixellm"):
        assert found[name] == ReleasedTruth("exclude", "leave out")
    assert found["gsva"] == ReleasedTruth("union", "object")  # a cast to bool makes 2 and 255 true
    assert found["sesame"] == ReleasedTruth("union", "background")


def test_ignored_pixels_are_what_each_release_makes_of_them():
    record = Record(Path("a.jpg"), "reason", (Target("it", partial(square, 4)),), ignore=lambda: square(8) & ~square(4))
    query = Query("q", (), (0,), ("it",))
    reply = Reply("", (Claim("", 0),), torch.from_numpy(square(8)[None]).float() - 0.5)
    for ignored, truth in (("leave out", 1.0), ("object", 1.0), ("background", 16 / 64)):
        scorer = SCORERS["overlap"]()
        scorer.add(SCORERS["overlap"].count(record, [query], [reply], FORCED, ReleasedTruth(ignored=ignored)))
        found = {figure.variant: figure.value for figure in scorer.figures() if figure.metric == "cIoU"}
        assert found == pytest.approx({"standard": 1.0, "as_released": truth}, abs=1e-6)


def test_see_goes_by_the_flags_of_data_and_answer():
    """sesame.md 6.2; the cup lies in ignored pixels, so no pixel is left of it, yet the data say it is there."""
    targets = Target("cup", partial(square, 4)), Target("pot", None), Target("pan", lambda: ~square(8))
    record = Record(Path("a.jpg"), "refer", targets, ignore=partial(square, 8))
    queries = [Query("q", (), (index,), (target.phrase,)) for index, target in enumerate(targets)]
    mask = torch.from_numpy(square(4)[None]).float() - 0.5
    replies = [
        Reply("", (Claim("", 0),), mask),
        Reply("", (Claim("", 0),), mask),
        Reply("", (Claim("", None),), mask[:0]),
    ]
    counts = SCORERS["premise"].count(record, queries, replies, "generate")
    assert counts["seen"] == [[1, 1], [0, 1], [1, 0]]
    scorer = SCORERS["premise"]()
    scorer.add(counts)
    found = {figure.metric: figure.value for figure in scorer.figures() if figure.variant == "standard"}
    assert [found[name] for name in ("See", "See_precision", "See_recall", "See_absent")] == [1 / 3, 1 / 2, 1 / 2, 0.0]
    old = SCORERS["premise"]()  # a file from before the flags were kept
    old.add({name: value for name, value in counts.items() if name != "seen"})
    assert {f.metric: f.value for f in old.figures()}["See_absent"] == 1.0


# Unlabelled is not absent


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_no_system_is_trained_on_or_asked_about_a_picture_without_a_labelled_pixel(system):
    task, rng = build_system(system).task, np.random.default_rng(0)
    unlabelled = Record(Path("a.png"), "classes", (), ("sky", "road"), ignore=everything)
    with pytest.raises(NothingToAsk, match=r"a\.png: no pixel is labelled as one of the 2 classes"):
        task.queries(unlabelled)
    for seed in range(8):
        with suppress(NothingToAsk):
            assert task.converse(unlabelled, np.random.default_rng(seed)) == []
    absent = Record(Path("a.png"), "classes", (), ("sky", "road"), ignore=nothing)
    assert task.queries(absent)  # every pixel is labelled, as something else: that is known
    if system == "lasagna":
        ((turn,),) = task.converse(absent, rng)
        assert [part for part in turn.answer if not isinstance(part, str)] == [Refuse(-1)] * 2


def test_label_maps_without_a_labelled_pixel_are_drawn_again_in_training(tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / "ade20k" / kind / "training").mkdir(parents=True)
    for stem, value in (("a", 0), ("b", 3)):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"ade20k/images/training/{stem}.jpg")
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"ade20k/annotations/training/{stem}.png")
    source, task = build_source("ade20k", tmp_path), build_system("lasagna").task
    with pytest.raises(NothingToAsk, match=r"a\.jpg: no pixel is labelled"):
        task.converse(source[0], np.random.default_rng(0))
    assert task.converse(source[1], np.random.default_rng(0))


# Whole evaluations


@pytest.fixture(scope="module")
def assistant():
    return tiny("lasagna", eager=8)


def own(root: Path, rows: list[dict], names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    for name in names:
        Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(root / f"{name}.jpg")
    (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


MINE = from_dict(
    EvalConfig,
    {"custom": [{"name": "mine", "source": "jsonl", "metric": "overlap", "options": {"file": "q.jsonl"}}]},
    "eval",
).custom
GOOD = {"image": "a.jpg", "phrase": "cup", "polygons": [FIRST]}
EMPTY = {"image": "b.jpg", "phrase": "pan", "polygons": [[90, 90, 95, 90, 95, 95]]}


def run(assistant, root: Path, out: Path | None = None, **options) -> EvaluationResults:
    return evaluate(assistant, ["mine"], root, FORCED, out_dir=out, custom=MINE, **options)


def test_an_empty_mask_gives_a_suite_up_and_names_file_and_entry_or_is_left_out_and_counted(assistant, tmp_path):
    root = own(tmp_path, [EMPTY, GOOD])
    results = run(assistant, root)
    assert not results.suites
    for words in ("given up: record 0", "q.jsonl: line 1", "on_bad_sample: skip"):
        assert words in results.missing["mine"]
    out = tmp_path / "out"
    suite = run(assistant, root, out, on_bad_sample="skip").suites["mine"]
    assert (suite.images, suite.left_out, suite.queries) == (1, 1, 1)
    (note,) = suite.notes
    assert note.startswith("1 left out, the first: record 0: ") and "line 1" in note
    alone = run(assistant, own(tmp_path, [GOOD])).suites["mine"]
    assert suite.figures == alone.figures
    again = rescore([out / "predictions"])
    assert again.suites["mine"].figures == suite.figures and again.suites["mine"].notes == [note]
    assert "left_out 1" in as_table(again)
    page = write_report(again, [out / "predictions"], tmp_path / "page").read_text()
    assert "1 left out, the first: record 0" in page


@pytest.mark.parametrize("present_only", [False, True])
def test_a_bad_entry_of_a_suites_file_is_left_out_and_counted_where_that_is_asked(assistant, tmp_path, present_only):
    root, custom = own(tmp_path, [{**GOOD, "phrase": 5}, GOOD]), (replace(MINE[0], present_only=present_only),)
    scored = partial(evaluate, assistant, ["mine"], root, FORCED, custom=custom, out_dir=tmp_path / "out")
    assert "line 1: phrase must be text" in scored().missing["mine"]
    suite = scored(on_bad_sample="skip").suites["mine"]
    assert (suite.images, suite.left_out) == (1, 1) and "line 1: phrase must be text" in suite.notes[0]


def test_the_recipe_says_what_a_bad_sample_means_unless_told(assistant, tmp_path, monkeypatch):
    root = own(tmp_path, [EMPTY, GOOD])
    recipe = replace(assistant.recipe, data=replace(assistant.recipe.data, on_bad_sample="skip"))
    lenient = replace(assistant, recipe=recipe)
    assert run(lenient, root).suites["mine"].left_out == 1
    assert "mine" in run(lenient, root, on_bad_sample="raise").missing
    with pytest.raises(ValueError, match="no on_bad_sample 'ignore'"):
        run(assistant, root, on_bad_sample="ignore")
    (root / "s.yaml").write_text("- {name: mine, source: jsonl, metric: overlap, options: {file: q.jsonl}}\n")
    monkeypatch.setattr(modes, "load_assistant", lambda args: assistant)
    command = ["--version", "x", "--dataset_dir", str(root), "--suite_file", str(root / "s.yaml"), "--protocol", FORCED]
    command += ["--out", str(tmp_path / "o")]
    assert test_sem.main(command) == 1
    assert test_sem.main([*command, "--on_bad_sample", "skip"]) == 0
    assert (tmp_path / "o" / FORCED / "report" / "index.html").is_file()


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8\xff no picture", None])
def test_a_record_that_cannot_be_read_is_the_same_whatever_its_reader_raises(assistant, tmp_path, damage, monkeypatch):
    root = own(tmp_path, [GOOD, {**GOOD, "image": "b.jpg"}])
    if damage is None:
        monkeypatch.setattr("evaluation.runner.load_views", partial(odd_reader, look=load_views))
    else:
        (root / "b.jpg").write_bytes(damage)
    assert "record 1" in run(assistant, root).missing["mine"] and "b.jpg" in run(assistant, root).missing["mine"]
    suite = run(assistant, root, on_bad_sample="skip").suites["mine"]
    assert (suite.images, suite.left_out) == (1, 1)


def odd_reader(path: Path, views, look):
    if path.name == "b.jpg":
        raise AttributeError(f"{path}: no shape")
    return look(path, views)


def test_a_mistake_in_the_code_is_never_a_bad_record(assistant, tmp_path, monkeypatch):
    def wrong(path: Path, views):
        raise NameError("no such name")

    monkeypatch.setattr("evaluation.runner.load_views", wrong)
    with pytest.raises(NameError):
        run(assistant, own(tmp_path, [GOOD]), on_bad_sample="skip")


def test_a_suite_of_which_nothing_can_be_scored_has_no_figure(assistant, tmp_path):
    results = run(assistant, own(tmp_path, [EMPTY]), on_bad_sample="skip")
    assert not results.suites and "none of its 1 images can be scored" in results.missing["mine"]


def test_left_out_pictures_are_looked_at_again_when_a_run_is_resumed(assistant, tmp_path):
    root, out = own(tmp_path, [{**GOOD, "image": "b.jpg"}, GOOD]), tmp_path / "out"
    whole = (root / "b.jpg").read_bytes()
    (root / "b.jpg").write_bytes(whole[:40] + bytes(len(whole) - 40))
    assert run(assistant, root, out, on_bad_sample="skip").suites["mine"].left_out == 1
    (root / "b.jpg").write_bytes(whole)
    suite = run(assistant, root, out, resume=True).suites["mine"]
    assert (suite.images, suite.left_out) == (2, 0)
    assert not list((out / "predictions").glob("*.old"))


def test_ignored_pixels_of_another_size_are_a_fault_of_the_record():
    record = Record(
        Path("a.jpg"), "refer", (Target("cup", partial(square, 4)),), ignore=partial(np.zeros, (1, SIDE), bool)
    )
    reply = Reply("", (), torch.zeros(0, SIDE, SIDE))
    for metric in ("overlap", "premise", "matched"):
        with pytest.raises(ValueError, match=r"a.jpg: the mask of ignored pixels is \(1, 16\), the image"):
            SCORERS[metric].count(record, [Query("q", (), (0,), ("cup",))], [reply], "generate")


@pytest.mark.parametrize("size", [1, 3])
def test_unlabelled_pictures_of_a_class_list_are_left_out_and_no_absence_is_counted(assistant, tmp_path, size):
    for kind in ("images", "annotations"):
        (tmp_path / "ade20k" / kind / "validation").mkdir(parents=True)
    for stem, value in (("a", 0), ("b", 3), ("c", 0)):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"ade20k/images/validation/{stem}.jpg")
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"ade20k/annotations/validation/{stem}.png")
    results = evaluate(assistant, ["ade20k"], tmp_path, max_new_tokens=2, batch_size=size)
    suite = results.suites["ade20k|val"]
    assert (suite.images, suite.left_out) == (1, 2)
    assert "a.jpg: no pixel is labelled" in " ".join(suite.notes)


def test_numbers_that_mean_nothing_are_refused(assistant, tmp_path):
    for wrong in ({"limit": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="limit must be 0"):
            run(assistant, tmp_path, **wrong)
