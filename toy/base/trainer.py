"""The loop of every stage: bf16 compute on fp32 master weights, a schedule by the clock, a log, checkpoints."""

import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.files import write_whole

WARMUP, FLOOR = 0.03, 0.02  # shares of the budget and of the peak rate
SAVE_EVERY, EVALUATE_EVERY, LOG_EVERY = 240, 480, 20  # seconds, seconds, seconds


@dataclass(frozen=True)
class StagePlan:
    """One stage: its name, seconds it may train, peak learning rate, and where log and checkpoints go.

    spare_core: a file whose appearance says that the stage on the other core has ended, so that this one may use both.
    """

    name: str
    seconds: float
    rate: float
    scratch: Path
    resume: bool = False
    spare_core: Path | None = None


class MixedPrecision:
    """A bf16 copy of a model that computes, and the fp32 original that AdamW updates.

    Matrix products in bf16 are several times faster than in fp32 on CPUs with bf16 instructions, and copying whole
    models costs less than autocast's casts at every operation.
    """

    def __init__(self, master: nn.Module, rate: float):
        self.master, self.live = master, deepcopy(master).bfloat16()
        self._keep_exact()
        learned = [p for p in master.parameters() if p.requires_grad]
        decay = [p for p in learned if p.ndim > 1]
        plain = [p for p in learned if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    def _keep_exact(self) -> None:
        """Rotary frequencies and SAM's frozen Fourier matrix stay fp32: phases do not survive bf16."""
        for (_, exact), (_, copy) in zip(self.master.named_buffers(), self.live.named_buffers(), strict=True):
            copy.data = exact.clone()
        for exact, copy in zip(self.master.parameters(), self.live.parameters(), strict=True):
            if not exact.requires_grad:
                copy.data = exact.detach().clone()

    def step(self, loss: Tensor, rate: float) -> float:
        """One update at learning rate `rate`; the gradient norm before clipping."""
        loss.backward()
        for slow, fast in zip(self.master.parameters(), self.live.parameters(), strict=True):
            slow.grad = None if fast.grad is None else fast.grad.float()
            fast.grad = None
        norm = nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.refresh()
        return norm.item()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights into the computing copy."""
        torch._foreach_copy_(list(self.live.parameters()), list(self.master.parameters()))


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if progress < WARMUP:
        return peak * max(progress, 0.002) / WARMUP
    share = (min(progress, 1.0) - WARMUP) / (1 - WARMUP)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


def train_stage(
    plan: StagePlan,
    master: nn.Module,
    batches: Callable[[int], Iterator[dict[str, Tensor]]],
    objective: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    publish: Callable[[nn.Module], None],
) -> dict[str, float]:
    """Train `master` for the plan's seconds (evaluation and data waits included); the last evaluation's figures.

    `batches(step)` yields batches from that step on, so that a resumed run sees no scene twice.
    """
    model = MixedPrecision(master, plan.rate)
    state = _Progress(plan, model)
    publish(model.master)
    stream, started = batches(state.step), time.monotonic() - state.seconds
    saved = evaluated = logged = state.seconds
    sums: dict[str, float] = {}
    bar = tqdm(total=round(plan.seconds), initial=round(state.seconds), unit="s", desc=plan.name, mininterval=5)
    steps_since = 0
    while (now := time.monotonic() - started) < plan.seconds:
        loss, parts = objective(model.live, next(stream))
        norm = model.step(loss, learning_rate(now / plan.seconds, plan.rate))
        state.step, steps_since = state.step + 1, steps_since + 1
        for key, value in {**parts, "loss": loss.detach(), "norm": norm}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        if now - logged > LOG_EVERY:
            means = {key: round(value / steps_since, 4) for key, value in sums.items()}
            state.log({"step_seconds": round((now - logged) / steps_since, 3), **means}, now)
            bar.update(round(now) - bar.n)
            bar.set_postfix(loss=means["loss"], refresh=False)
            sums, steps_since, logged = {}, 0, now
            if plan.spare_core and plan.spare_core.exists() and torch.get_num_threads() == 1:
                torch.set_num_threads(2)
        if now - evaluated > EVALUATE_EVERY:
            state.log({"held_out": _measure(evaluate, model)}, now)
            evaluated = now
        if now - saved > SAVE_EVERY:
            state.save(now)
            publish(model.master)
            saved = now
    bar.close()
    state.save(plan.seconds)
    publish(model.master)
    figures = _measure(evaluate, model)
    state.log({"held_out": figures}, plan.seconds)
    return figures


def _measure(evaluate: Callable[[nn.Module], dict[str, float]], model: MixedPrecision) -> dict[str, float]:
    with torch.no_grad():
        return {key: round(float(value), 4) for key, value in evaluate(model.live).items()}


class _Progress:
    """Step and seconds of a stage, its checkpoint file and its JSONL log."""

    def __init__(self, plan: StagePlan, model: MixedPrecision):
        self.plan, self.model, self.step, self.seconds = plan, model, 0, 0.0
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
        """Drop what was logged after the checkpoint: those steps are done again."""
        if (log := self._log_file()).exists():
            lines = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.step]
            write_whole(log, "".join(lines))

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
        part.replace(self.file)
