"""The method in one module: a LLaVA writes, and the states that predict mask tokens prompt a mask head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.types import IGNORE_ID, Batch
from model.heads.base import Features, MaskHead
from model.vlm.llava import Llava


@dataclass
class SegOutput:
    """S supervised positions over a vocabulary of V; N_b masks of picture b at its own size."""

    token_logits: Tensor  # (S, V)
    token_targets: Tensor  # (S,)
    masks: list[Tensor]  # B x (N_b, H_b, W_b) float32 logits, > 0 is inside; smaller in training without `full_masks`


@dataclass
class Answer:
    """What one row wrote, with a mask for each complete group of mask tokens in it."""

    ids: list[int]  # new ids, the end token included
    masks: Tensor  # (N, H, W) float32 logits


class SegModel(nn.Module):
    """vlm writes; `project` (the text MLP) turns states into mask prompts; `head` draws."""

    def __init__(self, vlm: Llava, head: MaskHead, project: nn.Module):
        super().__init__()
        self.vlm = vlm
        self.head = head
        self.project = project
        self.full_masks = True  # in training; else masks come as the decoder gives them
        self.added_ids: list[int] = []  # of the tokens that the system adds

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: pictures enter in it."""
        return self.project[0].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.project[0].weight.device

    def forward(self, batch: Batch) -> SegOutput:
        """Teacher forcing: logits where labels are, a mask for each mask position."""
        vision = self.vlm.encode_images(batch.pixels, batch.geometry)
        features = self.head.features(batch, vision)  # before the activations of the language model are there, too
        image = vision.states, batch.row_image, vision.attention
        hidden = self.vlm(batch.ids, batch.attention, *image)  # (R, L, H)
        targets = batch.labels[:, 1:]
        supervised = targets != IGNORE_ID
        return SegOutput(
            token_logits=self.vlm.logits(hidden[:, :-1][supervised]),
            token_targets=targets[supervised],
            masks=self._forced_masks(batch, features, hidden),
        )

    @torch.no_grad()
    def generate(self, batch: Batch, *, max_new_tokens: int, mask_ids: Sequence[int], eos: int) -> list[Answer]:
        """Greedy answers to left-padded prompts, one a row; each picture is encoded once, whatever its rows."""
        if self.training:
            raise RuntimeError("generate needs model.eval(): gradient checkpointing would drop the cache")
        vision = self.vlm.encode_images(batch.pixels, batch.geometry)
        image = vision.states, batch.row_image, vision.attention
        written = self.vlm.generate(batch.ids, batch.attention, *image, max_new_tokens=max_new_tokens, eos=eos)
        groups = [find_groups(ids, mask_ids) for ids in written.ids]
        counts = [len(starts) for starts in groups]
        if not sum(counts):
            return [Answer(ids, self._no_mask(batch, row)) for row, ids in enumerate(written.ids)]
        states = torch.stack(
            [
                written.states[row, start : start + len(mask_ids)]
                for row, starts in enumerate(groups)
                for start in starts
            ]
        )  # (Q, K, H)
        query_image = batch.row_image.repeat_interleave(torch.tensor(counts, device=states.device))
        masks = self._decode(self.head.features(batch, vision), states, query_image, batch)
        waiting = [iter(picture) for picture in masks]
        answers = []
        for row, ids in enumerate(written.ids):
            mine = [next(waiting[int(batch.row_image[row])]) for _ in range(counts[row])]
            answers.append(Answer(ids, torch.stack(mine) if mine else self._no_mask(batch, row)))
        return answers

    def _forced_masks(self, batch: Batch, features: Features, hidden: Tensor) -> list[Tensor]:
        """Masks of all mask positions. Without any, a dummy query is decoded and sliced off: every rank of a
        distributed run must touch the same weights, or the gradient exchange hangs."""
        rows, positions = batch.mask_rows, batch.mask_positions
        dummy = len(rows) == 0
        if dummy:
            rows, positions = rows.new_zeros(1), positions.new_zeros(1, self.head.tokens)
        states = hidden[rows[:, None], positions]  # (Q, K, H)
        full = self.full_masks or not self.training
        masks = self._decode(features, states, batch.row_image[rows], batch, full=full)
        return [picture[:0] for picture in masks] if dummy else masks

    def _decode(
        self, features: Features, states: Tensor, query_image: Tensor, batch: Batch, *, full: bool = True
    ) -> list[Tensor]:
        """(Q, K, H) states of the language model to masks by picture."""
        queries = self.project(states.to(self.dtype))
        return self.head.decode(features, queries, query_image, batch.geometry, full)

    def _no_mask(self, batch: Batch, row: int) -> Tensor:
        return torch.zeros(0, *batch.geometry[int(batch.row_image[row])].original, device=self.device)


def text_mlp(width: int, out: int) -> nn.Sequential:
    """Language-model state to mask prompt (lisa.md 1.4)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def find_groups(ids: Sequence[int], group: Sequence[int]) -> list[int]:
    """Where the whole `group` of mask tokens stands in `ids`; a part of one is no mask."""
    group, starts, index = list(group), [], 0
    while index + len(group) <= len(ids):
        found = list(ids[index : index + len(group)]) == group
        if found:
            starts.append(index)
        index += len(group) if found else 1
    return starts
