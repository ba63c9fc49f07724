"""Plots the curves of one or several runs, from their log.jsonl, in one image.

    python -m tools.plot_run runs/mine runs/other --out curves.png
    python -m tools.plot_run runs/mine --keys loss ce 'val/*' --smooth 20 --out curves.png

A key is a number of the training log (loss, lr, ...), its full name (train/loss, val/ReasonSeg|val/gIoU) or a glob of
full names. Without --keys: the loss and its parts, learning rate, gradient norm, images per second, waiting for data,
GPU memory, and all validation scores that can select a checkpoint (gIoU, cIoU, mIoU).
"""

from __future__ import annotations

import argparse
import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from utils.registry import unknown
from utils.run_log import flat, read_log

matplotlib.use("Agg")
USUAL = ("loss", "ce", "mask", "bce", "dice", "lr", "grad_norm", "images_per_second", "data_wait", "gpu_memory_gib")
USUAL_SCORES = ("val/*/gIoU", "val/*/cIoU", "val/*/mIoU")
NOT_CURVES = ("kind", "step", "time")  # fields of a log line that are no measurement
COLUMNS, WIDTH, HEIGHT = 3, 4.6, 3.0  # plots per row, inches of a plot
Curve = tuple[list[int], list[float]]  # steps, values


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        runs = {name: read_curves(path) for name, path in label_runs(args.runs).items()}
        keys = select_keys(args.keys, list(dict.fromkeys(key for curves in runs.values() for key in curves)))
        if not keys:
            raise ValueError(
                f"nothing to plot yet: {', '.join(runs)} logged none of the usual numbers (--keys has others)"
            )
        plot_curves(runs, keys, args.smooth, args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot_run: {error}") from None
    print(f"{len(keys)} plots of {len(runs)} runs: {args.out}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_run", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="image to write (default curves.png)")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="what to plot; see above")
    parser.add_argument("--smooth", type=int, default=1, help="training values to average per point (default 1)")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        parser.error("--smooth must be at least 1")
    return args


def label_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """A unique name for each run: its folder's, with as many parent folders as that takes."""
    folders = [(path.parent if path.is_file() else path).resolve() for path in dict.fromkeys(paths)]
    names: list[str] = []
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def read_curves(folder: Path) -> dict[str, Curve]:
    """Full name (kind/name) -> steps and values of every number in the run's log."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no log.jsonl")
    curves: dict[str, Curve] = {}
    for row in read_log(path):
        for name, value in flat({key: value for key, value in row.items() if key not in NOT_CURVES}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = curves.setdefault(f"{row['kind']}/{name}", ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def select_keys(keys: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """Full names of the curves to plot, in the order of `keys`; raises where a key matches no number of the logs."""
    if keys is None:
        usual = [f"train/{name}" for name in USUAL if f"train/{name}" in there]
        return [*usual, *(name for name in there if any(fnmatch.fnmatchcase(name, score) for score in USUAL_SCORES))]
    selected: list[str] = []
    for key in keys:
        hits = [name for name in there if name in (key, f"train/{key}") or fnmatch.fnmatchcase(name, key)]
        if not hits:
            raise ValueError(unknown("numbers", key, sorted(there)))
        selected += [name for name in hits if name not in selected]
    return selected


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 values before it."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def plot_curves(runs: dict[str, dict[str, Curve]], keys: Sequence[str], window: int, out: Path) -> None:
    """One plot per key, one line per run. Per-step values are smoothed; the raw curve stays in the background, pale."""
    columns = min(COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH * columns, HEIGHT * rows + 0.5), squeeze=False, layout="constrained"
    )
    for key, axis in zip(keys, axes.flat, strict=False):
        for number, curves in enumerate(runs.values()):
            if key not in curves:
                continue
            steps, values = curves[key]
            colour = f"C{number % 10}"
            per_step = key.startswith("train/") and key != "train/lr"  # others have no noise worth smoothing
            wide = window if per_step else 1
            mark = "o" if len(steps) < 30 else None
            if wide > 1:
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth(values, wide), color=colour, linewidth=1.6, marker=mark, markersize=3)
        axis.set_title(key.removeprefix("train/"), fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    lines = [plt.Line2D([], [], color=f"C{number % 10}", linewidth=2) for number in range(len(runs))]
    figure.legend(lines, list(runs), loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    figure.supxlabel("step", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
