"""The 7B shape on a CPU: it answers as teacher forcing predicts, and fits the memory of a small machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.real_size import check, main
from utils import dist

ROOT = Path(__file__).resolve().parents[1]
GIB_NEEDED, GIB_FREE = 16, 16.5  # of memory


def test_the_program_measures_a_small_shape(tmp_path):
    file = tmp_path / "figures.json"
    assert main(["--shape", "tiny", "--precision", "fp32", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert {"make_s", "forward_s", "two_answers_s", "peak_gib"} < set(figures)
    with pytest.raises(RuntimeError, match=r"begin with \[1\], teacher forcing predicts \[0\]"):
        check(torch.tensor([[1.0, 0.0, 0.5]]), [1])


@pytest.mark.slow
@pytest.mark.skipif(not dist.computes_bf16(), reason="without bf16 instructions a 7B forward pass takes half an hour")
def test_seven_billion_weights_answer_within_their_memory(tmp_path):
    if (free := free_gib()) < GIB_FREE:
        pytest.skip(f"{free:.0f} GiB of memory are free, of {GIB_FREE} needed")
    file = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/real_size.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["parameters_billion"] > 7 and figures["peak_gib"] < GIB_NEEDED


def free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
