from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.scaling import CLASSES, DIALOGUES, GROWTH, PANELS, PROCESSES, WAYS

ROOT = Path(__file__).resolve().parents[1]


def test_every_point_is_measured_and_plotted(tmp_path):
    """In a process of its own: the program forks, which is unsafe in this one with its threads."""
    file, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = [sys.executable, "benchmarks/scaling.py", "--shape", "tiny", "--repeats", "1", "--threads", "1"]
    command += ["--json", str(file), "--plot", str(plot)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    values = {"dialogues": DIALOGUES, "classes": CLASSES, "pixels": [round(60 * 80 * f * f) for f in GROWTH]}
    for panel in PANELS:
        for way in WAYS:
            assert list(figures[panel][way]) == [str(value) for value in values[panel]]
            assert all(seconds > 0 for seconds in figures[panel][way].values())
    assert list(figures["processes"]) == [str(world) for world in PROCESSES]
    assert plot.read_bytes().startswith(b"\x89PNG")
