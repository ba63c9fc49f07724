"""What a run records for those who watch it: numbers, images, its history, curves of several runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from data.mixture import Part
from data.sources.base import Source
from data.types import Batch, Claim, Mask, Query, Record, Target
from evaluation.predictions import answers_of
from evaluation.protocols import Reply
from evaluation.report.draw import Layer
from evaluation.report.panels import panel, replay
from tools import plot_run
from training.checkpoint import TrainState
from training.loop import kinds_to_log_again
from training.meters import CUT_ROWS, CUT_TOKENS, LEFT_OUT, MEMORY, SPEED, WAIT, Meters, peak_memory
from training.provenance import describe_data, describe_start, fingerprint, starts, versions
from utils.config import RunConfig
from utils.log import log
from utils.run_log import RunLog, import_wandb, read_log

RED = np.full((8, 10, 3), (250, 10, 10), np.uint8)


def board(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_numbers_and_pictures_go_to_files_and_board_under_one_step(tmp_path):
    run = RunConfig(str(tmp_path), "mine")
    run.folder.mkdir()
    first = RunLog(run)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": 4.0 - step, "lr": 0.1, "grad_norm": None})
    first.write("val", 2, {"ReasonSeg|val": {"gIoU": 0.5}})
    first.picture("val", 2, RED)
    first.close()
    second = RunLog(run, step=2)  # killed after step 3, whose checkpoint was not complete
    second.write("train", 3, {"loss": 0.5, "lr": 0.1, "grad_norm": 1.5})
    second.close()
    rows = [(row["kind"], row["step"], row.get("loss")) for row in read_log(run.folder / "log.jsonl")]
    assert rows == [("train", 1, 3.0), ("train", 2, 2.0), ("val", 2, None), ("train", 3, 0.5)]
    events = board(run.folder)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 0.5)]
    assert [event.step for event in events.Scalars("train/grad_norm")] == [3]
    assert [event.value for event in events.Scalars("val/ReasonSeg|val/gIoU")] == [0.5]
    assert [event.step for event in events.Images("val")] == [2]
    assert (np.asarray(Image.open(run.folder / "pictures" / "val_00000002.png")) == RED).all()


def test_a_validation_that_is_owed_again_is_logged_once(tmp_path):
    """Killed between the line and the note in the checkpoint; and a finished run that is started again."""
    run = RunConfig(str(tmp_path), "mine")
    run.folder.mkdir()
    first = RunLog(run)
    first.write("train", 2, {"loss": 1.0})
    for kind in ("val", "final"):
        first.write(kind, 2, {"gIoU": 0.5})
    first.picture("val", 2, RED)
    first.close()
    for _ in range(2):
        again = RunLog(run, step=2, again=("val", "final"))
        for kind in ("val", "final"):
            again.write(kind, 2, {"gIoU": 0.25})
        again.picture("val", 2, RED)
        again.close()
    assert [(row["kind"], row.get("gIoU")) for row in read_log(run.folder / "log.jsonl")] == [
        *(("train", None), ("val", 0.25), ("final", 0.25))
    ]
    events = board(run.folder)
    assert [(event.step, event.value) for event in events.Scalars("val/gIoU")] == [(2, 0.25)]
    assert [event.step for event in events.Images("val")] == [2] and len(events.Scalars("train/loss")) == 1
    kept = RunLog(run, step=2)  # what is not owed stays
    kept.close()
    assert len(read_log(run.folder / "log.jsonl")) == 3 and len(board(run.folder).Scalars("val/gIoU")) == 1


def test_a_final_line_stays_until_the_next_is_there(tmp_path):
    """More epochs are asked for, or the evaluation that is repeated is killed."""
    run = RunConfig(str(tmp_path), "mine")
    run.folder.mkdir()
    first = RunLog(run)
    first.write("train", 2, {"loss": 1.0})
    first.write("final", 2, {"gIoU": 0.5})
    first.close()
    again = RunLog(run, step=2, again=kinds_to_log_again(TrainState(step=2, validated=2)))
    assert read_log(run.folder / "log.jsonl")[-1]["gIoU"] == 0.5
    again.rewrite("final", 2, {"gIoU": 0.25})
    again.close()
    assert [(row["kind"], row.get("gIoU")) for row in read_log(run.folder / "log.jsonl")] == [
        ("train", None),
        ("final", 0.25),
    ]


def test_a_picture_that_was_cut_off_does_not_stop_a_start(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("utils.log.log.propagate", True)
    run = RunConfig(str(tmp_path), "mine")
    run.folder.mkdir()
    first = RunLog(run)
    first.write("val", 2, {"gIoU": 0.5})
    first.picture("val", 2, RED)
    first.close()
    file = run.folder / "pictures" / "val_00000002.png"
    file.write_bytes(file.read_bytes()[:-30])
    RunLog(run, step=2).close()
    assert "val_00000002.png is not shown" in caplog.text
    assert [event.value for event in board(run.folder).Scalars("val/gIoU")] == [0.5]


def test_tensorboard_holds_what_the_log_holds_whatever_a_kill_left(tmp_path):
    run = RunConfig(str(tmp_path), "mine")
    run.folder.mkdir()
    first = RunLog(run)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": float(step)})
    first.close()
    (events,) = (run.folder / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-40])  # what was not flushed
    (run.folder / "tensorboard" / "mine.txt").write_text("kept")
    with (run.folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    RunLog(run, step=3).close()
    assert [(event.step, event.value) for event in board(run.folder).Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3)]
    assert len(list((run.folder / "tensorboard").iterdir())) == 2 and len(read_log(run.folder / "log.jsonl")) == 3


def test_a_log_that_cannot_be_written_is_named_and_a_board_stops_nothing(tmp_path, monkeypatch):
    run = RunConfig(str(tmp_path), "mine")
    run.folder.mkdir()
    warned: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *words: warned.append(text % words))
    run_log = RunLog(run)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log.board, "add_scalar", full)
    run_log.write("train", 1, {"loss": 1.0})
    run_log.write("train", 2, {"loss": 1.0})
    assert len(warned) == 1 and "tensorboard cannot be written: No space left on device" in warned[0]
    assert len(read_log(run.folder / "log.jsonl")) == 2
    assert run_log.file is not None
    run_log.file.close()
    with Path("/dev/full").open("w") as full_disk:
        run_log.file = full_disk
        with pytest.raises(OSError, match=r"log\.jsonl cannot be written: No space left on device.*GiB free"):
            run_log.write("train", 3, {"loss": 1.0})
        os.dup2(os.open(os.devnull, os.O_WRONLY), full_disk.fileno())  # so that it can be closed


def test_meters_go_on_with_what_a_checkpoint_kept():
    whole, first, second = Meters(), Meters(), Meters()
    values = [torch.tensor(0.1), torch.tensor(0.7), torch.tensor(1e-3)]
    for meters, part in ((whole, values), (first, values[:2])):
        for value in part:
            meters.add({"loss": value}, weight=3)
    second.restore(json.loads(json.dumps([first.state()])))
    second.add({"loss": values[2]}, weight=3)
    means = second.read()
    assert means["loss"] == whole.read()["loss"] and means[SPEED] > 0 and second.state() == {}
    spread = Meters()  # of two processes, resumed by one
    spread.restore([first.state(), first.state()])
    assert spread.read()["loss"] == first.read()["loss"]
    Meters().restore([])


def test_other_processes_write_nothing(tmp_path):
    quiet = RunLog(RunConfig(str(tmp_path), "mine"), enabled=False)
    quiet.write("train", 1, {"loss": 1.0})
    quiet.picture("val", 1, RED)
    quiet.close()
    assert not (tmp_path / "mine").exists()


def test_wandb_without_the_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks a module that cannot be imported
    with pytest.raises(ImportError, match=r"run\.wandb names a project.*pip install wandb.*run\.wandb=null"):
        import_wandb()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ImportError, match="not installed"):
        RunLog(RunConfig(str(tmp_path), "mine", tensorboard=False, wandb="project"))


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = RunConfig(str(tmp_path), "mine", tensorboard=False, wandb="project")
    run.folder.mkdir()
    for step in (1, 2):
        run_log = RunLog(run, step=step - 1)
        run_log.write("train", step, {"loss": 1.0})
        run_log.picture("val", step, RED)
        run_log.close()
    name = (run.folder / "wandb_id").read_text()
    assert len(list((run.folder / "wandb").glob(f"offline-run-*-{name}"))) == 2


def test_meters_weigh_by_pictures_and_start_anew():
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0)}, weight=3)
    meters.add({"loss": torch.tensor(5.0)}, weight=1)
    means = meters.read()
    assert means["loss"] == 2.0 and means[SPEED] > 0 and 0 <= means[WAIT] <= 1
    assert (MEMORY in means) == torch.cuda.is_available()
    assert meters.read() == {} == peak_memory(torch.device("cpu"))


def test_meters_count_what_batches_lack_and_start_from_zero():
    meters = Meters()
    batches = [cast(Batch, SimpleNamespace(skipped=["a", "b"], cut_rows=1, cut_tokens=30))] * 2
    whole = cast(Batch, SimpleNamespace(skipped=[], cut_rows=0, cut_tokens=0))
    stream = iter([*batches, whole])
    assert [meters.timed(stream).cut_rows for _ in range(3)] == [1, 1, 0]
    meters.add({"loss": torch.tensor(1.0)}, weight=1)
    assert {(LEFT_OUT, 4), (CUT_ROWS, 2), (CUT_TOKENS, 60)} <= set(meters.read().items())
    meters.timed(iter([whole]))
    meters.add({"loss": torch.tensor(1.0)}, weight=1)
    assert not {LEFT_OUT, CUT_ROWS, CUT_TOKENS} & meters.read().keys(), "only where there are any"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_memory_is_that_since_the_last_reading():
    peak_memory(torch.device("cuda"))
    held = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    del held
    assert peak_memory(torch.device("cuda"))[MEMORY] >= 0.25 > peak_memory(torch.device("cuda"))[MEMORY]


@dataclass
class Listed:
    """A source by its annotation file and its images."""

    files: tuple[Path, ...]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def image_paths(self) -> list[str]:
        return [f"/somewhere/{name}" for name in self.names]


def test_a_run_folder_tells_what_it_was_trained_on_and_when_that_changes(tmp_path, monkeypatch):
    notes = tmp_path / "notes.json"
    notes.write_text("[]")
    os.utime(notes, ns=(10**18, 10**18))
    part = Part("refer/mine", cast(Source, Listed((notes,), ["a.jpg", "b.jpg"])), 0.5, [1])
    warned: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *words: warned.append(text % words))
    for _ in range(2):
        describe_start(tmp_path)
        describe_data(tmp_path, [part])
    assert not warned
    first, second = starts(tmp_path)
    assert first["data"] == second["data"] == {"refer/mine": fingerprint(part)}
    mine = first["data"]["refer/mine"]
    assert mine["records"] == 2 and mine["used"] == 1 and mine["files"] == {str(notes): [2, 10**18]}
    assert {"command", "revision", "device", "versions", "started"} <= first.keys()
    notes.write_text("[1]")
    describe_start(tmp_path)
    describe_data(tmp_path, [Part("refer/mine", cast(Source, Listed((notes,), ["b.jpg", "a.jpg"])), 0.5, [1])])
    assert len(warned) == 1 and "refer/mine" in warned[0] and "files, pictures differ" in warned[0]


def test_versions_are_of_all_that_is_required():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"transformers", "deepspeed", "opencv-python-headless", "PyYAML"} <= found.keys()


def test_a_package_under_another_name_stops_no_run(monkeypatch):
    """Conda and containers have e.g. opencv-python in place of opencv-python-headless."""
    version = importlib.metadata.version

    def without_opencv(name):
        if name.startswith("opencv"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without_opencv)
    found = versions()
    assert found["opencv-python-headless"] is None and found["torch"]


class TestPictures:
    """Panels of several objects, and of answers read back from a file."""

    def record(self, tmp_path: Path) -> Record:
        photo = tmp_path / "photo.png"
        Image.fromarray(RED).save(photo)
        masks = [np.zeros((8, 10), bool) for _ in range(3)]
        masks[0][:4], masks[1][4:], masks[2][:, :2] = True, True, True
        targets = tuple(Target(name, lambda mask=mask: mask) for name, mask in zip("abc", masks, strict=True))
        return Record(photo, "multi", targets)

    def replies(self) -> tuple[list[Query], list[Reply]]:
        """The question is about a and b. The answer has a mask for b, then one for something else, and none for c."""
        logits = torch.full((2, 8, 10), -1.0)
        logits[0, 4:] = logits[1, 2:3, 8:] = 2.0
        both = Query("<image>\nWhich?", (Mask(0), Mask(1)), (0, 1), ("a", "b"))
        one = Query("<image>\nAnd?", (Mask(2),), (2,), ("c",))
        first = Reply("these", (Claim("", 0), Claim("", 1)), logits)
        return [both, one], [first, Reply("none", (), logits[:0])]

    def test_masks_have_the_colour_of_what_they_are_matched_to(self, tmp_path):
        record = self.record(tmp_path)
        shown = panel(record, *self.replies())
        assert [layer.name for layer in shown.true] == ["a", "b", "c"]
        assert [layer.name for layer in shown.predicted] == ["b", "a"]
        assert [layer.colour for layer in shown.predicted] == [shown.true[1].colour, shown.true[0].colour]
        assert shown.note == "IoU 1.00, IoU 0.05, missed"

    def test_what_is_too_much_is_grey(self, tmp_path):
        queries, replies = self.replies()
        three = torch.cat([replies[0].masks, replies[0].masks[:1]])
        replies[0] = Reply("", tuple(Claim("", index) for index in range(3)), three)
        shown = panel(self.record(tmp_path), queries, replies)
        grey = [layer for layer in shown.predicted if layer.name == "extra"]
        assert len(grey) == 1 and len(set(grey[0].colour)) == 1 and shown.note.endswith("extra, missed")

    def test_read_back_from_a_file_they_are_the_same(self, tmp_path):
        record, (queries, replies) = self.record(tmp_path), self.replies()
        answers = json.loads(json.dumps(answers_of(record, queries, replies)))
        before, after = panel(record, queries, replies), replay(record, answers)
        assert (after.question, after.answer, after.note) == (before.question, before.answer, before.note)
        assert same(after.predicted, before.predicted) and same(after.true, before.true)


def same(some: Sequence[Layer], others: Sequence[Layer]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(a.name == b.name and a.colour == b.colour and (a.mask == b.mask).all() for a, b in pairs)


class TestCurves:
    def run(self, folder: Path, losses: list[float]) -> Path:
        folder.mkdir()
        rows: list[dict[str, Any]] = [
            {"kind": "train", "step": step + 1, "loss": loss, "lr": 0.1} for step, loss in enumerate(losses)
        ]
        rows.append({"kind": "val", "step": len(losses), "ReasonSeg|val": {"gIoU": 0.25}})
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def test_curves_are_read_by_kind_and_smoothed(self, tmp_path):
        curves = plot_run.read_curves(self.run(tmp_path / "a", [4.0, 2.0, 3.0]))
        assert curves["train/loss"] == ([1, 2, 3], [4.0, 2.0, 3.0])
        assert curves["val/ReasonSeg|val/gIoU"] == ([3], [0.25])
        assert plot_run.smooth([4.0, 2.0, 3.0], 2) == [4.0, 3.0, 2.5] and plot_run.smooth([1.0, 5.0], 1) == [1, 5]

    def test_several_runs_share_a_picture(self, tmp_path):
        runs = [self.run(tmp_path / "a", [4.0, 2.0, 3.0]), self.run(tmp_path / "b", [5.0, 1.0])]
        out = tmp_path / "curves.png"
        assert plot_run.main([*map(str, runs), "--out", str(out), "--keys", "loss", "val/*", "--smooth", "2"]) == 0
        assert len(np.unique(np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3), axis=0)) > 20

    def test_what_is_not_there_is_named(self, tmp_path):
        run = self.run(tmp_path / "a", [4.0])
        with pytest.raises(SystemExit, match="no numbers 'los'; have: train/loss, train/lr, val"):
            plot_run.main([str(run), "--keys", "los", "--out", str(tmp_path / "x.png")])
        with pytest.raises(SystemExit, match=r"gone.*log\.jsonl"):
            plot_run.main([str(tmp_path / "gone"), "--out", str(tmp_path / "x.png")])
        with pytest.raises(SystemExit, match=r"plot_run: Format 'xyz' is not supported"):
            plot_run.main([str(run), "--out", str(tmp_path / "x.xyz")])
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "log.jsonl").touch()
        with pytest.raises(SystemExit, match="nothing to plot yet: begun logged none"):
            plot_run.main([str(tmp_path / "begun"), "--out", str(tmp_path / "x.png")])
