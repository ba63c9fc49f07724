"""The annotated file tree of docs/tree.md, from the first sentence of every module's docstring.

python -m tools.tree > docs/tree.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("train_ds.py", "test_sem.py", "chat.py", "app.py", "merge_lora_weights_and_save_hf_model.py")
FOLDERS = (
    "utils",
    "data",
    "model",
    "systems",
    "training",
    "evaluation",
    "web",
    "toy",
    "tools",
    "benchmarks",
    "scripts",
)


def main() -> int:
    print(document(), end="")
    return 0


def document() -> str:
    """The page: entry points, then one table per folder."""
    parts = [
        "# Every file\n\nMade by `python -m tools.tree` from the first sentence of each file. Imports go one way:\n"
        "`utils <- data <- model <- systems <- evaluation <- {training, web} <- entry points <- {toy, tools}`.\n",
        table("Entry points", [ROOT / name for name in PROGRAMS]),
    ]
    for folder in FOLDERS:
        for place in sorted({path.parent for path in (ROOT / folder).rglob("*.py")}):
            files = [path for path in sorted(place.glob("*.py")) if first_sentence(path)]
            if files:
                parts.append(table(f"{place.relative_to(ROOT)}/", files))
    return "\n".join(parts)


def table(title: str, files: list[Path]) -> str:
    rows = [f"| [{path.name}](../{path.relative_to(ROOT)}) | {first_sentence(path)} |" for path in files]
    return "\n".join([f"## {title}\n", "| file | what it is |", "| --- | --- |", *rows, ""])


def first_sentence(path: Path) -> str:
    """Of the module's docstring, on one line; "" where there is none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[.!?])\s|\n\n", text, maxsplit=1)[0]
    return " ".join(sentence.split()).rstrip(":.").replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main())
