"""InternVL from transformers' parts: InternViT on tiles, pixel shuffle with an MLP, Qwen2 or Qwen3."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from data.internvl_tokenizer import INTERNVL
from data.tile_view import TileView, tile_view
from data.types import Geometry
from data.views import LanguageView
from model.checkpoints.config_file import QWEN_TEXT_KEYS, check_layer_types, complete, image_settings, whole
from model.checkpoints.name_table import Pair
from model.checkpoints.size_keys import SizeKeys
from model.checkpoints.weight_source import WeightSource
from model.vlm.base import VLMS, BackboneSizes, Vision
from model.vlm.causal_strips import of_language
from model.vlm.decoder import DecoderVLM, sees_all
from utils.config import ModelConfig
from utils.registry import unknown

TEXTS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHUFFLE = 2  # patches per side of an image token
_FIXED: dict[str, Any] = {  # fields of `config.json` that all releases agree on
    "downsample_ratio": 1 / SHUFFLE,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}

_VISION_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "attention_bias")
_VISION_KEYS += ("use_qk_norm", "hidden_act", "hidden_dropout_prob", "attention_dropout", "projection_dropout")
_VISION_KEYS += ("initializer_range", "norm_type", "layer_norm_eps", "image_size", "patch_size", "num_channels")
_VISION_KEYS += ("use_mask_token", "use_absolute_position_embeddings", "layer_scale_init_value", "use_mean_pooling")

_HUGGING_FACE: list[Pair] = [
    ("vision_tower.*", "vlm.tower.*"),
    ("multi_modal_projector.*", "vlm.projector.*"),
    ("language_model.model.*", "vlm.language.model.*"),
    ("language_model.lm_head.*", "vlm.language.lm_head.*"),
]
_MODULES: list[Pair] = [  # read, never written: the names of the library's modules, which some programs save
    ("model.vision_tower.*", "vlm.tower.*"),
    ("model.multi_modal_projector.*", "vlm.projector.*"),
    ("model.language_model.*", "vlm.language.model.*"),
    ("lm_head.*", "vlm.language.lm_head.*"),
]


def _released(text: str, *sizes: int, vocabulary: int) -> dict[str, Any]:
    """InternViT-300M with a text model of these sizes; a Qwen3 has heads of 128."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    own: dict[str, Any] = {"model_type": text, "vocab_size": vocabulary, **dict(zip(names, sizes, strict=True))}
    own |= {"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return {"text_config": own, "vision_config": {"attention_bias": True}}


@dataclass(frozen=True)
class InternVLSizes:
    """The configuration of an InternVL, as `Architecture.vlm_config` holds it."""

    text: dict[str, Any]  # of the class in TEXTS that its `model_type` names
    vision: dict[str, Any]  # of InternVLVisionConfig; sides are numbers, not pairs
    image_token_id: int | None = None  # of `config.json`, for the library's own class

    @property
    def cell(self) -> int:
        """Pixels per side of an image token."""
        return self.vision["patch_size"] * SHUFFLE

    def configs(self) -> tuple[InternVLVisionConfig, PreTrainedConfig]:
        text = {key: value for key, value in self.text.items() if key != "model_type"}
        return InternVLVisionConfig(**self.vision), TEXTS[self.text["model_type"]][0](**text)


@VLMS.register("internvl")
class InternVL(DecoderVLM):
    """Vision tower on tiles -> pixel shuffle and projector -> text model with rotary positions on one axis."""

    NAME = "internvl"
    LICENCE = "InternVL: MIT or Apache-2.0 for its own weights; with that of its Qwen (Apache-2.0 up to 38B)"
    WEIGHT_NAMES: ClassVar[list[Pair]] = [*_HUGGING_FACE, *_MODULES]
    FOLDER_NAMES = _HUGGING_FACE
    EMBEDDING = "vlm.language.model.embed_tokens.weight"
    LM_HEAD = "vlm.language.lm_head.weight"
    KEEPS_LAYERS = False
    FAMILY = INTERNVL
    TOWER_FIELDS = frozenset({"min_pixels", "max_pixels", "preprocessor", "train_projector", "train"})
    SIZE_KEYS = SizeKeys(
        widths=frozenset(
            {
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "num_channels",
                "patch_size",
            }
        ),
        counts=frozenset({"num_hidden_layers"}),
    )
    RELEASED: ClassVar[dict[str, dict[str, Any]]] = {
        "InternVL3-1B": _released("qwen2", 896, 4864, 24, 14, 2, vocabulary=151674),
        "InternVL3-2B": _released("qwen2", 1536, 8960, 28, 12, 2, vocabulary=151674),
        "InternVL3-8B": _released("qwen2", 3584, 18944, 28, 28, 4, vocabulary=151674),
    }

    def __init__(self, tower: InternVLVisionModel, projector: InternVLMultiModalProjector, language: Any, view: Any):
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.language = language
        self.view = cast(TileView, view)
        self.packs = self.packs and sees_all(language.config)

    @classmethod
    def build(cls, config: dict[str, Any], attention: str = "sdpa", view: LanguageView | None = None) -> InternVL:
        """An uninitialised model of InternVLSizes; `attention` is also the tower's."""
        sizes = InternVLSizes(**config)
        vision, text = sizes.configs()
        projector = InternVLMultiModalProjector(InternVLConfig(vision_config=vision, text_config=text, **_FIXED))
        # only now: the whole configuration gives its parts an attention of its own
        text._attn_implementation, vision._attn_implementation = of_language(attention), attention
        language = TEXTS[sizes.text["model_type"]][1](text)
        return cls(InternVLVisionModel(vision), projector, language, view or _usual_view(sizes))

    def vision_parts(self) -> dict[str, list[Any]]:
        return {"projector": [self.projector], "tower": [self.tower]}

    def encode_images(self, pixels: Tensor, geometry: Sequence[Geometry] = ()) -> Vision:
        """(n, 3, side, side) tiles of B images one after another -> Vision. Frozen weights keep no graph.

        geometry: of the B images; their original sizes say how many tiles each has.
        """
        patches = self.tower(pixels).last_hidden_state[:, 1:]  # without the class token
        states = self.projector(shuffled(patches))
        counts = [self.view.tokens(*place.original) for place in geometry]
        return Vision(states.flatten(0, 1), counts)

    def checkpoint_gradients(self) -> None:
        super().checkpoint_gradients()
        self._checkpoint_tower()

    def reset_buffers(self) -> None:
        """Rotary frequencies of the text model, in float32."""
        table = self.language.model.rotary_emb
        device = self.language.lm_head.weight.device
        self.language.model.rotary_emb = type(table)(table.config).to(device)

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    @classmethod
    def config_for(
        cls, source: WeightSource, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Any], TileView]:
        sizes = cls._sizes(source.values, rows=len(source.tensors[cls.EMBEDDING]))
        return asdict(sizes), cls._view(source.folder, sizes, config)

    @classmethod
    def _sizes(cls, values: dict[str, Any], rows: int) -> InternVLSizes:
        for key, value in _FIXED.items():
            if values.get(key, value) != value:
                raise ValueError(f"config.json: {key} {str(values[key])[:60]} is not supported, only {value}")
        text, vision = values.get("text_config", {}), values.get("vision_config", {})
        kind = text.get("model_type", "qwen2")
        if kind not in TEXTS:
            raise ValueError(f"config.json: {unknown('text_config.model_type of an InternVL', str(kind), TEXTS)}")
        sides = {key: _side(vision[key], key) for key in ("image_size", "patch_size") if vision.get(key) is not None}
        known = complete(InternVLVisionConfig, {**vision, **sides}, _VISION_KEYS)
        known |= {key: _side(known[key], key) for key in ("image_size", "patch_size")}
        own = complete(TEXTS[kind][0], text, QWEN_TEXT_KEYS)
        token = values.get("image_token_id")
        return InternVLSizes(
            {"model_type": kind, **own, "vocab_size": rows}, known, token if isinstance(token, int) else None
        )

    @classmethod
    def _view(cls, folder: Path, sizes: InternVLSizes, config: ModelConfig) -> TileView:
        tower = config.tower
        return tile_view(
            image_settings(folder, tower.preprocessor), _usual_view(sizes), (tower.min_pixels, tower.max_pixels)
        )

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> BackboneSizes:
        text, vision = config["text"], config["vision"]
        return BackboneSizes(
            vision["hidden_size"], vision["num_hidden_layers"], text["hidden_size"], text["vocab_size"]
        )

    @classmethod
    def size_sections(cls, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"text_config": config["text"], "vision_config": config["vision"]}

    @classmethod
    def check_config(cls, config: dict[str, Any], where: str) -> None:
        text, vision = config["text"], config["vision"]
        cell = InternVLSizes(**config).cell
        if vision["image_size"] % cell:
            raise ValueError(
                f"{where}: vision_config.image_size {vision['image_size']} does not divide into tokens of {cell} pixels"
            )
        check_layer_types(text, where)

    @classmethod
    def config_json(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes = InternVLSizes(**config)
        vision: dict[str, Any] = {"model_type": InternVLVisionConfig.model_type, **sizes.vision}
        vision |= {key: [vision[key]] * 2 for key in ("image_size", "patch_size")}
        fields = {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": cls.NAME,
            "text_config": {**sizes.text, "tie_word_embeddings": False},
            "vision_config": vision,
            "image_seq_length": _usual_view(sizes).tile_tokens,
            "tie_word_embeddings": False,
            **_FIXED,
        }
        return fields | ({} if sizes.image_token_id is None else {"image_token_id": sizes.image_token_id}), {}

    @classmethod
    def view_of(cls, values: dict[str, Any], config: ModelConfig) -> TileView:
        return cls._view(Path(config.version).expanduser(), cls._sizes(values, rows=1), config)

    @classmethod
    def planned(cls, values: dict[str, Any], config: ModelConfig, added: int) -> tuple[dict[str, Any], TileView]:
        sizes = cls._sizes(values, rows=values["text_config"]["vocab_size"] + added)  # the releases have no padding
        return asdict(sizes), cls._view(Path(config.version).expanduser(), sizes, config)

    @classmethod
    def check_published(cls, config: dict[str, Any]) -> None:
        raise ValueError(
            f"released checkpoints on {cls.NAME} have no common layout: write a Hugging Face folder instead, which "
            "InternVLForConditionalGeneration reads, too"
        )

    def write_view(self, folder: Path) -> None:
        view = cast(TileView, self.view)
        values = {
            "image_processor_type": "GotOcr2ImageProcessor",
            "do_convert_rgb": True,
            "crop_to_patches": True,
            "min_patches": view.min_tiles,
            "max_patches": view.max_tiles,
            "do_resize": True,
            "size": {"height": view.side, "width": view.side},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(view.mean),
            "image_std": list(view.std),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def shuffled(patches: Tensor) -> Tensor:
    """(n, g * g, W) patches row by row -> (n, g * g / 4, 4 W): squares of SHUFFLE x SHUFFLE patches as one vector."""
    side = int(patches.shape[1] ** 0.5)
    blocks = patches.unflatten(1, (side // SHUFFLE, SHUFFLE, side // SHUFFLE, SHUFFLE))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _usual_view(sizes: InternVLSizes) -> TileView:
    """Of a folder without image settings: up to twelve tiles."""
    return TileView(whole(sizes.vision["image_size"], "vision_config.image_size"), sizes.cell)


def _side(value: Any, name: str) -> int:
    """Of a square, which the files give as one number or as two."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if len(numbers) > 2 or len({*map(str, numbers)}) != 1:
        raise ValueError(f"config.json: vision_config.{name} must be the side of a square, got {str(value)[:60]}")
    return whole(numbers[0], f"vision_config.{name}")
