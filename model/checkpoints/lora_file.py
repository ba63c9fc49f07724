"""LoRA in files of the original training programs, which hold factors next to the weights that they change."""

from __future__ import annotations

from torch import Tensor

A, B = ".lora_A.default.weight", ".lora_B.default.weight"
BASE = ".base_layer."  # newer peft writes the weight of an adapted layer as q_proj.base_layer.weight


def merge_factors(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The plain weights of a file with adapters: W + alpha / r * B A (gsva.md 7).

    The rank r is the number of rows of A; alpha is in no file and comes from the recipe. peft's old (`q_proj.weight`)
    and new (`q_proj.base_layer.weight`) names are read. A file without factors is returned as it is; a factor without
    its partner or weight raises a ValueError.
    """
    plain = {name.replace(BASE, "."): value for name, value in tensors.items() if ".lora_" not in name}
    for name in [name for name in tensors if ".lora_" in name]:
        layer = name.partition(".lora_")[0]
        factors = {layer + A, layer + B}
        if name not in factors or not factors <= tensors.keys() or f"{layer}.weight" not in plain:
            raise ValueError(
                f"{name}: expected plain LoRA, {layer}.weight with lora_A.default and lora_B.default next to it; "
                "adapters alone, or of other kinds, are merged by the library that made them (peft's merge_and_unload)"
            )
        if name.endswith(A):
            weight, down, up = plain[f"{layer}.weight"], tensors[layer + A], tensors[layer + B]
            plain[f"{layer}.weight"] = (weight.float() + change(down, up, alpha)).to(weight.dtype)
    return plain


def ranks_of(tensors: dict[str, Tensor]) -> list[int]:
    """The ranks of the factors in a file; [] without factors."""
    return sorted({len(tensor) for name, tensor in tensors.items() if name.endswith(A)})


def change(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """(out, in) float32: what the factors A (r, in) and B (out, r) add to the weight of their layer."""
    return alpha / len(down) * (up.float() @ down.float())
