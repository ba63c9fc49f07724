"""The training program on tiny published weights: it runs, logs, validates, saves, stops and resumes exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train_ds
from tests.tiny_assistant import toy_world
from tests.tiny_run import ROOT, environment, start, train_log, write_reason_seg, write_recipe
from training import loop
from training.run import StopSignal, with_epochs
from utils.config import DataConfig, Recipe, TrainConfig, load_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_reason_seg(folder / "data")
    return folder, write_recipe(folder)


@pytest.fixture(scope="module")
def finished(world):
    """An uninterrupted run of four steps."""
    folder, recipe = world
    train_ds.main(["--config", str(recipe), "--exp_name", "whole"])
    return folder / "runs" / "whole"


def curve(run) -> list[tuple]:
    names = ("step", "loss", "ce", "bce", "dice", "lr")
    return [tuple(row[name] for name in names) for row in train_log(run)]


def test_a_run_logs_every_step_and_its_validations(finished):
    assert [row["step"] for row in train_log(finished)] == [1, 2, 3, 4]
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 for row in train_log(finished))
    assert train_log(finished)[1]["grad_norm"] > 0
    assert [row["step"] for row in train_log(finished, "val")] == [2, 4]
    assert list((finished / "tensorboard").glob("events*"))


def test_a_run_points_to_its_last_and_best_checkpoints(finished):
    assert (finished / "checkpoints" / "last").read_text().strip() == "step_4"
    assert (finished / "checkpoints" / "best").read_text().strip() in ("step_2", "step_4")


def test_a_run_folder_says_what_was_run(finished):
    """The recipe, the command, the versions, the data."""
    assert yaml.safe_load((finished / "recipe.yaml").read_text())["run"]["exp_name"] == "whole"
    (meta,) = json.loads((finished / "meta.json").read_text())
    assert meta["processes"] == 1 and "torch" in meta["versions"] and meta["command"]
    assert meta["data"]["reason_seg/ReasonSeg|train (" + str(finished.parents[1] / "data") + ")"]["records"] == 8


def test_validation_leaves_pictures_and_a_page(finished):
    assert [path.name for path in sorted((finished / "pictures").iterdir())] == ["val_00000002.png", "val_00000004.png"]
    page = np.asarray(Image.open(finished / "pictures" / "val_00000004.png"))
    assert page.shape[1] > 4 * 260 and len(np.unique(page.reshape(-1, 3), axis=0)) > 100
    report = (finished / "validation" / "report" / "index.html").read_text(encoding="utf-8")
    assert 'data-suite="ReasonSeg|val"' in report and 'alt="true masks"' in report
    scores = json.loads((finished / "validation" / "results.json").read_text())["suites"]["ReasonSeg|val"]["figures"]
    assert scores[0]["value"] == train_log(finished, "val")[-1]["ReasonSeg|val"]["gIoU"]


def test_stopped_run_goes_on_exactly(world, finished):
    folder, recipe = world
    line = ["--config", str(recipe), "--exp_name", "halting"]
    run = folder / "runs" / "halting"
    for count in (1, 2):  # a time limit that is over after one step
        train_ds.main([*line, "--set", "train.time_limit_minutes=1e-6"])
        assert len(train_log(run)) == count
    train_ds.main(line)
    assert curve(run) == curve(finished)
    assert [row["step"] for row in train_log(run, "val")] == [2, 4]  # the one it owed at the stop is made up for
    assert len(json.loads((run / "meta.json").read_text())) == 3


def test_killed_run_goes_on_exactly(world, finished):
    """kill -9 while training; what was logged beyond the last complete checkpoint is trained again."""
    folder, recipe = world
    line = ["--config", str(recipe), "--exp_name", "killed", "--no_eval"]
    run = folder / "runs" / "killed"
    process = subprocess.Popen(
        [sys.executable, "train_ds.py", *line],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 900
        while not (run / "checkpoints" / "step_2").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint in a quarter of an hour"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run / "checkpoints" / ".unfinished_step_3").mkdir(exist_ok=True)
    train_ds.main(line)
    assert curve(run) == curve(finished)
    assert not (run / "checkpoints" / ".unfinished_step_3").exists()
    assert (run / "checkpoints" / "best").read_text().strip() == "step_4"  # without scores the newest counts


def test_workers_do_not_change_a_draw(world, finished):
    folder, recipe = world
    train_ds.main(["--config", str(recipe), "--exp_name", "workers", "--workers", "2", "--no_eval"])
    assert curve(folder / "runs" / "workers") == curve(finished)


def test_second_run_does_not_overwrite_the_first(world, finished):
    _, recipe = world
    with pytest.raises(SystemExit, match=r"already holds a run up to step_4.*--auto_resume"):
        train_ds.main(["--config", str(recipe), "--exp_name", "whole", "--no-auto_resume"])


def test_a_run_may_count_steps_without_epochs(world):
    """train.steps replaces the recipe's epochs; the run validates and saves every eval.every_steps and at the end."""
    folder, recipe = world
    line = ["--config", str(recipe), "--exp_name", "steps", "--set", "train.steps=3", "--set", "eval.every_steps=2"]
    train_ds.main(line)
    run = folder / "runs" / "steps"
    saved = load_recipe(run)
    assert (saved.train.steps, saved.train.epochs, saved.train.steps_per_epoch) == (3, None, None)
    assert [row["step"] for row in train_log(run)] == [1, 2, 3]
    assert [row["step"] for row in train_log(run, "val")] == [2, 3]
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_2", "step_3"}
    train_ds.main([*line, "--set", "train.steps=4"])
    assert [row["step"] for row in train_log(run)] == [1, 2, 3, 4]


