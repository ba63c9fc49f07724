"""Stage 1: the vision tower learns what each patch shows, with a dense head that is dropped after training."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from toy.base.attention import IMPLEMENTATION
from toy.base.dense import DenseHead, dense_loss, read_spots
from toy.base.pictures import Sample, held_out_batches, normalise_tower, prefetch, tower_view
from toy.base.sizes import GRID, llava_config
from toy.base.trainer import StagePlan, train_stage
from toy.world.scene import Scene

BATCH = 32


class TowerStage(nn.Module):
    """CLIP's vision tower and the dense head."""

    def __init__(self):
        super().__init__()
        config = llava_config(vocab_size=8, image_token=3).vision_config
        self.tower = CLIPVisionModel(cast(CLIPVisionConfig, config))
        init_tower_embeddings(self.tower)
        self.head = DenseHead(self.tower.config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(patch_features(self.tower, pixels))


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(B, P, D) output of layer -2 without the class position; the last layer is not computed."""
    tower.config._attn_implementation = IMPLEMENTATION
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


@torch.no_grad()
def init_tower_embeddings(tower: CLIPVisionModel) -> None:
    """Start the positions from sines of row and column, and the patch embedding at a scale that matches them."""
    width = tower.config.hidden_size
    tower.embeddings.position_embedding.weight[1:] = 0.3 * sine_grid(GRID, width).flatten(0, 1)
    nn.init.normal_(tower.embeddings.patch_embedding.weight, std=0.05)


def sine_grid(side: int, width: int) -> Tensor:
    """(side, side, width) sines and cosines at geometric frequencies: first half of the row, then the column."""
    frequency = torch.exp(torch.linspace(0, -4, width // 4)) * 1.5
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], -1)
    return torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1)


def tower_sample(scene: Scene, step: int, rng: np.random.Generator) -> Sample:
    """Pixels and dense targets of a scene; neither `step` nor `rng` matters here."""
    spots = read_spots(scene, GRID)
    return {"pixels": tower_view(scene.image), "codes": spots.codes, "boxes": spots.boxes}


def tower_objective(model: TowerStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss, accuracy = dense_loss(model(normalise_tower(batch["pixels"])), batch["codes"], batch["boxes"])
    return loss, {"spot_accuracy": accuracy}


def load_tower(checkpoint: Path) -> TowerStage:
    """The stage with the weights of its checkpoint."""
    stage = TowerStage()
    stage.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return stage


def train_tower(plan: StagePlan, seed: int) -> tuple[TowerStage, dict[str, float]]:
    """The trained stage and its held-out figures."""
    stage = TowerStage()
    tests = held_out_batches(tower_sample, batches=4, size=BATCH, seed=seed)

    def evaluate(model: TowerStage) -> dict[str, float]:
        losses, parts = zip(*[tower_objective(model, batch) for batch in tests], strict=True)
        return {
            "loss": torch.stack(losses).mean().item(),
            "spot_accuracy": torch.stack([p["spot_accuracy"] for p in parts]).mean().item(),
        }

    def batches(step: int) -> Iterator[dict[str, Tensor]]:
        return prefetch(tower_sample, "tower", first=step, size=BATCH, seed=seed)

    figures = train_stage(plan, stage, batches, tower_objective, evaluate, publish=lambda model: None)
    return stage, figures
