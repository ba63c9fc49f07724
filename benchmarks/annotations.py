"""Time and memory of reading annotations of real size: the shared index against pycocotools, in one run.

    python benchmarks/make_big_annotations.py /tmp/big
    python benchmarks/annotations.py /tmp/big --out annotations.json

Each start is a process of its own. It opens instances.json as the source `coco`, or with pycocotools.COCO; then 1, 2
and 4 workers, forked as a DataLoader forks them, look up random images with all their polygons and report their memory:
Rss (everything mapped), Pss (shared pages divided by their users) and private.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

WORKERS, LATER_STARTS = (1, 2, 4), 3
MB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        print(json.dumps(measure_start(args.child, args.root, args.reads)))
        return 0
    shutil.rmtree(args.root / ".index", ignore_errors=True)
    figures = {"file_mb": round((args.root / "instances.json").stat().st_size / 1e6)}
    figures["first start"] = run_start("index", args)
    figures["later starts"] = [run_start("index", args) for _ in range(LATER_STARTS)]
    figures["pycocotools"] = run_start("pycocotools", args)
    size = sum(path.stat().st_size for path in (args.root / ".index").rglob("*") if path.is_file())
    figures["index_mb"] = round(size / 1e6)
    print(as_table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder written by make_big_annotations.py")
    parser.add_argument("--reads", type=int, default=5000, help="images that each worker looks up (default 5000)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the figures there")
    parser.add_argument("--child", choices=OPEN, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_start(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure_start` in a new process."""
    command = [sys.executable, __file__, str(args.root), "--reads", str(args.reads), "--child", kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_start(kind: str, root: Path, reads: int) -> dict[str, Any]:
    """Open the annotations in this process, then look images up in forked workers."""
    open_annotations = OPEN[kind](root)  # imports come first: they cost the same with every way of reading
    before = memory()
    began, cpu = time.perf_counter(), time.process_time()
    look_up, images = open_annotations()
    figures: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB,
        "imports_mb": before["Rss"],
        "opened_mb": memory()["Rss"],
    }
    for workers in WORKERS:
        figures[f"{workers} workers"] = measure_workers(look_up, images, workers, reads)
    return figures


def measure_workers(look_up: Callable[[int], int], images: int, workers: int, reads: int) -> dict[str, Any]:
    """Means over the workers, measured while all of them are alive."""
    fork = multiprocessing.get_context("fork")
    done = fork.Barrier(workers)
    answers = fork.Queue()

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        began = time.process_time()
        for index in rng.integers(images, size=reads):
            look_up(int(index))
        spent = time.process_time() - began
        done.wait()  # nobody has left yet, so that pages are still shared by all
        answers.put({**memory(), "us_each": spent / reads * 1e6})
        done.wait()

    children = [fork.Process(target=work, args=(number,)) for number in range(workers)]
    for child in children:
        child.start()
    reports = [answers.get() for _ in children]
    for child in children:
        child.join()
    return {key: sum(report[key] for report in reports) / workers for key in reports[0]}


def open_index(root: Path) -> Callable[[], tuple[Callable[[int], int], int]]:
    from data.sources import build_source

    def make() -> tuple[Callable[[int], int], int]:
        source = build_source("coco", root, annotations="instances.json", images="coco/train2017")
        return (lambda index: len(source[index].targets)), len(source)

    return make


def open_pycocotools(root: Path) -> Callable[[], tuple[Callable[[int], int], int]]:
    from pycocotools.coco import COCO

    import data.sources  # noqa: F401  (so that both ways start from the same imports)

    def make() -> tuple[Callable[[int], int], int]:
        coco = COCO(str(root / "instances.json"))
        numbers = coco.getImgIds()
        return (lambda index: len(coco.loadAnns(coco.getAnnIds(numbers[index])))), len(numbers)

    return make


OPEN = {"index": open_index, "pycocotools": open_pycocotools}


def memory() -> dict[str, float]:
    """Rss, Pss and private memory of this process, in MB (2^20 bytes)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"Rss": sizes["Rss"], "Pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def as_table(figures: dict[str, Any]) -> str:
    later = sorted(figures["later starts"], key=lambda start: start["seconds"])[LATER_STARTS // 2]
    ways = {"index, first start": figures["first start"], "index, later start": later}
    ways["pycocotools"] = figures["pycocotools"]
    lines = [
        f"instances.json {figures['file_mb']} MB, index {figures['index_mb']} MB",
        "| | seconds | CPU seconds | peak MB | MB after imports | opened | "
        + " | ".join(f"{n} workers: Rss / Pss / private MB each, µs per image" for n in WORKERS)
        + " |",
        "| --- |" + " ---: |" * (5 + len(WORKERS)),
    ]
    for name, way in ways.items():
        cells = [f"{way[key]:.2f}" for key in ("seconds", "cpu_seconds")]
        cells += [f"{way[key]:.0f}" for key in ("peak_mb", "imports_mb", "opened_mb")]
        for number in WORKERS:
            at = way[f"{number} workers"]
            cells.append(f"{at['Rss']:.0f} / {at['Pss']:.0f} / {at['private']:.0f}, {at['us_each']:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
