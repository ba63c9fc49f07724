"""The programs on a Qwen base, as a user starts them: train and validate, merge, evaluate, and the library reads it.

pytest -m slow tests/test_qwen_run.py
"""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForImageTextToText

from model.checkpoints.files import read_tensors
from tests.tiny_base import GOLDEN, write_sam
from tests.tiny_qwen import FAMILIES, stock_model
from tests.tiny_run import start, train_log, write_reason_seg, write_recipe
from tests.tiny_words import tiny_qwen_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_base_to_an_evaluated_folder(family, tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    size = tiny_qwen_tokenizer(base, version=3 if family == "qwen3_vl" else 2)
    stock_model(family, tied=True, vocab_size=size + 9, max_position_embeddings=2048).save_pretrained(base)
    model = {"version": str(base), "vision_pretrained": str(write_sam(tmp_path / "sam.pth", read_tensors(GOLDEN)))}
    model |= {"vision_tower": None, "conv_type": "qwen_chat", "tower": {"min_pixels": 384, "max_pixels": 1280}}
    write_reason_seg(tmp_path / "data")
    recipe = write_recipe(tmp_path, model=model)
    start("-m", "tools.doctor", recipe)
    start("train_ds.py", "--config", recipe)
    losses = [row["loss"] for row in train_log(tmp_path / "runs" / "tiny")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    start("merge_lora_weights_and_save_hf_model.py", "--run", tmp_path / "runs" / "tiny", "--save_path", merged)
    data = ("--dataset_dir", tmp_path / "data", "--suites", "ReasonSeg|val", "--out", tmp_path / "scores")
    start("test_sem.py", "--version", merged, *data)
    results = json.loads(next((tmp_path / "scores").rglob("results.json")).read_text())
    assert results
    assert type(AutoModelForImageTextToText.from_pretrained(merged)).__name__.startswith("Qwen")
