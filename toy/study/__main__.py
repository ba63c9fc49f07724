"""Five papers in miniature: trains every system from the same toy base in the same way, and asks each everything.

    bash scripts/miniature.sh                                    # all of it, into runs/miniature
    bash scripts/miniature.sh runs/miniature --only lisa gsva    # two rows; the others can follow later
    bash scripts/miniature.sh runs/miniature --write_doc         # nothing but docs/miniature.md, from what OUT holds

Every row (a system, or LaSagnA without one of its strategies) has a folder OUT/<row>: train/ (run folder), a folder of
answers for each way of asking, exam.json, log.txt. What is finished is not done again, what was cut goes on.
Writes OUT/results.json, OUT/table.md, OUT/*.png; --write_doc also docs/miniature.md and its pictures.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.study import page, plots, sheet
from toy.study.rows import ABLATION, ROWS, SYSTEM, Row
from utils.files import write_whole
from utils.log import read_log

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = (
    *("ade20k", "cocostuff", "cityscapes", "mapillary", "refcoco", "refcoco+", "refcocog", "refclef", "grefcoco"),
    *("refzom", "R-refcoco", "R-refcoco+", "R-refcocog", "fprefcoco", "fprefcoco+", "fprefcocog", "muse", "reason_seg"),
    *("llava_instruct", "paco_lvis", "pascal_part", "openimage"),
)
SETTINGS = ("steps", "batch_size", "images", "most")  # what all rows of a folder have in common
VAL_PICTURES = 60  # of each benchmark; the exam asks about so many or fewer
REPORT_SECONDS = 30  # seconds between two lines of progress
SAVE_STEPS = 40  # steps between two checkpoints, so much a cut costs at most


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rows = [row for row in ROWS if row.name in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out / "lock"):
        check_settings(args)
        failed: list[str] = []
        if not args.write_doc:
            render_world(args)
            failed = RowRunner(args).run(rows)
            measure_speed(args)
        write_results(args)
    for name in failed:
        print(f"{name} failed: see {args.out / name / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    epilog = f"rows: {', '.join(row.name for row in ROWS)}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, epilog=epilog, allow_abbrev=False)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/miniature"), help="default: runs/miniature")
    parser.add_argument("--only", nargs="+", default=[row.name for row in ROWS], metavar="ROW", help="these rows alone")
    parser.add_argument("--steps", type=int, default=320, help="of training, the same for all (default 320)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures a step, the same for all (default 8)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time (default: cores)")
    parser.add_argument("--images", type=int, default=6000, help="training pictures of the toy world (default 6000)")
    parser.add_argument("--most", type=int, default=0, help="pictures a benchmark at most (default 0: as planned)")
    parser.add_argument("--write_doc", action="store_true", help="run nothing, write docs/miniature.md from OUT")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "miniature.md", help="the page that this writes")
    args = parser.parse_args(argv)
    if strange := set(args.only) - {row.name for row in ROWS}:
        parser.error(f"no row {', '.join(sorted(strange))}; {epilog}")
    if min(args.steps, args.batch_size, args.jobs, args.images) < 1 or args.most < 0:
        parser.error("--steps, --batch_size, --jobs and --images must be 1 or more, --most not negative")
    return args


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """No second one works in the same folder. What this one starts holds the lock, too, should it be killed alone."""
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{path.parent}: another miniature is at work there (it holds {path})") from None
        yield


def check_settings(args: argparse.Namespace) -> None:
    """Rows of one folder are made alike: a folder made with other settings is refused."""
    file = args.out / "settings.json"
    mine = {name: getattr(args, name) for name in SETTINGS}
    if args.write_doc and not file.is_file():
        raise SystemExit(f"{args.out} holds no results: no {file.name} there")
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else mine
    if made != mine and not args.write_doc:
        told = ", ".join(f"--{name} {value}" for name, value in made.items())
        raise SystemExit(f"{args.out} was made with {told}: go on with these, or choose another folder")
    write_whole(file, json.dumps(made) + "\n")


def render_world(args: argparse.Namespace) -> None:
    """The toy world; one that was drawn to its end is kept (the file behind it is written last)."""
    done = args.out / "dataset.done"
    if not done.is_file():
        print("drawing the toy world", flush=True)
        flags = ["--force", "--images", args.images, "--val_images", args.most or VAL_PICTURES, "--only", *LAYOUTS]
        run_program(["-m", "toy.world", args.out / "dataset", *flags], args.out / "dataset.log", {})
        done.touch()


@dataclass
class RowRunner:
    """Rows, some at a time, each on one thread of its own; what fails does not stop the others."""

    args: argparse.Namespace

    def run(self, rows: Sequence[Row]) -> list[str]:
        """The names of the rows that failed."""
        self.stages = {row.name: "done" if self._exam_file(row).is_file() else "waits" for row in rows}
        over = threading.Event()
        teller = threading.Thread(target=self._report, args=(over,), daemon=True)
        teller.start()
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(self._row, (row for row in rows if self.stages[row.name] == "waits")))
        over.set()
        teller.join()
        return [name for name, stage in self.stages.items() if stage == "failed"]

    def _row(self, row: Row) -> None:
        folder = self.args.out / row.name
        folder.mkdir(exist_ok=True)
        try:
            for stage, command in (("trains", self._training(row)), ("answers", self._evaluation(row))):
                self.stages[row.name] = stage
                run_program(command, folder / "log.txt", {"OMP_NUM_THREADS": "1"})
            self.stages[row.name] = "done"
        except subprocess.CalledProcessError:
            self.stages[row.name] = "failed"

    def _training(self, row: Row) -> list[Any]:
        sets = {
            "train.epochs": 1,
            "train.steps_per_epoch": self.args.steps,
            "train.batch_size": self.args.batch_size,
            "train.save_steps": SAVE_STEPS,
            "train.keep_checkpoints": 1,
            "train.time_limit_minutes": 0,
            "eval.no_eval": "true",
            "run.tensorboard": "false",
        }
        changes = [*(f"{name}={value}" for name, value in sets.items()), *row.changes]
        flags = ["--dataset_dir", self.args.out / "dataset", "--log_base_dir", self.args.out / row.name]
        flags += ["--exp_name", "train"]
        flags += [part for change in changes for part in ("--set", change)]
        return [ROOT / "train_ds.py", "--config", row.config, *flags]

    def _evaluation(self, row: Row) -> list[Any]:
        flags = ["--run", self.args.out / row.name / "train", "--dataset_dir", self.args.out / "dataset"]
        flags += ["--out", self.args.out / row.name, "--most", self.args.most]
        return ["-m", "toy.study.exam", *flags, *(["--lists_only"] if row.kind == ABLATION else [])]

    def _exam_file(self, row: Row) -> Path:
        return self.args.out / row.name / "exam.json"

    def _report(self, over: threading.Event) -> None:
        """A line now and then: where each row stands."""
        started = time.monotonic()
        while not over.wait(REPORT_SECONDS):
            told = ", ".join(f"{name} {self._stage(name)}" for name in self.stages)
            print(f"[{(time.monotonic() - started) / 60:5.1f} min] {told}", flush=True)

    def _stage(self, name: str) -> str:
        stage, log = self.stages[name], self.args.out / name / "train" / "log.jsonl"
        if stage == "trains" and log.is_file() and (rows := read_log(log)):
            return f"trains {rows[-1]['step']}/{self.args.steps}"
        return stage


def measure_speed(args: argparse.Namespace) -> None:
    """All finished systems against each other, with no other row at work; again when others have come."""
    runs = {row.name: args.out / row.name / "train" for row in finished_rows(args.out) if row.kind == SYSTEM}
    file = args.out / "speed.json"
    if not runs or (file.is_file() and json.loads(file.read_text(encoding="utf-8")).keys() == runs.keys()):
        return
    print(f"timing {', '.join(runs)}", flush=True)
    pairs = [f"{name}={run}" for name, run in runs.items()]
    flags = ["--runs", *pairs, "--dataset_dir", args.out / "dataset", "--out", file, "--most", args.most]
    run_program(["-m", "toy.study.speed", *flags], args.out / "speed.log", {"OMP_NUM_THREADS": "1"})


def finished_rows(out: Path) -> list[Row]:
    return [row for row in ROWS if (out / row.name / "exam.json").is_file()]


def write_results(args: argparse.Namespace) -> None:
    """Table, plots and pictures of what is finished; with --write_doc the page, its written words kept."""
    rows = finished_rows(args.out)
    if not rows:
        return
    results = page.collect_results(args.out, rows)
    write_whole(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    (args.out / "table.md").write_text(page.all_tables(results), encoding="utf-8")
    pictures = [
        *plots.write_plots(results, args.out),
        *sheet.write_answer_sheet(args.out, [row for row in rows if row.kind == SYSTEM]),
    ]
    print(page.all_tables(results))
    if args.write_doc:
        page.update_page(args.doc, results, pictures)
        print(f"page: {args.doc}")


def run_program(command: Sequence[Any], log: Path, environment: dict[str, str]) -> None:
    """Runs a program of this project, its words at the end of `log`; raises where it fails."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}
    with log.open("a", encoding="utf-8") as file:
        words = [sys.executable, *map(str, command)]
        subprocess.run(words, stdout=file, stderr=file, cwd=ROOT, env=env, check=True, close_fds=False)


if __name__ == "__main__":
    raise SystemExit(main())
