"""What trains: LoRA on the language model's linears, and the parts that a recipe trains in full (lisa.md 5.2)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.checkpoints.layouts import LORA_WRAPPER, reading_table
from model.checkpoints.lora_file import BASE, A, B, change
from model.finetune.kernels import speed_up
from model.finetune.quantize import quantize
from model.finetune.vocabulary import merge_rows, train_rows
from model.seg_model import SegModel
from utils.config import LoraConfig, ModelConfig
from utils.log import log
from utils.registry import unknown

ADAPTER = "default"
ROUNDING = 2**-7  # of each number: bf16 moves it by at most 2**-8, training moves some by more
SMALLEST = 2**-24  # of the numbers of fp16, where rounding is no share


class Adapters(NamedTuple):
    """LoRA in a part of the model, on its linears of the names that `config` has."""

    part: nn.Module
    config: LoraConfig

    def linears(self) -> list[nn.Linear]:
        targets = self.config.target_modules
        return [
            layer
            for name, layer in self.part.named_modules()
            if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets
        ]


def prepare_training(model: SegModel, config: ModelConfig, *, seed: int = 0) -> SegModel:
    """Applies a recipe's `model` section for training, in place: LoRA, what trains, kernels, checkpointing."""
    quantize_frozen(model, config)
    apply_lora(model, config.lora, seed=seed)
    adapt_head(model, config.head_options, seed=seed)
    mark_trainable(model, config)
    speed_up(model, config)
    if config.gradient_checkpointing:
        model.vlm.checkpoint_gradients()
    log.info(describe(model))
    return model.train()


def quantize_frozen(model: SegModel, config: ModelConfig) -> None:
    """QLoRA with `load_in_4bit`: the language model's linears in NF4, everything else in the recipe's precision."""
    if config.load_in_8bit:
        raise ValueError("load_in_8bit is for inference (chat, evaluation); training takes load_in_4bit (QLoRA)")
    if config.load_in_4bit and config.lora.r <= 0:
        raise ValueError("load_in_4bit trains adapters only: 4-bit layers have no gradients; set model.lora.r above 0")
    if config.load_in_4bit:
        quantize(model, bits=4)
        setattr(model.vlm.decoder, "is_loaded_in_4bit", True)  # noqa: B010  (nn.Module is typed for modules only); peft reads it to decide on its adapter class


def apply_lora(model: SegModel, config: LoraConfig, *, seed: int = 0) -> None:
    """Adapters on the named linears of the language model only: SAM's decoder and the vision tower have layers of the
    same names. r = 0 or below: none. A name that matches no linear raises and lists those there are."""
    _inject(_language_adapters(model, config), seed)


def adapt_head(model: SegModel, options: dict[str, Any], *, seed: int = 0) -> None:
    """Adapters on the mask head's image encoder, where the head's options ask for them (lisa.md 9.3, SAM + LoRA)."""
    _inject(_head_adapters(model, options), seed)


def _language_adapters(model: SegModel, config: LoraConfig) -> list[Adapters]:
    if config.r <= 0:
        return []
    language = model.vlm.decoder
    have = {name.rpartition(".")[2] for name, module in language.named_modules() if isinstance(module, nn.Linear)}
    for target in config.target_modules:
        if target not in have:
            raise ValueError(unknown("linear layer of the language model", target, have))
    return [Adapters(language, config)]


def _head_adapters(model: SegModel, options: dict[str, Any]) -> list[Adapters]:
    adapted = model.head.adapted_encoder(options)
    if adapted is None:
        return []
    # scaled as the language model's: alpha is twice the rank
    config = LoraConfig(adapted.rank, 2 * adapted.rank, dropout=0.0, target_modules=adapted.layers)
    return [Adapters(adapted.module, config)]


def _inject(adapters: Iterable[Adapters], seed: int) -> None:
    for part, config in adapters:
        # here, not above: peft imports bitsandbytes and torch's compiler, and only training has adapters
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that only 4-bit layers use
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        peft_config = PeftConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            bias="none",
        )
        # on a fork: with other adapters, or none, a seed still gives the same order of data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(peft_config, part, ADAPTER)


