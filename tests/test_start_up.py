"""Programs start fast: flags are read before anything that takes seconds is imported, and a question is answered
without what only training, quantized weights, pages and plots need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_run import write_reason_seg

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "transformers", "deepspeed", "peft", "scipy", "gradio")
TOY = ("--version", "assets/toy/assistant")
NOT_TO_ANSWER = ("peft", "bitsandbytes", "deepspeed", "torch._inductor.compile_fx", "pandas", "matplotlib", "gradio")
ASK = """
import runpy, sys
sys.argv = {argv!r}
try:
    runpy.{how}(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(set(sys.modules) & set({names!r})))
"""


def programs() -> list[str]:
    """Files in the root and in scripts/, and the modules of tools/ and toy/ that are programs with flags."""
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for folder in ("tools", "toy")
        for path in (ROOT / folder).rglob("*.py")
        if "Parser(" in (text := path.read_text(encoding="utf-8")) and '__name__ == "__main__"' in text
    ]
    return sorted([str(path.relative_to(ROOT)) for path in files] + modules)


def test_all_programs_are_found():
    assert {"train_ds.py", "chat.py", "scripts/plan_memory.py", "tools.memory", "toy.base.blank"} <= set(programs())


@pytest.mark.parametrize("program", programs())
def test_help_imports_nothing_slow(program: str):
    said = imported(SLOW, program, "--help")
    assert said[0].startswith("usage: ")
    assert said[-1].split() == ["imported:"]


def test_a_question_is_answered_without_what_only_training_needs(tmp_path: Path):
    """The toy assistant is a run with LoRA: not even adapters need the package that makes them."""
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(picture)
    asks = ("--image", str(picture), "--classes", "sky, water", "--max_new_tokens", "4")
    said = imported(NOT_TO_ANSWER, "chat.py", *TOY, *asks, "--vis_save_path", str(tmp_path / "answers"))
    assert list((tmp_path / "answers").glob("*.json"))
    assert said[-1].split() == ["imported:"]


def test_suites_are_evaluated_without_what_only_training_needs(tmp_path: Path):
    data, out = write_reason_seg(tmp_path / "data"), tmp_path / "out"
    asks = ("--dataset_dir", str(data), "--suites", "ReasonSeg|val", "--limit", "1", "--max_new_tokens", "4")
    said = imported(NOT_TO_ANSWER, "test_sem.py", *TOY, *asks, "--out", str(out))
    assert list(out.rglob("results.json"))
    assert said[-1].split() == ["imported:"]


def imported(names: tuple[str, ...], program: str, *flags: str) -> list[str]:
    """What the program prints in a process of its own, by lines; the last one says which of the modules it imported."""
    how = "run_path" if program.endswith(".py") else "run_module"
    command = [sys.executable, "-c", ASK.format(how=how, argv=[program, *flags], names=names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
