"""Three plots of the results: class lists by share of absent classes, every benchmark as bars, training losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from toy.study.page import ADE, LISTS, MAIN, SPEED, Column
from toy.study.rows import ABLATION, SYSTEM

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#777777", "#222222")
SMOOTHING = 5  # logged steps per point of a loss curve, averaged
Rows = dict[str, dict[str, Any]]


def write_plots(results: dict[str, Any], out: Path) -> list[Path]:
    """Write lists.png, benchmarks.png and losses.png into `out`; returns their paths."""
    rows = results["rows"]
    colours = dict(zip(rows, COLOURS, strict=False))
    systems = {name: row for name, row in rows.items() if row["kind"] == SYSTEM}
    figures = {
        "lists": lists(rows, colours),
        "benchmarks": benchmarks(systems, colours),
        "losses": losses(systems, colours),
    }
    files = []
    for name, figure in figures.items():
        file = out / f"{name}.png"
        figure.savefig(file, dpi=110)
        files.append(file)
        plt.close(figure)
    return files


def lists(rows: Rows, colours: dict[str, str]) -> plt.Figure:
    """mIoU and the share of absent classes refused, by the absent share of the list; left systems, right ablation."""
    groups = {"systems": {name: row for name, row in rows.items() if row["kind"] == SYSTEM}}
    if any(row["kind"] == ABLATION for row in rows.values()):
        strategies = {name: row for name, row in rows.items() if row["kind"] == ABLATION or name == "lasagna"}
        groups["LaSagnA's strategies"] = strategies
    size = (5 * len(groups), 7)
    figure, axes = plt.subplots(
        2, len(groups), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for column, (title, group) in enumerate(groups.items()):
        for place, metric in enumerate(("mIoU", "absent_accuracy")):
            part_names = [name for name in LISTS if metric == "mIoU" or name != "present"]
            ax = axes[place, column]
            for name, row in group.items():
                values = [Column("", part, ADE, metric).value(row) for part in part_names]
                label = "all three" if column and name == "lasagna" else row["title"]
                places = [list(LISTS).index(part) for part in part_names]
                ax.plot(places, [np.nan if v is None else v for v in values], "o-", color=colours[name], label=label)
            ax.set_xticks(range(len(LISTS)), list(LISTS.values()))
            ax.set_ylim(0, 1.02)
            ax.grid(alpha=0.3)
        axes[0, column].set_title(title)
        if group:
            axes[1, column].legend(fontsize=8, loc="lower right")
        axes[1, column].set_xlabel("of the classes in the list")
    axes[0, 0].set_ylabel("mIoU")
    axes[1, 0].set_ylabel("absent classes refused")
    return figure


def benchmarks(rows: Rows, colours: dict[str, str]) -> plt.Figure:
    """One small panel per column of the main table."""
    figure, axes = plt.subplots(3, 4, figsize=(12, 7.5), layout="constrained")
    for ax, column in zip(axes.flat, MAIN, strict=True):
        bars(ax, rows, column, colours)
    return figure


def bars(ax: Axes, rows: Rows, column: Column, colours: dict[str, str]) -> None:
    values = [column.value(row) or 0.0 for row in rows.values()]
    container = ax.barh([row["title"] for row in rows.values()], values, color=[colours[name] for name in rows])
    ax.bar_label(container, [column.cell(row) for row in rows.values()], fontsize=8, padding=2)
    ax.invert_yaxis()
    ax.set_title(column.title, fontsize=10)
    ax.tick_params(labelsize=8)
    if column.part == SPEED:
        ax.margins(x=0.2)
    else:
        ax.set_xlim(0, 1.12)


def losses(rows: Rows, colours: dict[str, str]) -> plt.Figure:
    """The weighted losses of training, smoothed."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, (name, title) in zip(axes, {"ce": "text", "bce": "mask BCE", "dice": "mask dice"}.items(), strict=True):
        for key, row in rows.items():
            for number, trial in enumerate(row["trials"]):
                steps, values = trial["training"]["step"], trial["training"][name]
                label = None if number else row["title"]
                ax.plot(smooth(steps), smooth(values), color=colours[key], label=label)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    if rows:
        axes[2].legend(fontsize=8)
    return figure


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over SMOOTHING neighbours, or over all values where there are fewer."""
    window = min(SMOOTHING, len(values))
    return np.convolve(values, np.full(window, 1 / max(1, window)), mode="valid") if window else np.array([])
