"""LoRA in files of the original training programs, which hold factors next to the weights that they change."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from utils.log import log

A, B = ".lora_A.default.weight", ".lora_B.default.weight"
BASE = ".base_layer."  # newer peft writes the weight of an adapted layer as q_proj.base_layer.weight


def merge_factors(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The plain weights of a file with adapters: W + alpha / r * B A (gsva.md 7).

    The rank r is the number of rows of A; alpha is in no file: `model.checkpoint_alpha`, else `model.lora.alpha`.
    peft's old (`q_proj.weight`) and new (`q_proj.base_layer.weight`) names are read. A file without factors is returned
    as it is; a factor without its partner or weight raises a ValueError.
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


def note_scale(file: Path, tensors: dict[str, Tensor], alpha: float, rank: int | None) -> None:
    """Logs with which alpha the factors of a file are merged. rank: of the recipe's LoRA, where alpha is its own; a
    file of another rank, as of the stage before, may have been trained with another alpha."""
    ranks = sorted({len(tensor) for name, tensor in tensors.items() if name.endswith(A)})
    if ranks and rank not in (None, *ranks):
        log.warning(
            "%s: its LoRA is of rank %s, model.lora of rank %d: it is merged with the alpha %g of the latter, and "
            "model.checkpoint_alpha says where it was trained with another",
            *(file, ", ".join(map(str, ranks)), rank, alpha),
        )
    elif ranks:
        log.info("%s: its LoRA, of rank %s, is merged with alpha %g", file, ", ".join(map(str, ranks)), alpha)


def change(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """(out, in) float32: what the factors A (r, in) and B (out, r) add to the weight of their layer."""
    return alpha / len(down) * (up.float() @ down.float())
