"""Optional kernels (torch.compile, Liger) have the loss and the gradients of the plain layers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from model.finetune.trainable import prepare_training, trainable_names
from model.losses import objective
from tests.tiny_model import tiny_batch, tiny_model
from utils.config import LoraConfig, LossConfig, ModelConfig

CONFIG = ModelConfig(lora=LoraConfig(r=2, alpha=4, dropout=0.0), gradient_checkpointing=False)
LIGER = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()


def step(config: ModelConfig, device: str = "cpu"):
    model = prepare_training(tiny_model(), config).to(device)
    batch = tiny_batch().to(device, torch.float32)
    total = objective(model(batch), batch, LossConfig()).total
    total.backward()
    return total, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}, model


def test_compiled_layers_have_the_loss_and_gradients_of_plain_ones():
    """By the backend that traces and differentiates as inductor does, without a C++ compiler at the end."""
    torch.compiler.reset()
    plain, compiled = step(CONFIG), step(replace(CONFIG, compile="aot_eager"))
    layers = compiled[2].vlm.language.model.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch.testing.assert_close(compiled[:2], plain[:2], atol=1e-5, rtol=1e-4)
    assert trainable_names(compiled[2]) == trainable_names(plain[2])


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"no torch.compile backend \(model.compile\) 'induktor'.*did you mean 'indu"):
        step(replace(CONFIG, compile="induktor"))


@pytest.mark.skipif(LIGER, reason="Liger can run here")
def test_liger_says_what_it_needs():
    with pytest.raises(ImportError, match=r"model.liger needs an NVIDIA GPU and the liger-kernel package"):
        step(replace(CONFIG, liger=True))


@pytest.mark.skipif(not LIGER, reason="needs an NVIDIA GPU and liger-kernel")
def test_liger_has_the_loss_and_gradients_of_plain_layers():
    plain, liger = step(CONFIG, "cuda"), step(replace(CONFIG, liger=True), "cuda")
    assert "Liger" in type(liger[2].vlm.language.model.norm).__name__ + str(liger[2].vlm.language.model.norm.forward)
    torch.testing.assert_close(liger[:2], plain[:2], atol=1e-3, rtol=1e-3)
