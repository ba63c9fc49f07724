"""Qwen2.5-VL and Qwen3-VL on disk: names of weights in three layouts, sizes in `config.json`, image settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data.patch_view import PatchView, patch_view
from data.qwen_tokenizer import QWEN
from model.checkpoints.config_file import QWEN_TEXT_KEYS, SECTION, check_layer_types, complete, image_settings, whole
from model.checkpoints.name_table import Pair, under
from model.checkpoints.size_keys import SizeKeys
from model.checkpoints.weight_source import WeightSource
from model.vlm.base import BackboneSizes, VisionLanguageModel
from utils.config import ModelConfig

_VISION_KEYS = ("depth", "hidden_size", "intermediate_size", "num_heads", "hidden_act", "in_channels", "patch_size")
_VISION_KEYS += ("spatial_merge_size", "temporal_patch_size", "out_hidden_size", "initializer_range", "rope_parameters")
_VISION_KEYS += ("window_size", "fullatt_block_indexes", "tokens_per_second")  # Qwen2.5
_VISION_KEYS += ("num_position_embeddings", "deepstack_visual_indexes")  # Qwen3
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_SHAPE = ("patch_size", "spatial_merge_size", "temporal_patch_size")  # of an image token, in pixels, patches, frames
_LISTS = ("fullatt_block_indexes", "deepstack_visual_indexes")  # of layers of the tower

_HUGGING_FACE: list[Pair] = [
    ("model.visual.*", "vlm.tower.*"),
    ("model.language_model.*", "vlm.language.model.*"),
    ("lm_head.*", "vlm.language.lm_head.*"),
]
_VARIANTS: list[Pair] = [  # read, never written: transformers before 4.52, and Sa2VA's wrapper (sa2va.md 2.2)
    ("visual.*", "vlm.tower.*"),
    *((f"model.{part}.*", f"vlm.language.model.{part}.*") for part in ("embed_tokens", "layers", "norm")),
    *under(_HUGGING_FACE, "model.", ""),
]


@dataclass(frozen=True)
class QwenSizes:
    """The configuration of a Qwen-VL, as `Architecture.vlm_config` holds it."""

    text: dict[str, Any]  # of the family's text configuration class
    vision: dict[str, Any]  # of its vision configuration class
    token_ids: dict[str, int] = field(default_factory=dict)  # of `config.json`, for the library's own class
    resize: str = "once"  # of PatchView


class QwenVLFiles(VisionLanguageModel):
    """The class-level half of a Qwen-VL: what its files look like."""

    STOCK: ClassVar[str]  # the library's class that reads our folders
    TEXT_CONFIG: ClassVar[type[PreTrainedConfig]]
    VISION_CONFIG: ClassVar[type[PreTrainedConfig]]
    STATS: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # mean and deviation where no file says
    LEAST_TOKENS: ClassVar[int]  # of an image, where no file says

    WEIGHT_NAMES: ClassVar[list[Pair]] = [*_HUGGING_FACE, *_VARIANTS]
    FOLDER_NAMES = _HUGGING_FACE
    EMBEDDING = "vlm.language.model.embed_tokens.weight"
    LM_HEAD = "vlm.language.lm_head.weight"
    KEEPS_LAYERS = False
    FAMILY = QWEN
    TOWER_FIELDS = frozenset({"min_pixels", "max_pixels", "resize", "preprocessor", "train_projector", "train"})
    SIZE_KEYS = SizeKeys(
        widths=frozenset(
            {
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "num_heads",
                "in_channels",
                "patch_size",
                "spatial_merge_size",
                "temporal_patch_size",
                "out_hidden_size",
                "num_position_embeddings",
            }
        ),
        counts=frozenset({"num_hidden_layers", "depth"}),
    )

    @classmethod
    def config_for(
        cls, source: WeightSource, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Any], PatchView]:
        # the matrix may be padded: it has more rows than the tokenizer has tokens
        sizes = cls._sizes(source.values, config, rows=len(source.tensors[cls.EMBEDDING]))
        return asdict(sizes), cls._view(source.folder, sizes, config)

    @classmethod
    def _sizes(cls, values: dict[str, Any], config: ModelConfig, rows: int) -> QwenSizes:
        """From a nested `config.json`, or from an older one whose text sizes stand at the top."""
        text = values.get("text_config") or values
        resize = config.tower.resize or (values.get(SECTION, {}).get("sight") or {}).get("resize", "once")
        return QwenSizes(
            text={**complete(cls.TEXT_CONFIG, text, QWEN_TEXT_KEYS), "vocab_size": rows},
            vision=complete(cls.VISION_CONFIG, values.get("vision_config", {}), _VISION_KEYS),
            token_ids={key: values[key] for key in _TOKENS if isinstance(values.get(key), int)},
            resize=resize,
        )

    @classmethod
    def _view(cls, folder: Path, sizes: QwenSizes, config: ModelConfig) -> PatchView:
        tower = config.tower
        limits = {name: getattr(tower, name) for name in ("min_pixels", "max_pixels")}
        changes = {name: value for name, value in limits.items() if value is not None} | {"resize": sizes.resize}
        for key in _SHAPE:
            whole(sizes.vision[key], f"vision_config.{key}")
        return patch_view(image_settings(folder, tower.preprocessor), cls.usual_view(sizes), changes)

    @classmethod
    def usual_view(cls, sizes: QwenSizes) -> PatchView:
        """Of a folder without image settings: with the family's statistics and limits."""
        patch, merge, frames = (sizes.vision[key] for key in _SHAPE)
        low, high = (tokens * (patch * merge) ** 2 for tokens in (cls.LEAST_TOKENS, 16384))
        return PatchView(patch, low, high, *cls.STATS, merge=merge, frames=frames, resize=sizes.resize)

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> BackboneSizes:
        text, vision = config["text"], config["vision"]
        return BackboneSizes(vision["hidden_size"], vision["depth"], text["hidden_size"], text["vocab_size"])

    @classmethod
    def size_sections(cls, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"text_config": config["text"], "vision_config": config["vision"]}

    @classmethod
    def check_config(cls, config: dict[str, Any], where: str) -> None:
        """What fits into the sizes of weights and still makes no model: lists of layers, and how a rotation is cut."""
        text, vision = config["text"], config["vision"]
        for key in _LISTS:
            layers = vision.get(key, [])
            if not _distinct(layers, vision["depth"]):
                raise ValueError(
                    f"{where}: vision_config.{key} must list layers below {vision['depth']}, got {str(layers)[:60]}"
                )
        cell = vision["patch_size"] * vision["spatial_merge_size"]
        if "window_size" in vision and not cell <= whole(vision["window_size"], "vision_config.window_size"):
            raise ValueError(f"{where}: vision_config.window_size {vision['window_size']} is smaller than a token")
        if vision["out_hidden_size"] != text["hidden_size"]:
            raise ValueError(
                f"{where}: vision_config.out_hidden_size {vision['out_hidden_size']} is not text_config.hidden_size "
                f"{text['hidden_size']}"
            )
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        section = text.get("rope_parameters", {}).get("mrope_section")
        if not isinstance(section, list) or not _sums_to(section, width // 2):
            raise ValueError(
                f"{where}: mrope_section must be three numbers that add up to {width // 2}, half of a head, got "
                f"{str(section)[:60]}"
            )
        check_layer_types(text, where)

    @classmethod
    def config_json(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes = QwenSizes(**config)
        fields = {
            "architectures": [cls.STOCK],
            "model_type": cls.NAME,
            "text_config": {"model_type": cls.TEXT_CONFIG.model_type, **sizes.text, "tie_word_embeddings": False},
            "vision_config": {"model_type": cls.VISION_CONFIG.model_type, **sizes.vision},
            "tie_word_embeddings": False,
            **sizes.token_ids,
        }
        return fields, {"sight": {"resize": sizes.resize}}

    @classmethod
    def view_of(cls, values: dict[str, Any], config: ModelConfig) -> PatchView:
        return cls._view(Path(config.version).expanduser(), cls._sizes(values, config, rows=1), config)

    @classmethod
    def planned(cls, values: dict[str, Any], config: ModelConfig, added: int) -> tuple[dict[str, Any], PatchView]:
        # new tokens take rows of the padding, which is larger
        sizes = cls._sizes(values, config, rows=(values.get("text_config") or values)["vocab_size"])
        return asdict(sizes), cls._view(Path(config.version).expanduser(), sizes, config)

    @classmethod
    def check_published(cls, config: dict[str, Any]) -> None:
        raise ValueError(
            f"released checkpoints on {cls.NAME} have no common layout: write a Hugging Face folder instead, which "
            f"{cls.STOCK} reads, too"
        )

    def write_view(self, folder: Path) -> None:
        view = self.view
        assert isinstance(view, PatchView)  # no other is ever given to a Qwen-VL
        limits = {"shortest_edge": view.min_pixels, "longest_edge": view.max_pixels}
        values = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": limits,
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(view.mean),
            "image_std": list(view.std),
            "patch_size": view.patch,
            "merge_size": view.merge,
            "temporal_patch_size": view.frames,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _distinct(layers: Any, depth: int) -> bool:
    return (
        isinstance(layers, (list, tuple))
        and len(layers) <= depth
        and len(set(map(str, layers))) == len(layers)
        and all(isinstance(layer, int) and 0 <= layer < depth for layer in layers)
    )


def _sums_to(section: list[Any], half: int) -> bool:
    return len(section) == 3 and all(isinstance(n, int) and n >= 0 for n in section) and sum(section) == half
