"""Trained weights and Adam's moments, whole and by the names of their parameters, however ZeRO divides them.

So a checkpoint is plain tensors that any number of processes and any ZeRO stage can go on from, to the bit. The shards
that DeepSpeed itself writes fit the processes and the stage that wrote them, until another program has converted them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import dist

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # kinds of tensors that a trained parameter has


class TrainedParameters:
    """The trained parameters of a DeepSpeed engine with AdamW inside. Every process calls everything."""

    def __init__(self, engine: Any):
        self.wrapper, self.stage = engine.optimizer, engine.zero_optimization_stage()
        self.adam = self.wrapper.optimizer if self.stage else self.wrapper
        self.parameters = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}

    @property
    def steps(self) -> int:
        """Updates that Adam has made; in fp16 steps without one happen."""
        return int(max((float(state["step"]) for state in self.adam.state.values() if state), default=0.0))

    def gather(self, kind: str) -> dict[str, Tensor]:
        """Whole fp32 tensors of a kind on the CPU of the main process, the others get {}; no moments before a step.

        One parameter at a time is put together on the devices.
        """
        tensors = {}
        for name, parameter in self.parameters.items() if kind == WEIGHT or self.steps else ():
            whole = self._whole(parameter, kind)
            if dist.is_main():
                tensors[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
        return tensors

    def scatter(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Puts what `gather` returned back; every process needs the tensors, and keeps its part.

        Raises when they are not those of this model's trained parameters.
        """
        if odd := sorted(self.parameters.keys() ^ tensors.keys()):
            raise ValueError(f"the checkpoint is of a model in which other weights train: {', '.join(odd[:10])}")
        for name, parameter in self.parameters.items():
            value = tensors[name].to(dist.device())
            if kind == WEIGHT:
                _set_weight(parameter, value)
            if self.stage == 3:
                self._set_share(parameter, value, kind)
            elif self.stage:
                self._set_whole(parameter, value, kind)
            elif kind != WEIGHT:
                self.adam.state[parameter][kind] = value.clone()

    def begin(self, steps: int) -> None:
        """Room for the moments, which Adam makes at its first step only, and the number of its steps."""
        for part in self._parts():
            zeros = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self.adam.state[part] = {"step": torch.tensor(float(steps), device=part.device), **zeros}
        if self.stage in (1, 2):
            self.wrapper._lazy_init_hp_params_optimizer_state()  # ties each parameter to its piece of the moments

    def _parts(self) -> list[Tensor]:
        """What Adam updates: parameters, or this process's flat share of them in fp32."""
        if self.stage == 0:
            return list(self.parameters.values())
        place = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return getattr(self.wrapper, place)

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter) if self.stage else parameter
        if self.stage:
            return safe_get_full_optimizer_state(parameter, kind)
        return self.adam.state.get(parameter, {}).get(kind, torch.zeros_like(parameter))  # none without a gradient

    @staticmethod
    def _set_whole(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    @staticmethod
    def _set_share(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
        """Shares are of equal size, the last one padded, which DeepSpeed's own setter of whole tensors forgets."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * dist.world_size() - value.numel()))
        share = padded.narrow(0, size * dist.rank(), size)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, kind)


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """The weight that the model computes with, in the model's precision."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):  # does nothing where weights are whole
        parameter.data.copy_(value)
