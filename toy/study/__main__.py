"""Five papers in miniature: trains every system from the same toy base until it has learned and compares them.

    python -m toy.study                                   # everything, into runs/miniature
    python -m toy.study runs/miniature --only lisa gsva   # two rows; the others can follow later
    python -m toy.study runs/miniature --write_doc        # only rewrite docs/miniature.md from the results in OUT

Every row of the tables (a system, or LaSagnA without one of its strategies) has a folder per seed, OUT/<row>/seed<n>:
train/ (the run folder), one folder of answers per part of the evaluation, exam.json (its figures), log.txt. Systems are
trained with every seed, ablations with the first. A training ends after --steps, or before, when --patience validations
in a row were no better than the best before them. Finished stages are not repeated, interrupted ones resume. Writes
OUT/results.json, OUT/table.md and OUT/*.png; --write_doc also updates docs/miniature.md, its images and
docs/miniature.json, from which it takes rows and seeds that OUT lacks, where they were made with the same settings.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy.study.rows import ABLATION, ROWS, SYSTEM, Trial, trials
from utils.files import write_atomically
from utils.run_log import read_log

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = (
    *("ade20k", "cocostuff", "cityscapes", "mapillary", "refcoco", "refcoco+", "refcocog", "refclef", "grefcoco"),
    *("refzom", "R-refcoco", "R-refcoco+", "R-refcocog", "fprefcoco", "fprefcoco+", "fprefcocog", "muse", "reason_seg"),
    *("llava_instruct", "paco_lvis", "pascal_part", "openimage"),
)
SETTINGS = ("steps", "patience", "batch_size", "images", "most")  # flags that all rows of a folder share
VAL_IMAGES = 60  # per benchmark; the evaluation uses this many or fewer
REPORT_SECONDS = 30  # between two lines of progress
SAVE_STEPS = 40  # steps between two checkpoints: what an interruption costs at most
CHECK_STEPS, CHECK_IMAGES = 100, 24  # steps between two validations of --patience, images of each
WAITING, TRAINING, EVALUATING, DONE, FAILED = "waiting", "training", "evaluating", "done", "failed"  # stages of a row


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rows = [row for row in ROWS if row.name in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out / "lock"):
        check_settings(args)
        failed: list[str] = []
        if not args.write_doc:
            render_world(args)
            failed = TrialRunner(args).run(trials(rows, args.seeds))
            measure_speed(args)
        write_results(args)
    for name in failed:
        print(f"{name} failed: see {args.out / name / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    epilog = f"rows: {', '.join(row.name for row in ROWS)}"
    parser = argparse.ArgumentParser(
        prog="python -m toy.study", description=__doc__, formatter_class=style, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/miniature"), help="default: runs/miniature")
    parser.add_argument("--only", nargs="+", default=[row.name for row in ROWS], metavar="ROW", help="only these rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="SEED", help="default: 0 1")
    parser.add_argument("--steps", type=int, default=1600, help="training steps of each row at most (default 1600)")
    parser.add_argument(
        "--patience",
        type=int,
        default=8,  # the losses of a new mask decoder, and of SESAME's, rest for 200 to 300 steps before they fall
        help=f"stop after this many validations ({CHECK_STEPS} steps apart) without a better one; 0: never (default 8)",
    )
    parser.add_argument("--batch_size", type=int, default=4, help="images per step (default 4)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="trainings at the same time (default: number of cores)"
    )
    parser.add_argument("--images", type=int, default=6000, help="training images of the toy world (default 6000)")
    parser.add_argument("--most", type=int, default=0, help="upper limit of images per benchmark (default 0: none)")
    parser.add_argument("--write_doc", action="store_true", help="run nothing, only write docs/miniature.md from OUT")
    parser.add_argument(
        "--doc", type=Path, default=ROOT / "docs" / "miniature.md", help="the page to write (default docs/miniature.md)"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.only) - {row.name for row in ROWS}:
        parser.error(f"no row {', '.join(sorted(unknown))}; {epilog}")
    if min(args.steps, args.batch_size, args.jobs, args.images) < 1 or min(args.most, args.patience) < 0:
        parser.error("--steps, --batch_size, --jobs and --images must be 1 or more, --most and --patience not negative")
    return args


@contextmanager
def lock(path: Path) -> Generator[None]:
    """Keep a second process out of the folder. Child processes inherit the lock, so it lasts if this one is killed."""
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{path.parent}: another miniature study is running there (it holds {path})") from None
        yield


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a folder whose rows were made with other settings: they would not compare."""
    file = args.out / "settings.json"
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.write_doc and not file.is_file():
        raise SystemExit(f"{args.out} holds no results: no {file.name} there")
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
    if saved != settings and not args.write_doc:
        flags = ", ".join(f"--{name} {value}" for name, value in saved.items())
        raise SystemExit(f"{args.out} was made with {flags}: continue with these, or choose another folder")
    write_atomically(file, json.dumps(saved) + "\n")


