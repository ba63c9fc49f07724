"""A system with its weights: built from a recipe for training, or loaded from any kind of folder to answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.encode import Encoder
from data.tokens import TokenSpec, load_tokenizer
from data.views import Views
from model.checkpoints.config_file import class_names, read_config
from model.checkpoints.files import read_tensors
from model.checkpoints.fingerprint import replaced
from model.checkpoints.hub import fetch_folder
from model.checkpoints.load import build_model, load_folder, views_for
from model.finetune.quantize import quantize
from model.runtime import inference_options, training_options
from model.seg_model import SegModel
from model.vlm.prefix_packing import can_pack
from systems.base import SYSTEMS, System, build_system
from systems.weights_recipe import CHECKPOINTS, RECIPE, check_options, is_run, recipe_in
from utils import dist
from utils.config import ModelConfig, Recipe, from_dict, merge, to_dict
from utils.log import log
from utils.plain import parse_json
from utils.registry import unknown
from utils.renamed import new_name, with_new_names

WEIGHTS = "trainable.safetensors"
META = "meta.json"  # the history of a run
POINTERS = ("best", "last")
UNLIMITED = 10**9  # tokenizers warn beyond their own length; only the encoder limits rows


@dataclass
class Assistant:
    """Everything that answering takes: words (`system`), ids (`tokenizer`, `encoder`), images (`views`), weights
    (`model`).

    lock: held by who answers where several threads ask. The model is not reentrant: rows that share a prefix switch
    its attention while they are decoded (model/vlm/prefix_cache.py).
    """

    system: System
    tokenizer: PreTrainedTokenizerBase
    model: SegModel
    views: Views
    encoder: Encoder
    recipe: Recipe
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)


def build(recipe: Recipe, device: torch.device | str | None = None, trainable: bool = True) -> Assistant:
    """The assistant of a recipe from the weights it names: a base LLaVA with a mask head, or a finished assistant.

    trainable: with LoRA, trained parts marked, in training mode; else frozen, in evaluation mode. Raises ValueError for
    settings of the model that cannot be trained with `train.zero_stage`.
    """
    if trainable and recipe.model.load_in_4bit and recipe.train.zero_stage == 3:
        raise ValueError("4-bit layers cannot be sharded: model.load_in_4bit needs train.zero_stage 0, 1 or 2, not 3")
    if trainable and recipe.model.embedding_cache and recipe.train.zero_stage == 3:
        raise ValueError("model.embedding_cache: under train.zero_stage=3 all processes must encode together; use 2")
    system, tokenizer, model = _parts(recipe)
    if trainable:
        from model.finetune.trainable import prepare_training  # of no use where a merged folder answers

        prepare_training(model, recipe.model, seed=recipe.train.seed)
    else:
        model.requires_grad_(False).eval()
    return _assemble(system, tokenizer, model, recipe, device, trainable=trainable)


def load(
    path: str | Path,
    *,
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    checkpoint: str = "best",
) -> Assistant:
    """A finished assistant, frozen, its adapters merged.

    path: a run folder, a merged folder, a published checkpoint, or the hub name of one of the latter.
    system: the one that it must be; None: inferred from the recipe, else the `config.json`, else the added tokens.
    options, model: fields that override the recipe's (`model={"precision": "fp16", "vision_tower": ...}`). Without
    them, precision is the recipe's on a GPU and fp32 on a CPU, and there is no `embedding_cache`.
    checkpoint: of a run folder: best (last where there is no best), last, or a name like step_500.
    """
    device = torch.device(device) if device is not None else dist.device()
    folder = fetch_folder(path)
    model = with_new_names({"model": dict(model or {})})["model"]
    if is_run(folder):
        if model.get("checkpoint_file"):
            raise ValueError(
                f"{folder} is a run, which has trained weights of its own: model.checkpoint_file (--weight) goes over "
                "a base or a finished folder"
            )
        recipe = _with_overrides(_checked(recipe_in(folder), folder, system), options, model, device)
        return _load_run(folder, recipe, device, checkpoint)
    if (folder / RECIPE).is_file():
        recipe = _checked(recipe_in(folder), folder, system)
        check_options(folder, recipe, options or ())
    else:
        recipe = _inferred(folder, system, bare=bool(model.get("checkpoint_file")))
    recipe = replace(
        recipe, model=replace(recipe.model, version=str(folder), vision_pretrained=None, checkpoint_file=None)
    )
    recipe = _with_overrides(recipe, options, model, device)
    named_system = system_of(recipe)
    tokenizer = _tokenizer(folder, named_system, recipe)
    network = load_folder(folder, named_system.tokens, tokenizer, named_system.head, recipe.model)
    return _assemble(named_system, tokenizer, network, recipe, device)


def _load_run(folder: Path, recipe: Recipe, device: torch.device, checkpoint: str) -> Assistant:
    """The recipe's base with a run's trained weights on it, merged and frozen.

    Layers are quantized last: merging into 4-bit weights would round the adapters away.
    """
    from model.finetune.trainable import load_merged

    file = find_checkpoint(folder, checkpoint) / WEIGHTS
    _compare_base(folder, recipe)
    try:
        system, tokenizer, model = _parts(recipe)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} (the run's {folder / RECIPE} names it; of a base that was moved, --set model.version=FOLDER says "
            "where it is)"
        ) from None
    try:
        load_merged(model, read_tensors(file), recipe.model)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    model.requires_grad_(False).eval()
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        quantize(model, bits=4 if recipe.model.load_in_4bit else 8)
    return _assemble(system, tokenizer, model, recipe, device)


def _compare_base(run: Path, recipe: Recipe) -> None:
    """Warns where the weights that the recipe names are not those that the run was trained on, as its `meta.json` has
    them: what it learned may mean little on others."""
    try:
        *_, start = parse_json((run / META).read_text(encoding="utf-8"))
        trained_on = {new_name(name): digest for name, digest in start["content"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # a run without a history that can be read
    for name, before, digest in replaced(recipe.model, trained_on):
        place = reduce(getattr, name.split("."), recipe)
        log.warning(
            "%s: %s=%s does not hold what the run was trained on (digest %s, now %s): answers are wrong, unless "
            "the same weights only lie in other files",
            *(run, name, place, before, digest),
        )


def find_checkpoint(run: Path, name: str = "best") -> Path:
    """The folder of a run's checkpoint: `best` (`last` while there is no best), `last`, or its own name."""
    folder = run / CHECKPOINTS
    have = sorted(place.name for place in folder.glob("*") if (place / WEIGHTS).is_file())
    if not have:
        raise FileNotFoundError(f"{run} has no finished checkpoint: expected {CHECKPOINTS}/<name>/{WEIGHTS} there")
    if name == "best" and not (folder / "best").is_file():
        name = "last"
    if name in POINTERS:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} names no {name!r} checkpoint; have: {', '.join(have)}")
        name = (folder / name).read_text(encoding="utf-8").strip()
    if name not in have:
        raise FileNotFoundError(f"{run}: {unknown('checkpoint', name, [*have, *POINTERS])}")
    return folder / name


