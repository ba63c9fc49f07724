"""Faster kernels for the layers of the language model, where a recipe asks for them: torch.compile, Liger."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from model.seg_model import SegModel
from utils.config import ModelConfig
from utils.registry import unknown


def speed_up(model: SegModel, config: ModelConfig) -> None:
    """`model.compile` and `model.liger` of a recipe, in place; names of weights stay."""
    if config.liger:
        use_liger(model)
    if config.compile:
        compile_layers(model, config.compile)


def compile_layers(model: SegModel, backend: str) -> None:
    """Layer by layer, for rows of any length: the layers have the same code, so that compiling one serves for all."""
    have = torch.compiler.list_backends(exclude_tags=())
    if backend not in have:
        raise ValueError(unknown("torch.compile backend (model.compile)", backend, have))
    for layer in model.vlm.decoder_layers:
        layer.compile(backend=backend, dynamic=True)


def use_liger(model: SegModel) -> None:
    """Norms, gates and rotations of the language model in one kernel each. The text loss is lean without it."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        raise ImportError(
            "model.liger needs an NVIDIA GPU and the liger-kernel package (requirements-gpu.txt); "
            "set model.liger=false to train without"
        )
    if model.vlm.LIGER is None:
        raise ValueError(
            f"model.liger: Liger has no kernels for the backbone {model.vlm.NAME!r}; set model.liger=false"
        )
    # by name and only now: the optional package imports triton, which needs a GPU
    patch = getattr(importlib.import_module("liger_kernel.transformers"), model.vlm.LIGER)
    kernels = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    patch(**kernels, fused_linear_cross_entropy=False, model=model.vlm.decoder)