def mark_trainable(model: SegModel, config: ModelConfig) -> None:
    """Marks what trains and freezes everything else.

    Trained: all LoRA, embedding and output rows of the vocabulary (`train_vocabulary`), the text MLP, the mask decoder
    with `train_mask_decoder`, the projector with `tower.train_projector`, the tower with `tower.train`. Without LoRA
    (r = 0) the language model trains in full with `train_language`: one released program does so, another does not. r
    below 0: its layers train in full.
    """
    model.requires_grad_(False)
    language = model.vlm.language
    in_full = config.lora.r == 0 and config.train_language
    parts: list[nn.Module | nn.Parameter] = [language] if in_full else _vocabulary(model, config)
    if config.lora.r < 0:
        parts.append(model.vlm.decoder_layers)
    parts.append(model.project)
    if config.train_mask_decoder:
        parts.extend(model.head.trainable_parts(config.head_options))
    vision = model.vlm.vision_parts()
    if config.tower.train_projector:
        parts.extend(vision["projector"])
    if config.tower.train:
        parts.extend(vision["tower"])
    if in_full and config.train_vocabulary != "full":
        raise ValueError("model.train_vocabulary: without LoRA the language model trains in full, its vocabulary too")
    for part in parts:
        part.requires_grad_(True)
    # the adapters lie inside frozen layers: by name, after everything else
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)


def _vocabulary(model: SegModel, config: ModelConfig) -> list[nn.Module | nn.Parameter]:
    """The vocabulary rows that train, embedding and output: all, or those of the tokens that the system adds."""
    language = model.vlm.language
    if config.train_vocabulary == "full":
        return [language.get_input_embeddings(), language.lm_head]
    return [*train_rows(language, model.added_ids)]


def merge_lora(model: SegModel) -> None:
    """Merges adapters into their linears, and separately trained vocabulary rows into their tables; a model without
    any stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merge_rows(model.vlm.language)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def trainable_names(model: SegModel) -> list[str]:
    """Names of trained parameters in `state_dict` order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainable_state(model: SegModel) -> dict[str, Tensor]:
    """The trained tensors under their `state_dict` names: all that a checkpoint must hold in addition to the base."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trainable(model: SegModel, tensors: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint's tensors into a model prepared by the same recipe; other names or shapes raise."""
    _check_tensors(_shapes(model), tensors)
    _copy(model, tensors)


