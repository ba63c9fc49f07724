"""DeepSpeed behind a thin wrapper: what the training loop needs of it, and nothing else."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import dist
from utils.config import Recipe, TrainConfig
from utils.log import log

PUBLISHED_BUCKET = 500_000_000  # elements; the buffers are allocated whole, so never larger than what trains
SHARDS = "engine"  # folder of a checkpoint that holds DeepSpeed's own files


class Engine:
    """Forward, backward, step; learning rate, gradient norm; shards to and from a folder; whole weights.

    Every process makes one, after `dist.start()`. Parameters that ask for gradients are trained.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        deepspeed = _import_deepspeed()
        train, self.device = recipe.train, dist.device()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("nothing to train: no parameter of the model asks for gradients")
        betas = (train.beta1, train.beta2)
        fused = self.device.type == "cuda" or None
        optimizer = torch.optim.AdamW(trained, train.lr, betas, weight_decay=train.weight_decay, fused=fused)
        settings = engine_settings(recipe, sum(parameter.numel() for parameter in trained), self.device)
        self.engine, *_ = deepspeed.initialize(model=model.to(self.device), optimizer=optimizer, config=settings)

    def __call__(self, batch: Any) -> Any:
        return self.engine(batch)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def train(self) -> None:
        self.engine.train()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch (DeepSpeed divides by the number of micro-batches)."""
        self.engine.backward(loss)

    def step(self) -> None:
        """After the last micro-batch of a step: clip, update, next learning rate. After the others: nothing."""
        self.engine.step()

    @property
    def lr(self) -> float:
        return float(self.engine.get_lr()[0])

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None where DeepSpeed keeps none (fp32 without ZeRO)."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Writes the shards of every process (optimizer, schedule, trained weights) below `folder`."""
        self.engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, with the same ZeRO stage and number of processes."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=SHARDS, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"{folder} has no engine state: expected {folder / SHARDS}")

    def trained_weights(self) -> dict[str, Tensor]:
        """The whole trained weights in fp32, by name, on the CPU of the main process; the others get {}.

        Every process has to call it: each parameter is put together from the processes' shards, one at a time.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                whole = parameter if whole is None else whole
                if dist.is_main():
                    weights[name] = whole.detach().float().cpu().clone().contiguous()
        return weights


def engine_settings(recipe: Recipe, trained: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration; everything whose default moved between versions is said (lisa.md 5.4)."""
    train, precision = recipe.train, recipe.model.precision
    bucket = min(PUBLISHED_BUCKET, trained)
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.grad_accumulation_steps,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
            "reduce_scatter": device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "scheduler": {"type": "WarmupDecayLR", "params": _schedule(train)},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _schedule(train: TrainConfig) -> dict[str, Any]:
    """Linear from 0 over the warm-up, then linearly to 0 at the last step."""
    total = train.epochs * train.steps_per_epoch
    if train.warmup_steps >= total:
        log.warning("warm-up of %d steps in a run of %d: train.lr is never reached", train.warmup_steps, total)
    return {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": train.lr,
        "warmup_num_steps": max(1, train.warmup_steps),
        "warmup_type": "linear",
        "total_num_steps": total,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet; on a CPU without its shared-memory operator.

    That operator (inference only) would be compiled on first use: 40 s, and no start at all without a C++ compiler.
    """
    if dist.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # seconds that evaluation and chat need not wait
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if dist.device().type == "cpu":
        vars(deepspeed.ops).setdefault("__compatible_ops__", defaultdict(bool))
    return deepspeed
