"""Vision towers of every family: tiny folders that the stock classes write, put together with a LLaMA."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
)

from data.tokens import TokenSpec, load_tokenizer
from data.types import Geometry
from data.views import IMAGENET_MEAN, IMAGENET_STD, ClipView, PaddedView, StretchedView
from model.checkpoints.files import read_tensors
from model.checkpoints.load import build_model, load_folder
from model.checkpoints.save import save_folder, save_original
from model.finetune.trainable import mark_trainable
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.tower import write_view
from model.vlm.towers import TOWERS
from tests.tiny_base import GOLDEN, base_tensors, write_base, write_sam
from tests.tiny_model import llava_of
from tools.memory.released_sizes import released_architecture
from utils.config import ModelConfig, TowerConfig
from utils.images import read_image
from utils.log import log

REAL = Path(os.environ.get("REAL_DIR") or "real")
PHOTOGRAPHS = 6
SPEC = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
SIDE, PATCH, WIDTH, LAYERS = 32, 8, 16, 3
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "patch_size": PATCH}
WIDE = {**SIZES, "intermediate_size": 24, "image_size": SIDE}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}


@dataclass(frozen=True)
class Case:
    """A family: a stock model as its checkpoints hold it, and what is particular about it."""

    stock: Callable[[], PreTrainedModel]
    skip: int  # tokens before the patches
    layer: int  # the usual feature layer
    vision: Callable[[Any], PreTrainedModel] = lambda model: model
    masks: bool = True


CASES = {
    "clip": Case(
        lambda: CLIPModel(CLIPConfig(vision_config=WIDE, text_config=TEXT)), 1, -2, lambda model: model.vision_model
    ),
    "siglip": Case(
        lambda: SiglipModel(SiglipConfig(vision_config=WIDE, text_config=TEXT)), 0, -2, lambda model: model.vision_model
    ),
    "dinov2": Case(lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=SIDE)), 1, -1, masks=False),
    "dinov2 with a head": Case(
        lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, image_size=SIDE, use_swiglu_ffn=True)),
        1,
        -1,
        lambda model: model.dinov2,
        masks=False,
    ),
    "dinov2_with_registers": Case(
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, image_size=SIDE, num_register_tokens=3)),
        4,
        -1,
        masks=False,
    ),
    "dinov3_vit": Case(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, num_register_tokens=4, use_gated_mlp=True)), 5, -1
    ),
}
RESIZED = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # whose stock class takes other sides by itself


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A plain LLaMA, a base LLaVA without a tower, a SAM file, and a folder for each family."""
    folder = tmp_path_factory.mktemp("parts")
    published = read_tensors(GOLDEN)
    tensors = base_tensors(published)
    write_base(folder / "llava", tensors, clip=False)
    write_sam(folder / "sam.pth", published)
    plain = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    values = json.loads((folder / "llava" / "config.json").read_text())
    llama = {key: value for key, value in values.items() if not key.startswith("mm_") and "vision" not in key}
    write_base(folder / "llama", plain, llama | {"model_type": "llama"}, clip=False)
    for name, case in CASES.items():
        torch.manual_seed(0)
        model = case.stock()
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0, 0.3)
        model.save_pretrained(folder / name)
    return folder


def build(material: Path, tower: str | Path, version: str = "llama", **fields: Any) -> SegModel:
    config = ModelConfig(
        version=str(material / version),
        vision_tower=str(material / tower),
        vision_pretrained=str(material / "sam.pth"),
        precision="fp32",
        head_options={"decoder_heads": 4},
        tower=TowerConfig(**{"new_projector": True, **fields}),
    )
    return build_model(config, SPEC, load_tokenizer(material / version, SPEC)).eval()


def stock(material: Path, name: str) -> PreTrainedModel:
    model = CASES[name].stock()
    loaded = type(model).from_pretrained(material / name)
    return CASES[name].vision(loaded).eval()


