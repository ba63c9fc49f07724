"""The SAM stage: promptable, class-agnostic masks, with a dense head on the image encoder during training."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2Model, SamModel

from toy.base.attention import use_folded_attention
from toy.base.dense import DenseHead, dense_loss
from toy.base.llava import init_by_width
from toy.base.pictures import held_out_batches, normalise_sam, prefetch
from toy.base.prompts import KINDS, prompt_sample
from toy.base.sizes import PATCH, SCENE_SIDE, sam_config
from toy.base.tower import sine_grid
from toy.base.trainer import StagePlan, train_stage

BATCH = 16
DENSE_WEIGHT = 0.5


class SamStage(nn.Module):
    """SAM and the dense head on its image encoder."""

    def __init__(self):
        super().__init__()
        config = sam_config()
        self.sam = SamModel(config)
        use_folded_attention(self.sam)
        reset_sam(self.sam)
        positions = cast(nn.Parameter, self.sam.vision_encoder.pos_embed)  # None only without absolute positions
        with torch.no_grad():
            positions.copy_(0.3 * sine_grid(SCENE_SIDE // PATCH, positions.shape[-1])[None])
            nn.init.normal_(self.sam.vision_encoder.patch_embed.projection.weight, std=0.05)
        self.head = DenseHead(self.sam.vision_encoder.config.output_channels)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The dense head's output; mask logits (B, K, M, h, w) and IoU estimates (B, K, M) of points, then of boxes."""
        embedding = self.sam.vision_encoder(normalise_sam(batch["pixels"])).last_hidden_state
        decoded = [self._decode(embedding, points=batch["points"], levels=batch["masks"].shape[2] > 1)]
        if "corners" in batch:
            decoded.append(self._decode(embedding, boxes=batch["corners"]))
        return self.head(embedding.flatten(2).transpose(1, 2)), decoded

    def _decode(
        self, embedding: Tensor, *, points: Tensor | None = None, boxes: Tensor | None = None, levels: bool = False
    ) -> tuple[Tensor, Tensor]:
        labels = None if points is None else torch.ones(points.shape[:-1])
        sparse, dense = self.sam.prompt_encoder(points, labels, boxes, None)
        positions = self.sam.get_image_wide_positional_embeddings().to(embedding.dtype)
        return self.sam.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=positions.expand(len(embedding), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=levels,
        )


def reset_sam(sam: SamModel | Sam2Model) -> None:
    """Initialise weights as upstream SAM does: PyTorch's defaults, and Fourier features of scale 1.

    transformers expects weights to be loaded: with its Fourier scale of half the width, neighbouring points get
    unrelated codes.
    """
    for module in sam.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            module.reset_parameters()
    nn.init.normal_(sam.shared_image_embedding.positional_embedding)
    sam.shared_image_embedding.positional_embedding.requires_grad_(False)


def tell_prompts_apart(decoder: Any) -> None:
    """Initialise a mask decoder, of SAM or SAM 2, so that its masks depend on the prompt from the first step on.

    Mask logits are the product of a mask token and the upscaled image, both after the decoder. With PyTorch's default
    weights they hardly depend on the prompt, and hundreds of steps pass before they do: hence the larger gains here.
    """
    init_by_width(decoder.transformer, gain=1.0)
    for part in (decoder.output_hypernetworks_mlps, decoder.upscale_conv1, decoder.upscale_conv2):
        init_by_width(part, gain=2**0.5)
    with torch.no_grad():
        for network in decoder.output_hypernetworks_mlps:
            network.proj_out.weight *= 0.4
        for token in (part for part in decoder.children() if isinstance(part, nn.Embedding)):
            token.weight *= 0.02  # small, so that the prompt token next to them dominates


def mask_loss(logits: Tensor, estimates: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, dice and IoU-estimate loss of (B, K, M, h, w) logits, and the IoU (B, K, M) of each mask.

    counts: `prompts.shrink` of the true masks; a cell of the decoder's output covers 2 x 2 pixels.
    """
    logits = logits.float().flatten(3)
    truth = counts.float().flatten(3) / 4
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * truth).sum(-1) + 1) / (probability.sum(-1) + truth.sum(-1) + 1)
    with torch.no_grad():
        iou = binary_iou(logits > 0, truth >= 0.5)
    return 5 * cross_entropy.mean() + dice.mean() + 0.1 * F.mse_loss(estimates.float(), iou), iou


def binary_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU over the last axis of two boolean tensors."""
    return (first & second).sum(-1) / (first | second).sum(-1).clamp(min=1)


def sam_objective(model: SamStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    output, decoded = model(batch)
    dense, accuracy = dense_loss(output, batch["codes"], batch["boxes"])
    logits = torch.cat([mask for mask, _ in decoded], dim=1)
    estimates = torch.cat([estimate for _, estimate in decoded], dim=1)
    loss, iou = mask_loss(logits, estimates, batch["masks"])
    return loss + DENSE_WEIGHT * dense, {"spot_accuracy": accuracy, "iou": iou.mean()}


def evaluate_on(tests: list[dict[str, Tensor]]) -> Callable[[SamStage], dict[str, float]]:
    """A function of the model: mean IoU of single points, of boxes, of several points and of the three levels.

    tests: batches in the order of `prompts.KINDS`, over and over.
    """

    def evaluate(model: SamStage) -> dict[str, float]:
        figures: dict[str, list[Tensor]] = {}
        for index, batch in enumerate(tests):
            output, decoded = model(batch)
            kind = KINDS[index % len(KINDS)]
            names = ("point", "box") if kind == "single" else (kind,)
            start = 0
            for name, (logits, estimates) in zip(names, decoded, strict=True):
                truth = batch["masks"][:, start : start + logits.shape[1]]
                start += logits.shape[1]
                figures.setdefault(f"{name}_iou", []).append(mask_loss(logits, estimates, truth)[1].mean())
            figures.setdefault("spot_accuracy", []).append(dense_loss(output, batch["codes"], batch["boxes"])[1])
        return {key: float(torch.stack(values).mean()) for key, values in figures.items()}

    return evaluate


def train_sam(plan: StagePlan, seed: int, publish: Callable[[SamStage], object]) -> tuple[SamStage, dict[str, float]]:
    """The trained stage and its held-out figures; `publish(stage)` is called with each checkpoint."""
    stage = SamStage()
    tests = held_out_batches(prompt_sample, batches=8, size=BATCH, seed=seed)

    def batches(step: int) -> Iterator[dict[str, Tensor]]:
        return prefetch(prompt_sample, "sam", first=step, size=BATCH, seed=seed)

    return stage, train_stage(plan, stage, batches, sam_objective, evaluate_on(tests), publish)