def render_world(args: argparse.Namespace) -> None:
    """Render the toy world unless it is complete: the marker file is written last."""
    done = args.out / "dataset.done"
    if not done.is_file():
        print("rendering the toy world", flush=True)
        flags = ["--force", "--images", args.images, "--val_images", args.most or VAL_IMAGES, "--only", *LAYOUTS]
        run_program(["-m", "toy.world", args.out / "dataset", *flags], args.out / "dataset.log", {})
        done.touch()


@dataclass
class TrialRunner:
    """Trains and evaluates trials, several at a time, each on one core; one that fails does not stop the others."""

    args: argparse.Namespace
    stages: dict[str, str] = field(default_factory=dict)  # trial -> stage

    def run(self, trials: Sequence[Trial]) -> list[str]:
        """The names of the trials that failed."""
        self.stages = {trial.name: DONE if self._exam_file(trial).is_file() else WAITING for trial in trials}
        finished = threading.Event()
        reporter = threading.Thread(target=self._report, args=(finished,), daemon=True)
        reporter.start()
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(self._trial, (trial for trial in trials if self.stages[trial.name] == WAITING)))
        finished.set()
        reporter.join()
        return [name for name, stage in self.stages.items() if stage == FAILED]

    def _trial(self, trial: Trial) -> None:
        folder = self.args.out / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for stage, command in ((TRAINING, self._training(trial)), (EVALUATING, self._evaluation(trial))):
                self.stages[trial.name] = stage
                run_program(command, folder / "log.txt", {"OMP_NUM_THREADS": "1"})
            self.stages[trial.name] = DONE
        except subprocess.CalledProcessError:
            self.stages[trial.name] = FAILED

    def _training(self, trial: Trial) -> list[Any]:
        """The command that trains a row; train_ds.py resumes by itself from the last checkpoint."""
        suite, figure = trial.row.judged
        settings = {
            "train.steps": self.args.steps,
            "train.seed": trial.seed,
            "train.batch_size": self.args.batch_size,
            "train.patience": self.args.patience,
            "train.save_steps": SAVE_STEPS,
            "train.keep_checkpoints": 1,
            "train.time_limit_minutes": 0,
            "eval.validate": str(self.args.patience > 0).lower(),
            "eval.every_steps": CHECK_STEPS,
            "eval.suites": f"['{suite}']",
            "eval.best_by": figure,
            "eval.protocol": "generate",
            "eval.limit": CHECK_IMAGES,
            "eval.batch_size": 4,
            "eval.max_new_tokens": 160,
            "run.tensorboard": "false",
            "model.embedding_cache.folder": self.args.out / "embeddings",  # of images that other rows have, too
        }
        changes = [*(f"{name}={value}" for name, value in settings.items()), *trial.row.changes]
        flags = ["--dataset_dir", self.args.out / "dataset", "--log_base_dir", self.args.out / trial.name]
        flags += ["--exp_name", "train"]
        flags += [part for change in changes for part in ("--set", change)]
        return [ROOT / "train_ds.py", "--config", trial.row.config, *flags]

    def _evaluation(self, trial: Trial) -> list[Any]:
        """The command that evaluates a row; ablations answer class lists only."""
        flags = ["--run", self.args.out / trial.name / "train", "--dataset_dir", self.args.out / "dataset"]
        flags += ["--out", self.args.out / trial.name, "--most", self.args.most]
        if trial.row.kind == ABLATION:
            flags.append("--lists_only")
        return ["-m", "toy.study.exam", *flags]

    def _exam_file(self, trial: Trial) -> Path:
        return self.args.out / trial.name / "exam.json"

    def _report(self, finished: threading.Event) -> None:
        """Print the stage of every trial from time to time."""
        started = time.monotonic()
        while not finished.wait(REPORT_SECONDS):
            stages = ", ".join(f"{name} {self._stage(name)}" for name in self.stages)
            print(f"[{(time.monotonic() - started) / 60:5.1f} min] {stages}", flush=True)

    def _stage(self, name: str) -> str:
        stage = self.stages[name]
        log = self.args.out / name / "train" / "log.jsonl"
        if stage == TRAINING and log.is_file() and (rows := read_log(log)):
            return f"{stage} {rows[-1]['step']}/{self.args.steps}"
        return stage


