"""Trained weights and Adam's moments as full tensors by parameter name, however ZeRO shards them.

A checkpoint made of these is plain tensors, from which any number of processes and any ZeRO stage resume to the bit.
DeepSpeed's own checkpoints are shards that only the same number of processes and the same stage can load.

Where the fp32 values are, for two processes and one trained weight W (m: `exp_avg`, v: `exp_avg_sq`):

    stage 0     Every process has W, m and v; Adam's state has W itself as key.
    stage 1, 2  Every process has W in the model's precision. The fp32 copies of all weights are laid end to end in one
                flat tensor and cut into two halves, of which each process keeps one. Adam sees that half as its only
                parameter, so m and v are flat halves as well. W may lie in one half or across the cut; DeepSpeed ties
                each weight to its piece (`_hp_mapping`).
    stage 3     W itself is sharded: flattened, padded to an even length and cut in two (`ds_tensor`). Each process
                keeps its share in the model's precision, and the same share of the fp32 copy, m and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from utils import dist

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # kinds of tensors that a trained parameter has


class TrainedParameters:
    """The trained parameters of a DeepSpeed engine whose optimizer is AdamW. All processes call every method."""

    def __init__(self, engine: Any):
        self.stage = engine.zero_optimization_stage()
        self.wrapper = engine.optimizer  # under ZeRO DeepSpeed's optimizer, which has Adam inside
        self.adam = self.wrapper.optimizer if self.stage else self.wrapper
        self.parameters = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}

    @property
    def steps(self) -> int:
        """Updates that Adam has made; fewer than the training steps where fp16 skipped some for an overflow."""
        return int(max((float(state["step"]) for state in self.adam.state.values() if state), default=0.0))

    def gather(self, kind: str) -> dict[str, Tensor]:
        """Full fp32 tensors of a kind on the CPU of the main process; the others get {}.

        There are no moments before the first update. Gathers one parameter at a time, so that a device needs room for
        the largest weight only.
        """
        tensors: dict[str, Tensor] = {}
        if kind != WEIGHT and self.steps == 0:
            return tensors
        for name, parameter in self.parameters.items():
            full = self._full(parameter, kind)
            if dist.is_main():
                tensors[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        return tensors

    def scatter(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Sets what `gather` returned. Every process passes the same full tensors and keeps its share.

        Raises ValueError where they are not those of this model's trained parameters.
        """
        if odd := sorted(self.parameters.keys() ^ tensors.keys()):
            raise ValueError(f"the checkpoint is of a model in which other weights train: {', '.join(odd[:10])}")
        for name, parameter in self.parameters.items():
            value = tensors[name].to(dist.device())
            # A weight exists twice: in the model's precision, which computes, and as fp32 copy, which Adam updates.
            # With the first alone, the next update would overwrite it from the old fp32 copy.
            if kind == WEIGHT:
                _set_weight(parameter, value)
            if self.stage == 3:
                self._set_share(parameter, value, kind)
            elif self.stage:
                self._set_full(parameter, value, kind)
            elif kind != WEIGHT:
                self.adam.state[parameter][kind] = value.clone()

    def begin(self, steps: int) -> None:
        """Creates zero moments, which Adam itself does at its first step only, and sets the number of its steps."""
        for part in self._parts():
            zeros = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self.adam.state[part] = {"step": torch.tensor(float(steps), device=part.device), **zeros}
        if self.stage in (1, 2):
            # Ties each parameter to its piece of the flat moments; DeepSpeed does it after its first step.
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> list[Tensor]:
        """The tensors that Adam updates: the parameters, or this process's flat fp32 shares of them."""
        if self.stage == 0:
            return list(self.parameters.values())
        attribute = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return getattr(self.wrapper, attribute)

    def _full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter) if self.stage else parameter
        if self.stage:
            return safe_get_full_optimizer_state(parameter, kind)
        # A parameter that has had no gradient yet has no state.
        return self.adam.state.get(parameter, {}).get(kind, torch.zeros_like(parameter))

    @staticmethod
    def _set_full(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    @staticmethod
    def _set_share(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
        """Sets this process's share of a tensor under ZeRO-3.

        All shares have the same size: 5 values over 2 processes are shares of 3, the last one padded. DeepSpeed's
        setter of full tensors (`safe_set_full_fp32_param`) cuts the value without padding it and fails at the last
        share, so the shares are cut here.
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = cast(Any, parameter).ds_tensor.numel()  # DeepSpeed adds the attribute
        padded = nn.functional.pad(value.flatten(), (0, size * dist.world_size() - value.numel()))
        share = padded.narrow(0, size * dist.rank(), size)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, kind)


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets the weight that the model computes with, in the model's precision."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):  # does nothing below ZeRO-3
        parameter.data.copy_(value)
