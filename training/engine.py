"""A thin wrapper around DeepSpeed: what the training loop needs of it, and nothing else."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.optimizer_state import MOMENTS, WEIGHT, TrainedParameters
from utils import dist
from utils.config import Recipe, TrainConfig
from utils.log import log

PUBLISHED_BUCKET = 500_000_000  # elements; buffers are allocated at full size, so never larger than what trains
EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
OFFLOADS = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "all": (3,)}  # with which ZeRO stages


class Engine:
    """Forward, backward, step; learning rate, gradient norm; trained tensors by name.

    Every process makes one, after `dist.start()`. Parameters that require gradients are trained. Under ZeRO-3 each
    process keeps a shard of every weight, under ZeRO-1 and 2 a shard of Adam's state.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        deepspeed = _import_deepspeed()
        train = recipe.train
        self.device = dist.device()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("nothing to train: no parameter of the model requires gradients")
        settings = engine_settings(recipe, sum(parameter.numel() for parameter in trained), self.device)
        # Shards the model weight by weight while it is still on the CPU: moved to the device at full size first, a
        # 13B model would need room on it for all of its weights.
        if train.zero_stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        model.to(self.device)
        betas = (train.beta1, train.beta2)
        optimizer = torch.optim.AdamW(trained, train.lr, betas, weight_decay=train.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        dist.set_timeout(train.timeout_minutes)

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
        """Norm of the last step's gradient before clipping; None where DeepSpeed keeps none (fp32 without ZeRO)
        and where it is not finite."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    @property
    def updated(self) -> bool:
        """Whether the last step changed the weights. DeepSpeed drops an update whose gradient is not finite, on all
        processes and without a word."""
        return self.engine.was_step_applied()

    @contextmanager
    def gathered(self) -> Generator[None]:
        """The full weights on every process, for evaluation.

        Under ZeRO-3, weights of a layer exist only during its forward pass: hooks gather them from all processes and
        release them afterwards. That works in training, where all processes run the same layers together. In evaluation
        each has its own questions and generates answers of its own length; a process that needs one more forward pass
        than the others would wait for them until the time-out. So all weights are gathered once, and the hooks are
        removed meanwhile. Below ZeRO-3 every process has the full weights anyway. All processes enter it together.
        """
        if self.engine.zero_optimization_stage() < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        hooks = self.engine.optimizer.parameter_offload
        with GatheredParameters(list(self.module.parameters())):
            hooks._remove_module_hooks()  # they would release each layer's weights after its first use
            hooks.forward_hooks, hooks.backward_hooks = [], []  # else the next removal would find them again
            try:
                yield
            finally:
                hooks.setup_zero_stage3_hooks()

    def gather(self, kind: str) -> dict[str, Tensor]:
        """The full trained weights ("weight") or Adam moments ("exp_avg", "exp_avg_sq") by name, in fp32 and on the CPU
        of the main process; the other processes get {}. All processes call it."""
        return TrainedParameters(self.engine).gather(kind)

    def counters(self) -> dict[str, Any]:
        """What else a resumed run needs: updates made, position in the schedule, loss scale (fp16)."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        plain = {} if scaler is None else {name: value for name, value in vars(scaler).items() if _is_plain(value)}
        schedule = self.engine.lr_scheduler.last_batch_iteration
        return {"updates": TrainedParameters(self.engine).steps, "schedule": schedule, "loss_scale": plain}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any]) -> None:
        """Resumes from tensors by kind, as `gather` returned them, and `counters`, whatever ZeRO stage and number of
        processes they come from. All processes call it with the same values."""
        trained = TrainedParameters(self.engine)
        if counters["updates"]:
            trained.begin(counters["updates"])
        for kind in (WEIGHT, *(MOMENTS if counters["updates"] else ())):
            trained.scatter(kind, tensors[kind])
        self.engine.lr_scheduler.step(counters["schedule"])
        if scaler := getattr(self.engine.optimizer, "loss_scaler", None):
            vars(scaler).update(counters["loss_scale"])


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def engine_settings(recipe: Recipe, trained: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration. It states every setting whose default differs between versions (lisa.md 5.4)."""
    train = recipe.train
    precision = dist.precision(recipe.model.precision)
    check_settings(train)
    bucket = min(PUBLISHED_BUCKET, trained + trained % 2)  # even, as DeepSpeed demands
    on_gpu = device.type == "cuda"
    place = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.grad_accumulation_steps,
        "gradient_clipping": train.grad_clip,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {
            # In half precision stage 0 would keep its fp32 copies where `TrainedParameters` cannot read them.
            "stage": train.zero_stage if precision == "fp32" else max(1, train.zero_stage),
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            "reduce_scatter": on_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": place} if train.offload != "none" else {}),
            **({"offload_param": place} if train.offload == "all" else {}),
            **_with_numbers(train.zero_options),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        "scheduler": _schedule(train),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _with_numbers(value: Any) -> Any:
    """Options with numbers such as 5e8, which are text in YAML 1.1, as numbers: of fields that it alone knows DeepSpeed
    refuses text."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def check_settings(train: TrainConfig) -> None:
    """Raises ValueError where fields of the `train` section do not go together."""
    if train.zero_stage not in (stages := OFFLOADS[train.offload]):
        have = ", ".join(map(str, stages))
        raise ValueError(f"train.offload={train.offload} needs train.zero_stage {have}, got {train.zero_stage}")


def _schedule(train: TrainConfig) -> dict[str, Any]:
    """Linear from 0 to `train.lr` over the warm-up, then to 0 at the last step as `train.schedule` says."""
    total, warmup = train.total_steps, train.total_warmup_steps
    if warmup >= total:
        log.warning("warm-up of %d steps in a run of %d: train.lr is never reached", warmup, total)
    params = {"warmup_num_steps": max(1, warmup), "warmup_type": "linear", "total_num_steps": total}
    if train.schedule == "cosine":
        return {"type": "WarmupCosineLR", "params": {**params, "warmup_min_ratio": 0.0, "cos_min_ratio": 0.0}}
    return {"type": "WarmupDecayLR", "params": {**params, "warmup_min_lr": 0.0, "warmup_max_lr": train.lr}}


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and on a CPU without its shared-memory operator.

    That operator (for inference) would be compiled on first use, which takes 40 s and fails without a C++ compiler.
    """
    if dist.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # here because it takes seconds, which evaluation and chat need not wait
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if dist.device().type == "cpu":
        vars(deepspeed.ops).setdefault("__compatible_ops__", defaultdict(bool))
    return deepspeed