def test_a_run_stops_where_validation_is_no_better(world, capsys):
    """A learning rate that moves no weight gives every validation the same figure: none is better than the first."""
    folder, recipe = world
    run = folder / "runs" / "patient"
    fixed = ("train.epochs=8", "train.steps_per_epoch=1", "train.lr=1e-30", "eval.num_examples=0")
    line = ["--config", str(recipe), "--exp_name", "patient", *(word for value in fixed for word in ("--set", value))]
    two = [*line, "--set", "train.patience=2"]
    for _ in range(2):  # a time limit that is over after one step; the next start validates it
        train_ds.main([*two, "--set", "train.time_limit_minutes=1e-6"])
    assert [row["step"] for row in train_log(run, "val")] == [1]
    train_ds.main(two)
    assert [row["step"] for row in train_log(run, "val")] == [1, 2, 3] and len(train_log(run)) == 3
    assert len({row["ReasonSeg|val"]["gIoU"] for row in train_log(run, "val")}) == 1
    assert (run / "checkpoints" / "best").read_text().strip() == "step_1"
    said = f"stopped: gIoU no better for 2 validations at step 3 of 8: {run}"
    assert said in capsys.readouterr().out
    train_ds.main(two)  # the same command again
    assert len(train_log(run)) == 3 and said in capsys.readouterr().out
    train_ds.main([*line, "--set", "train.patience=3"])
    assert len(train_log(run)) == 4  # and counted from there
    state = run / "checkpoints" / "step_4" / "state.json"
    values = json.loads(state.read_text())
    assert values.pop("no_better") == 3
    state.write_text(json.dumps(values))  # as a version without patience saved it: nothing is counted yet
    train_ds.main(two)
    assert [row["step"] for row in train_log(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("eval.validate=false",), r"train\.patience \(3\).*set eval\.validate=true"),
        (("eval.suites=[]",), r"train\.patience \(3\).*name eval\.suites"),
        (("train={patience: 3, steps: 4}",), r"train\.patience \(3\).*set eval\.every_steps"),
    ],
)
def test_patience_without_validations_stops_at_the_door(settings, message):
    words = [word for value in ("train.patience=3", *settings) for word in ("--set", value)]
    with pytest.raises(SystemExit, match=message):
        train_ds.main(words)


def test_eval_only_scores_and_trains_nothing(world, finished):
    folder, recipe = world
    results = []
    for words in ([], ["--resume", str(finished / "checkpoints" / "step_4")]):
        train_ds.main(["--config", str(recipe), "--exp_name", "scored", "--eval_only", *words])
        results.append(json.loads((folder / "runs" / "scored" / "eval" / "results.json").read_text()))
    assert not (folder / "runs" / "scored" / "checkpoints").exists()
    with pytest.raises(SystemExit, match=r"runs/whole holds a run up to step_4: --resume .*--no_auto_resume"):
        train_ds.main(["--config", str(recipe), "--exp_name", "whole", "--eval_only"])
    (line,) = (folder / "runs" / "scored" / "eval" / "predictions").glob("*.jsonl")
    assert len(line.read_text().splitlines()) == 1  # eval.limit
    assert all(result["suites"]["ReasonSeg|val"]["pictures"] == 1 for result in results)


