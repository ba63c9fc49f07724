"""The demo's report: its JSON has exactly the promised fields, the grid is an image, the time comes from the log."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_assistant import CLASSES, tiny, toy_world
from toy import demo_report, demo_scores
from utils.config import from_dict, save_recipe, to_dict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """A run folder with a log of 20 steps of 4 images, half of them at 2 and half at 8 images per second."""
    assistant = tiny("lasagna", eager=8)
    world = toy_world(tmp_path / "world", "ade20k", "refcoco", "reason_seg", val_images=1)
    sets = [{"source": "ade20k", "options": {"classes": CLASSES.replace("{source}", "ade20k")}}]
    values = to_dict(assistant.recipe)
    values["data"] = {"dataset_dir": str(world), "mixture": [{"task": "sem_seg", "sets": sets}]}
    values["train"] |= {"batch_size": 2, "grad_accumulation_steps": 2}
    assistant.recipe = from_dict(type(assistant.recipe), values)
    folder = tmp_path / "run"
    save_recipe(assistant.recipe, folder)
    (folder / "meta.json").write_text(json.dumps([{"processes": 1}]))
    rows = [{"kind": "train", "step": 10, "images_per_second": 2.0}, {"kind": "val", "step": 10}]
    rows += [{"kind": "train", "step": 20, "images_per_second": 8.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, assistant


def test_report_has_the_promised_figures_and_pictures(run, monkeypatch, capsys):
    folder, assistant = run
    monkeypatch.setattr(demo_scores, "build", lambda recipe, trainable: assistant)
    monkeypatch.setattr(demo_scores, "load", lambda path: assistant)
    out = folder / "report"
    assert demo_report.main(["--run", str(folder), "--out", str(out), "--limit", "1", "--max_new_tokens", "4"]) == 0
    report = json.loads((out / "metrics.json").read_text())
    names = ["miou", "present_accuracy", "absent_accuracy", "refer_ciou", "reason_giou"]
    assert list(report) == ["before", "after", "train_seconds"]
    assert list(report["before"]) == list(report["after"]) == names and report["before"] == report["after"]
    assert report["train_seconds"] == 10 * 4 / 2 + 10 * 4 / 8
    page = np.asarray(Image.open(out / "grid.png"))
    assert page.shape[2] == 3 and page.shape[0] > 10 * 100
    said = capsys.readouterr().out
    assert "mIoU on ade20k|val, generated" in said and "grid.png" in said


def test_a_suite_without_data_ends_the_report(run, tmp_path, monkeypatch):
    folder, assistant = run
    monkeypatch.setattr(demo_scores, "build", lambda recipe, trainable: assistant)
    with pytest.raises(SystemExit, match=str(tmp_path / "nowhere")):
        demo_report.main(["--run", str(folder), "--dataset_dir", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_the_demo_finds_its_picture_among_many(tmp_path):
    """A reader that stopped early ended the demo now and then, without a word, where the list was long."""
    folder = tmp_path / "dataset" / "validation"
    folder.mkdir(parents=True)
    for number in range(3000):
        (folder / f"{number:060}.jpg").touch()
    script = (ROOT / "scripts/demo.sh").read_text(encoding="utf-8")
    (line,) = [line for line in script.splitlines() if line.startswith("picture=")]
    program = f'set -euo pipefail; out={tmp_path}; {line}; echo "$picture"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / f"{0:060}.jpg")
