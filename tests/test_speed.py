from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_line_gives_the_same_loss_and_the_figures_are_written(tmp_path):
    """In a process of its own: the program forks, which this one, with threads, should not."""
    file = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--tiny", "--repeats", "1", "--threads", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert list(figures["parts"]) == ["all_off", "vision_once", "packed_rows", "supervised_logits", "all_on"]
    for name in ("all_off", "all_on"):
        assert figures[name]["seconds"] > 0
    assert figures["speedup"] == figures["all_off"]["seconds"] / figures["all_on"]["seconds"]
    parts = figures["parts"]["all_on"]["parts"]
    assert {"tower", "language model", "mask encoder", "mask decoder", "forward", "backward", "optimizer"} == set(parts)
    assert all(seconds >= 0 for seconds in parts.values())
