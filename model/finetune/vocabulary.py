"""Training the rows of a few tokens: those a system adds to the vocabulary; all others stay as they were.

Embedding and output layer in full are the larger part of what LoRA training updates: 262 of 300 million weights at 7B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM


class RowsEmbedding(nn.Embedding):
    """An embedding whose rows `ids` are `new_rows`; `weight` keeps the others and takes no gradient."""

    def __init__(self, base: nn.Embedding, ids: Sequence[int]):
        super().__init__(*base.weight.shape, base.padding_idx, device="meta")
        self.weight = base.weight
        _add_rows(self, ids)
        slots = torch.full((base.num_embeddings,), -1, device=base.weight.device)
        slots[self.ids] = torch.arange(len(ids), device=slots.device)
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        slots = self.slots[ids]
        return torch.where(
            (slots >= 0)[..., None], F.embedding(slots.clamp(min=0), self.new_rows), super().forward(ids)
        )


class RowsLinear(nn.Linear):
    """An output layer whose rows `ids` are `new_rows`; `weight` keeps the others and takes no gradient."""

    def __init__(self, base: nn.Linear, ids: Sequence[int]):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        _add_rows(self, ids)

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states).index_copy_(-1, self.ids, F.linear(states, self.new_rows))


def train_rows(language: LlamaForCausalLM, ids: Sequence[int]) -> list[nn.Parameter]:
    """Sets the rows of these tokens apart, in and out, and returns them; a model with such rows keeps them."""
    if not isinstance(language.lm_head, RowsLinear):
        language.set_input_embeddings(RowsEmbedding(language.get_input_embeddings(), ids))
        language.lm_head = RowsLinear(language.lm_head, ids)
    return [language.get_input_embeddings().new_rows, language.lm_head.new_rows]


def merge_rows(language: LlamaForCausalLM) -> None:
    """Puts rows that were set apart back among the others."""
    if not isinstance(language.lm_head, RowsLinear):
        return
    rows, head = language.get_input_embeddings(), language.lm_head
    with torch.no_grad():
        for layer in (rows, head):
            layer.weight[layer.ids] = layer.new_rows
    language.set_input_embeddings(nn.Embedding(*rows.weight.shape, rows.padding_idx, device="meta"))
    language.lm_head = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    language.get_input_embeddings().weight, language.lm_head.weight = rows.weight, head.weight


def _add_rows(layer: nn.Embedding | nn.Linear, ids: Sequence[int]) -> None:
    layer.register_buffer("ids", torch.tensor(ids, device=layer.weight.device), persistent=False)
    layer.new_rows = nn.Parameter(layer.weight.detach()[layer.ids].clone())