def test_missing_data_and_unknown_figures_stop_at_the_door(world, tmp_path):
    _, recipe = world
    with pytest.raises(SystemExit, match=r"train_ds\.py: .*(ade20k|ADE)"):
        train_ds.main(["--config", str(recipe), "--val_dataset", "ade20k|val"])
    with pytest.raises(SystemExit, match=r"train_ds\.py: eval\.best_by: no figure of ReasonSeg.val 'mIoU'"):
        train_ds.main(["--config", str(recipe), "--set", "eval.best_by=mIoU"])
    with pytest.raises(SystemExit, match=r"train_ds\.py: no system 'lissa' \(did you mean 'lisa'\?\)"):
        train_ds.main(["--config", str(recipe), "--set", "system=lissa"])
    with pytest.raises(SystemExit, match=r"train_ds\.py: no field in options 'nope'"):
        train_ds.main(["--config", str(recipe), "--set", "options.nope=1"])
    with pytest.raises(SystemExit, match=r"train\.offload=all needs train\.zero_stage 3"):
        train_ds.main(["--config", str(recipe), "--set", "train.offload=all"])
    with pytest.raises(SystemExit, match=r"no train\.on_bad_loss 'ignore'; have: .*skip"):
        train_ds.main(["--config", str(recipe), "--set", "train.on_bad_loss=ignore"])
    with pytest.raises(SystemExit, match=r"train_ds\.py: .*nowhere"):
        train_ds.main(["--config", str(recipe), "--exp_name", "from", "--version", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"train_ds\.py: .*nothing"):
        words = ["--dataset_dir", str(tmp_path / "nothing"), "--set", "eval.validate=false"]
        train_ds.main(["--config", str(recipe), "--exp_name", "from", *words])
    with pytest.raises(SystemExit, match="is not a complete checkpoint"):
        train_ds.main(["--config", str(recipe), "--exp_name", "from", "--resume", str(tmp_path)])


def test_wandb_that_is_not_installed_stops_at_the_door(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match=r"run\.wandb names a project"):
        train_ds.main(["--config", str(world[1]), "--exp_name", "watched", "--set", "run.wandb=mine"])


def test_wrong_flag_stops_at_the_door():
    with pytest.raises(SystemExit, match="did you mean --epochs"):
        train_ds.main(["--epoch", "3"])
    with pytest.raises(SystemExit, match=r"field in train 'epoch'.*did you mean 'epochs'"):
        train_ds.main(["--set", "train.epoch=3"])


def test_dropout_of_a_step_is_its_own():
    numbers = []
    for key in ((0, 3, 0), (0, 4, 0), (1, 3, 0), (0, 3, 1), (0, 3, 0)):
        loop.seed_dropout(*key)
        numbers.append(torch.rand(1).item())
    assert numbers[0] == numbers[4] and len(set(numbers)) == 4


@pytest.mark.parametrize(
    ("sampling", "stated", "steps"),
    [("rates", None, 500), ("rates", 7, 7), ("epoch", None, 4), ("epoch", 4, 4), ("epoch", 9, 9)],
)
def test_an_epoch_of_every_record_once_counts_its_own_steps(caplog, sampling, stated, steps):
    train = TrainConfig(batch_size=2, grad_accumulation_steps=3, steps_per_epoch=stated)
    found = with_epochs(Recipe(data=DataConfig(sampling=sampling), train=train), pictures=20)
    assert found.train == replace(train, steps_per_epoch=steps)
    assert ("an epoch of data.sampling epoch is 4 steps (20 images, 6 per step)" in caplog.text) == (stated == 9)


def test_sigterm_and_time_limit_ask_to_stop():
    stop = StopSignal()
    try:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    finally:
        stop.close()
    late = StopSignal(minutes=60, started=time.monotonic() - 3601)  # the start of the program counts
    late.close()
    assert late()


@pytest.mark.parametrize(
    "program", ["train_ds.py", "merge_lora_weights_and_save_hf_model.py", "test_sem.py", "chat.py", "app.py"]
)
def test_every_entry_point_starts(program):
    assert "usage:" in start(program, "--help").stdout


def test_deepspeed_launcher_is_there():
    assert shutil.which("deepspeed")


def test_rows_that_are_cut_are_trained_on_and_counted_in_the_log(tmp_path):
    """Dialogues all longer than the limit: cut they are trained on, else nothing is left to train on."""
    toy_world(tmp_path / "data", "llava_instruct")
    mixture = [{"task": "vqa", "sets": ["llava_instruct_150k"]}]
    recipe = write_recipe(
        tmp_path,
        model={"model_max_length": 256 + 139},  # every question fits, no dialogue does
        data={"mixture": mixture, "on_bad_sample": "skip", "long_rows": "cut"},
        eval={"suites": [], "validate": False},
    )
    train_ds.main(["--config", str(recipe)])
    rows = train_log(tmp_path / "runs" / "tiny")
    assert len(rows) == 4 and all(row["cut_rows"] == 2 and row["cut_tokens"] >= 2 and row["ce"] > 0 for row in rows)
    assert not any("left_out" in row for row in rows)
    with pytest.raises(RuntimeError, match=r"records in a row gave no sample; .* does not fit in model_max_length 395"):
        train_ds.main(["--config", str(recipe), "--exp_name", "error", "--set", "data.long_rows=error"])
