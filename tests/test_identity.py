"""Predictions are used again only for the same weights, data and questions; digests follow content, and are cheap."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test_sem
from data.readers import digest
from data.readers.digest import annotation_digest, annotation_paths, digests
from data.sources import build_source
from evaluation import identity, modes
from evaluation.identity import NotNumbers, check_finite
from evaluation.predictions import PredictionFile
from evaluation.protocols import FORCED
from evaluation.results import SuiteResult
from evaluation.runner import evaluate
from evaluation.score import rescore
from evaluation.suites import find_suites, own_suites
from systems.base import SYSTEMS, build_system
from systems.wording import WORDING
from tests.tiny_assistant import CLASSES, tiny, toy_world
from utils import files
from utils.config import EvalConfig, from_dict

NAMES = ("ade20k|val", "refcoco|unc|val", "ReasonSeg|val")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), "ade20k", "refcoco", "reason_seg", "jsonl")


@pytest.fixture
def world(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "world"))


@pytest.fixture(scope="module")
def assistant():
    return tiny("lasagna", eager=8)


def told(world: Path, name: str, **options) -> str:
    return annotation_digest(build_source(name, world, **options), world)


def edit(path: Path, old: str, new: str, *, keep_time: bool = False) -> None:
    before, text = path.stat(), path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_label(path: Path) -> None:
    """One pixel of a label map."""
    labels = np.asarray(Image.open(path)).copy()
    labels[0, 0] ^= 1
    Image.fromarray(labels).save(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_digest_follows_the_content_of_annotations_and_survives_a_move(world, name):
    before = told(world, name)
    assert told(world, name) == before
    moved = world.rename(world.with_name("elsewhere"))
    for path in moved.rglob("*"):
        os.utime(path)  # a copy without its times
    assert told(moved, name) == before
    path = {
        "ade20k|val": moved / "ade20k/annotations/validation/ADE_val_00000001.png",
        "refcoco|unc|val": moved / "refer_seg/refcoco/instances.json",
        "ReasonSeg|val": next((moved / "reason_seg/ReasonSeg/val").glob("*.json")),
    }[name]
    path = path if path.exists() else next(path.parent.glob("*.png"))
    change_label(path) if path.suffix == ".png" else path.write_text(path.read_text() + " ")
    assert told(moved, name) != before


def test_class_lists_label_values_and_mask_files_count(world):
    assert told(world, "ade20k|val") != told(world, "ade20k|val", classes=CLASSES.replace("{source}", "ade20k"))
    folder = world / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    shutil.copy(next((world / "ade20k/images/validation").glob("*.jpg")), folder / "images/a.jpg")
    shutil.copy(next((world / "ade20k/annotations/validation").glob("*.png")), folder / "masks/a.png")
    (folder / "classes.txt").write_text("1: cat\n2: dog\n")
    before = told(world, "folder", folder="mine", ignore_unknown=True)
    (folder / "classes.txt").write_text("2: cat\n1: dog\n")  # the same names, other pixels
    assert told(world, "folder", folder="mine", ignore_unknown=True) != before
    lines = folder / "q.jsonl"
    lines.write_text('{"image": "images/a.jpg", "phrase": "it", "mask": "masks/a.png"}\n')
    before = told(world, "jsonl", file="mine/q.jsonl")
    change_label(folder / "masks/a.png")
    assert told(world, "jsonl", file="mine/q.jsonl") != before
    before = told(world, "jsonl", file="mine/q.jsonl")
    (folder / "images/a.jpg").write_bytes((folder / "images/a.jpg").read_bytes() + b"\0")
    assert told(world, "jsonl", file="mine/q.jsonl") != before


def test_a_file_is_read_once_until_it_changes_even_with_its_old_size_and_time(tmp_path, monkeypatch):
    path, read = tmp_path / "instances.json", []
    path.write_text('{"a": 1}')
    monkeypatch.setattr(digest, "SETTLED", -1.0)  # this file system's clock is fine enough
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), whole(file, name))[1])
    (first,) = digests([path], tmp_path)
    assert digests([path], tmp_path) == [first] and len(read) == 1
    assert json.loads((tmp_path / ".index" / "digests.json").read_text())[str(path)][-1] == first
    time.sleep(0.02)
    edit(path, "1", "2", keep_time=True)
    (second,) = digests([path], tmp_path)
    assert second != first and len(read) == 2
    (tmp_path / ".index" / "digests.json").write_text("{")  # damage costs a second reading
    assert digests([path], tmp_path) == [second] and len(read) == 3
    assert digests([tmp_path / "gone.png"], tmp_path) == [""]


def test_what_has_just_been_written_is_not_kept_for_it_may_change_within_the_same_tick(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("1")
    digests([path], tmp_path)
    assert not (tmp_path / ".index" / "digests.json").exists()


def seen_by(assistant, monkeypatch) -> list[int]:
    seen, encode = [], type(assistant.model.vlm).encode_images
    monkeypatch.setattr(
        type(assistant.model.vlm),
        "encode_images",
        lambda self, pixels, *rest: (seen.append(len(pixels)), encode(self, pixels, *rest))[1],
    )
    return seen


def test_changed_annotations_are_evaluated_again_and_no_old_file_is_overwritten(
    world, assistant, tmp_path, monkeypatch
):
    def run() -> SuiteResult:
        how = {"protocol": FORCED, "limit": 2, "out_dir": tmp_path / "out", "resume": True}
        return evaluate(assistant, ["refcoco|unc|val"], world, **how).suites["refcoco|unc|val"]

    folder = tmp_path / "out" / "predictions"
    first = run()
    kept = [(folder / "refcoco_unc_val.jsonl").read_text()]
    seen = seen_by(assistant, monkeypatch)
    assert run().figures == first.figures and not seen
    path = world / "refer_seg/refcoco/instances.json"
    data = json.loads(path.read_text())
    for number in (1, 2):
        for entry in data["annotations"]:
            entry["segmentation"] = [[0, 0, 9 + number, 0, 9, 9, 0, 9]]
        path.write_text(json.dumps(data))
        again = run()
        assert len(seen) == 2 * number and again.figures != first.figures
        kept.append((folder / "refcoco_unc_val.jsonl").read_text())
    for ending, text in zip((".old", ".old.2", ""), kept, strict=True):
        assert (folder / f"refcoco_unc_val.jsonl{ending}").read_text() == text
    old = rescore([folder / "refcoco_unc_val.jsonl.old"]).suites["refcoco|unc|val"]
    assert old.figures == first.figures and old.notes == first.notes == ["2 of 3 pictures only"]
    settings = [
        json.loads((folder / f"refcoco_unc_val.run.json{ending}").read_text()) for ending in (".old", ".old.2", "")
    ]
    assert len({one["annotations"] for one in settings}) == 3


def custom(**entry):
    entry = {
        "name": "mine",
        "source": "jsonl",
        "metric": "overlap",
        "options": {"file": "my_queries/val.jsonl"},
    } | entry
    return from_dict(EvalConfig, {"custom": [entry]}, "eval").custom


def test_another_suite_of_the_same_name_never_takes_old_predictions(world, assistant, tmp_path, monkeypatch):
    seen = seen_by(assistant, monkeypatch)

    def run(**entry) -> SuiteResult:
        how = {"protocol": FORCED, "limit": 1, "out_dir": tmp_path, "resume": True, "custom": custom(**entry)}
        results = evaluate(assistant, ["mine"], world, **how)
        assert not results.missing
        return results.suites["mine"]

    run()
    run(metric="premise")
    assert len(seen) == 2
    run(metric="premise", present_only=True)
    assert len(seen) == 3
    shutil.copy(world / "my_queries/val.jsonl", world / "my_queries/other.jsonl")
    run(metric="premise", options={"file": "my_queries/other.jsonl"})
    assert len(seen) == 4
    run(metric="premise", options={"file": "my_queries/other.jsonl"})
    assert len(seen) == 4


def test_suites_whose_files_would_be_the_same_are_refused():
    values = [
        {"name": name, "source": "jsonl", "metric": "overlap", "options": {"file": "a.jsonl"}}
        for name in ("a|b", "a_b")
    ]
    with pytest.raises(ValueError, match=r"eval.custom\[1\].name: the files of 'a_b' would be those of 'a\|b'"):
        own_suites(from_dict(EvalConfig, {"custom": values}, "eval").custom)


def test_predictions_of_other_weights_are_not_scored_together(world, assistant, tmp_path):
    for place, model in (("a", assistant), ("b", tiny("lasagna", eager=2))):
        evaluate(model, ["ReasonSeg|val"], world, FORCED, 2, tmp_path / place)
    with pytest.raises(ValueError, match=r"ReasonSeg\|val was made with other weights"):
        rescore([tmp_path / "a" / "predictions", tmp_path / "b" / "predictions"])
    evaluate(assistant, ["refcoco|unc|val"], world, FORCED, 0, tmp_path / "b")
    notes = [suite.notes for suite in rescore([tmp_path / "b" / "predictions"]).suites.values()]
    assert all("not all of the same" in " ".join(note) for note in notes) and len(notes) == 2
    suite = rescore([tmp_path / "a" / "predictions"]).suites["ReasonSeg|val"]
    assert suite.images == 2 and suite.notes == ["2 of 3 pictures only"]


def test_whatever_changes_the_answers_without_the_weights_is_in_the_key(assistant, tmp_path):
    before = identity.of_assistant(assistant)
    model = assistant.recipe.model
    for other in (replace(model, image_size=512), replace(model, tower=replace(model.tower, pad=True))):
        recipe = replace(assistant.recipe, model=other)
        assert identity.of_assistant(replace(assistant, recipe=recipe)) != before
    moved = replace(model, version="elsewhere", vision_tower="elsewhere")
    assert identity.of_assistant(replace(assistant, recipe=replace(assistant.recipe, model=moved))) == before
    for name in SYSTEMS:
        assert identity._wording(build_system(name).task) == identity._wording(build_system(name).task) != ""
    text = (WORDING / "sesame.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    path = str(tmp_path / "mine.yaml")
    one = identity._wording(build_system("sesame", {"wording": path}).task)
    (tmp_path / "mine.yaml").write_text(text.replace("mark it", "show it", 1))
    assert identity._wording(build_system("sesame", {"wording": path}).task) != one


def test_damaged_settings_are_other_settings(world, assistant, tmp_path, monkeypatch):
    evaluate(assistant, ["ReasonSeg|val"], world, FORCED, 1, tmp_path)
    (tmp_path / "predictions" / "ReasonSeg_val.run.json").write_text('{"weights": "ab')
    seen = seen_by(assistant, monkeypatch)
    evaluate(assistant, ["ReasonSeg|val"], world, FORCED, 1, tmp_path, resume=True)
    assert len(seen) == 1 and (tmp_path / "predictions" / "ReasonSeg_val.jsonl.old").exists()


def test_the_suite_and_the_data_are_in_the_key(world):
    (suite,) = find_suites(["ReasonSeg|val"])
    found = identity.of_data(suite, suite.open(world), world, {})
    assert found["source"] == "ReasonSeg|val" and found["metric"] == "overlap" and found["present_only"]
    assert found["suite_options"] == suite.options and len(found["annotations"]) == 32


@pytest.mark.parametrize("name", ["ReasonSeg|val", "multirefcoco|unc|val"])
def test_wrapped_sources_depend_on_the_annotations_of_what_they_wrap(world, name):
    (suite,) = find_suites([name])
    wrapped = suite.open(world)
    assert annotation_paths(wrapped) == annotation_paths(wrapped.source) != []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_an_error_before_anything_is_asked(world, value, tmp_path, monkeypatch):
    broken = tiny("lasagna")
    check_finite(broken.model)
    name, weight = list(broken.model.named_parameters())[5]
    weight.data.view(-1)[3] = value
    with pytest.raises(NotNumbers, match=rf"1 of \d+ weights hold NaN or infinity \({name}\)"):
        evaluate(broken, ["ReasonSeg|val"], world, FORCED, 1, tmp_path)
    assert not list(tmp_path.glob("*/predictions"))
    monkeypatch.setattr(modes, "load_assistant", lambda args: broken)
    with pytest.raises(SystemExit, match="nothing that they answer can be scored"):
        test_sem.main(
            ["--version", "x", "--dataset_dir", str(world), "--suites", "ReasonSeg|val", "--out", str(tmp_path)]
        )


def test_masks_that_are_no_numbers_are_an_error(world, monkeypatch):
    odd = tiny("lasagna")
    forward = type(odd.model).forward

    def spoiled(self, batch):
        output = forward(self, batch)
        output.masks[0][0, 0, 0] = torch.nan
        return output

    monkeypatch.setattr(type(odd.model), "forward", spoiled)
    with pytest.raises(NotNumbers, match=r"ReasonSeg\|val: .*\.jpg: the masks of the answer to .* hold NaN"):
        evaluate(odd, ["ReasonSeg|val"], world, FORCED, 1)


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["results.json"]


def test_a_prediction_file_reads_back_what_was_written(tmp_path):
    settings = {"groups": (6, 5), "data": Path("x")}
    line = {"suite": "x", "metric": "overlap", "index": 0, "protocol": "p", "counts": {"unmatched": 0}, "answers": []}
    line |= {"image": "a.jpg", "seconds": 0.5}
    with PredictionFile(tmp_path, "x") as file:
        file.begin(settings, [[0]], resume=True)
        file.write(line)
    with PredictionFile(tmp_path, "x") as file:
        assert file.begin(settings, [[0]], resume=True) == ([line], [])
