"""Two processes under the DeepSpeed launcher: ZeRO-2 trains, saves, goes on exactly, and equals one process."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_ds
from systems.assistant import load
from tests.tiny_run import start, train_log, write_reason_seg, write_recipe

COLUMNS = ("step", "loss", "ce", "bce", "dice")


def launch(*words: str):
    """Two processes; the port is this test's own."""
    port = 20000 + os.getpid() % 20000
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port))
    return start("train_ds.py", *words, launcher=launcher, timeout=900)


def curve(run: Path) -> list[tuple]:
    return [tuple(row[name] for name in COLUMNS) for row in train_log(run)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    write_reason_seg(folder / "data")
    train = {"grad_accumulation_steps": 1, "warmup_steps": 0, "zero_stage": 2}
    recipe = write_recipe(folder, train=train, eval={"limit": 2})
    launch("--config", str(recipe), "--exp_name", "pair")
    return folder, recipe


def test_resumed_pair_equals_the_uninterrupted_one(world):
    """The run as it stood when killed after step 2: later checkpoints are not there yet, the log is longer."""
    folder, recipe = world
    run, again = folder / "runs" / "pair", folder / "runs" / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step_4")
    launch("--config", str(recipe), "--exp_name", "again")
    assert curve(again) == curve(run)
    assert [row["ReasonSeg|val"] for row in train_log(again, "val")] == [
        row["ReasonSeg|val"] for row in train_log(run, "val")
    ]
    weights = [load_file(path / "checkpoints" / "step_4" / "trainable.safetensors") for path in (run, again)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_pair_scores_every_picture_once_and_can_be_loaded(world):
    folder, _ = world
    run = folder / "runs" / "pair"
    assert (run / "checkpoints" / "last").read_text().strip() == "step_4"
    assert len(list((run / "checkpoints" / "step_4" / "engine").glob("*optim_states.pt"))) == 2
    assert load(run).system.name == "lisa"


def test_one_process_with_the_same_global_batch_draws_the_same(world):
    """Samples are dealt to processes by number: two processes with a picture each see what one with both sees."""
    folder, recipe = world
    words = ("--batch_size", "2", "--no_eval", "--set", "train.zero_stage=0", "--set", "train.epochs=1")
    train_ds.main(["--config", str(recipe), "--exp_name", "alone", *words])
    (_, *alone), (_, *pair) = curve(folder / "runs" / "alone")[0], curve(folder / "runs" / "pair")[0]
    assert alone[-2:] == pytest.approx(pair[-2:], rel=1e-4)  # one mask a picture, so means over masks agree
