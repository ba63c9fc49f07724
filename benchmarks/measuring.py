"""Measures a training step: seconds per part, peak memory, floating-point operations."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.shapes import sam_head, vlm_of
from data.types import Batch
from model.seg_model import SegModel

MIB = 2**20
RESET_PEAK = "5"  # written to /proc/self/clear_refs, resets the peak resident size
MMAP_THRESHOLD, LARGE = -3, 2**18  # glibc's M_MMAP_THRESHOLD; blocks of at least LARGE bytes are returned when freed
PEAK_FLOPS = {  # dense, 16 bit, from the data sheets; by a part of the device's name, first match
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}
PRODUCT_SIDES = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product shows what a device reaches
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTIONS = {
    CPU_ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
}
PRODUCT_SECONDS, PRODUCTS = 1.0, 3  # for so long, and at least so often


class PartClock:
    """Seconds per part of a step.

    Forward passes of the model's parts count for themselves and are subtracted from "forward", which keeps the rest.
    """

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
    """Peak memory from now on, beyond what is in use now: allocated on a GPU, resident on a CPU (Linux).

    On a CPU freed blocks are returned to the system at once from now on, so that resident means in use; that costs
    time, so steps are timed without it.
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
        """The peak resident size since it was reset."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def parts_of(model: SegModel) -> dict[str, nn.Module]:
    vlm, head = vlm_of(model), sam_head(model)
    return {
        "tower": vlm.tower,
        "language model": vlm.decoder,
        "mask encoder": head.encoder,
        "mask decoder": head.decoder,
    }


def step_flops(model: SegModel, batch: Batch) -> float:
    """Floating-point operations that a training step needs; recomputation to save memory does not count.

    The forward pass as torch counts it, by part: once for frozen parts, twice where gradients pass through frozen
    weights, three times for trained parts and for attention that gradients pass through, which has no weights.
    Attention counts in full, masked positions too, as in PaLM's MFU (arXiv 2204.02311, appendix B).
    """
    with flop_counter() as counter:
        model(batch)  # with gradients: inference takes other paths in places
    counts = counter.get_flop_counts()
    names = {part: name for name, part in model.named_modules()}
    root = type(model).__name__
    vlm = vlm_of(model)
    vocabulary = vlm.language.lm_head
    frozen = [sam_head(model).encoder, vlm.tower]
    inside = set(vlm.tower.modules())  # a Qwen-VL's mergers are counted with its tower
    frozen += [part for part in vlm.vision_parts()["projector"] if part not in inside]
    factors: dict[nn.Module, int] = dict.fromkeys(frozen, 1)
    factors[vlm.decoder] = 2  # with LoRA's own products
    factors[vocabulary] = 3 if vocabulary.weight.requires_grad else 2
    parts = {part: counts.get(f"{root}.{names[part]}", {}) for part in factors}
    rest = sum(counts["Global"].values()) - sum(sum(part.values()) for part in parts.values())
    return 3 * rest + sum(  # the rest trains: text MLP and mask decoder
        number * (3 if operation in ATTENTIONS and factors[part] > 1 else factors[part])
        for part, operations in parts.items()
        for operation, number in operations.items()
    )


def flop_counter() -> FlopCounterMode:
    """torch's, which has no formula for the attention kernel on CPUs."""
    formulas = {
        CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        CPU_ATTENTION_BACKWARD: lambda grad, *shapes, **__: sdpa_backward_flop_count(grad, *shapes[:3]),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def utilisation(flops: float, seconds: float, device: str) -> float | None:
    """Model FLOPs utilisation (MFU), 0 to 1; None for a device that PEAK_FLOPS does not list."""
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    return None if peak is None else flops / seconds / peak


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that a product of large square matrices reaches here and now, in this
    precision and with the threads that are set; the fastest of several."""
    side = PRODUCT_SIDES[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    seconds: list[float] = []
    while len(seconds) < PRODUCTS or sum(seconds) < PRODUCT_SECONDS:
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
