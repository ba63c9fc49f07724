"""The README stays true: its table of flags is the code's, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

from utils.flags import FLAGS, markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


def test_the_table_of_flags_is_the_codes():
    assert markdown().strip() in README, "the table is stale: paste the output of `python -m utils.flags`"


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


def test_linked_files_are_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