def pixels(side: int = SIDE) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stock_layers(model: PreTrainedModel, given: Tensor, skip: int, **options: Any) -> list[Tensor]:
    output = model(given, output_hidden_states=True, **options)
    return [state[:, skip:] for state in (*output.hidden_states, output.last_hidden_state)]


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_stock_classs(name, material):
    case, model = CASES[name], build(material, name)
    llava = llava_of(model)
    *states, last = stock_layers(stock(material, name), pixels(), case.skip)
    with torch.no_grad():
        vision = llava.encode_images(pixels())
    assert len(vision.layers) == LAYERS + 1 and vision.attention is None
    assert vision.states.shape == (32, llava.hidden_size) and vision.counts == [16, 16] and llava.view.most_tokens == 16
    for found, expected in zip(vision.layers[:-1], states[:-1], strict=True):
        assert torch.equal(found, expected)
    normed = llava.family.NORM is not None
    assert torch.equal(vision.layers[-1], last if normed else states[-1])
    assert llava.feature_layer == case.layer
    with torch.no_grad():
        assert torch.equal(vision.states, llava.projector(vision.layers[case.layer]).flatten(0, 1))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_random_in_training(name, material):
    """Neither dropout nor DINOv3's moved positions, which its class has in training mode."""
    model = build(material, name)
    with torch.no_grad():
        expected = model.vlm.encode_images(pixels()).states
        assert torch.equal(model.train().vlm.encode_images(pixels()).states, expected)


def test_rotary_frequencies_keep_their_precision(material):
    model = build(material, "dinov3_vit")
    frequencies = cast(Tensor, llava_of(model).tower.get_submodule("rope_embeddings").inv_freq)
    expected = cast(Tensor, stock(material, "dinov3_vit").get_submodule("rope_embeddings").inv_freq)
    assert torch.equal(frequencies, expected)
    moved = cast(Tensor, llava_of(model.to(torch.bfloat16)).tower.get_submodule("rope_embeddings").inv_freq)
    assert moved.dtype == torch.float32 and torch.equal(moved, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_plain_language_model_gets_a_new_projector(name, material):
    model = build(material, name)
    assert {part.split(".")[0] for part in model.report.fresh} == {"vlm", "project"}
    new = [part for part in model.report.fresh if part.startswith("vlm.")]
    assert new == [f"vlm.projector.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")]
    assert not model.report.missing and not model.report.unexpected
    width = llava_of(model).hidden_size
    assert llava_of(model).projector[0].weight.shape == (2 * width, WIDTH)
    with pytest.raises(ValueError, match=r"no projector.*model\.tower\.new_projector=true"):
        build(material, name, new_projector=False)


