"""The speed benchmark: every optimisation leaves the loss as it is, and its rates are those of the step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measuring
from benchmarks.measuring import flop_counter, step_flops, utilisation
from benchmarks.shapes import BACKBONES, SHAPES, make_batch, random_model
from benchmarks.speed import LINES, check_losses, measure_line, parse
from data.views import ClipView
from model.finetune.trainable import prepare_training
from model.losses import objective
from model.runtime import RuntimeOptions
from utils.config import LossConfig, ModelConfig

ROOT = Path(__file__).resolve().parents[1]


PARTS = {"tower", "language model", "mask encoder", "mask decoder", "forward", "backward", "optimizer"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lines_give_the_same_loss(tmp_path, backbone):
    """The step of the original programs, that of recipes by default, and everything at once."""
    args = parse(["--shape", "tiny", "--repeats", "1", "--only_ends", "--backbone", backbone])
    lines = {name: measure_line(LINES[name], args, str(tmp_path)) for name in args.lines}
    check_losses({name: line["loss"] for name, line in lines.items()}, args.precision)
    assert set(lines["defaults"]["parts"]) == PARTS
    assert set(lines["all_on"]["parts"]) == PARTS - {"mask encoder"}, "its embeddings are cached"
    with pytest.raises(SystemExit, match="the losses differ"):
        check_losses({"all_off": 1.0, "defaults": 1.1}, args.precision)


@pytest.mark.slow
def test_every_line_gives_the_same_loss_and_the_figures_are_written(tmp_path):
    """In a process of its own: the program forks, which is unsafe in this one with its threads."""
    file = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--shape", "tiny", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert list(figures["parts"]) == list(LINES)
    for name in ("all_off", "all_on"):
        assert figures[name]["seconds"] > 0
    assert figures["speedup"] == figures["all_off"]["seconds"] / figures["all_on"]["seconds"]
    on = figures["parts"]["all_on"]
    assert set(figures["parts"]["defaults"]["parts"]) == PARTS
    assert PARTS - {"mask encoder"} == set(on["parts"]), "its embeddings are cached"
    assert all(seconds >= 0 for seconds in on["parts"].values())
    assert on["images_per_second"] == pytest.approx(2 / on["seconds"])
    assert on["tokens_per_second"] == pytest.approx(6 * (6 + 16 + 12) / on["seconds"]), "rows, whatever they share"
    assert on["mfu"] is None, "no peak is listed for a CPU"
    assert on["share_of_matrix_peak"] == pytest.approx(on["flops"] / on["seconds"] / on["matrix_peak"])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("vocabulary", "precision"), [("full", "fp32"), ("new_tokens", "bf16")])
def test_operations_are_those_that_torch_counts(vocabulary, precision, backbone):
    """By part and formula against forward and backward pass as they are; checkpointing computes more, needs no more."""
    shape, counts = SHAPES["tiny"], []
    for checkpointing in (False, True):
        model = random_model(shape, precision, "sdpa", torch.device("cpu"), backbone)
        config = ModelConfig(
            gradient_checkpointing=checkpointing, decoder_checkpointing=False, train_vocabulary=vocabulary
        )
        prepare_training(model, config).configure(RuntimeOptions(pack_rows=True))
        batch = make_batch(shape, model.vlm.view, images=2, each=3).to("cpu", model.dtype)
        with flop_counter() as counter:
            objective(model(batch), batch, LossConfig()).total.backward()
        counts.append((step_flops(model, batch), counter.get_total_flops()))
    assert counts[0][0] == counts[1][0]
    assert counts[0][0] == pytest.approx(counts[0][1], rel=0.12)
    assert counts[1][1] > 1.05 * counts[0][1]


def test_utilisation():
    assert utilisation(989e12, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert utilisation(756e12, 2.0, "NVIDIA H100 PCIe") == pytest.approx(0.5)
    assert utilisation(1e12, 1.0, "cpu") is None


def test_the_peak_is_that_of_products(monkeypatch):
    """Of the fastest of them."""
    monkeypatch.setitem(measuring.PRODUCT_SIDES, "cpu", 8)
    times = iter([0.0, 2.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(times))
    assert measuring.matrix_peak(torch.device("cpu"), torch.float32) == 2 * 8**3 / 0.5


def test_dialogues_of_class_lists():
    shape = SHAPES["tiny"]
    batch = make_batch(shape, ClipView(shape.tower_side), images=2, each=2, masks=3, classes=5)
    assert batch.ids.shape == (4, shape.opening + 16 + 15 + 20)
    assert [len(masks) for masks in batch.masks] == [6, 6]
    rows = batch.mask_rows[:, None]
    assert (batch.ids[rows, batch.mask_positions + 1] == 3).all()
    assert int((batch.ids == 3).sum()) == 12
