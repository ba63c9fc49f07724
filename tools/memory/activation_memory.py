"""Measures the activation memory of a training step without a device, by running it on tensors without values.

Weights and images are meta tensors; ids, labels and positions are real, because shapes depend on them. Every storage
that the step allocates is entered in a ledger and removed when it is freed. The peak is therefore that of the code that
trains, with its checkpointing, packing and frozen parts, not that of a formula about it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from data.types import Batch
from model.losses import objective
from model.seg_model import SegModel
from utils.config import LossConfig

INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._unsafe_index.Tensor)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step beyond weights and gradients."""

    saved: int  # at the end of the forward pass, for the backward pass
    peak: int  # highest sum during the step


def footprint(model: SegModel, batch: Batch, loss: LossConfig) -> Footprint:
    """The memory of a forward and backward pass over `batch`. Attention counts as a fused kernel, unless it is eager.

    model: on meta, prepared for training, with gradients, which exist after the first step. batch: images and masks on
    meta, too.
    """
    weights = [tensor for weight in model.parameters() for tensor in (weight, weight.grad) if tensor is not None]
    inputs = [getattr(batch, field.name) for field in fields(batch)]
    existing = [leaf for leaf in tree_leaves([weights, *model.buffers(), inputs]) if isinstance(leaf, Tensor)]
    ledger = Ledger(existing)
    with fused_attention(), ledger:
        total = objective(model(batch), batch, loss).total
        saved = ledger.live
        total.backward()
    return Footprint(saved, ledger.peak)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages allocated under it that are alive, and their peak.

    Views share the storage of their base and add nothing, also those of the `existing` tensors.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._entered = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.is_meta for tensor in tensors}) == 2:  # real ids or masks meet meta states
            if func in INDEXING:  # the number of selected elements is known only from the values of a mask
                args = (args[0], _as_numbers(args[1]), *args[2:])
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.bool and not args[0].is_meta:
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}  # a mask keeps its values
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # transformers drops an attention mask that hides nothing: assume that it hides something
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._entered:
            self._entered.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, key, size)  # called when the last tensor on the storage is gone

    def _leave(self, key: int, size: int) -> None:
        self._entered.discard(key)
        self.live -= size


@contextmanager
def fused_attention() -> Generator[None]:
    """Make SDPA on meta tensors count as a fused kernel, which keeps one number per query and head.

    Without this, PyTorch decomposes attention on meta and allocates all its scores.
    """
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, *rest, **options)
        groups = query.shape[1] // key.shape[1]
        return _Fused.apply(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))

    # Replaced by name and not by a torch function mode: modes are off where the backward pass recomputes activations.
    F.scaled_dot_product_attention = attend  # ty: ignore[invalid-assignment]  # options stay open for other releases
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _Fused(torch.autograd.Function):
    """The memory of a fused attention kernel: its inputs, its output, and the log-sum-exp of each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _as_numbers(indices: Any) -> list[Tensor | None]:
    """Indices with boolean masks replaced by the positions that they select."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and not index.is_meta and index.dtype == torch.bool:
            numbers += index.nonzero(as_tuple=True)
        else:
            numbers.append(index)
    return numbers


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