def test_the_tower_in_a_folder_counts_and_says_so(material, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    save_folder(build(material, "siglip"), tmp_path / "saved", load_tokenizer(material / "llama", SPEC))
    config = ModelConfig(vision_tower=str(material / "dinov2"), head_options={"decoder_heads": 4})
    model = load_folder(tmp_path / "saved", SPEC, load_tokenizer(tmp_path / "saved", SPEC), config=config)
    assert llava_of(model).family is TOWERS["siglip"] and "holds its own vision tower" in caplog.text


def test_a_new_projector_takes_the_place_of_a_bases(material):
    model = build(material, "siglip", "llava")
    assert {"vlm.projector.0.weight", "vlm.projector.2.weight"} <= set(model.report.fresh)


@pytest.mark.parametrize("name", CASES)
def test_folders_come_back_equal(name, material, tmp_path):
    model = build(material, name, feature_layer=-2)
    save_folder(model, tmp_path / "saved", load_tokenizer(material / "llama", SPEC))
    config = ModelConfig(vision_tower=None, precision="fp32", head_options={"decoder_heads": 4})
    again = load_folder(tmp_path / "saved", SPEC, load_tokenizer(tmp_path / "saved", SPEC), config=config)
    assert again.architecture.vlm_config == model.architecture.vlm_config | {"tower_name": None}
    assert again.vlm.view == model.vlm.view
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again.vlm.encode_images(pixels()).states, model.vlm.encode_images(pixels()).states)
    recorded = json.loads((tmp_path / "saved" / "config.json").read_text())["vision_config"]["model_type"]
    assert TOWERS[recorded] is llava_of(model).family


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_transformers_reads_the_same_llava(name, material, tmp_path):
    """With raw hidden states and one token or none before the patches, its LLaVA class reads the same features. Its
    projector is as wide as the language model between its layers, a new one here is twice as wide: it is left out."""
    model = build(material, name, feature_layer=-2)
    save_folder(model, tmp_path / "saved", load_tokenizer(material / "llama", SPEC))
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", ignore_mismatched_sizes=True).eval()
    with torch.no_grad():
        expected = theirs.model.vision_tower(pixels(), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(model.vlm.encode_images(pixels()).layers[-2], expected[:, CASES[name].skip :])


@pytest.mark.parametrize("name", [name for name in CASES if name != "clip"])
def test_the_published_layout_knows_clip_only(name, material, tmp_path):
    with pytest.raises(ValueError, match="knows towers of CLIP only"):
        save_original(build(material, name), tmp_path / "saved", load_tokenizer(material / "llama", SPEC))


@pytest.mark.parametrize("layer", [None, -2, 1, LAYERS])
@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_what_features_come_from(name, layer, material):
    fields = {"feature_layer": layer, "train": True, "train_projector": True}
    model = build(material, name, **fields)
    mark_trainable(model, ModelConfig(tower=TowerConfig(**fields)))
    llava = llava_of(model)
    llava.encode_images(pixels()).states.square().sum().backward()
    trained = {key for key, weight in llava.tower.named_parameters() if weight.requires_grad}
    reached = {key for key, weight in llava.tower.named_parameters() if weight.grad is not None}
    assert trained == reached and len(trained) > 10
    assert all(weight.grad is not None for weight in llava.projector.parameters())


@pytest.mark.parametrize("name", RESIZED)
def test_another_side_equals_the_stock_class_at_that_side(name, material):
    """DINO's classes resize their positions in every forward pass; here the table is resized once."""
    model = build(material, name, size=48)
    assert model.vlm.view.most_tokens == 36 and model.vlm.view.size == 48
    *states, last = stock_layers(stock(material, name), pixels(48), CASES[name].skip)
    found = model.vlm.encode_images(pixels(48)).layers
    assert torch.equal(found[1], states[1]) and torch.equal(found[-1], last)


def test_siglip_at_another_side_equals_its_interpolation(material):
    model = build(material, "siglip", size=48)
    *states, _ = stock_layers(stock(material, "siglip"), pixels(48), 0, interpolate_pos_encoding=True)
    assert torch.equal(model.vlm.encode_images(pixels(48)).layers[-2], states[-2])
    with pytest.raises(ValueError, match=r"model\.tower\.size 44 does not divide into patches of 8"):
        build(material, "siglip", size=44)


def test_a_side_with_a_rest_that_no_patch_covers(tmp_path, material):
    """SigLIP so400m at 384 pixels in patches of 14 has 27 x 27 of them."""
    torch.manual_seed(0)
    sizes = {**WIDE, "image_size": 38, "patch_size": 8}
    SiglipModel(SiglipConfig(vision_config=sizes, text_config=TEXT)).save_pretrained(tmp_path / "siglip")
    model = build(material, tmp_path / "siglip")
    assert model.vlm.view.most_tokens == 16 and model.vlm.encode_images(pixels(38)).counts == [16, 16]


# --- what a tower is shown


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("clip", ClipView(SIDE)),
        ("siglip", StretchedView(SIDE, (0.5,) * 3, (0.5,) * 3)),
        ("dinov2", ClipView(SIDE, IMAGENET_MEAN, IMAGENET_STD)),
        ("dinov3_vit", StretchedView(SIDE, IMAGENET_MEAN, IMAGENET_STD, "bilinear")),
    ],
)
def test_without_a_preprocessor_file_the_familys_view_holds(name, view, material):
    assert build(material, name).vlm.view == view


