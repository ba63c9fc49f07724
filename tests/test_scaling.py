"""The scaling benchmark measures each of its points both ways and plots them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import (
    CLASSES,
    DIALOGUES,
    GROWTH,
    PANELS,
    PROCESSES,
    WAYS,
    measure_step,
    parse,
    plot_scaling,
    points,
)
from benchmarks.shapes import SHAPES
from benchmarks.speed import check_losses

ROOT = Path(__file__).resolve().parents[1]


VALUES = {"dialogues": DIALOGUES, "classes": CLASSES, "pixels": [round(60 * 80 * f * f) for f in GROWTH]}


def test_points_lie_on_the_axes_of_their_panels():
    found = {panel: [value for name, value, *_ in points(SHAPES["tiny"]) if name == panel] for panel in PANELS}
    assert found == {panel: list(values) for panel, values in VALUES.items()}


KEYS = {"seconds", "peak_mib", "share_of_matrix_peak", "loss"}


def test_a_step_is_measured_both_ways_and_has_one_loss():
    args = parse(["--shape", "tiny", "--repeats", "1"])
    contents = {"each": 1, "classes": 10, "masks": 4}
    found = {way: measure_step(SHAPES["tiny"], contents, way, args) for way in WAYS}
    assert all(set(point) == KEYS and point["seconds"] > 0 for point in found.values())
    check_losses({way: point["loss"] for way, point in found.items()}, "fp32")


def test_figures_are_plotted(tmp_path):
    point = dict.fromkeys(KEYS, 1.0)
    figures = {panel: {way: dict.fromkeys(VALUES[panel], point) for way in WAYS} for panel in PANELS}
    plot_scaling({**figures, "processes": dict.fromkeys(PROCESSES, point)}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_point_is_measured_and_plotted(tmp_path):
    """In a process of its own: the program forks, which is unsafe in this one with its threads."""
    file, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = [sys.executable, "benchmarks/scaling.py", "--shape", "tiny", "--repeats", "1", "--threads", "1"]
    command += ["--json", str(file), "--plot", str(plot)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    for panel in PANELS:
        for way in WAYS:
            assert list(figures[panel][way]) == [str(value) for value in VALUES[panel]]
            assert all(set(point) == KEYS and point["seconds"] > 0 for point in figures[panel][way].values())
    assert list(figures["processes"]) == [str(world) for world in PROCESSES]
    assert all(set(point) == KEYS for point in figures["processes"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")
