"""The text projection: from states of the language model to prompts of the mask head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.checkpoints.name_table import Pair

NORM_EPS = 1e-6  # unipixel.md 1
KINDS: dict[str, Callable[[int, int], nn.Sequential]] = {  # model.text_projection -> (width, out) -> the layers
    # lisa.md 1.4, sa2va.md 2.1, whose last layer is a dropout of 0
    "mlp": lambda width, out: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)),
    # LISA's paper compares its MLP with this (the paragraph "MLP vs. Linear Projection Layer" of its ablations)
    "linear": lambda width, out: nn.Sequential(nn.Linear(width, out)),
    # unipixel.md 1
    "norm_mlp": lambda width, out: nn.Sequential(
        nn.RMSNorm(width, NORM_EPS), nn.Linear(width, width), nn.GELU(), nn.Linear(width, out)
    ),
}
# Names on disk and ours: LISA's family holds a list of one projection, Sa2VA the projection itself; UniPixel names it
# `seg_head`.
PUBLISHED: Pair = ("model.text_hidden_fcs.0.#.*", "project.#.*")
WEIGHT_NAMES: list[Pair] = [PUBLISHED, ("text_hidden_fcs.#.*", "project.#.*"), ("seg_head.#.*", "project.#.*")]


@dataclass(frozen=True)
class Projection:
    """kind: in KINDS. prompts: how many prompts of the mask head a state gives (UniPixel: two)."""

    kind: str = "mlp"
    prompts: int = 1

    def build(self, width: int, prompt_dim: int) -> nn.Sequential:
        """Uninitialised: (..., width) states -> (..., prompts * prompt_dim). Its weights are named `project.*` in a
        SegModel."""
        return KINDS[self.kind](width, self.prompts * prompt_dim)


def prompts_of(projected: Tensor, prompt_dim: int) -> Tensor:
    """(Q, K, P * D) projected states of the K mask tokens of each query -> (Q, K * P, D) prompts, token by token."""
    return projected.unflatten(-1, (-1, prompt_dim)).flatten(1, 2)


def new_weight(name: str, shape: tuple[int, ...], width: int, generator: torch.Generator) -> Tensor:
    """A new weight `project.<name>`: of a linear layer uniform, torch's own distribution; of a norm the identity."""
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape)
    bound = 1 / math.sqrt(width)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
