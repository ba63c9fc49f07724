"""`--help` of every program comes at once: nothing that takes seconds is imported before the flags are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "transformers", "deepspeed", "peft", "scipy", "gradio")
ASK = """
import runpy, sys
sys.argv = [{program!r}, "--help"]
try:
    runpy.{how}({program!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(set(sys.modules) & set({slow!r})))
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
    how = "run_path" if program.endswith(".py") else "run_module"
    command = [sys.executable, "-c", ASK.format(how=how, program=program, slow=SLOW)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stdout.splitlines()[-1].split() == ["imported:"]
