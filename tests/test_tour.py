"""The tour, docs/tour.ipynb: it runs from start to end, and what it holds is fit to be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"
MOST_BYTES = 2**20


def cells() -> list[dict]:
    return json.loads(TOUR.read_text(encoding="utf-8"))["cells"]


def test_the_tour_is_small_and_shows_nobody_s_machine():
    text = TOUR.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES, "show smaller images"
    written = "".join(str(cell.get("outputs", "")) + "".join(cell["source"]) for cell in cells())
    assert not any(place in written for place in ("/home/", "/root/", "/tmp/", str(ROOT)))
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(cell["outputs"] for cell in code[1:]), "saved without its outputs"
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


def test_programs_and_pages_of_the_tour_exist():
    words = " ".join("".join(cell["source"]) for cell in cells()).replace("(", " ").replace(")", " ").replace('"', " ")
    named = {word.strip("`,;:") for word in words.split() if word.strip("`,;:").endswith((".py", ".md"))}
    named -= {"results.md"}  # what a program writes
    assert {"train_ds.py", "test_sem.py", "your_data.md"} <= named
    assert not [name for name in named if not ((ROOT / name).exists() or (ROOT / "docs" / name).exists())]


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    """From start to end, in a copy of the checkout's folders, so that nothing is left in this one."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat and nbclient")
    nbclient = pytest.importorskip("nbclient", reason="needs nbformat and nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    for path in ROOT.iterdir():
        if path.name not in {".git", "runs", "docs"}:
            os.symlink(path, tmp_path / path.name)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    book = nbformat.read(TOUR, 4)
    client = nbclient.NotebookClient(
        book, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "docs")}}
    )
    client.execute()
    printed = " ".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))
    assert "all well" in printed and "is not there" in printed
    (scored,) = (tmp_path / "runs/tour/scored_mine").rglob("results.json")
    assert "mIoU" in scored.read_text()
