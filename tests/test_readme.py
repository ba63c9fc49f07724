"""The README stays true: what it names is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from systems.base import SYSTEMS, build_system
from utils.config import Recipe
from utils.flags import FLAGS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


def test_programs_and_recipes_of_the_commands_are_there():
    named = set(re.findall(r"[\w./-]+\.(?:py|sh|yaml)\b", CODE))
    assert {"train_ds.py", "test_sem.py", "chat.py", "scripts/demo.sh"} <= named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_flags_of_the_training_commands_are_known():
    known = {flag.name for flag in FLAGS} | {"config", "set", "dataset", "sample_rates"}
    for line in CODE.replace("\\\n", " ").splitlines():
        if "train_ds.py" in line:
            given = re.findall(r"--(\w+)", line.split("train_ds.py")[1])
            assert set(given) <= known, line


def test_the_table_of_differences_names_switches_that_are_there():
    """Four cells per row; every `section.field` of the last is a field of the recipe, or of some system's options."""
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and {len(row) for row in rows} == {4} and all(cell.strip() for row in rows for cell in row)
    for switch in re.findall(r"`(\w+)\.(\w+)", " ".join(row[3] for row in rows)):
        section, field = switch
        if section == "options":
            assert any(_has_option(name, field) for name in SYSTEMS), switch
        elif field != "yaml":
            assert field in {entry.name for entry in fields(getattr(Recipe(), section))}, switch


def _has_option(system: str, name: str) -> bool:
    with pytest.raises(ValueError, match="options") as caught:
        build_system(system, {name: object()})  # no option takes that
    return not str(caught.value).startswith("no field in options")


def test_linked_files_are_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
