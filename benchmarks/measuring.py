"""What a training step takes: seconds by part, memory at its highest, arithmetic."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data.types import Batch
from model.seg_model import SegModel

MIB = 2**20
RESET_PEAK = "5"  # what /proc/self/clear_refs takes for it
MMAP_THRESHOLD, LARGE = -3, 2**18  # glibc's name of the option; from so many bytes on a block goes back when freed
PEAK_FLOPS = {  # dense, 16 bit, as the makers state them; by a part of the device's name, the first that fits
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


class PartClock:
    """Seconds by part; the parts of the model are counted in their forward pass, and out of `forward`'s rest."""

    def __init__(self, model: SegModel):
        self.device = model.device
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}
        for name, part in parts_of(model).items():
            part.register_forward_pre_hook(lambda *_, name=name: self.began.update({name: self.now()}))
            part.register_forward_hook(lambda *_, name=name: self.add(name, self.now() - self.began[name], "forward"))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        began = self.now()
        result = work()
        self.add(name, self.now() - began)
        return result

    def add(self, name: str, seconds: float, out_of: str | None = None) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if out_of:
            self.add(out_of, -seconds)


class PeakMemory:
    """The most that is held from now on, beyond what is held now: allocated on a GPU, resident on a CPU (Linux).

    On a CPU freed blocks go back at once from here on, so that resident is what is in use; that costs time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated() / MIB
        else:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(MMAP_THRESHOLD, LARGE)
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            self.base = self._resident()

    def peak_mib(self) -> float:
        now = torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else self._resident()
        return now - self.base

    def _resident(self) -> float:
        """The high-water mark, which `clear_refs` has put to the resident size."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def parts_of(model: SegModel) -> dict[str, torch.nn.Module]:
    parts = {"tower": model.vlm.tower, "language model": model.vlm.language.model}
    return parts | {"mask encoder": model.head.encoder, "mask decoder": model.head.decoder}


def step_flops(model: SegModel, batch: Batch) -> float:
    """Floating-point operations that a training step needs, whatever is computed twice to save memory.

    The forward pass as torch counts it, by part: once for frozen parts, twice where gradients pass through frozen
    weights, three times where they train. Attention on a CPU is not counted (torch has no formula for its kernel).
    """
    with FlopCounterMode(display=False) as counter:  # with gradients, for inference goes another way in places
        model(batch)
    by_part = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    names = {part: name for name, part in model.named_modules()}
    root = type(model).__name__
    vocabulary = model.vlm.language.lm_head
    factors = {model.vlm.tower: 1, model.vlm.projector: 1, model.head.encoder: 1, model.vlm.language.model: 2}
    factors |= {vocabulary: 3 if vocabulary.weight.requires_grad else 2}
    taken = {part: by_part.get(f"{root}.{names[part]}", 0) for part in factors}
    rest = by_part["Global"] - sum(taken.values())  # trained: text MLP and mask decoder
    return 3 * rest + sum(factors[part] * flops for part, flops in taken.items())


def utilisation(flops: float, seconds: float, device: str) -> float | None:
    """Share of what the device can do (MFU); None for one that PEAK_FLOPS does not know."""
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    return None if peak is None else flops / seconds / peak
