"""Two processes: every ZeRO stage trains, saves, merges and resumes exactly, and equals one process.

They start under DeepSpeed's launcher first, then as two simulated nodes, each with a launcher of its own.
"""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as merge
import train_ds
from systems.assistant import load
from tests.tiny_run import start, train_log, write_reason_seg, write_recipe

COLUMNS = ("step", "loss", "ce", "bce", "dice")
NEAR: dict[str, Any] = {"rel": 1e-5}  # sums of fp32 numbers in another order, through four updates
NOISE = "k_proj.bias"  # softmax does not see it: its gradient is rounding alone, which Adam makes as large as any other
STAGES = ("stage0", "stage1", "stage2", "stage3")


PORT = str(20000 + os.getpid() % 20000)  # this test's own


def launch(file: Path, runs: list[dict]) -> None:
    """Two processes go through all runs one after another."""
    file.write_text(json.dumps(runs))
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", PORT)
    start("tests/several_runs.py", file, launcher=launcher, timeout=1800)


def launch_nodes(file: Path, runs: list[dict]) -> None:
    """The same by two launchers with a process each, at addresses of their own on the loopback network."""
    file.write_text(json.dumps(runs))
    launcher = (str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc_per_node", "1")
    meet = ("--master_addr", "127.0.0.1", "--master_port", PORT)

    def node(rank: int) -> None:
        here = ("--node_rank", str(rank), "--local_addr", f"127.0.0.{rank + 1}")
        start("tests/several_runs.py", file, launcher=(*launcher, *meet, *here), timeout=1800)

    with ThreadPoolExecutor() as nodes:
        list(nodes.map(node, range(2)))


def curve(run: Path) -> list[tuple]:
    return [tuple(row[name] for name in COLUMNS) for row in train_log(run)]


def weights(run: Path, step: int = 4) -> dict:
    return load_file(run / "checkpoints" / f"step_{step}" / "trainable.safetensors")


def largest_difference(some: dict, others: dict, without: str = "no such name") -> float:
    assert some.keys() == others.keys()
    names = [name for name in some if not name.endswith(without)]
    return max(float((some[name] - others[name]).abs().max()) for name in names)


def cut(run: Path, name: str) -> Path:
    """A copy of the run as it stood when killed after step 2: step 4 is not there yet, the log is longer."""
    again = run.with_name(name)
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step_4")
    (again / "checkpoints" / "best").write_text("step_2")
    return again


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of two processes: one per stage (the last two validate on three images, so unevenly), and unlucky ones."""
    folder = tmp_path_factory.mktemp("pair")
    write_reason_seg(folder / "data", val=3)
    train = {"grad_accumulation_steps": 1, "warmup_steps": 0, "zero_options": {"stage3_param_persistence_threshold": 0}}
    recipe = write_recipe(folder, train=train, eval={"limit": 3})

    def argv(name: str, *words: str, stage: int = 2) -> list[str]:
        return ["--config", str(recipe), "--exp_name", name, "--set", f"train.zero_stage={stage}", *words]

    plain: list[dict[str, Any]] = []
    for stage in range(4):
        words = ("--no_eval",) if stage < 2 else ()
        plain.append({"argv": argv(f"stage{stage}", *words, stage=stage)})
    poison = {"poison": [1, 1]}
    unlucky: list[dict[str, Any]] = [
        {"argv": argv("skip", "--no_eval", "--set", "train.on_bad_loss=skip", stage=3), **poison},
        {"argv": argv("stop", "--no_eval"), **poison},
        {"argv": argv("term", "--no_eval", "--set", "train.steps_per_epoch=500"), "terminate": 1},
    ]
    unlucky[-1]["log"] = str(folder / "runs" / "term" / "log.jsonl")
    launch(folder / "first.json", plain + unlucky)
    return folder / "runs", argv


@pytest.fixture(scope="module")
def alone(world):
    """One process with the same number of micro-batches per step."""
    runs, argv = world
    train_ds.main(argv("alone", "--no_eval", "--grad_accumulation_steps", "2", stage=0))
    return runs / "alone"


@pytest.fixture(scope="module")
def resumed(world, alone):
    """Two nodes resume runs that stopped after step 2: their own, and one of one process."""
    runs, argv = world
    names = {"again2": ("stage2", 2), "again3": ("stage3", 3), "up": ("alone", 3), "over": ("stage2", 3)}
    for name, (source, _) in names.items():
        cut(runs / source, name)
    launch_nodes(runs.parent / "second.json", [{"argv": argv(name, stage=stage)} for name, (_, stage) in names.items()])
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_stages_and_numbers_of_processes_train_alike(world, alone, stage):
    runs, _ = world
    assert [row[0] for row in curve(alone)] == [1, 2, 3, 4]
    for mine, theirs in zip(curve(runs / stage), curve(alone), strict=True):
        assert mine == pytest.approx(theirs, **NEAR)
    assert largest_difference(weights(runs / stage), weights(alone), without=NOISE) < 1e-5


@pytest.mark.parametrize(("again", "first"), [("again2", "stage2"), ("again3", "stage3")])
def test_resumed_pair_equals_the_uninterrupted_one(resumed, again, first):
    assert curve(resumed / again) == curve(resumed / first)
    values = [[row["ReasonSeg|val"] for row in train_log(resumed / name, "val")] for name in (again, first)]
    assert values[0] == values[1] and len(values[0]) == 2
    assert largest_difference(weights(resumed / again), weights(resumed / first)) == 0


@pytest.mark.parametrize("name", ["up", "over"])
def test_more_processes_and_another_stage_go_on_alike(resumed, name):
    for mine, theirs in zip(curve(resumed / name), curve(resumed / "alone"), strict=True):
        assert mine == pytest.approx(theirs, **NEAR)
    state = json.loads((resumed / name / "checkpoints" / "step_4" / "state.json").read_text())
    assert (state["processes"], state["samples"], state["pictures"]) == (2, 8, 2)


def test_fewer_processes_go_on_alike(world, alone):
    runs, argv = world
    cut(runs / "stage3", "down")
    train_ds.main(argv("down", "--no_eval", "--grad_accumulation_steps", "2"))
    for mine, theirs in zip(curve(runs / "down"), curve(alone), strict=True):
        assert mine == pytest.approx(theirs, **NEAR)


def test_divided_weights_merge_to_the_same_model(world, alone):
    runs, _ = world
    merged = []
    for run in (runs / "stage3", alone):
        merge.main(["--run", str(run), "--tag", "last", "--save_path", str(run / "merged")])
        merged.append(load_file(run / "merged" / "model.safetensors"))
    assert largest_difference(*merged, without=NOISE) < 1e-5
    assert load(runs / "stage3" / "merged").system.name == "lisa"


def test_uneven_validation_scores_every_picture_once(world):
    """Three images for two processes: under ZeRO-3 one of them makes a forward pass alone."""
    runs, _ = world
    values = [[row["ReasonSeg|val"]["gIoU"] for row in train_log(runs / name, "val")] for name in ("stage2", "stage3")]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[0]) == 2


def test_bad_loss_of_one_process_stops_both_or_is_skipped_by_both(world):
    runs, _ = world
    errors = [(runs.parent / f"first.json.5.{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "step 2: the loss is nan" in errors[0] and ".jpg" in errors[0]
    assert len(curve(runs / "stop")) == 1
    losses = curve(runs / "skip")
    assert losses[0] == pytest.approx(curve(runs / "stage3")[0], **NEAR) and losses[1] != curve(runs / "stage3")[1]
    assert [row.get("skipped") for row in train_log(runs / "skip")] == [None, 1, 1, 1]
    state = json.loads((runs / "skip" / "checkpoints" / "step_4" / "state.json").read_text())
    assert (state["samples"], state["skipped"]) == (10, 1)


def test_sigterm_to_one_process_saves_on_both_and_leaves(world):
    runs, _ = world
    rows = curve(runs / "term")
    assert 1 <= len(rows) < 1000
    assert (runs / "term" / "checkpoints" / "last").read_text().strip() == f"step_{len(rows)}"
    assert len(weights(runs / "term", len(rows))) > 10
