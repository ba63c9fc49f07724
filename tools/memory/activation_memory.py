"""The memory of a training step without a device: the real step on weights that have shapes and no values.

Weights and pictures are meta tensors; ids, labels and places are real, for they decide about shapes. Every storage that
the step makes is entered when it is made and struck out when it goes, so the peak is that of the code that trains, with
its checkpointing, packing and frozen parts, not of a formula about it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

    saved: int  # for the backward pass
    peak: int


def footprint(model: SegModel, batch: Batch, loss: LossConfig) -> Footprint:
    """What a forward and backward pass over `batch` takes; attention counts as fused kernels do, unless it is eager.

    model: on meta, prepared for training, with gradients, for they are there after the first step. batch: pictures and
    masks on meta too.
    """
    held = [tensor for weight in model.parameters() for tensor in (weight, weight.grad) if tensor is not None]
    given = [getattr(batch, name) for name in batch.__dataclass_fields__]
    ledger = Ledger([leaf for leaf in tree_leaves([held, *model.buffers(), given]) if isinstance(leaf, Tensor)])
    with fused_attention(), ledger:
        total = objective(model(batch), batch, loss).total
        kept = ledger.live
        total.backward()
    return Footprint(kept, ledger.peak)


class Ledger(TorchDispatchMode):
    """Bytes of all storages made since it began that still live, and their highest sum; views of `held` add none."""

    def __init__(self, held: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._entered = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.is_meta for tensor in tensors}) == 2:
            if func in INDEXING:  # how many a mask picks is known only where it has values
                args = (args[0], _as_numbers(args[1]), *args[2:])
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # transformers asks whether a mask hides nothing, to leave it out; it is counted
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
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._entered.discard(key)
        self.live -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """On meta, attention would be taken apart and its scores counted; kernels keep one number a query and head."""
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, *rest, **options)
        groups = query.shape[1] // key.shape[1]
        return _Fused.apply(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))

    F.scaled_dot_product_attention = attend  # not by a mode: those are off where the backward pass recomputes
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _as_numbers(indices: Any) -> list[Tensor | None]:
    numbers: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and not index.is_meta and index.dtype == torch.bool
        numbers += index.nonzero(as_tuple=True) if mask else [index]
    return numbers


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
