"""The method in one module: a vision-language model writes, the states that predict mask tokens prompt a mask head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from data.types import IGNORE_ID, Batch
from model.checkpoints.architecture import Architecture
from model.checkpoints.layouts import Report
from model.heads.base import Decoded, Features, MaskHead
from model.runtime import RuntimeOptions
from model.vlm.base import Vision, VisionLanguageModel
from model.vlm.past import Past


@dataclass
class SegOutput:
    """S supervised positions over a vocabulary of V; N_b masks of image b at its own size."""

    token_logits: Tensor  # (S, V)
    token_targets: Tensor  # (S,)
    # B x (N_b, H_b, W_b) float32 logits, > 0 is inside; in training without RuntimeOptions.full_size_masks as the mask
    # decoder gives them, and truth is resized instead
    masks: list[Tensor]
    scores: list[Tensor] | None = None  # B x (N_b,), the mask head's own confidence in each mask, where it has one


@dataclass
class Answer:
    """What one row wrote, with a mask for each complete group of mask tokens in it."""

    ids: list[int]  # new ids, the end token included
    masks: Tensor  # (N, H, W) float32 logits
    scores: Tensor | None = None  # (N,) float32 in 0..1, the mask head's own confidence in each, where it has one


@dataclass
class Memory:
    """What the model keeps between the rounds of a conversation about one image: its encodings, each made when it is
    first needed, and what the language model has read (None: nothing is continued)."""

    past: Past | None = field(default_factory=Past)
    vision: Vision | None = None
    features: Features | None = None


class SegModel(nn.Module):
    """`vlm` writes; `project` (the text MLP) turns states into mask prompts; `head` decodes masks.

    architecture: what the model is made of, for writing it to a folder. added_ids: of the tokens that the system adds.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        head: MaskHead,
        project: nn.Sequential,
        *,
        architecture: Architecture,
        added_ids: Sequence[int] = (),
    ):
        super().__init__()
        self.vlm = vlm
        self.head = head
        self.project = project
        self.architecture = architecture
        self.added_ids = list(added_ids)
        self.report = Report()  # how the weights on disk fit the model, filled where they are loaded
        self.runtime = RuntimeOptions()

    def configure(self, runtime: RuntimeOptions) -> None:
        """Sets how the model computes: the one place where a recipe's speed and memory switches arrive."""
        self.runtime = runtime
        self.vlm.set_packing(runtime.pack_rows, runtime.pack_length)
        self.head.checkpoint_decoder = runtime.checkpoint_decoder

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: pixels enter in it."""
        return self._first_linear.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._first_linear.weight.device

    @property
    def _first_linear(self) -> nn.Linear:
        return cast(nn.Linear, self.project[0])

    def forward(self, batch: Batch) -> SegOutput:
        """Teacher forcing: logits where labels are, a mask for each mask position."""
        vision = self.vlm.encode_images(batch.pixels, batch.geometry)
        # first, so that the mask encoder's activations are gone before those of the language model are there, too
        features = self.head.features(batch, vision)
        hidden = self.vlm(batch.ids, batch.attention, vision, batch.row_image)  # (R, L, H)
        # the state at position t predicts the token at t + 1: states and targets are shifted by one
        targets = batch.labels[:, 1:]
        supervised = targets != IGNORE_ID
        decoded = self._teacher_forced_masks(batch, features, hidden)
        return SegOutput(
            # the vocabulary is large and most positions are prompt: logits of supervised positions only
            token_logits=self.vlm.logits(hidden[:, :-1][supervised]),
            token_targets=targets[supervised],
            masks=decoded.masks,
            scores=decoded.scores,
        )

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int,
        mask_ids: Sequence[int],
        eos: int,
        memory: Memory | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers to left-padded prompts, one per row; each image is encoded once, whatever its rows.

        memory: of the conversation that a batch of one row continues; its ids are those of all rounds. on_token: called
        with each new token of a batch of one row.
        """
        if self.training:
            raise RuntimeError("generate needs model.eval(): gradient checkpointing would drop the cache")
        memory = memory or Memory(past=None)
        if memory.vision is None:
            memory.vision = self.vlm.encode_images(batch.pixels, batch.geometry)
        written = self.vlm.generate(
            batch.ids,
            batch.attention,
            memory.vision,
            batch.row_image,
            max_new_tokens=max_new_tokens,
            eos=eos,
            past=memory.past,
            on_token=on_token,
        )
        groups = [find_groups(ids, mask_ids) for ids in written.ids]  # per row: where its mask tokens begin
        if not any(groups):
            return [Answer(ids, self._no_mask(batch, row)) for row, ids in enumerate(written.ids)]
        if memory.features is None:
            memory.features = self.head.features(batch, memory.vision)
        decoded = self._generated_masks(batch, memory.features, written.states, groups, len(mask_ids))
        # masks come per image, in the order of its rows: deal them back to the rows
        counts = list(map(len, groups))
        masks = _deal(decoded.masks, batch.row_image, counts)
        scores = _deal(decoded.scores, batch.row_image, counts) if decoded.scores else [None] * len(groups)
        return [Answer(*answer) for answer in zip(written.ids, masks, scores, strict=True)]

    def _generated_masks(
        self, batch: Batch, features: Features, states: Tensor, groups: list[list[int]], tokens: int
    ) -> Decoded:
        """Masks of generated answers, B x (N_b, H_b, W_b). `states[row, t]` is the state that predicted new token t, so
        the K mask tokens that begin at t are prompted by the states t ... t + K - 1."""
        queries = torch.stack(
            [states[row, start : start + tokens] for row, starts in enumerate(groups) for start in starts]
        )  # (Q, K, H)
        counts = torch.tensor([len(starts) for starts in groups], device=states.device)
        query_image = batch.row_image.repeat_interleave(counts)
        return self._decode(features, queries, query_image, batch)

    def _teacher_forced_masks(self, batch: Batch, features: Features, hidden: Tensor) -> Decoded:
        """Masks at all mask positions of the batch, B x (N_b, H_b, W_b)."""
        rows, positions = batch.mask_rows, batch.mask_positions
        # A batch without masks decodes a dummy query and slices it off: every rank of a distributed run must touch the
        # same weights, or the gradient exchange hangs.
        dummy = len(rows) == 0
        if dummy:
            rows, positions = rows.new_zeros(1), positions.new_zeros(1, self.head.tokens)
        # The line of the method: `positions` hold t - 1 for a mask token at t, because the state at t - 1 predicts it.
        # Training therefore prompts with the state that generation has when it decides to write the token.
        states = hidden[rows[:, None], positions]  # (Q, K, H)
        full = self.runtime.full_size_masks or not self.training
        decoded = self._decode(features, states, batch.row_image[rows], batch, full=full)
        if not dummy:
            return decoded
        scores = decoded.scores
        return Decoded([masks[:0] for masks in decoded.masks], scores and [part[:0] for part in scores])

    def _decode(
        self, features: Features, states: Tensor, query_image: Tensor, batch: Batch, *, full: bool = True
    ) -> Decoded:
        """(Q, K, H) states of the language model -> masks per image."""
        queries = self.project(states.to(self.dtype))
        return self.head.decode(features, queries, query_image, batch.geometry, full)

    def _no_mask(self, batch: Batch, row: int) -> Tensor:
        return torch.zeros(0, *batch.geometry[int(batch.row_image[row])].original, device=self.device)


def text_mlp(width: int, out: int) -> nn.Sequential:
    """Language-model state to mask prompt (lisa.md 1.4)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def _deal(values: Sequence[Tensor], row_image: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """B x (N_b, ...) per image, in the order of its rows -> R x (counts[r], ...) per row."""
    rows: list[Tensor] = [torch.empty(0)] * len(counts)
    for image, value in enumerate(values):
        mine = [row for row, about in enumerate(row_image.tolist()) if about == image]
        for row, part in zip(mine, value.split([counts[row] for row in mine]), strict=True):
            rows[row] = part
    return rows


def find_groups(ids: Sequence[int], group: Sequence[int]) -> list[int]:
    """Where the complete `group` of mask tokens begins in `ids`; a part of one is no mask."""
    group, starts, index = list(group), [], 0
    while index + len(group) <= len(ids):
        found = list(ids[index : index + len(group)]) == group
        if found:
            starts.append(index)
        index += len(group) if found else 1
    return starts
