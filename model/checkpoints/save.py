"""Writing a SegModel: one self-contained Hugging Face folder, or the layout of released checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.pieces import STRIP
from model.checkpoints.files import write_json, write_tensors
from model.checkpoints.layouts import folder_table, published_table, to_layout_names
from model.projection import Projection
from model.seg_model import SegModel
from utils.config import ModelConfig, Recipe, save_recipe
from utils.files import atomic_folder

WRITTEN = "written.json"  # the files of a folder that was written here; any other file in it is the user's


def check_target(folder: str | Path, sources: Iterable[str | Path | None] = (), *, overwrite: bool = False) -> None:
    """Raises where writing to `folder` would remove what is read (`sources`: places of the base, the run, its weights)
    or files that these programs did not write; `overwrite` allows the latter."""
    target = Path(folder).resolve()
    for source in filter(None, sources):
        place = Path(source).expanduser().resolve()
        if place.exists() and place.is_relative_to(target):
            raise ValueError(f"{folder} is, or holds, {source}, which is read: choose another --save_path")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another --save_path")
    if target.is_mount():
        raise ValueError(f"{folder} is where a disk is mounted, and cannot be replaced: choose a folder in it")
    strange = [] if overwrite else _strange(target)
    if strange:
        some = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        raise FileExistsError(
            f"{folder} holds what this program did not write ({some}): choose another --save_path, or --overwrite "
            "replaces the folder with all that is in it"
        )


def read_from(config: ModelConfig) -> tuple[str | None, ...]:
    """The places that a model is made from."""
    return (
        config.version,
        config.vision_tower,
        config.vision_pretrained,
        config.checkpoint_file,
        config.tower.preprocessor,
    )


def _strange(folder: Path) -> list[str]:
    """Files in a folder that are not in the list that `_writing` left there."""
    try:
        written = {WRITTEN, *json.loads((folder / WRITTEN).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        written = set()
    # everything that is no folder, broken links too: it would be removed with the rest
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return sorted(set(files) - written)


@contextmanager
def _writing(folder: str | Path, notes: Mapping[str, Any], overwrite: bool) -> Generator[Path]:
    """A draft folder that takes the place of `folder` when everything is written, with a list of its files."""
    check_target(folder, overwrite=overwrite)
    with atomic_folder(folder) as draft:
        yield draft
        for name, values in notes.items():
            write_json(draft / name, values)
        files = [path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file()]
        (draft / WRITTEN).write_text(json.dumps(sorted(files), indent=1) + "\n", encoding="utf-8")


def save_folder(
    model: SegModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None = None,
    *,
    notes: Mapping[str, Any] = MappingProxyType({}),
    more: Callable[[Path], None] = lambda _: None,
    overwrite: bool = False,
) -> None:
    """Safetensors, config, tokenizer, image settings: everything `load_folder` needs, vision tower included.

    The layout is the backbone's Hugging Face layout with `head.*` and `project.*` added, so that its class there, e.g.
    `LlavaForConditionalGeneration.from_pretrained`, takes the language side (of a LLaVA with an MLP projector). The
    folder appears complete or not at all, in place of one that was written before; `check_target` says what is refused.

    notes: file name -> values of further JSON files. more: called with the draft of the folder when all else is there,
    to add other files.
    """
    with _writing(folder, notes, overwrite) as draft:
        write_tensors(to_layout_names(model.state_dict(), folder_table(model.vlm.FOLDER_NAMES)), draft)
        dtype = str(model.dtype).removeprefix("torch.")
        write_json(draft / "config.json", model.architecture.to_json() | {"dtype": dtype})
        model.vlm.write_view(draft)
        _write_tokenizer(draft, tokenizer)
        if recipe is not None:
            save_recipe(recipe, draft)
        more(draft)


def save_original(
    model: SegModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    class_name: str = "LlavaLlamaForCausalLM",
    *,
    notes: Mapping[str, Any] = MappingProxyType({}),
    overwrite: bool = False,
) -> None:
    """The published layout: flat config, published key names, `pytorch_model*.bin` (lisa.md 7). What it keeps
    elsewhere, e.g. a vision tower, the backbone writes or names.

    class_name: of the model, for `architectures` in the config. The folder appears complete, as with `save_folder`.
    """
    model.vlm.check_published(model.architecture.vlm_config)
    if model.architecture.projection != Projection():
        raise ValueError(
            f"the published layout has no fields for this model's text projection: {model.architecture.projection}"
        )
    with _writing(folder, notes, overwrite) as draft:
        _write_original(model, draft, tokenizer, class_name)


def _write_original(model: SegModel, folder: Path, tokenizer: PreTrainedTokenizerBase, class_name: str) -> None:
    vlm, config = model.vlm, model.architecture.vlm_config
    table = published_table(vlm.published_names(config), model.head.WEIGHT_NAMES)
    tensors = to_layout_names(model.state_dict(), table)
    places = vlm.write_published_parts(config, tensors, folder)
    write_tensors(tensors, folder, safe=False)
    general = {"architectures": [class_name], "torch_dtype": str(model.dtype).removeprefix("torch.")}
    family = tokenizer.family
    # a field of LLaVA's; other families always have their image wrap
    wrap = {"mm_use_im_start_end": family.wrap[0] in tokenizer.get_added_vocab()} if family.adds_wrap else {}
    write_json(folder / "config.json", vlm.published_json(config) | general | places | wrap)
    _write_old_tokenizer(folder, tokenizer)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    if pieces := tokenizer.pieces.file:  # the library does not copy it, and the old programs read nothing else
        _copy(pieces, folder)


def _write_old_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The four files of a published folder, as transformers 4.31 reads them; without a sentencepiece model, the files
    that today's library writes."""
    pieces = tokenizer.pieces.file
    if not pieces:
        tokenizer.save_pretrained(folder)
        return
    _copy(pieces, folder)
    plain = {name: _plain_token(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "unk_token")}
    names = {token["content"] for token in plain.values()}
    added = sorted((index, name) for name, index in tokenizer.get_added_vocab().items() if name not in names)
    write_json(folder / "added_tokens.json", {name: index for index, name in added})
    write_json(folder / "special_tokens_map.json", {**plain, "pad_token": tokenizer.pad_token})
    settings: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"legacy": tokenizer.pieces.legacy}
    if tokenizer.pieces.release != STRIP:  # published folders have no such key: they mean 4.31
        settings["tokenization"] = tokenizer.pieces.release
    settings |= {"model_max_length": tokenizer.model_max_length, "padding_side": "right", "sp_model_kwargs": {}}
    tokens = {name: {"__type": "AddedToken", **token} for name, token in plain.items()}
    settings |= {"pad_token": None, "tokenizer_class": "LlamaTokenizer", **tokens}
    write_json(folder / "tokenizer_config.json", settings)


def _plain_token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _copy(file: Path, folder: Path) -> None:
    if file.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(file, folder / "tokenizer.model")
