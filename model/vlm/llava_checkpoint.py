"""LLaVA on disk: names of weights, sizes in `config.json`, and the vision tower and projector that may lie elsewhere.

`model_type: llava` is parsed here, never by AutoConfig, which reads the flat files of published checkpoints as its own
nested ones and silently takes defaults (lisa.md 7.4).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from data.llama_tokenizer import LLAMA
from data.views import LanguageView, PaddedView
from model.checkpoints.config_file import SECTION, read_config
from model.checkpoints.files import read_tensors, write_json, write_tensors
from model.checkpoints.hub import fetch
from model.checkpoints.layouts import to_model_names
from model.checkpoints.name_table import NameTable, Pair, under
from model.checkpoints.size_keys import SizeKeys
from model.checkpoints.weight_source import WeightSource
from model.vlm.base import BackboneSizes, VisionLanguageModel
from model.vlm.tower import (
    OwnView,
    TowerInput,
    fit_tower,
    own_view,
    published_fields,
    representable,
    tower_input,
    tower_side,
    tower_view,
    write_view,
)
from model.vlm.towers import TOWERS, TowerFamily, tower_family
from utils.config import ModelConfig
from utils.log import log
from utils.plain import leaves
from utils.registry import unknown

NEW_DEPTH, NEW_GROWTH = 2, 2  # of a new projector: layers, and the width between them in widths of the language model
ACTIVATION = "gelu"  # between the projector's layers
OWN_TOWER = "vision_tower"  # subfolder of a published folder for a tower that the hub does not have
HUB_TOWER = "model.vision_tower.vision_tower."  # what the published layout puts before a CLIP's own names
TOWER = "vlm.tower.*"
LANGUAGE_MODELS = ("llama", "llava", "llava_llama")  # model_type of the language model; the latter two in flat files

_LANGUAGE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_LANGUAGE_KEYS += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range")
_LANGUAGE_KEYS += ("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "pretraining_tp")

# of every family in a LLaVA's folder; wider patterns go last
_TOWER_NAMES = sorted(
    {pair for name in TOWERS for pair in under(TOWERS[name].LLAVA_FILES, "vision_tower.", "vlm.tower.")},
    key=lambda pair: (pair[1] == TOWER, pair),
)
_PROJECTOR_LINEARS = 4  # as many as the Hugging Face names are listed for
_LANGUAGE: list[Pair] = [
    (f"model.{part}.*", f"vlm.language.model.{part}.*") for part in ("embed_tokens", "layers", "norm")
]
_LANGUAGE += [("lm_head.*", "vlm.language.lm_head.*")]
_HUGGING_FACE: list[Pair] = [
    ("language_model.model.*", "vlm.language.model.*"),
    ("language_model.lm_head.*", "vlm.language.lm_head.*"),
    *_TOWER_NAMES,
    # Hugging Face numbers the linears 1, 2, ...; in our nn.Sequential an activation stands between two of them
    *((f"multi_modal_projector.linear_{i + 1}.*", f"vlm.projector.{2 * i}.*") for i in range(_PROJECTOR_LINEARS)),
]
_PUBLISHED_TOWER: Pair = (f"{HUB_TOWER}vision_model.*", TOWER)
_LINEAR_PROJECTOR: Pair = ("model.mm_projector.*", "vlm.projector.0.*")
_MLP_PROJECTOR: Pair = ("model.mm_projector.#.*", "vlm.projector.#.*")
_VARIANTS: list[Pair] = [  # read, never written by save_folder: towers in old LLaVA files, newer Hugging Face layouts
    _PUBLISHED_TOWER,
    (f"{HUB_TOWER}*", TOWER),
    *under(_TOWER_NAMES, "model.", ""),
    ("model.vision_tower.*", TOWER),
    ("vision_tower.*", TOWER),
    *((f"model.multi_modal_projector.linear_{i + 1}.*", f"vlm.projector.{2 * i}.*") for i in range(_PROJECTOR_LINEARS)),
    _MLP_PROJECTOR,  # before the linear one, whose `*` would match its names, too
    _LINEAR_PROJECTOR,
    ("model.language_model.*", "vlm.language.model.*"),
]


@dataclass(frozen=True)
class LlavaSizes:
    """The configuration of a LLaVA, as `Architecture.vlm_config` holds it."""

    language: dict[str, Any]  # of LlamaConfig
    tower: dict[str, Any]  # of its family in TOWERS, which `model_type` names; none: CLIP
    projector_depth: int = 2
    feature_layer: int = -2  # the hidden state of the tower that is projected
    projector_width: int | None = None  # between the projector's layers; None: the language model's
    tower_input: dict[str, Any] = field(default_factory=dict)  # of tower.TowerInput
    tower_name: str | None = None  # where the tower came from, for folders that do not hold it


class LlavaFiles(VisionLanguageModel):
    """The class-level half of LLaVA: what its files look like."""

    NAME = "llava"
    WEIGHT_NAMES: ClassVar[list[Pair]] = [*_HUGGING_FACE, *_VARIANTS, *_LANGUAGE]
    FOLDER_NAMES = _HUGGING_FACE
    EMBEDDING = "vlm.language.model.embed_tokens.weight"
    LM_HEAD = "vlm.language.lm_head.weight"
    LIGER = "apply_liger_kernel_to_llama"
    FAMILY = LLAMA
    TOWER_FIELDS = frozenset(
        {
            "size",
            "pad",
            "stats",
            "pool",
            "position_resize",
            "feature_layer",
            "preprocessor",
            "new_projector",
            "train_projector",
            "train",
        }
    )
    SIZE_KEYS = SizeKeys(
        widths=frozenset(
            {
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "patch_size",
                "num_channels",
                "mlp_ratio",
                "num_register_tokens",
            }
        ),
        counts=frozenset({"num_hidden_layers"}),
    )

    @classmethod
    def config_for(
        cls, source: WeightSource, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Any], LanguageView]:
        """The tower inside the folder counts; one outside gives what is lacking (sizes, weights, image settings)."""
        inside = any(name.startswith("vlm.tower.") for name in source.tensors)
        name = tower_name(source.values)
        if "vision_config" in source.values and inside:
            folder = source.folder
            if config.vision_tower not in (None, name, ModelConfig.vision_tower):
                log.warning("%s holds its own vision tower: %s is not read", folder, config.vision_tower)
        else:
            folder, name = _find_tower(source, name, config)
        values = source.values if folder == source.folder else read_config(folder)
        family = tower_family(values, str(folder / "config.json"))
        if not inside:
            source.tensors.update(_read_tower(folder, source, family))
        _drop_unused(source, family)
        shown = tower_input(source.values, config.tower, family)
        built = family.sizes(values)
        own = own_view(folder, built, config.tower.preprocessor)
        tower = fit_tower(built, source.tensors, shown, own)
        view = tower_view(own, tower["image_size"], shown)

        width = source.tensors[cls.EMBEDDING].shape[1]
        new_projector = config.tower.new_projector and not source.finished
        if new_projector:
            _drop_projector(source)
        else:
            _check_activation(source)
        layer = config.tower.feature_layer
        sizes = LlavaSizes(
            language=language_sizes(source.values, tokenizer, source.where),
            tower=tower,
            projector_depth=NEW_DEPTH if new_projector else _projector_depth(source.tensors, source.where),
            feature_layer=_feature_layer(source.values, source.where, family) if layer is None else layer,
            projector_width=NEW_GROWTH * width if new_projector else len(source.tensors["vlm.projector.0.weight"]),
            tower_input=asdict(shown),
            tower_name=None if config.tower.train else name,  # a trained one is nowhere else
        )
        return asdict(sizes), view

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> BackboneSizes:
        language, tower = config["language"], config["tower"]
        return BackboneSizes(
            tower["hidden_size"], tower["num_hidden_layers"], language["hidden_size"], language["vocab_size"]
        )

    @classmethod
    def size_sections(cls, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"text_config": config["language"], "vision_config": config["tower"]}

    @classmethod
    def check_config(cls, config: dict[str, Any], where: str) -> None:
        layers, layer = config["tower"]["num_hidden_layers"], config["feature_layer"]
        if not -layers - 1 <= layer <= layers:
            raise ValueError(f"{where}: the vision feature layer is {layer}, the tower has {layers} layers")

    @classmethod
    def config_json(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes = LlavaSizes(**config)
        family = family_of(config)
        fields = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": cls.NAME,
            "text_config": {"model_type": "llama", **sizes.language},
            "vision_config": {"model_type": family.NAME, **sizes.tower},
            "vision_feature_layer": sizes.feature_layer,
            "vision_feature_select_strategy": family.SELECT[0],
            "projector_hidden_act": ACTIVATION,
            "tie_word_embeddings": False,
        }
        own = {
            "projector_depth": sizes.projector_depth,
            "sight": sizes.tower_input,
            "tower_name": sizes.tower_name,
        }
        return fields, own

    @classmethod
    def view_of(cls, values: dict[str, Any], config: ModelConfig) -> OwnView | PaddedView:
        folder = Path(config.version if "vision_config" in values else config.vision_tower or "").expanduser()
        tower = values if "vision_config" in values else read_config(folder)
        family = tower_family(tower, str(folder / "config.json"))
        shown, sizes = tower_input(values, config.tower, family), family.sizes(tower)
        own = own_view(folder, sizes, config.tower.preprocessor)
        view = tower_view(own, tower_side(sizes, shown, own), shown)
        return replace(view, cell=sizes["patch_size"] * shown.pool)

    @classmethod
    def published_names(cls, config: dict[str, Any]) -> list[Pair]:
        """The tower keeps the name that it had in old LLaVA files."""
        projector = _LINEAR_PROJECTOR if LlavaSizes(**config).projector_depth == 1 else _MLP_PROJECTOR
        return [projector, _PUBLISHED_TOWER, *_LANGUAGE]

    @classmethod
    def check_published(cls, config: dict[str, Any]) -> None:
        saved, family = LlavaSizes(**config).tower_input, family_of(config)
        if not family.PUBLISHED:
            raise ValueError(f"the published layout knows towers of CLIP only, this model's is of {family.NAME}")
        # how the position table was resized needs no field: a tower with another table than the hub's is written out
        if not representable(replace(TowerInput(**saved), positions="released"), family):
            raise ValueError(f"the published layout has no fields for this model's tower input: {saved}")

    @classmethod
    def published_json(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The flat `config.json` of lisa.md 7.3, as far as sizes go."""
        sizes = LlavaSizes(**config)
        language = dict(sizes.language)
        rope = dict(language.pop("rope_parameters", {}))
        base, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
        depth = sizes.projector_depth
        return {
            "model_type": cls.NAME,
            **language,
            "rope_theta": base,
            "rope_scaling": None if kind == "default" else {**rope, "type": kind},
            "tie_word_embeddings": False,
            "use_cache": False,
            "mm_hidden_size": sizes.tower["hidden_size"],
            "mm_projector_type": "linear" if depth == 1 else f"mlp{depth}x_gelu",
            "mm_vision_select_layer": sizes.feature_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "image_aspect_ratio": "square",
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": True,
            "pretrain_mm_mlp_adapter": None,
            "train_mask_decoder": True,
            **published_fields(TowerInput(**sizes.tower_input)),
        }

    def write_published_parts(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """A released checkpoint names its tower on the hub and does not hold it. One that the hub does not have, or
        whose position table is not resized as readers of the released layout would, is written to a subfolder."""
        sizes = LlavaSizes(**config)
        tower = {name: tensors.pop(name) for name in list(tensors) if ".vision_tower." in name}
        name = sizes.tower_name
        if not name or not _is_hub_name(name) or TowerInput(**sizes.tower_input).positions != "released":
            name = OWN_TOWER
            write_tensors({key.removeprefix(HUB_TOWER): value for key, value in tower.items()}, folder / name)
            write_json(folder / name / "config.json", {"model_type": family_of(config).NAME, **sizes.tower})
            self.write_view(folder / name)
        return {"mm_vision_tower": name, "vision_tower": name}

    def write_view(self, folder: Path) -> None:
        write_view(folder, cast(OwnView | PaddedView, self.view))  # no other is ever given to a LLaVA


def language_sizes(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """LlamaConfig values from a flat (original) or nested (Hugging Face) `config.json`. Token ids come from the
    tokenizer, because those in the files of published bases are wrong."""
    text = values.get("text_config", values)
    kind = text.get("model_type", "llama")
    if kind not in LANGUAGE_MODELS:
        raise ValueError(f"{where}: " + unknown("language model", str(kind), ["llama"]))
    sizes = {key: text[key] for key in _LANGUAGE_KEYS if text.get(key) is not None}
    sizes["bos_token_id"] = tokenizer.bos_token_id
    sizes["eos_token_id"] = tokenizer.eos_token_id
    sizes["pad_token_id"] = tokenizer.pad_token_id
    sizes["vocab_size"] = len(tokenizer)
    # the library's defaults are written out, because the next release may have other ones
    complete, drop = LlamaConfig(**sizes).to_dict(), ("rope_theta", "rope_scaling")
    keys = dict.fromkeys((*_LANGUAGE_KEYS, *sizes))
    return {key: complete[key] for key in keys if key not in drop and complete.get(key) is not None}


def family_of(config: dict[str, Any]) -> type[TowerFamily]:
    """The tower's family in a configuration of LlavaSizes."""
    return tower_family(config["tower"], "the vision tower")


def tower_name(values: dict[str, Any]) -> str | None:
    """The vision tower that a published or original `config.json` names."""
    section = values.get(SECTION, {})
    name = section.get("tower_name") or values.get("mm_vision_tower") or values.get("vision_tower")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"config.json: the vision tower must be a name, got {name!r}")
    return name


def _feature_layer(values: dict[str, Any], where: str, family: type[TowerFamily]) -> int:
    """Which hidden state of the tower is projected; only patch features (no class token) are supported."""
    select = values.get("vision_feature_select_strategy") or values.get("mm_vision_select_feature") or "patch"
    if select not in family.SELECT:
        raise ValueError(f"{where}: " + unknown("vision feature selection", select, family.SELECT))
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", family.FEATURE_LAYER))
    if not isinstance(layer, int):
        raise ValueError(f"{where}: one vision feature layer is supported, got {layer!r}")
    return layer


def _projector_depth(tensors: dict[str, Tensor], where: str) -> int:
    """1 for a linear projector, N for mlpNx_gelu; counted in the weights, because old files lack the field."""
    depth = sum(name.startswith("vlm.projector.") and name.endswith(".weight") for name in tensors)
    if not depth:
        raise ValueError(
            f"{where} has no projector (model.mm_projector.* or multi_modal_projector.*): not a LLaVA; "
            "model.tower.new_projector=true puts a new one between a language model and a tower"
        )
    return depth


def _check_activation(source: WeightSource) -> None:
    """Raises where a Hugging Face `config.json` names another activation than LLaVA's between the projector's layers:
    no weight shows it."""
    activation = source.values.get("projector_hidden_act") or ACTIVATION
    if activation != ACTIVATION:
        raise ValueError(f"{source.where}: " + unknown("projector_hidden_act", str(activation), [ACTIVATION]))


def _drop_projector(source: WeightSource) -> None:
    """A base's projector gives way to a new, wider one."""
    old = [name for name in source.tensors if name.startswith("vlm.projector.")]
    source.report.ignored.extend(old)
    for name in old:
        del source.tensors[name]
    source.fresh.extend(f"vlm.projector.{2 * i}.{kind}" for i in range(NEW_DEPTH) for kind in ("weight", "bias"))


def _find_tower(source: WeightSource, named: str | None, config: ModelConfig) -> tuple[Path, str | None]:
    """The tower's folder, and the name to remember it by. named: in `config.json`.

    Folders count before hub names, the recipe's before the one that `config.json` names (inside its folder or
    anywhere).
    """
    if not config.vision_tower and leaves(named):
        raise ValueError(
            f"{source.where} names the vision tower {named!r}, which lies outside the folder: give "
            "the tower yourself (--vision_tower, model.vision_tower)"
        )
    local = [config.vision_tower]
    if named:
        local.extend([str(source.folder / named), named])
    for place in local:
        if place and (Path(place) / "config.json").is_file():
            return Path(place), named
    name = config.vision_tower or named
    if not name:
        raise ValueError(f"{source.folder} holds no vision tower and names none: set model.vision_tower")
    if named and name != named:
        log.warning("%s was made with the vision tower %s; model.vision_tower=%s is used", source.folder, named, name)
    try:
        return fetch(name), str(name)
    except FileNotFoundError as error:
        who = "model.vision_tower names" if config.vision_tower else f"{source.where} names"
        raise FileNotFoundError(
            f"{who} the vision tower {name}, which is not here ({error}); say where it is with --vision_tower "
            "(model.vision_tower): a folder, or a hub name like openai/clip-vit-large-patch14"
        ) from None


def _read_tower(folder: Path, source: WeightSource, family: type[TowerFamily]) -> dict[str, Tensor]:
    """Weights of a tower's folder; what else its model has, e.g. a text side, has no place in a LLaVA."""
    tensors = read_tensors(folder)
    rest = {name for name in tensors if family.UNUSED.fullmatch(name)}
    source.report.ignored.extend(sorted(rest))
    vision = {name: value for name, value in tensors.items() if name not in rest}
    return to_model_names(vision, NameTable(under(family.FILES, "", "vlm.tower.")), source.report)


def _drop_unused(source: WeightSource, family: type[TowerFamily]) -> None:
    """Weights of a tower inside the folder that no feature needs."""
    own = [name for name in source.tensors if name.startswith("vlm.tower.")]
    rest = [name for name in own if family.UNUSED.fullmatch(name.removeprefix("vlm.tower."))]
    source.report.ignored.extend(rest)
    for name in rest:
        del source.tensors[name]


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
