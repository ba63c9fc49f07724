"""`model.precision: auto`: bf16 where the device has instructions for it, else fp32."""

from __future__ import annotations

import pytest
import torch

from model.checkpoints.load import dtype_of
from training.engine import engine_settings
from training.run import with_precision
from utils import dist
from utils.config import ModelConfig, Recipe, TrainConfig
from utils.log import log


@pytest.mark.parametrize(("fast", "meant"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_computes_fast(fast, meant, monkeypatch):
    monkeypatch.setattr(dist, "computes_bf16", lambda: fast)
    recipe = Recipe(model=ModelConfig(precision="auto"), train=TrainConfig(steps_per_epoch=4))
    assert with_precision(recipe).model.precision == meant
    assert dtype_of("auto") == dtype_of(meant)
    assert engine_settings(recipe, 10, torch.device("cpu"))["bf16"]["enabled"] is (meant == "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_stated_precision_stays_and_an_emulated_one_is_said(precision, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    for fast in (True, False):
        monkeypatch.setattr(dist, "computes_bf16", lambda fast=fast: fast)
        caplog.clear()
        assert with_precision(Recipe(model=ModelConfig(precision=precision))).model.precision == precision
        assert ("model.precision=auto" in caplog.text) is (precision == "bf16" and not fast)


def test_a_cpu_computes_bf16_where_its_flags_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        flags = open("/proc/cpuinfo").read().split()  # noqa: SIM115
    except OSError:
        pytest.skip("no /proc/cpuinfo on this system")
    assert dist.computes_bf16() is ("avx512_bf16" in flags)
