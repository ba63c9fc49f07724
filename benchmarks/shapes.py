"""Models with random weights in the sizes of the benchmarks, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from data.types import IGNORE_ID, IMAGE_ID, Batch, Geometry
from data.views import LanguageView
from model.checkpoints.architecture import Architecture
from model.checkpoints.load import assemble, dtype_of
from model.heads.sam import SamHead
from model.seg_model import SegModel
from model.vlm.decoder import DecoderVLM

MASK_TOKEN = 3


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and its inputs; by default the model dominates: SAM at 1024 pixels, and 256 image tokens for
    LLaVA, 300 for Qwen3-VL, which shows an image in its own size."""

    width: int = 512
    inner: int = 1365  # width of the language model's gates
    layers: int = 8
    heads: int = 8
    vocabulary: int = 32000
    tower_width: int = 256
    tower_layers: int = 6
    tower_heads: int = 4
    tower_side: int = 224  # of LLaVA's view
    sam_width: int = 96
    sam_layers: int = 4
    sam_heads: int = 4
    sam_global: tuple[int, ...] = (3,)  # layers with global attention
    sam_side: int = 1024
    prompt: int = 256  # width of the mask decoder
    picture: tuple[int, int] = (480, 640)  # height and width of an image
    opening: int = 40  # tokens before the image
    text: int = 40  # tokens of a question, and of an answer


SHAPES = {
    "issue": ModelShape(),
    "tiny": ModelShape(32, 85, 2, 2, 200, 16, 2, 4, 56, 16, 2, 4, (1,), 128, 16, (60, 80), 6, 6),
    "7b": ModelShape(4096, 11008, 32, 32, 32004, 1024, 24, 16, 224, 1280, 32, 16, (7, 15, 23, 31)),
}