def measure_speed(args: argparse.Namespace) -> None:
    """Time all finished systems together, while none is trained; again when further ones have finished."""
    runs = {trial.name: args.out / trial.name / "train" for trial in finished(args) if trial.row.kind == SYSTEM}
    file = args.out / "speed.json"
    if not runs or (file.is_file() and json.loads(file.read_text(encoding="utf-8")).keys() == runs.keys()):
        return
    print(f"timing {', '.join(runs)}", flush=True)
    pairs = [f"{name}={run}" for name, run in runs.items()]
    flags = ["--runs", *pairs, "--dataset_dir", args.out / "dataset", "--out", file, "--most", args.most]
    run_program(["-m", "toy.study.speed", *flags], args.out / "speed.log", {"OMP_NUM_THREADS": "1"})


def finished(args: argparse.Namespace) -> list[Trial]:
    return [trial for trial in trials(ROWS, args.seeds) if (args.out / trial.name / "exam.json").is_file()]


def write_results(args: argparse.Namespace) -> None:
    """Table, plots and answer sheet of the finished rows; with --write_doc also the page, whose prose stays."""
    done = finished(args)
    if not done:
        return
    from toy.study import page, plots, sheet  # takes seconds, and `--help` does without

    results = page.collect_results(args.out, done)
    if args.write_doc:
        results = page.with_earlier(results, args.doc.with_suffix(".json"))
    write_atomically(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    (args.out / "table.md").write_text(page.all_tables(results), encoding="utf-8")
    first = [trial for trial in done if trial.row.kind == SYSTEM and trial.seed == args.seeds[0]]
    figures = [*plots.write_plots(results, args.out), *sheet.write_answer_sheet(args.out, first)]
    print(page.all_tables(results))
    if args.write_doc:
        page.update_page(args.doc, results, figures)
        print(f"page: {args.doc}")


def run_program(command: Sequence[Any], log: Path, environment: dict[str, str]) -> None:
    """Run a program of this project, with its output appended to `log`; raises CalledProcessError where it fails."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}
    with log.open("a", encoding="utf-8") as file:
        # Open descriptors are inherited: the lock of `main` then lasts as long as the program.
        arguments = [sys.executable, *map(str, command)]
        subprocess.run(arguments, stdout=file, stderr=file, cwd=ROOT, env=env, check=True, close_fds=False)


if __name__ == "__main__":
    raise SystemExit(main())