def _checked(recipe: Recipe, folder: Path, wanted: str | None) -> Recipe:
    """The recipe, if it is of the system `wanted` or that is None; else raises."""
    if wanted is not None and wanted != recipe.system:
        SYSTEMS[wanted]  # an unknown name raises with the choices
        raise ValueError(f"{folder} holds a {recipe.system!r} assistant, {wanted!r} was asked for")
    return recipe


def _inferred(folder: Path, wanted: str | None, *, bare: bool) -> Recipe:
    """A recipe for a folder without one. Its system is that of the architecture in `config.json`, else of the tokens.

    wanted: the caller's system, which must not contradict these. bare: the weights are a published file on top of a
    base folder; the folder's tokenizer then says nothing about the ids that the weights were used with.
    """
    values = read_config(folder)
    wrap = bool(values.get("mm_use_im_start_end", True))
    model = ModelConfig(version=str(folder), vision_tower=None, use_mm_start_end=wrap, tokenizer_legacy=None)
    names = _by_architecture(class_names(values))
    if len(names) != 1:
        names = [name for name in _by_tokens(folder) if not names or name in names]
    if wanted is not None:
        SYSTEMS[wanted]  # an unknown name raises with the choices
        if names and wanted not in names:
            raise ValueError(f"{folder} holds a {' or '.join(names)!r} assistant, {wanted!r} was asked for")
    if wanted is not None or len(names) == 1:
        name = wanted or names[0]
        released = build_system(name).released
        tokenization = released.tokenization if bare else None
        model = replace(model, vision_tower=released.vision_tower, tokenization=tokenization)
        settings = released.settings(values)
        try:
            return from_dict(Recipe, merge(to_dict(Recipe(system=name, model=model)), settings))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if names:
        raise ValueError(f"{folder} could hold any of {', '.join(names)}: say which system it is")
    raise ValueError(
        f"{folder} does not say which system it is of (no {RECIPE}, architecture {values.get('architectures')}, tokens "
        f"of none): a base model, or a checkpoint of a system that is not here; have: {', '.join(SYSTEMS)}"
    )


