"""What weights, gradients and optimizer take on each device, by ZeRO stage: DeepSpeed's arithmetic for this engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from training.engine import PUBLISHED_BUCKET

MASTER, MOMENTS = 4, 8  # bytes of a trained weight: its fp32 copy; AdamW's two moments
MAX_LIVE_PARAMETERS = 1_000_000_000  # weights that ZeRO-3 has whole at most: DeepSpeed's stage3_max_live_parameters
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
FOUR_BITS = 0.5 + (1 + 4 / 256) / 64  # NF4 with a scale for each 64, itself in 8 bits with a scale for each 256


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights."""

    trained: int
    frozen: int  # in the recipe's precision
    four_bit: int = 0  # frozen, in NF4
    widest: int = 0  # of the linears in NF4: unpacked one at a time


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a device."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    update: int  # only while the optimizer steps, when activations are gone

    def peak(self, activations: int) -> int:
        held = self.weights + self.gradients + self.optimizer + self.buffers
        return held + max(activations, self.update)


def count_parameters(model: nn.Module, four_bit: bool = False) -> ParameterCounts:
    """Of a model prepared for training; `four_bit` for the frozen linears of its language model's layers (QLoRA)."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters()) - trained
    if not four_bit:
        return ParameterCounts(trained, frozen)
    layers = model.vlm.decoder_layers.modules()
    packed = [part.weight for part in layers if isinstance(part, nn.Linear) and not part.weight.requires_grad]
    small = sum(weight.numel() for weight in packed)
    return ParameterCounts(trained, frozen - small, small, max(weight.numel() for weight in packed))


def bucket_size(counts: ParameterCounts) -> int:
    """Gradients that are reduced together."""
    return min(PUBLISHED_BUCKET, counts.trained)


def device_memory(
    counts: ParameterCounts, stage: int, devices: int, precision: str, offload: str = "none"
) -> DeviceMemory:
    """stage: 0 to 3. offload: none, optimizer (its part is in the host's memory), or all (with it, weights in ZeRO-3).

    0 keeps all on each device; 1 divides the fp32 weights and the moments; 2 the gradients too; 3 the weights too,
    trained and frozen, and has up to LIVE_AT_ONCE of them whole while they are used.
    """
    width, part = WIDTHS[precision], 1 / devices
    share = part if stage else 1
    master = 0 if precision == "fp32" and not stage else MASTER
    weights = (counts.trained + counts.frozen) * width
    buffers = 2 * bucket_size(counts) * width if stage else 0  # one fills while the other is sent
    if stage == 3 and (devices > 1 or offload == "all"):
        buffers += min(MAX_LIVE_PARAMETERS * width, weights)
        weights = 0 if offload == "all" else int(weights * part)
    on_device = offload == "none"
    return DeviceMemory(
        weights=weights + int(counts.four_bit * FOUR_BITS) + counts.widest * width,
        gradients=int(counts.trained * width * (part if stage > 1 else 1)),
        optimizer=int(counts.trained * (master + MOMENTS) * share) if on_device else 0,
        buffers=buffers,
        update=int(counts.trained * master * share) if on_device else 0,  # gradients in fp32
    )