def load_merged(model: SegModel, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Puts a checkpoint's tensors into a plain model of the same recipe, which stays plain: adapters and separately
    trained vocabulary rows are merged into its weights. Other names or shapes raise.

    What `load_trainable` and `merge_lora` do on a model with adapters, without making them.
    """
    mark_trainable(model, config)
    shapes = _shapes(model)
    adapters = [*_language_adapters(model, config.lora), *_head_adapters(model, config.head_options)]
    adapted = {linear: adapter.config for adapter in adapters for linear in adapter.linears()}
    linears = [(name, layer, adapted[layer]) for name, layer in model.named_modules() if layer in adapted]
    for name, linear, lora in linears:
        shapes |= {name + A: (lora.r, linear.in_features), name + B: (linear.out_features, lora.r)}
    tensors = {name.replace(BASE, "."): tensor for name, tensor in tensors.items()}
    _check_tensors(shapes, tensors)
    _copy(model, tensors)
    with torch.no_grad():
        for name, linear, lora in linears:
            linear.weight += change(tensors[name + A], tensors[name + B], lora.alpha)
    merge_rows(model.vlm.language)


def _shapes(model: SegModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def _copy(model: SegModel, tensors: Mapping[str, Tensor]) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.copy_(tensors[name])


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raises where a checkpoint's tensors are not those of a recipe."""
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(
            "the checkpoint's trained weights are not this recipe's; "
            f"missing: {', '.join(missing[:10]) or 'none'}; unexpected: {', '.join(unexpected[:10]) or 'none'}"
        )
    wrong = [name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        raise ValueError(f"shapes of the checkpoint differ: {', '.join(sorted(wrong)[:10])}")


def from_training_file(model: SegModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained part of a full-model file (`pytorch_model.bin` of `zero_to_fp32`) under this model's names.

    Both our names and the original programs' (`base_model.model.*`, LoRA as `lora_A.default`) are read. The frozen
    rest is left out: it is the base's (`check_frozen`). Adapters that this model has not raise a ValueError.
    """
    ours = _model_names(model, tensors)
    wanted = set(trainable_names(model))
    if lora := [name for name in tensors if ".lora_" in name and ours[name] not in wanted]:
        raise ValueError(
            f"{len(lora)} weights of adapters have no place in a model of this recipe, e.g. {lora[0]}: give the "
            "model.lora of its training (target_modules, r); of adapters only plain LoRA can be merged, no DoRA"
        )
    return {str(ours[name]): tensor for name, tensor in tensors.items() if ours[name] in wanted}


def check_frozen(model: SegModel, tensors: Mapping[str, Tensor]) -> None:
    """Raises where frozen weights in a full-model file are not this model's, up to rounding: its training had another
    base, or trained more than this model's recipe. What the file lacks, or holds in 4 bits, cannot be compared."""
    trained = set(trainable_names(model))
    # of vocabulary rows that train separately, the table holds the values before training
    frozen = {
        name.replace(BASE, "."): weight
        for name, weight in model.named_parameters()
        if name not in trained and name.rpartition(".")[0] + ".new_rows" not in trained
    }
    other = []
    for name, ours in _model_names(model, tensors).items():
        tensor, weight = tensors[name], frozen.get(str(ours).replace(BASE, "."))
        if weight is None or tensor.shape != weight.shape or not tensor.is_floating_point():
            continue
        if not ((tensor.float() - weight).abs() <= ROUNDING * weight.abs() + SMALLEST).all():
            other.append(name)
    if other:
        raise ValueError(
            f"{len(other)} frozen weights are not those of this recipe's model, e.g. {', '.join(other[:3])}: the file "
            "is of another base (model.version, model.vision_pretrained), or its training changed these, too (e.g. "
            "model.train_mask_decoder, model.tower.train_projector). python -m tools.convert_weights --weight takes "
            "all weights of the file as they are"
        )


def load_frozen_head(model: SegModel, tensors: Mapping[str, Tensor], options: dict[str, Any]) -> None:
    """The frozen part of a mask head that started from no file: no base has it, so a full-model file must, else
    ValueError. options: the recipe's `model.head_options`."""
    if not model.head.starts_random(options):
        return
    state = model.head.state_dict(prefix="head.")
    absent = state.keys() - set(trainable_names(model))
    for name, ours in _model_names(model, tensors).items():
        if ours in state:
            if tensors[name].shape != state[ours].shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, here {tuple(state[ours].shape)}")
            state[ours].copy_(tensors[name])
            absent.discard(ours)
    if absent:
        raise ValueError(
            f"the file lacks {len(absent)} frozen weights of a mask head that started from random ones, e.g. "
            f"{', '.join(sorted(absent)[:3])}: write all weights, the frozen ones, too"
        )


def _model_names(model: SegModel, names: Iterable[str]) -> dict[str, str | None]:
    """Names in a full-model file -> this model's; None where it has no such weight."""
    table = reading_table(model.vlm.WEIGHT_NAMES, model.head.WEIGHT_NAMES)
    return {name: table.to_model(name.removeprefix(LORA_WRAPPER)) for name in names}


def describe(model: SegModel) -> str:
    """One line: how many weights train, by part."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "lora" if ".lora_" in name else re.sub(r"^vlm\.language\.(model\.)?", "", name).split(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"{sum(counts.values()):,} of {total:,} weights train ({parts})"