def _by_architecture(names: Collection[str]) -> list[str]:
    return [system for system in SYSTEMS if set(names) & set(build_system(system).released.architectures)]


def _by_tokens(folder: Path) -> list[str]:
    """The systems that add exactly the tokens that the folder's tokenizer has beyond a base model's."""
    tokenizer = load_tokenizer(folder, TokenSpec((), (), wrap_image=False))
    added = set(tokenizer.get_added_vocab()) - tokenizer.family.control - tokenizer.family.optional
    return [system for system in SYSTEMS if set(build_system(system).tokens.added) == added]


def _with_overrides(
    recipe: Recipe, options: Mapping[str, Any] | None, model: Mapping[str, Any] | None, device: torch.device
) -> Recipe:
    model_fields = dict(model or {})
    if device.type == "cpu":
        model_fields.setdefault("precision", "fp32")
    return from_dict(Recipe, merge(to_dict(recipe), {"options": dict(options or {}), "model": model_fields}))


def system_of(recipe: Recipe) -> System:
    """The recipe's system, with the image wrap that the recipe asks for."""
    system = build_system(recipe.system, recipe.options)
    return replace(system, tokens=replace(system.tokens, wrap_image=recipe.model.use_mm_start_end))


def _parts(recipe: Recipe) -> tuple[System, PreTrainedTokenizerBase, SegModel]:
    """System, tokenizer and untrained model of a recipe, on the CPU."""
    system = system_of(recipe)
    tokenizer = _tokenizer(fetch_folder(recipe.model.version), system, recipe)
    model = build_model(recipe.model, system.tokens, tokenizer, system.head, seed=recipe.train.seed)
    return system, tokenizer, model


def _tokenizer(folder: Path, system: System, recipe: Recipe) -> PreTrainedTokenizerBase:
    config = recipe.model
    limit = config.model_max_length or UNLIMITED
    return load_tokenizer(folder, system.tokens, limit, release=config.tokenization, legacy=config.tokenizer_legacy)


def _assemble(
    system: System,
    tokenizer: PreTrainedTokenizerBase,
    model: SegModel,
    recipe: Recipe,
    device: torch.device | str | None,
    *,
    trainable: bool = False,
) -> Assistant:
    encoder = Encoder(
        tokenizer,
        system.tokens,
        recipe.model.conv_type,
        recipe.model.model_max_length,
        system.released.prompt_template,
        recipe.data.long_rows,
    )
    options = training_options if trainable else inference_options
    packed = can_pack(recipe.model.pack_rows, model.vlm.attention_implementation, model.vlm.packs)
    model.configure(options(recipe, pack_rows=packed))
    model.to(device if device is not None else dist.device())
    if recipe.model.embedding_cache:
        model.use_cache(recipe.model.embedding_cache)
    return Assistant(system, tokenizer, model, views_for(model), encoder, recipe)
