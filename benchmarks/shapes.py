"""Models with random weights in the sizes of the benchmarks, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from data.types import IGNORE_ID, IMAGE_ID, Batch, Geometry
from model.checkpoints.architecture import Architecture
from model.checkpoints.load import assemble, dtype_of
from model.heads.sam import SamHead
from model.seg_model import SegModel
from model.vlm.llava import Llava

MASK_TOKEN = 3


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and its inputs; by default the model dominates: 256 image tokens, SAM at 1024 pixels."""

    width: int = 512
    inner: int = 1365  # width of the language model's gates
    layers: int = 8
    heads: int = 8
    vocabulary: int = 32000
    tower_width: int = 256
    tower_layers: int = 6
    tower_heads: int = 4
    tower_side: int = 224
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


def random_model(shape: ModelShape, precision: str, attention: str, device: torch.device) -> SegModel:
    """A LLaVA with SAM, created on its device in its precision: 7B weights never exist in float32."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(precision))
    try:
        with torch.device(device):
            model = assemble(_architecture(shape), attention)
    finally:
        torch.set_default_dtype(default)
    nn.init.normal_(sam_head(model).prompts.shared_embedding.positional_embedding)
    model.vlm.reset_buffers()
    model.added_ids = [MASK_TOKEN, shape.vocabulary - 2, shape.vocabulary - 1]
    return model.to(device)


def llava(model: SegModel) -> Llava:
    """The vision-language model of a benchmark, which is always LLaVA."""
    return cast(Llava, model.vlm)


def sam_head(model: SegModel) -> SamHead:
    """The mask head of a benchmark, which is always SAM."""
    return cast(SamHead, model.head)


def make_batch(
    shape: ModelShape, image_tokens: int, *, images: int, each: int, masks: int = 1, classes: int = 0
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

    opening = torch.cat([words(shape.opening), torch.full((image_tokens,), IMAGE_ID)])
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
        pixels=torch.randn(images, 3, shape.tower_side, shape.tower_side, generator=generator),
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


def _architecture(shape: ModelShape) -> Architecture:
    language = {"vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.inner}
    language |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    tower = {"hidden_size": shape.tower_width, "intermediate_size": 4 * shape.tower_width, "patch_size": 14}
    tower |= {"num_hidden_layers": shape.tower_layers, "num_attention_heads": shape.tower_heads}
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
    tower |= {"image_size": shape.tower_side}
    vlm_config = {"language": language, "tower": tower, "projector_depth": 2, "feature_layer": -2}
    return Architecture("llava", vlm_config, "sam", sam)
