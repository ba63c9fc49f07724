"""Training only the vocabulary rows of the tokens that a system adds; all other rows keep their weights.

Embedding and output layer in full are most of what LoRA training updates: 262 of 300 million weights at 7B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class RowsEmbedding(nn.Embedding):
    """An embedding whose rows `ids` are `new_rows`; `weight` keeps the others and takes no gradient."""

    ids: Tensor  # (A,) long
    row_of: Tensor  # (V,) long: which of `new_rows` stands for an id, -1 for none
    new_rows: nn.Parameter  # (A, H)

    def __init__(self, base: nn.Embedding, ids: Sequence[int]):
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.weight = base.weight
        _add_rows(self, ids)
        row_of = torch.full((base.num_embeddings,), -1, device=base.weight.device)
        row_of[self.ids] = torch.arange(len(ids), device=row_of.device)
        self.register_buffer("row_of", row_of, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        row = self.row_of[input]
        new = F.embedding(row.clamp(min=0), self.new_rows)
        return torch.where((row >= 0)[..., None], new, super().forward(input))


class RowsLinear(nn.Linear):
    """An output layer whose rows `ids` are `new_rows`; `weight` keeps the others and takes no gradient."""

    ids: Tensor  # (A,) long
    new_rows: nn.Parameter  # (A, H)

    def __init__(self, base: nn.Linear, ids: Sequence[int]):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        _add_rows(self, ids)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).index_copy_(-1, self.ids, F.linear(input, self.new_rows))


def train_rows(language: PreTrainedModel, ids: Sequence[int]) -> list[nn.Parameter]:
    """Separates the rows of these tokens from the rest, in and out, and returns them; a model with such rows keeps
    them."""
    if not isinstance(language.lm_head, RowsLinear):
        language.set_input_embeddings(RowsEmbedding(cast(nn.Embedding, language.get_input_embeddings()), ids))
        language.lm_head = RowsLinear(cast(nn.Linear, language.lm_head), ids)
    return [cast(RowsEmbedding, language.get_input_embeddings()).new_rows, language.lm_head.new_rows]


def merge_rows(language: PreTrainedModel) -> None:
    """Puts separated rows back among the others; plain layers take the place of the special ones."""
    if not isinstance(language.lm_head, RowsLinear):
        return
    embedding, head = cast(RowsEmbedding, language.get_input_embeddings()), language.lm_head
    with torch.no_grad():
        for layer in (embedding, head):
            layer.weight[layer.ids] = layer.new_rows
    plain_embedding = nn.Embedding(
        embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta"
    )
    plain_head = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain_embedding.weight, plain_head.weight = embedding.weight, head.weight
    language.set_input_embeddings(plain_embedding)
    language.lm_head = plain_head


def _add_rows(layer: RowsEmbedding | RowsLinear, ids: Sequence[int]) -> None:
    layer.register_buffer("ids", torch.tensor(ids, device=layer.weight.device), persistent=False)
    layer.new_rows = nn.Parameter(layer.weight.detach()[layer.ids].clone())