def random_model(
    shape: ModelShape, precision: str, attention: str, device: torch.device, backbone: str = "llava"
) -> SegModel:
    """A backbone with SAM, created on its device in its precision: 7B weights never exist in float32."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(precision))
    try:
        with torch.device(device):
            model = assemble(architecture(shape, backbone), attention)
    finally:
        torch.set_default_dtype(default)
    nn.init.normal_(sam_head(model).prompts.shared_embedding.positional_embedding)
    model.vlm.reset_buffers()
    model.added_ids = [MASK_TOKEN, shape.vocabulary - 2, shape.vocabulary - 1]
    return model.to(device)


def vlm_of(model: SegModel) -> DecoderVLM:
    """The vision-language model of a benchmark, of any backbone."""
    return cast(DecoderVLM, model.vlm)


def sam_head(model: SegModel) -> SamHead:
    """The mask head of a benchmark, which is always SAM."""
    return cast(SamHead, model.head)


def look(view: LanguageView, size: tuple[int, int], images: int, seed: int = 0) -> Tensor:
    """`Batch.pixels` of images of noise, (height, width) each."""
    noise = np.random.default_rng(seed)
    views = [view(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(images)]
    return torch.stack(views) if views[0].dim() == 3 else torch.cat(views)


def make_batch(
    shape: ModelShape, view: LanguageView, *, images: int, each: int, masks: int = 1, classes: int = 0
) -> Batch:
    """Images with `each` dialogues that share the opening, ask in different words and answer with `masks` masks.

    classes: number of classes, with three tokens each in the question and four in the answer; 0: `text` tokens in both.
    """
    generator = torch.Generator().manual_seed(0)
    rows = images * each
    question = 3 * classes or shape.text  # tokens
    answer = max(4 * classes, 2 * masks + 2) if classes else shape.text

    def words(*size: int) -> Tensor:
        return torch.randint(MASK_TOKEN + 1, shape.vocabulary - 2, size, generator=generator)

    opening = torch.cat([words(shape.opening), torch.full((view.tokens(*shape.picture),), IMAGE_ID)])
    ids = torch.cat([opening.expand(rows, -1), words(rows, question + answer)], dim=1)
    labels = ids.clone()
    labels[:, :-answer] = IGNORE_ID
    mask_places = ids.shape[1] - 2 * torch.arange(masks, 0, -1)  # every other position at the end
    ids[:, mask_places] = labels[:, mask_places] = MASK_TOKEN
    scale = shape.sam_side / max(shape.picture)
    height, width = shape.picture
    geometry = Geometry(shape.picture, (round(height * scale), round(width * scale)))
    truth = torch.rand(each * masks, *shape.picture, generator=generator) > 0.5
    return Batch(
        pixels=look(view, shape.picture, images),
        seg_pixels=torch.randn(images, 3, shape.sam_side, shape.sam_side, generator=generator),
        ids=ids,
        labels=labels,
        attention=torch.ones_like(ids, dtype=torch.bool),
        row_image=torch.arange(images).repeat_interleave(each),
        mask_rows=torch.arange(rows).repeat_interleave(masks),
        mask_positions=(mask_places - 1).repeat(rows)[:, None],  # the state before the token
        masks=[truth.float()] * images,
        geometry=[geometry] * images,
        names=[f"image {index}" for index in range(images)],
    )


def architecture(shape: ModelShape, backbone: str) -> Architecture:
    encoder: dict[str, Any] = {
        "hidden_size": shape.sam_width,
        "mlp_dim": 4 * shape.sam_width,
        "num_hidden_layers": shape.sam_layers,
    }
    encoder |= {"num_attention_heads": shape.sam_heads, "image_size": shape.sam_side, "output_channels": shape.prompt}
    encoder |= {"global_attn_indexes": list(shape.sam_global), "num_pos_feats": shape.prompt // 2}
    prompt = {"hidden_size": shape.prompt, "image_size": shape.sam_side}
    decoder = {"hidden_size": shape.prompt, "mlp_dim": 8 * shape.prompt, "num_attention_heads": 8}
    sam = {"vision_config": encoder | {"initializer_range": 0.02}, "prompt_encoder_config": prompt}
    sam |= {"mask_decoder_config": decoder | {"iou_head_hidden_dim": shape.prompt}}
    return Architecture(backbone, BACKBONES[backbone](shape), "sam", sam)


def _language(shape: ModelShape) -> dict[str, Any]:
    sizes = {"vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.inner}
    return sizes | {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}


def _llava(shape: ModelShape) -> dict[str, Any]:
    """CLIP and LLaMA."""
    tower = {"hidden_size": shape.tower_width, "intermediate_size": 4 * shape.tower_width, "patch_size": 14}
    tower |= {"num_hidden_layers": shape.tower_layers, "num_attention_heads": shape.tower_heads}
    tower |= {"image_size": shape.tower_side}
    return {"language": _language(shape), "tower": tower, "projector_depth": 2, "feature_layer": -2}


def _qwen3_vl(shape: ModelShape) -> dict[str, Any]:
    """As in Qwen3-VL-4B: four query heads per key head, the rotation of a head cut 24 : 20 : 20, features of three
    layers of the tower, patches of 16 pixels of which 2 x 2 are a token."""
    head = shape.width // shape.heads
    side = 5 * head // 32  # of rows and of columns, in pairs of a head's values
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    rope |= {"mrope_section": [head // 2 - 2 * side, side, side]}
    text = _language(shape) | {"num_key_value_heads": max(1, shape.heads // 4), "head_dim": head}
    depth = shape.tower_layers
    vision: dict[str, Any] = {"hidden_size": shape.tower_width, "intermediate_size": 4 * shape.tower_width}
    vision |= {"depth": depth, "num_heads": shape.tower_heads, "out_hidden_size": shape.width}
    vision |= {"num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"deepstack_visual_indexes": sorted({max(0, depth * part // 4 - 1) for part in (1, 2, 3)})}
    return {"text": text | {"rope_parameters": rope}, "vision": vision}


BACKBONES: dict[str, Callable[[ModelShape], dict[str, Any]]] = {"llava": _llava, "qwen3_vl": _qwen3_vl}
