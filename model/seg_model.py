"""The method in one module: a vision-language model writes, the states that predict mask tokens prompt a mask head.

(Of some systems the states at the mask tokens: TokenSpec.read.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.tokens import TokenSpec
from data.types import IGNORE_ID, Batch
from data.views import LanguageView, SegView
from model.checkpoints.architecture import Architecture
from model.checkpoints.layouts import Report
from model.heads.base import Decoded, Features, MaskHead
from model.projection import prompts_of
from model.runtime import RuntimeOptions
from model.vlm.base import Vision, VisionLanguageModel
from model.vlm.past import Past
from utils.config import CacheConfig


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
    """`vlm` writes; `project` (model/projection.py) turns states into mask prompts; `head` decodes masks.

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
        self.read_at_token = False  # see `read_states`

    def configure(self, runtime: RuntimeOptions) -> None:
        """Sets how the model computes: the one place where a recipe's speed and memory switches arrive."""
        self.runtime = runtime
        self.vlm.set_packing(runtime.pack_rows, runtime.pack_length)
        self.vlm.draft_tokens = runtime.draft_tokens
        self.head.checkpoint_decoder = runtime.checkpoint_decoder

    def read_states(self, spec: TokenSpec) -> None:
        """Sets which states prompt masks, as `TokenSpec.norm` and `.read` say. (In training the positions of the batch
        follow the latter: data/encode.py.)"""
        self.vlm.read_unnormed = spec.norm == "before"
        self.read_at_token = spec.read == "at"

    def use_cache(self, settings: CacheConfig) -> None:
        """Keeps on disk what the frozen encoder that masks are decoded from gives (model.embedding_cache). The weights
        must be final and on their device."""
        if self.head.READS_TOWER:
            self.vlm.use_cache(settings, self.head.levels)
        else:
            self.head.use_cache(settings)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: pixels enter in it."""
        return next(self.project.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.project.parameters()).device

    def normalised(self, batch: Batch) -> Batch:
        """A batch with image views of bytes normalised: in float32 whatever the model's dtype, which they then take."""
        originals = [place.original for place in batch.geometry]

        def numbers(view: LanguageView | SegView, pixels: Tensor) -> Tensor:
            return pixels if pixels.is_floating_point() else view.normalise(pixels, originals).to(self.dtype)

        seg, view = batch.seg_pixels, self.head.view
        if seg is not None and view is not None:
            seg = numbers(view, seg)
        return replace(batch, pixels=numbers(self.vlm.view, batch.pixels), seg_pixels=seg)

    def forward(self, batch: Batch) -> SegOutput:
        """Teacher forcing: logits where labels are, a mask for each mask position."""
        batch = self.normalised(batch)
        vision = self.vlm.encode_images(batch.pixels, batch.geometry)
        # first, so that the mask encoder's activations are gone before those of the language model are there, too
        features = self.head.features(batch, vision)
        states = self.vlm(batch.ids, batch.attention, vision, batch.row_image)  # (R, L, H)
        # the state at position t predicts the token at t + 1: states and targets are shifted by one
        targets = batch.labels[:, 1:]
        supervised = targets != IGNORE_ID
        decoded = self._teacher_forced_masks(batch, features, states.read)
        return SegOutput(
            # the vocabulary is large and most positions are prompt: logits of supervised positions only
            token_logits=self.vlm.logits(states.final[:, :-1][supervised]),
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
        batch = self.normalised(batch)
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
        # per row: where mask tokens begin whose states there are
        groups = [self._with_states(find_groups(ids, mask_ids), len(mask_ids), len(ids)) for ids in written.ids]
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
        the K mask tokens that begin at t are prompted by the states t ... t + K - 1, or by one later each, which are
        the states at the tokens themselves."""
        shift = int(self.read_at_token)
        queries = torch.stack(
            [states[row, start + shift :][:tokens] for row, starts in enumerate(groups) for start in starts]
        )  # (Q, K, H)
        counts = torch.tensor([len(starts) for starts in groups], device=states.device)
        query_image = batch.row_image.repeat_interleave(counts)
        return self._decode(features, queries, query_image, batch)

    def _with_states(self, starts: list[int], tokens: int, length: int) -> list[int]:
        """Without a group that ends with the last of `length` new ids, if states are read at mask tokens: the state at
        a token is made when the next one is written, so at the length limit there is none (sa2va.md 2.3)."""
        return [start for start in starts if start + tokens + int(self.read_at_token) <= length]

    def _teacher_forced_masks(self, batch: Batch, features: Features, hidden: Tensor) -> Decoded:
        """Masks at all mask positions of the batch, B x (N_b, H_b, W_b). hidden: (R, L, H)."""
        rows, positions = batch.mask_rows, batch.mask_positions
        # A batch without masks decodes a dummy query and slices it off: every rank of a distributed run must touch the
        # same weights, or the gradient exchange hangs.
        dummy = len(rows) == 0
        if dummy:
            tokens = max(1, self.head.tokens // self.architecture.projection.prompts)
            rows, positions = rows.new_zeros(1), positions.new_zeros(1, tokens)
        # The line of the method: `positions` hold t - 1 for a mask token at t, because the state at t - 1 predicts it.
        # Training therefore prompts with the state that generation has when it decides to write the token. (With
        # TokenSpec.read "at" they hold t; generation then has the state one step later.)
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
        queries = prompts_of(self.project(states.to(self.dtype)), self.head.prompt_dim)
        return self.head.decode(features, queries, query_image, batch.geometry, full)

    def _no_mask(self, batch: Batch, row: int) -> Tensor:
        return torch.zeros(0, *batch.geometry[int(batch.row_image[row])].original, device=self.device)


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
