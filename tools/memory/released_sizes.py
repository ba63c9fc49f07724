"""The architecture of a recipe's model without its weights, for planning: of the bases and mask heads as released."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from data.tokens import TokenSpec, added_tokens
from data.views import LanguageView
from model.checkpoints.architecture import Architecture
from model.checkpoints.config_file import SECTION, read_config
from model.checkpoints.load import check_parts, choose_head, projection_of, vlm_class
from model.heads import HEADS, HeadContext
from model.heads.promptable import PromptableHead
from model.vlm import VLMS
from utils.config import ModelConfig


def released_architecture(
    config: ModelConfig, head: str, tokens: TokenSpec
) -> tuple[Architecture, LanguageView | None]:
    """The architecture of a recipe's model, and its view (None: the usual one): from `config.json` where `version` is a
    local folder, else from its name.

    head, tokens: the system's; head is a name in HEADS. A mask head's file that is not named after a released size is
    read where it is at hand.
    """
    values = base_config(config.version)
    backbone = vlm_class(values, config.version)
    head = choose_head(values, config, head)
    head_class = HEADS[head]
    check_parts(backbone, head_class, head, config)
    vlm_config, view = backbone.planned(values, config, len(added_tokens(backbone.FAMILY, tokens)))
    sizes = backbone.sizes(vlm_config)
    projection = projection_of(config)
    context = HeadContext(
        sizes.tower_width,
        sizes.tower_layers,
        sizes.language_width,
        len(tokens.mask) * projection.prompts,
        side=config.image_size,
    )
    saved_config = values.get(SECTION, {}).get("head_config")
    options = dict(config.head_options)
    if not saved_config and issubclass(head_class, PromptableHead) and not head_class.starts_random(options):
        saved_config = _promptable(head_class, config.vision_pretrained, options, context)
    head_config = head_class.config_for({}, options, replace(context, saved_config=saved_config))
    return Architecture(backbone.NAME, vlm_config, head, head_config, projection), view


def base_config(version: str) -> dict[str, Any]:
    """The `config.json` of a local folder, else what is known of a released base of that name."""
    folder = Path(version).expanduser()
    return read_config(folder) if (folder / "config.json").is_file() else released_config(version)


def released_config(name: str) -> dict[str, Any]:
    """The `config.json` of the released base that a name stands for, as far as sizes go; empty if no class knows it."""
    for kind in VLMS:
        for base, values in VLMS[kind].RELEASED.items():
            if base.lower() in name.lower():
                return {"model_type": VLMS[kind].NAME, **values}
    return {}


def _promptable(
    head: type[PromptableHead], name: str | None, options: dict[str, Any], context: HeadContext
) -> dict[str, Any]:
    """The configuration of a mask head's file: by its name, else from its weights, else that of the largest size."""
    plain = str(name).lower().replace("-", "_").replace("b+", "base_plus")
    kind = next((kind for kind in head.RELEASED if kind in plain), None)
    if kind is None and name and Path(name).exists():
        tensors, options = head.read_weights(name, options)
        return head.config_for(tensors, options, context)
    return head.released(kind or next(iter(head.RELEASED)), options.get("sizes"))
