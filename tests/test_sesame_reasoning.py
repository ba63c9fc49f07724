"""SESAME's published ReasonSeg command line trains on the toy world, and its pairs of questions are scored."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import train_ds
from tests.tiny_assistant import toy_world
from tests.tiny_run import ROOT, train_log

SETS = ("ade20k", "cocostuff", "pascal_part", "paco_lvis", "reason_seg", "llava_instruct")
SETS += ("refclef", *(f"{family}{name}" for family in ("", "R-", "fp") for name in ("refcoco", "refcoco+", "refcocog")))
TASKS = ("sem_seg", "refer_seg", "correct_refer_seg", "vqa", "neg_refer_seg", "reason_seg")
LINE = (
    "--version={toy}/llava --dataset_dir={world} --vision_pretrained={toy}/sam_vit_toy.safetensors "
    "--exp_name=sesame_bun "
    f"--dataset='{'||'.join(TASKS)}' --sample_rates='10,10,2,3,1,1' "
    "--batch_size=12 --grad_accumulation_steps 1 --num_classes_per_sample=3"
)
SMALL = (  # of the published sizes only
    "--log_base_dir={runs} --batch_size=3 --epochs=1 --steps_per_epoch=2 --workers=0 --precision=fp32 "
    "--set model.vision_tower=null --set train.zero_stage=0 --set data.val_workers=0 "
    "--set options.prompt_template=llava_v1 --set eval.suites='[ReasonSeg-premise|val]' --set eval.limit=2 "
    "--set eval.protocol=generate --set eval.max_new_tokens=4 --set eval.best_by=See"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sesame")
    places = {
        "toy": ROOT / "assets/toy",
        "world": toy_world(folder / "world", *SETS, images=40, val_images=2),
        "runs": folder / "runs",
    }
    train_ds.main(shlex.split(f"{LINE} {SMALL}".format(**places)))
    return folder / "runs" / "sesame_bun"


def test_the_published_line_trains_on_every_family(run):
    rows = train_log(run)
    assert [row["step"] for row in rows] == [1, 2] and all(row["ce"] > 0 for row in rows)
    text = (run / "meta.json").read_text()
    assert all(f"{task}/" in text for task in TASKS), "the data of every family were opened"
    assert "sesame" in (run / "recipe.yaml").read_text()


def test_the_pairs_are_scored(run):
    (row,) = train_log(run, "val")
    figures = row["ReasonSeg-premise|val"]
    assert 0 <= figures["See"] <= 1 and 0 <= figures["Segment"] <= 1
