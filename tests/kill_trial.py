"""Kills real training runs at random moments, resumes each, and compares it with one that nobody interrupted.

    python -m tests.kill_trial OUT [--kills 20] [--seed 0]

Ways to kill: SIGKILL and SIGTERM, to the process alone, to torchrun, and to the whole process group with the loader
workers in it. A run must have kept its last save (and, at SIGTERM, every step that it logged), and in the end have the
weights, log, TensorBoard, images and pointers of an uninterrupted run. OUT/kills.json holds a line per kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny_run import ROOT, environment, write_reason_seg, write_recipe
from training.checkpoint import Checkpoints, damage
from utils.run_log import read_log

STEPS, EPOCHS, SAVED_EVERY, LOGGED_EVERY = 5, 3, 4, 3  # so that some lines begin in one start and end in the next
TIMED = ("time", "images_per_second", "data_wait")  # what no two runs have in common
PATIENCE = 600.0  # seconds for one start
AT_START = 5  # one of this many kills comes before anything is trained


@dataclass(frozen=True)
class Way:
    name: str
    processes: int
    signal: signal.Signals
    group: bool  # the signal goes to all processes of the job, not to the first alone


WAYS = (
    Way("SIGKILL to the process", 1, signal.SIGKILL, group=False),
    Way("SIGTERM to torchrun", 2, signal.SIGTERM, group=False),
    Way("SIGTERM to the group", 1, signal.SIGTERM, group=True),
    Way("SIGKILL to torchrun's group", 2, signal.SIGKILL, group=True),
    Way("SIGTERM to the process", 1, signal.SIGTERM, group=False),
    Way("SIGTERM to torchrun's group", 2, signal.SIGTERM, group=True),
)


def trial(out: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """One line per kill; raises nothing, `verdict` of a line says what was wrong."""
    write_reason_seg(out / "data")
    train = {"epochs": EPOCHS, "steps_per_epoch": STEPS, "save_steps": SAVED_EVERY, "print_freq": LOGGED_EVERY}
    data = {"workers": 1, "dataset_dir": str(out / "data")}
    recipe = write_recipe(out, train={"grad_accumulation_steps": 1, **train}, data=data, eval={"num_examples": 1})
    whole, spans = {}, {}
    for processes in sorted({way.processes for way in WAYS}):
        run, job = start(recipe, out, f"whole{processes}", processes)
        begun = wait_until_begun(run, job)
        assert finish(job) == 0, output(run)
        whole[processes], spans[processes] = run, time.monotonic() - begun
    chance, lines = random.Random(seed), []
    for number in range(kills):
        way, share = WAYS[number % len(WAYS)], chance.random()
        line = one_kill(recipe, out, number, way, share, spans[way.processes], whole[way.processes])
        lines.append(line)
        print(json.dumps(line), flush=True)
        (out / "kills.json").write_text(json.dumps(lines, indent=1) + "\n")
    return lines


def one_kill(recipe: Path, out: Path, number: int, way: Way, share: float, span: float, whole: Path) -> dict[str, Any]:
    run, job = start(recipe, out, f"kill{number}", way.processes)
    if number % AT_START == AT_START - 1:
        time.sleep(share * span)
    else:  # by what is done, not by the clock: how fast it goes depends on what else the machine does
        wait_until_begun(run, job)
        done = share * STEPS * EPOCHS
        while last_logged(run) + LOGGED_EVERY <= done and job.poll() is None:
            time.sleep(0.01)
        time.sleep((done % LOGGED_EVERY) * span / (STEPS * EPOCHS))
    saved = newest(run)
    over = job.poll() is not None
    (os.killpg if way.group else os.kill)(job.pid, way.signal) if not over else None
    finish(job)
    logged, kept = last_logged(run), newest(run)
    line = {"kill": number, "way": way.name, "share": round(share, 3), "over": over, "logged": logged}
    line |= {"saved_before": saved, "kept": kept, "stopped": "stopped at step" in output(run)}
    faults = [] if kept >= saved else [f"the save of step {saved} is gone"]
    faults += [f"{path.name} {why}" for path in checkpoints(run).complete() if (why := damage(path))]
    if line["stopped"] and kept < logged:
        faults.append(f"asked to stop, it kept step {kept} of {logged}")
    wait_for_the_lock(run)
    run, job = start(recipe, out, f"kill{number}", way.processes)
    if code := finish(job):
        faults.append(f"going on ended with {code}: {output(run)[-2000:]}")
    else:
        faults += differences(run, whole)
    return line | {"lost_steps": max(0, logged - kept), "verdict": faults or "as uninterrupted"}


def start(recipe: Path, out: Path, name: str, processes: int) -> tuple[Path, subprocess.Popen]:
    """The run's folder and its first process, which leads a process group of its own."""
    words = [sys.executable]
    if processes > 1:
        words = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(processes)]
    words += ["train_ds.py", "--config", str(recipe), "--exp_name", name]
    run = out / "runs" / name
    with (out / f"{name}.txt").open("a") as file:
        job = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True)
    return run, job


