"""Writing a SegModel: one self-contained Hugging Face folder, or the layout of released checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.pieces import STRIP
from data.tokens import IMAGE_START, pieces_file
from model.heads import HEADS
from model.legacy import folder_table, published_table, to_theirs
from model.plan import Plan
from model.seg_model import SegModel
from model.tower import Sight, is_told, published, write_view
from model.weights import write_tensors
from utils.config import Recipe, save_recipe

OWN_TOWER = "vision_tower"  # subfolder for a tower that the hub does not have


def save_folder(
    model: SegModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None = None
) -> None:
    """Safetensors, config, tokenizer, picture settings: everything `load_folder` needs, vision tower included.

    The layout is Hugging Face's LLaVA with `head.*` and `project.*` beside it, so that
    `LlavaForConditionalGeneration.from_pretrained` takes the language side of a model with an MLP projector.
    """
    folder = Path(folder)
    write_tensors(to_theirs(model.state_dict(), folder_table()), folder)
    _write_json(folder / "config.json", model.plan.to_json() | {"dtype": str(model.dtype).removeprefix("torch.")})
    write_view(folder, model.vlm.view)
    _write_tokenizer(folder, tokenizer)
    if recipe is not None:
        save_recipe(recipe, folder)


def save_original(
    model: SegModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase, architecture: str = "LlavaLlamaForCausalLM"
) -> None:
    """The published layout: flat config, published key names, `pytorch_model*.bin`, no vision tower (lisa.md 7).

    The tower's hub name goes into the config; one that is no hub name is written to a subfolder beside it.
    `architecture`: the class name in the config.
    """
    folder, plan = Path(folder), model.plan
    sight = Sight(**plan.sight)
    if not is_told(replace(sight, positions="released")):
        raise ValueError(f"the published layout cannot tell how this model's vision tower sees: {plan.sight}")
    tensors = to_theirs(model.state_dict(), published_table(HEADS[plan.head].NAMES, plan.projector_depth))
    tower = {name: tensors.pop(name) for name in list(tensors) if ".vision_tower." in name}
    write_tensors(tensors, folder, safe=False)
    name = plan.tower_name
    if not name or not _is_hub_name(name) or sight.positions != "released":
        name = OWN_TOWER
        prefix = "model.vision_tower.vision_tower."
        write_tensors({key.removeprefix(prefix): value for key, value in tower.items()}, folder / name)
        _write_json(folder / name / "config.json", {"model_type": "clip_vision_model", **plan.tower})
        write_view(folder / name, model.vlm.view)
    told = {
        "architectures": [architecture],
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "mm_vision_tower": name,
        "vision_tower": name,
        "mm_use_im_start_end": IMAGE_START in tokenizer.get_added_vocab(),
    }
    _write_json(folder / "config.json", _published_config(plan) | told)
    _write_old_tokenizer(folder, tokenizer)


def _published_config(plan: Plan) -> dict[str, Any]:
    """The flat `config.json` of lisa.md 7.3, as far as sizes go."""
    language = dict(plan.language)
    rope = language.pop("rope_parameters", {})
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "model_type": "llava",
        **language,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {"type": rope["rope_type"], "factor": rope["factor"]} if scaled else None,
        "tie_word_embeddings": False,
        "use_cache": False,
        "mm_hidden_size": plan.tower["hidden_size"],
        "mm_projector_type": "linear" if plan.projector_depth == 1 else f"mlp{plan.projector_depth}x_gelu",
        "mm_vision_select_layer": plan.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "square",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": True,
        "pretrain_mm_mlp_adapter": None,
        "train_mask_decoder": True,
        **published(Sight(**plan.sight)),
    }


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    if pieces := pieces_file(tokenizer):
        _copy(pieces, folder)


def _write_old_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The four files of a published folder, which library 4.31 reads; without a sentencepiece model, today's files."""
    pieces = pieces_file(tokenizer)
    if not pieces:
        tokenizer.save_pretrained(folder)
        return
    _copy(pieces, folder)
    plain = {name: _plain_token(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "unk_token")}
    names = {token["content"] for token in plain.values()}
    added = sorted((index, name) for name, index in tokenizer.get_added_vocab().items() if name not in names)
    _write_json(folder / "added_tokens.json", {name: index for index, name in added})
    _write_json(folder / "special_tokens_map.json", {**plain, "pad_token": tokenizer.pad_token})
    settings = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"legacy": tokenizer.pieces.legacy}
    if tokenizer.pieces.release != STRIP:  # published folders have no such key: they mean 4.31
        settings["tokenization"] = tokenizer.pieces.release
    settings |= {"model_max_length": tokenizer.model_max_length, "padding_side": "right", "sp_model_kwargs": {}}
    tokens = {name: {"__type": "AddedToken", **token} for name, token in plain.items()}
    settings |= {"pad_token": None, "tokenizer_class": "LlamaTokenizer", **tokens}
    _write_json(folder / "tokenizer_config.json", settings)


def _plain_token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _copy(file: Path, folder: Path) -> None:
    if file.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(file, folder / "tokenizer.model")


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
