"""The activation memory counted without values, against what the allocator provides when the step really runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from data.patch_view import PatchView
from data.types import IGNORE_ID, IMAGE_ID, Batch
from data.views import LanguageView
from model.checkpoints.architecture import Architecture
from model.checkpoints.load import assemble
from model.finetune.trainable import prepare_training
from model.heads.base import CHECKPOINTED_AT_ONCE
from model.losses import objective
from model.runtime import RuntimeOptions
from model.seg_model import SegModel
from tests.tiny_model import EOS, LANGUAGE, LLAVA, PLAN, SAM, TOWER, tiny_batch
from tests.tiny_qwen import FAMILIES, read_backbone, stock_model
from tools.memory.activation_memory import Ledger, footprint
from utils.config import LoraConfig, LossConfig, ModelConfig

MIB = 2**20
WIDE = replace(  # so that activations outweigh the workspaces of kernels
    PLAN,
    vlm_config={
        **LLAVA,
        "language": LANGUAGE
        | {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 2000},
        "tower": TOWER | {"hidden_size": 64, "intermediate_size": 256},
    },
    head_config=SAM | {"vision_config": SAM["vision_config"] | {"hidden_size": 64, "mlp_dim": 256}},
)


def prepared(
    attention: str,
    checkpointing: bool,
    precision: torch.dtype,
    plan: Architecture = WIDE,
    view: LanguageView | None = None,
) -> SegModel:
    """With gradients, as after a first step."""
    model = assemble(plan, attention, view).to(precision)
    lora = LoraConfig(r=4, alpha=8, dropout=0.0)
    prepare_training(model, ModelConfig(gradient_checkpointing=checkpointing, lora=lora))
    model.configure(RuntimeOptions(pack_rows=True, checkpoint_decoder=True))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    return model


def long_batch(precision: torch.dtype) -> Batch:
    """The tiny images with longer rows, so that the language model matters."""
    batch = tiny_batch()
    words = 10 + torch.arange(3 * 160).view(3, 160) % 25
    ids = torch.cat([batch.ids[:, :6], words, batch.ids[:, -1:].clamp(min=EOS)], dim=1)
    labels = ids.clone()
    labels[:, :80] = IGNORE_ID
    return replace(batch, ids=ids, labels=labels, attention=torch.ones_like(ids, dtype=torch.bool)).to("cpu", precision)


def measured(model: SegModel, batch: Batch) -> int:
    """Peak of the bytes that the allocator handed out."""

    def step() -> None:
        objective(model(batch), batch, LossConfig()).total.backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("attention", "checkpointing", "precision"),
    [
        ("sdpa", False, torch.float32),
        ("sdpa", True, torch.float32),
        ("sdpa", False, torch.bfloat16),
        ("eager", False, torch.float32),
    ],
)
def test_peak_is_that_of_the_real_step(attention, checkpointing, precision, monkeypatch):
    monkeypatch.setitem(CHECKPOINTED_AT_ONCE, "meta", CHECKPOINTED_AT_ONCE["cpu"])
    torch.manual_seed(0)
    model = prepared(attention, checkpointing, precision)
    batch = long_batch(precision)
    truth = measured(model, batch)
    with torch.device("meta"):
        model = prepared(attention, checkpointing, precision)
    planned = footprint(model, batch.map_tensors(_without_values), LossConfig())
    assert truth > MIB
    assert abs(planned.peak / truth - 1) < 0.15
    assert 0 < planned.saved < planned.peak


@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_with_patches_of_several_images(family, tmp_path, monkeypatch):
    monkeypatch.setitem(CHECKPOINTED_AT_ONCE, "meta", CHECKPOINTED_AT_ONCE["cpu"])
    wide = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 16}  # heads as wide as before
    stock_model(family, vision={"out_hidden_size": 128, "hidden_size": 64}, **wide).save_pretrained(tmp_path)
    plan, _, _ = read_backbone(tmp_path)
    torch.manual_seed(0)
    shown, batch = PatchView(4, 8 * 8 * 100, 8 * 8 * 150), long_batch(torch.float32)
    images = [np.zeros((*place.original, 3), np.uint8) for place in batch.geometry]
    counts = [shown.tokens(*image.shape[:2]) for image in images]
    rows = [[5] + [IMAGE_ID] * counts[image] + list(range(6, 46)) for image in (0, 0, 1)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [6] * (length - len(row)) for row in rows])
    batch = replace(
        batch,
        pixels=torch.cat([shown(image) for image in images]),
        ids=ids,
        labels=ids.masked_fill(ids == IMAGE_ID, IGNORE_ID),
        attention=torch.ones_like(ids, dtype=torch.bool),
    )
    model = prepared("sdpa", True, torch.float32, plan, shown)
    truth = measured(model, batch)
    with torch.device("meta"):
        model = prepared("sdpa", True, torch.float32, plan, shown)
    planned = footprint(model, batch.map_tensors(_without_values), LossConfig())
    assert abs(planned.peak / truth - 1) < 0.15


def test_checkpointing_saves_less_for_the_backward_pass():
    saved = []
    for checkpointing in (False, True):
        with torch.device("meta"):
            model = prepared("sdpa", checkpointing, torch.float32)
        batch = long_batch(torch.float32).map_tensors(_without_values)
        saved.append(footprint(model, batch, LossConfig()).saved)
    assert saved[1] < saved[0]


def test_views_and_what_was_there_before_count_nothing():
    existing = torch.zeros(1000)
    with Ledger([existing]) as ledger:
        existing[10:].view(-1)
        assert ledger.live == 0
        result = existing + 1
        assert ledger.live == result.nbytes
        del result
        assert ledger.live == 0 and ledger.peak == existing.nbytes


def _without_values(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta") if tensor.is_floating_point() else tensor
