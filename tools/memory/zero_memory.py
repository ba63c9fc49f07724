"""Memory of weights, gradients and optimizer on each device per ZeRO stage: DeepSpeed's arithmetic for this engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.seg_model import SegModel
from training.engine import PUBLISHED_BUCKET

MASTER, MOMENTS = 4, 8  # bytes per trained weight: its fp32 copy; AdamW's two moments
MAX_LIVE_PARAMETERS = 1_000_000_000  # weights that ZeRO-3 gathers at a time: DeepSpeed's stage3_max_live_parameters
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
FOUR_BITS = 0.5 + (1 + 4 / 256) / 64  # bytes: NF4, an 8-bit scale per 64 weights, an fp32 scale per 256 scales


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights."""

    trained: int
    frozen: int  # in the recipe's precision
    four_bit: int = 0  # frozen, in NF4
    widest: int = 0  # of the largest NF4 layer: they are unpacked one at a time


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a device."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    update: int  # only during the optimizer step, when activations are freed

    def peak(self, activations: int) -> int:
        permanent = self.weights + self.gradients + self.optimizer + self.buffers
        return permanent + max(activations, self.update)


def count_parameters(model: SegModel, four_bit: bool = False) -> ParameterCounts:
    """Of a model prepared for training. four_bit: the frozen linear layers of its language model are in NF4 (QLoRA)."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters()) - trained
    if not four_bit:
        return ParameterCounts(trained, frozen)
    layers = model.vlm.decoder_layers.modules()
    packed = [part.weight for part in layers if isinstance(part, nn.Linear) and not part.weight.requires_grad]
    four_bit_weights = sum(weight.numel() for weight in packed)
    return ParameterCounts(
        trained, frozen - four_bit_weights, four_bit_weights, max(weight.numel() for weight in packed)
    )


def bucket_size(counts: ParameterCounts) -> int:
    """Number of gradients that are reduced together."""
    return min(PUBLISHED_BUCKET, counts.trained)


def device_memory(
    counts: ParameterCounts, stage: int, devices: int, precision: str, offload: str = "none"
) -> DeviceMemory:
    """Bytes on each of `devices`.

    stage: 0 keeps everything on each device; 1 shards fp32 weights and moments; 2 also the gradients; 3 also the
    weights, trained and frozen, of which up to MAX_LIVE_PARAMETERS are gathered while in use. offload: none, optimizer
    (its states are in host memory), or all (with ZeRO-3 the weights, too).
    """
    width = WIDTHS[precision]
    shard = 1 / devices
    share = shard if stage else 1
    master = 0 if precision == "fp32" and not stage else MASTER
    weights = (counts.trained + counts.frozen) * width
    buffers = 2 * bucket_size(counts) * width if stage else 0  # one fills while the other is sent
    if stage == 3 and (devices > 1 or offload == "all"):
        buffers += min(MAX_LIVE_PARAMETERS * width, weights)
        weights = 0 if offload == "all" else int(weights * shard)
    on_device = offload == "none"
    return DeviceMemory(
        weights=weights + int(counts.four_bit * FOUR_BITS) + counts.widest * width,
        gradients=int(counts.trained * width * (shard if stage > 1 else 1)),
        optimizer=int(counts.trained * (master + MOMENTS) * share) if on_device else 0,
        buffers=buffers,
        update=int(counts.trained * master * share) if on_device else 0,  # gradients in fp32
    )
