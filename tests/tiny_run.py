"""A tiny real run for the tests of training and merging: images on disk, tiny published weights, a recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.records import OWN

ROOT = Path(__file__).resolve().parents[1]
BASE = OWN / "lisa"
SENTENCES = ("the bright thing", "Where does the light come from?", "What would you look at first?")


def write_reason_seg(root: Path, train: int = 8, val: int = 2) -> Path:
    """ReasonSeg in its own layout: noise images with one bright rectangle, which is what is asked for."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        folder = root / "reason_seg" / "ReasonSeg" / split
        folder.mkdir(parents=True)
        for index in range(count):
            picture = rng.integers(0, 90, (48, 64, 3), dtype=np.uint8)
            x, y = int(rng.integers(2, 30)), int(rng.integers(2, 20))
            picture[y : y + 20, x : x + 24] = 230
            Image.fromarray(picture).save(folder / f"{index}.jpg", quality=95)
            corners = [[x, y], [x + 24, y], [x + 24, y + 20], [x, y + 20]]
            shapes = [{"label": "target", "points": corners, "shape_type": "polygon", "image_name": f"{index}.jpg"}]
            sentence = index % 2 == 0
            text = [SENTENCES[1 + index % 2] if sentence else SENTENCES[0]]
            note = {"shapes": shapes, "text": text, "is_sentence": sentence}
            (folder / f"{index}.json").write_text(json.dumps(note))
    return root


def write_recipe(folder: Path, **sections: dict) -> Path:
    """A recipe that trains the tiny published weights on ReasonSeg in `folder`, in fp32, in seconds."""
    values = {
        "system": "lisa",
        "model": {
            "version": str(BASE),
            "vision_tower": str(BASE / "clip"),
            "precision": "fp32",
            "model_max_length": 0,
            "head_options": {"decoder_heads": 4},
            "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        },
        "data": {
            "dataset_dir": str(folder / "data"),
            "workers": 0,
            "val_workers": 0,
            "mixture": [{"task": "reason_seg", "sets": ["ReasonSeg|train"]}],
        },
        "train": {
            "epochs": 2,
            "steps_per_epoch": 2,
            "batch_size": 1,
            "grad_accumulation_steps": 2,
            "lr": 1e-3,
            "warmup_steps": 1,
        },
        "eval": {"suites": ["ReasonSeg|val"], "limit": 1},
        "run": {"log_base_dir": str(folder / "runs"), "exp_name": "tiny"},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def environment() -> dict[str, str]:
    """One thread per process, no GPU, and no trace of a launcher that this test itself runs under."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def start(*words: str | Path, launcher: tuple[str, ...] = (sys.executable,), check: bool = True, timeout: float = 300):
    """Runs an entry point from the root, as a user would."""
    done = subprocess.run(
        [*launcher, *map(str, words)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    if check:
        assert done.returncode == 0, f"{words} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done


def train_log(folder: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]