def wait_until_begun(run: Path, job: subprocess.Popen) -> float:
    """When the run folder is first written: from then on there is something to lose."""
    deadline = time.monotonic() + PATIENCE
    while not (run / "meta.json").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic()


def finish(job: subprocess.Popen) -> int:
    """Its exit status; whatever is left of the group then, such as workers whose trainer was killed, ends by itself."""
    return job.wait(PATIENCE)


def wait_for_the_lock(run: Path) -> None:
    """Processes that outlive torchrun may still be saving; a second start meanwhile would rightly be refused."""
    import fcntl

    deadline = time.monotonic() + PATIENCE
    while (run / ".lock").exists() and time.monotonic() < deadline:
        with (run / ".lock").open("a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)


def differences(run: Path, whole: Path) -> list[str]:
    """In what a run that was killed and resumed differs from the uninterrupted one."""
    unequal = []
    if rows(run) != rows(whole):
        unequal.append(f"log.jsonl: {rows(run)} for {rows(whole)}")
    if board(run) != board(whole):
        unequal.append("TensorBoard")
    for pointer in ("last", "best"):
        pair = [(folder / "checkpoints" / pointer).read_text() for folder in (run, whole)]
        if pair[0] != pair[1]:
            unequal.append(f"{pointer}: {pair}")
    images = [sorted(path.name for path in (folder / "pictures").iterdir()) for folder in (run, whole)]
    if images[0] != images[1]:
        unequal.append(f"pictures: {images}")
    first, second = (load_file(str(checkpoints(folder).last()) + "/trainable.safetensors") for folder in (run, whole))
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        unequal.append("weights")
    unequal += [f"unfinished: {path.name}" for path in run.rglob(".unfinished*")]
    return unequal


def rows(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in read_log(run / "log.jsonl")]


def board(run: Path) -> dict[str, Any]:
    """Tag -> (step, value) of every number, and the steps of the images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.rpartition("/")[2] not in TIMED]
    numbers = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return numbers | {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def checkpoints(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints")


def newest(run: Path) -> int:
    last = checkpoints(run).last()
    return int(last.name.removeprefix("step_")) if last else 0


def last_logged(run: Path) -> int:
    return max((row["step"] for row in read_log(run / "log.jsonl")), default=0) if (run / "log.jsonl").exists() else 0


def output(run: Path) -> str:
    return (run.parents[1] / f"{run.name}.txt").read_text(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    lines = trial(args.out, args.kills, args.seed)
    wrong = [line for line in lines if line["verdict"] != "as uninterrupted"]
    print(
        f"{len(lines)} kills, {len(wrong)} not as uninterrupted, {sum(line['lost_steps'] for line in lines)} steps lost"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