def test_the_preprocessor_file_says_the_side_where_a_family_takes_any(material, tmp_path):
    """As DINOv2 is released: trained at 518 pixels, shown 224 of 256."""
    shutil.copytree(material / "dinov2", tmp_path / "tower")
    view = ClipView(24, IMAGENET_MEAN, IMAGENET_STD, edge=28)
    write_view(tmp_path / "tower", view)
    model = build(material, tmp_path / "tower")
    assert model.vlm.view == view and model.vlm.view.most_tokens == 9
    *_, last = stock_layers(stock(material, "dinov2"), pixels(24), 1)
    assert torch.equal(model.vlm.encode_images(pixels(24)).layers[-1], last)
    assert build(material, tmp_path / "tower", size=40).vlm.view == ClipView(40, IMAGENET_MEAN, IMAGENET_STD)
    square = StretchedView(16, IMAGENET_MEAN, IMAGENET_STD)
    write_view(tmp_path / "square", square)
    file = str(tmp_path / "square" / "preprocessor_config.json")
    assert build(material, tmp_path / "tower", preprocessor=file).vlm.view == square
    shutil.copytree(material / "siglip", tmp_path / "siglip")
    write_view(tmp_path / "siglip", StretchedView(24, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match=r"for a view of 24 pixels, the tower for 32: set model\.tower\.size"):
        build(material, tmp_path / "siglip")


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].masks])
def test_padding_is_hidden_from_the_tower(name, material):
    """What stands in the padding moves no visible patch."""
    model = build(material, name, pad=True)
    assert isinstance(model.vlm.view, PaddedView)
    places = [Geometry((10, 20), (16, 32))] * 2
    other = pixels()
    other[:, :, 16:] = 5.0
    with torch.no_grad():
        plain, changed = (model.vlm.encode_images(given, places) for given in (pixels(), other))
    assert plain.attention is not None and plain.attention.unflatten(0, (2, 16)).sum(1).tolist() == [8, 8]
    before, after = (vision.states.unflatten(0, (2, 16)) for vision in (plain, changed))
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-2)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].masks])
def test_padding_is_refused_where_attention_takes_no_mask(name, material):
    with pytest.raises(ValueError, match=r"model\.tower\.pad: the attention of dinov2.*takes no mask"):
        build(material, name, pad=True)


def test_the_pixel_head_decodes_from_a_square_view_of_any_family(material, tmp_path):
    write_view(tmp_path, StretchedView(SIDE, IMAGENET_MEAN, IMAGENET_STD))
    file = str(tmp_path / "preprocessor_config.json")
    options = {"levels": [-1, -2], "width": 32, "mlp_dim": 64}
    config = ModelConfig(
        version=str(material / "llama"),
        vision_tower=str(material / "dinov2_with_registers"),
        precision="fp32",
        head_options=options,
        tower=TowerConfig(new_projector=True, preprocessor=file),
    )
    spec = TokenSpec(added=("[SEG0]", "[SEG1]"), mask=("[SEG0]", "[SEG1]"))
    tokenizer = load_tokenizer(material / "llama", spec)
    model = build_model(config, spec, tokenizer, "pixel").eval()
    batch: Any = None
    features = model.head.features(batch, model.vlm.encode_images(pixels()))
    assert cast(list[Tensor], features)[0].shape[-2:] == (4, 4)
    with pytest.raises(ValueError, match="must show the whole image"):
        build_model(replace(config, tower=TowerConfig(new_projector=True)), spec, tokenizer, "pixel")


# --- what is refused


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("vit", r"no vision tower 'vit'.*clip.*dinov2.*dinov3_vit.*siglip"),
        ("dinov", r"did you mean 'dinov2'"),
        ("siglip2", r"'siglip2': variable resolution.*model_type siglip"),
    ],
)
def test_unknown_model_types_list_the_known(kind, says, material, tmp_path):
    shutil.copytree(material / "dinov2", tmp_path / "tower")
    values = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps(values | {"model_type": kind}))
    with pytest.raises(ValueError, match=r"tower/config\.json: no vision tower") as error:
        build(material, tmp_path / "tower")
    assert error.match(says)


