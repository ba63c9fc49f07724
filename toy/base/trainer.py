"""The training loop of every stage: fp32 weights, computed with in bf16 where that is fast, a schedule by wall clock,
log, checkpoints."""

import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import dist
from utils.files import write_atomically

WARMUP, FLOOR = 0.03, 0.02  # warm-up as a share of the time; last learning rate as a share of the peak
SAVE_EVERY, EVALUATE_EVERY, LOG_EVERY = 240, 480, 20  # seconds
Batch = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StagePlan:
    """One stage: name, seconds of training, peak learning rate, folder of log and checkpoints.

    spare_core: a file that appears when the stage on the other core has finished; from then on this one uses both.
    """

    name: str
    seconds: float
    rate: float
    scratch: Path
    resume: bool = False
    spare_core: Path | None = None


def compute_dtype() -> torch.dtype:
    return torch.bfloat16 if dist.computes_bf16() else torch.float32


class MixedPrecision(Generic[Model]):
    """A copy of a model for forward and backward passes, in bf16 where the CPU has instructions for it, and the fp32
    original that AdamW updates.

    Matrix products in bf16 are then several times faster than in fp32, and copying all weights once per step costs less
    than autocast's casts at every operation.
    """

    def __init__(self, master: Model, rate: float):
        self.master = master
        self.compute: Model = deepcopy(master).to(compute_dtype())
        self._keep_exact()
        trainable = [p for p in master.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.ndim > 1]
        vectors = [p for p in trainable if p.ndim <= 1]  # biases and norms
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    def _keep_exact(self) -> None:
        """Rotary frequencies and SAM's frozen Fourier matrix stay fp32: bf16 is too coarse for phases."""
        for (_, exact), (_, copy) in zip(self.master.named_buffers(), self.compute.named_buffers(), strict=True):
            copy.data = exact.clone()
        for exact, copy in zip(self.master.parameters(), self.compute.parameters(), strict=True):
            if not exact.requires_grad:
                copy.data = exact.detach().clone()

    def step(self, loss: Tensor, rate: float) -> float:
        """One update at learning rate `rate`; returns the gradient norm before clipping."""
        loss.backward()
        for exact, copy in zip(self.master.parameters(), self.compute.parameters(), strict=True):
            exact.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None
        norm = nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.refresh()
        return norm.item()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights into the copy that computes."""
        torch._foreach_copy_(list(self.compute.parameters()), list(self.master.parameters()))


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to FLOOR of it. progress: share of the time that has passed."""
    if progress < WARMUP:
        return peak * max(progress, 0.002) / WARMUP
    share = (min(progress, 1.0) - WARMUP) / (1 - WARMUP)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


def train_stage(
    plan: StagePlan,
    master: Model,
    batches: Callable[[int], Iterator[Batch]],
    objective: Callable[[Model, Batch], tuple[Tensor, dict[str, Tensor]]],
    evaluate: Callable[[Model], dict[str, float]],
    publish: Callable[[Model], object],
) -> dict[str, float]:
    """Train `master` for the plan's seconds, evaluation and waiting for data included; the last held-out figures.

    batches: yields batches from a given step on, so that a resumed run uses no scene twice. objective: loss and figures
    to log. publish: called with the fp32 model at every checkpoint.
    """
    model = MixedPrecision(master, plan.rate)
    state = _Progress(plan, model)
    publish(model.master)
    stream = batches(state.step)
    started = time.monotonic() - state.seconds
    saved_at = evaluated_at = logged_at = state.seconds
    sums: dict[str, float] = {}
    bar = tqdm(total=round(plan.seconds), initial=round(state.seconds), unit="s", desc=plan.name, mininterval=5)
    steps_since = 0
    while (now := time.monotonic() - started) < plan.seconds:
        loss, parts = objective(model.compute, next(stream))
        norm = model.step(loss, learning_rate(now / plan.seconds, plan.rate))
        state.step += 1
        steps_since += 1
        for key, value in {**parts, "loss": loss.detach(), "norm": norm}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        if now - logged_at > LOG_EVERY:
            means = {key: round(value / steps_since, 4) for key, value in sums.items()}
            state.log({"step_seconds": round((now - logged_at) / steps_since, 3), **means}, now)
            bar.update(round(now) - bar.n)
            bar.set_postfix(loss=means["loss"], refresh=False)
            sums, steps_since = {}, 0
            logged_at = now
            if plan.spare_core and plan.spare_core.exists() and torch.get_num_threads() == 1:
                torch.set_num_threads(2)
        if now - evaluated_at > EVALUATE_EVERY:
            state.log({"held_out": _measure(evaluate, model)}, now)
            evaluated_at = now
        if now - saved_at > SAVE_EVERY:
            state.save(now)
            publish(model.master)
            saved_at = now
    bar.close()
    state.save(plan.seconds)
    publish(model.master)
    figures = _measure(evaluate, model)
    state.log({"held_out": figures}, plan.seconds)
    return figures


def _measure(evaluate: Callable[[Model], dict[str, float]], model: MixedPrecision[Model]) -> dict[str, float]:
    with torch.no_grad():
        return {key: round(float(value), 4) for key, value in evaluate(model.compute).items()}


class _Progress:
    """Step and seconds of a stage, its checkpoint file and its JSONL log."""

    def __init__(self, plan: StagePlan, model: MixedPrecision[Any]):
        self.plan = plan
        self.model = model
        self.step, self.seconds = 0, 0.0
        self.file = plan.scratch / f"{plan.name}.pt"
        plan.scratch.mkdir(parents=True, exist_ok=True)
        if plan.resume and self.file.exists():
            stored = torch.load(self.file, weights_only=True)
            model.master.load_state_dict(stored["model"])
            model.optimizer.load_state_dict(stored["optimizer"])
            model.refresh()
            self.step, self.seconds = stored["step"], stored["seconds"]
            self._cut_log()
        elif (log := self._log_file()).exists():
            log.unlink()

    def _log_file(self) -> Path:
        return self.plan.scratch / f"{self.plan.name}.jsonl"

    def _cut_log(self) -> None:
        """Drop what was logged after the checkpoint: those steps are repeated."""
        if (log := self._log_file()).exists():
            lines = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.step]
            write_atomically(log, "".join(lines))

    def log(self, figures: dict, seconds: float) -> None:
        line = {"stage": self.plan.name, "step": self.step, "seconds": round(seconds), **figures}
        with self._log_file().open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, seconds: float) -> None:
        stored = {
            "model": self.model.master.state_dict(),
            "optimizer": self.model.optimizer.state_dict(),
            "step": self.step,
            "seconds": seconds,
        }
        part = self.file.with_suffix(".part")
        torch.save(stored, part)
        part.replace(self.file)  # at once: a killed process leaves the old checkpoint or the new one