def test_fields_that_do_not_fit_a_family_are_named(material, tmp_path):
    with pytest.raises(ValueError, match=r"position_resize: 'released' is not for a tower of siglip.*have: correct"):
        build(material, "siglip", position_resize="released")
    with pytest.raises(ValueError, match=r"the vision feature layer is 7, the tower has 3 layers"):
        build(material, "dinov2", feature_layer=7)
    save_folder(build(material, "siglip"), tmp_path / "saved", load_tokenizer(material / "llama", SPEC))
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["vision_feature_select_strategy"] == "full"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(values | {"vision_feature_select_strategy": "default"}))
    with pytest.raises(ValueError, match=r"no vision feature selection 'default'.*full, patch"):
        load_folder(tmp_path / "saved", SPEC, load_tokenizer(material / "llama", SPEC))


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_planned_without_weights(name, material):
    model = build(material, name, size=48)
    recipe = ModelConfig(
        version=str(material / "llama"),
        vision_tower=str(material / name),
        vision_pretrained=str(material / "sam.pth"),
        head_options={"decoder_heads": 4},
        tower=TowerConfig(new_projector=True, size=48),
    )
    assert released_architecture(recipe, "sam", SPEC)[0].vlm_config["tower"] == model.architecture.vlm_config["tower"]
    values = json.loads((material / "llama" / "config.json").read_text())
    view = type(model.vlm).view_of(values, recipe)
    assert view == model.vlm.view and view.most_tokens == model.vlm.view.most_tokens == 36


def test_sizes_are_planned_of_a_tower_below_the_home_folder(material, monkeypatch):
    """Not those of the CLIP that stands in for a tower which is not here."""
    monkeypatch.setenv("HOME", str(material))
    recipe = ModelConfig(version=str(material / "llama"), vision_tower="~/siglip")
    values = json.loads((material / "llama" / "config.json").read_text())
    own = json.loads((material / "siglip" / "config.json").read_text())
    plan = released_architecture(recipe, "sam", SPEC)[0].vlm_config
    assert plan["tower"]["hidden_size"] == own.get("vision_config", own)["hidden_size"]
    whole = replace(recipe, vision_tower=str(material / "siglip"))
    assert VLMS["llava"].view_of(values, recipe) == VLMS["llava"].view_of(values, whole)


# --- a real tower


@pytest.mark.skipif(
    not all((REAL / name).is_dir() for name in ("towers/vits14", "coco")),
    reason="a real ViT-S/14 and photographs: set REAL_DIR to the folder that holds towers/vits14 and coco/",
)
def test_a_real_tower_knows_a_photograph_again(material):
    """DINOv2's ViT-S/14 as the tower: its features are the stock class's, and two crops of a photograph, the upper left
    and the lower right of it, are more similar than it is to the others on average."""
    model = build(material, (REAL / "towers" / "vits14").resolve(), size=224)
    theirs = AutoModel.from_pretrained(REAL / "towers" / "vits14", dtype=torch.float32).eval()
    crops = []
    for file in sorted((REAL / "coco" / "val2017").glob("*.jpg"))[:PHOTOGRAPHS]:
        image = read_image(file)
        height, width = image.shape[:2]
        crops += [image[: height * 4 // 5, : width * 4 // 5], image[height // 4 :, width // 4 :]]
    shown = torch.stack([model.vlm.view(np.ascontiguousarray(crop)) for crop in crops])
    with torch.no_grad():
        found = model.vlm.encode_images(shown).layers
        expected = theirs(shown, output_hidden_states=True)
    assert torch.equal(found[-1], expected.last_hidden_state[:, 1:])
    assert torch.equal(found[-2], expected.hidden_states[-2][:, 1:])
    means = torch.nn.functional.normalize(found[-1].mean(1), dim=1)
    similar = (means @ means.T).unflatten(0, (PHOTOGRAPHS, 2)).unflatten(2, (PHOTOGRAPHS, 2))[:, 0, :, 1]
    own = similar.diagonal()
    others = (similar.sum(1) - own) / (PHOTOGRAPHS - 1)
    assert bool((own > others).all()), (own, others)
    assert int((similar.argmax(1) == torch.arange(PHOTOGRAPHS)).sum()) > PHOTOGRAPHS // 2  # at random: one of them
