"""Published Sa2VA and UniPixel folders give the published program's numbers, from their files to masks and gradients.

Everything goes the way of a user's folder: load, views and encoder, forward or generate, read. Two things are given:
the image as the published processor resized it (`resized*.png`; ours may differ by a grey level, which
tests/test_patch_view.py and tests/test_qwen_vl.py hold), and the sizes of the records' toy trunk, which no shape shows;
those of the released trunks are known. GOLDEN_DIR points to other records of the same form; tolerances are those of
golden/README.md.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.collate import Sample, collate, collate_prompts, load_views
from data.patch_view import PatchView
from data.tokens import decode, mask_ids, token_id
from data.types import IMAGE_ID, Turn
from model.checkpoints.layouts import reading_table
from model.heads.sam2 import REJECTED
from model.losses import objective
from model.point_sampling import IMPORTANCE, values_at
from systems.assistant import Assistant, build, load
from systems.wording import about_image
from tests.records import GOLDEN, ROOT, names, record_folder, script_of, system_of
from utils.config import Recipe, from_dict, load_recipe, merge, to_dict
from utils.images import read_image

TRUNK = {"num_attention_heads_per_stage": [1, 2, 4, 8], "global_attention_blocks": [4]}
NORM = 1e-6  # smaller gradients are rounding
# A bias of keys adds the same to all scores of a query, which softmax does not see: its gradient is zero, and what is
# recorded, up to 1e-4, is the rounding of the published order of sums (five masks are decoded where ours are repeated).
ZERO = re.compile(r"head\.decoder\..*k_proj\.bias")


@dataclass(frozen=True)
class Family:
    """What the records of a system are made of, and what golden/README.md asks of another implementation."""

    windows: list[int]
    pad: str  # stands for an image in recorded ids
    positions: str  # the name of where states are read
    recipes: dict[str, str]  # the recipe that trains it, by backbone
    logits: float
    prompts: float
    pixels: int = 0  # that may differ per mask
    opening: str = ""  # what stands before a recorded first question


FAMILIES = {
    "sa2va": Family(
        [8, 4, 16, 8],
        "<|image_pad|>",
        "seg_positions",
        {"qwen3_vl": "sa2va_qwen3_4b", "qwen2_5_vl": "sa2va_qwen2_5_3b"},
        logits=3e-4,
        prompts=3e-4,
    ),
    "unipixel": Family(
        [8, 4, 14, 7],
        "<|video_pad|>",
        "states_read",
        {"qwen2_5_vl": "unipixel_3b"},
        logits=1e-4,
        prompts=1e-4,
        pixels=2,
        opening=about_image(""),
    ),
}


@dataclass
class Seen:
    """What parts of the model were given and gave, call after call."""

    calls: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def joined(self, name: str) -> Tensor:
        return torch.cat(self.calls[name])


@dataclass
class Case:
    folder: Path
    family: Family
    sizes: dict[str, Any]
    record: dict[str, np.ndarray]
    told: dict[str, Any]
    assistant: Assistant  # sees an image as in training: it is resized once

    @property
    def generations(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """UniPixel's stand among the conversations."""
        if "generate" in self.told:
            return self.told["generate"], self.record
        described = json.loads((self.folder / "generate.json").read_text(encoding="utf-8"))
        return described, dict(np.load(self.folder / "generate.npz"))

    def shown(self, views, image: int, resized: str) -> Sample:
        """An image in both views, that of the language side as the published processor made it."""
        sample = load_views(self.folder / f"image{image}.png", views)
        pixels = read_image(self.folder / resized)
        assert views.language.geometry(*sample.geometry.original).resized == pixels.shape[:2]
        assert isinstance(views.language, PatchView)
        return replace(sample, pixels=views.language.cut(pixels))

    def sample(self, number: int, assistant: Assistant | None = None) -> Sample:
        """A recorded conversation as training sees it."""
        assistant, talk = assistant or self.assistant, self.told["conversations"][number]
        sample = self.shown(assistant.views, talk["image"], f"resized{talk['image']}.png")
        spec, turns, holes = assistant.system.tokens, [], 0
        for index, (question, answer) in enumerate(talk["turns"]):
            script = script_of(answer, spec, holes)
            holes += sum(not isinstance(part, str) for part in script)
            turns.append(Turn(question if index else self.family.opening + question, script))
        sample.rows = [assistant.encoder(tuple(turns), sample.image_tokens)]
        truth = self.record.get(f"conv{number}_gt_packed")
        height, width = sample.geometry.original
        sample.masks = torch.zeros(0, height, width) if truth is None else unpacked(truth, width).float()
        return sample


def unpacked(packed: np.ndarray, width: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, axis=-1)[..., :width].astype(bool))


FOUND = {name for name in names("sa2va", "unipixel") if (GOLDEN / name).is_dir()}
RECORDS = sorted(FOUND | {"sa2va_qwen3", "sa2va_qwen2_5", "unipixel"})


@pytest.fixture(scope="module", params=RECORDS)
def case(request) -> Case:
    folder = record_folder(request.param, several_runs=True)
    name = system_of(request.param)
    family = FAMILIES[str(name)]
    sizes = {"sizes": {"backbone_config": {**TRUNK, "window_size_per_stage": family.windows}}}
    once = {"resize": "once"} if name == "sa2va" else {}
    assistant = load(folder, model={"head_options": sizes, "tower": once}, device="cpu")
    assert assistant.system.name == name
    told = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return Case(folder, family, sizes, dict(np.load(folder / "golden.npz")), told, assistant)


@contextmanager
def watched(assistant: Assistant) -> Iterator[Seen]:
    """Records what passes through the model's parts, as hooks see it."""
    seen, model = Seen(), assistant.model
    language = model.vlm.language

    def norm(_: Any, given: tuple[Tensor], made: Tensor) -> None:
        seen.calls["read"].append(given[0] if assistant.system.tokens.norm == "before" else made)
        seen.calls["final"].append(made)

    def project(_: Any, given: tuple[Tensor], made: Tensor) -> None:
        seen.calls["states"].append(given[0].flatten(1))
        seen.calls["prompts"].append(made.flatten(1))

    def decoder(_: Any, given: Any, made: tuple[Tensor, ...]) -> None:
        for name, part in zip(("candidates", "iou", "presence"), made, strict=True):
            seen.calls[name].append(part)

    hooks = [
        language.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.calls["positions"].append(kwargs["position_ids"]), with_kwargs=True
        ),
        language.model.norm.register_forward_hook(norm),
        language.lm_head.register_forward_hook(lambda _, given, made: seen.calls["logits"].append(made)),
        model.project.register_forward_hook(project),
        model.head.decoder.register_forward_hook(decoder),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def read(case) -> list[tuple[Any, Any, Seen]]:
    """The batch, the output and what was seen of every conversation, teacher forced, in evaluation."""
    runs = []
    for number in range(len(case.told["conversations"])):
        batch = collate([case.sample(number)])
        with watched(case.assistant) as seen, torch.no_grad():
            runs.append((batch, case.assistant.model(batch), seen))
    return runs


def differing(found: Tensor, expected: Tensor) -> int:
    """Pixels in which the worst of some masks differs."""
    return max((found != expected).flatten(1).sum(1).tolist(), default=0)


def near(ours: Tensor, stored: np.ndarray, tolerance: float, step: int = 1) -> None:
    """step: every how many rows and columns are stored."""
    ours = ours[..., ::step, ::step] if step > 1 else ours
    np.testing.assert_allclose(ours.detach().numpy(), stored, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Teacher forced


def test_ids_labels_and_positions_are_equal(case, read):
    pad = token_id(case.assistant.tokenizer, case.family.pad)
    for number, (batch, _, seen) in enumerate(read):
        ids = case.record[f"conv{number}_input_ids"]
        assert batch.ids[0].tolist() == np.where(ids == pad, IMAGE_ID, ids).tolist()
        assert batch.labels[0].tolist() == case.record[f"conv{number}_labels"].tolist()
        assert batch.mask_positions.flatten().tolist() == case.told["conversations"][number][case.family.positions]
        (positions,) = seen.calls["positions"]
        assert np.array_equal(positions[-3:, 0].numpy(), case.record[f"conv{number}_position_ids"])


def test_states_as_read(case, read):
    for number, (_, _, seen) in enumerate(read):
        rows = case.record.get(f"conv{number}_last_hidden_rows")
        if rows is not None:  # of Sa2VA
            near(seen.joined("read")[0][::32], rows, 5e-5)
        logits = case.assistant.model.vlm.logits(seen.joined("final")[0, -1])
        near(logits, case.record[f"conv{number}_logits_last"], 2e-4)
        states, count = case.record[f"conv{number}_hidden_seg"], len(case.told["conversations"][number]["iou"])
        near(seen.joined("states")[:count], states, 5e-5)  # without masks a dummy query is decoded
        assert len(states) == count
        other = case.record.get(f"conv{number}_hidden_seg_not_read")
        if other is not None and count:
            assert not np.allclose(states, other, atol=0.1), "the other side of the norm would be seen"


def test_prompts(case, read):
    for number, (_, _, seen) in enumerate(read):
        stored = case.record[f"conv{number}_prompt"]
        prompts = seen.joined("prompts")[: len(stored)]
        near(prompts.reshape(stored.shape), stored, case.family.prompts)


def test_candidates_and_scores(case, read):
    for number, (_, output, seen) in enumerate(read):
        talk = case.told["conversations"][number]
        for index, (iou, presence) in enumerate(zip(talk["iou"], talk["object_score"], strict=True)):
            near(seen.joined("iou")[index], np.asarray(iou), 1e-5)
            assert seen.joined("presence")[index].item() == pytest.approx(presence, abs=1e-5)
            score = max(iou) / (1 + np.exp(-presence))
            assert output.scores[0][index].item() == pytest.approx(score, abs=1e-5)
            if blank(case, presence):  # the record has them after they were blanked
                continue
            near(
                seen.joined("candidates")[index], case.record[f"conv{number}_low_res_all{index}"], case.family.logits, 8
            )


def blank(case: Case, presence: float) -> bool:
    return case.assistant.model.head.decoding.reject == "object" and presence <= 0


def test_masks_in_every_pixel(case, read):
    count = 0
    for number, (batch, output, _) in enumerate(read):
        packed = case.record.get(f"conv{number}_mask_packed")
        assert len(output.masks[0]) == (0 if packed is None else len(packed))
        if packed is not None:
            found, expected = output.masks[0] > 0, unpacked(packed, batch.geometry[0].original[1])
            assert differing(found, expected) <= case.family.pixels
            areas = case.told["conversations"][number]["mask_area"]
            assert found.float().mean((1, 2)).tolist() == pytest.approx(
                areas, abs=case.family.pixels / found[0].numel() + 1e-6
            )
            count += len(packed)
    assert count


# ---------------------------------------------------------------------------------------------------------------------
# Generated


@contextmanager
def louder(model: Any, row: int, scale: float) -> Iterator[None]:
    """The row of the output layer as the record's program changed it, so that random weights write a mask token."""
    head = model.vlm.language.lm_head.weight.data
    plain = head[row].clone()
    head[row] = (plain * scale).bfloat16().float()
    try:
        yield
    finally:
        head[row] = plain


@pytest.fixture(scope="module")
def answering(case) -> Assistant:
    """The folder as `chat.py` loads it."""
    return load(case.folder, model={"head_options": case.sizes}, device="cpu")


def test_generations(case, answering):
    runs, record = case.generations
    tokenizer, spec = answering.tokenizer, answering.system.tokens
    pad, (mask,) = token_id(tokenizer, case.family.pad), mask_ids(tokenizer, spec)
    for number, run in enumerate(runs):
        talk = case.told["conversations"][run["conversation"]] if "conversation" in run else {}
        image, question = run.get("image", talk.get("image")), run.get("text") or talk["turns"][0][0]
        prompt = answering.encoder.prompt(question if run.get("text") else case.family.opening + question)
        file = f"resized_gen{number}.png" if "image" in run else f"resized{image}.png"
        batch = collate_prompts([case.shown(answering.views, image, file)], [[prompt]])
        given = record[f"gen{number}_input_ids"]
        assert batch.ids[0].tolist() == np.where(given == pad, IMAGE_ID, given).tolist()
        with louder(answering.model, run["lm_head_row"], run["lm_head_row_scale"]), watched(answering) as seen:
            (answer,) = answering.model.generate(
                batch, max_new_tokens=run["max_new_tokens"], mask_ids=[mask], eos=tokenizer.eos_token_id
            )
        assert answer.ids == record[f"gen{number}_output_ids"][len(given) :].tolist()
        near(seen.calls["logits"][0].reshape(-1, len(record[f"gen{number}_first_logits"]))[-1],
             record[f"gen{number}_first_logits"], 3e-4)  # fmt: skip
        if "prediction" in run:
            assert decode(answer.ids, tokenizer) == run["prediction"].strip()
        # the state at a token is made with the next one: a last [SEG] has none (sa2va.md 2.3)
        counted = answer.ids[:-1] if spec.read == "at" else answer.ids
        expected = unpacked(record[f"gen{number}_mask_packed"], batch.geometry[0].original[1])
        assert len(answer.masks) == len(expected) == run["masks"] == counted.count(mask)
        assert differing(answer.masks > 0, expected) <= case.family.pixels
        for kind, name, tolerance in (("hidden_seg", "states", 5e-5), ("prompt", "prompts", case.family.prompts)):
            if f"gen{number}_{kind}" in record:
                near(seen.joined(name), record[f"gen{number}_{kind}"], tolerance)
        for index, (iou, presence) in enumerate(zip(run.get("iou", []), run.get("object_score", []), strict=True)):
            near(seen.joined("iou")[index], np.asarray(iou), 1e-5)
            assert answer.scores[index].item() == pytest.approx(max(iou) / (1 + np.exp(-presence)), abs=1e-5)
            chosen = seen.joined("candidates")[index][int(np.argmax(iou))]
            near(chosen, record[f"gen{number}_low_res{index}"], case.family.logits, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def trained(case) -> Assistant:
    """What the recipe of the system builds on the folder; in the records everything of the language side trains, in
    full. In float64: what differs is then the rounding of the record alone, not also that of this machine's fp32, which
    on some CPUs came to 3.02e-4 in one mask logit of 16,384, at a tolerance of 3e-4."""
    recipe = load_recipe(ROOT / "configs" / f"{case.family.recipes[case.assistant.model.architecture.vlm]}.yaml")
    model = {
        "version": str(case.folder),
        "vision_pretrained": None,
        "precision": "fp32",
        "lora": {"r": 0},
        "tower": {"train": True, "train_projector": True},
        "head_options": case.sizes,
        "gradient_checkpointing": False,
    }
    assistant = build(from_dict(Recipe, merge(to_dict(recipe), {"model": model})), device="cpu")
    assistant.model.double()
    return assistant


def runs_of(case: Case, *systems: str) -> list[dict[str, Any]]:
    if case.assistant.system.name not in systems:
        pytest.skip(f"of {', '.join(systems)}")
    return case.told["train"]


def step(case: Case, assistant: Assistant, conversations: list[int], points: int) -> tuple[Any, Any, Any]:
    """Forward and backward of one micro-batch: an image for each conversation."""
    assistant.model.zero_grad(set_to_none=True)
    batch = collate([case.sample(number, assistant) for number in conversations])
    output = assistant.model(batch)
    losses = objective(output, batch, replace(assistant.recipe.loss, points=points))
    losses.total.backward()
    return batch, output, losses


def test_training_losses_and_gradients(case, trained, monkeypatch):
    """Points are random, and from no seed that is recorded: the losses are given those of the record. That these lie at
    uncertain places of our masks, in the order of their certainty, shows that they are chosen as ours are."""
    runs = runs_of(case, "sa2va")
    norms = json.loads((case.folder / "grad_norms.json").read_text(encoding="utf-8"))
    model = trained.model
    table = reading_table(model.vlm.WEIGHT_NAMES, model.head.WEIGHT_NAMES)
    for number, run in enumerate(runs):
        stored, points = case.record.get(f"train{number}_points"), 0
        if run["kind"] == "points" and stored is not None:
            points = stored.shape[1]

            def recorded(logits: Tensor, count: int, stored: np.ndarray = stored) -> Tensor:
                assert (len(logits), count) == stored.shape[:2]
                sampled = torch.from_numpy(stored)
                important = values_at(logits, sampled[:, : int(IMPORTANCE * count)]).abs().detach()
                assert (important.diff(dim=1) > -1e-3).all()
                return sampled

            monkeypatch.setattr("model.losses.sample_points", recorded)
        batch, output, losses = step(case, trained, run["conversations"], points)
        if len(run["conversations"]) > 1 and f"train{number}_labels" in case.record:
            assert batch.labels.tolist() == case.record[f"train{number}_labels"].tolist()
            assert batch.attention.tolist() == case.record[f"train{number}_attention_mask"].tolist()
        told = {"bce": "loss_mask", "dice": "loss_dice", "ce": "llm_loss", "loss": "total"}
        for ours, theirs in told.items():
            assert losses.parts[ours].item() == pytest.approx(run["losses"][theirs], rel=1e-5, abs=1e-9), (number, ours)
        for conversation, masks in zip(run["conversations"], output.masks, strict=True):
            for index, mask in enumerate(masks):
                near(mask, case.record[f"conv{conversation}_low_res{index}"], case.family.logits, 2)
        expected = {str(table.to_model(name)): norm for name, norm in norms[str(number)].items()}
        found = {
            name: weight.grad.norm().item() for name, weight in model.named_parameters() if weight.grad is not None
        }
        counted = {name for name, norm in expected.items() if norm > NORM and not ZERO.fullmatch(name)}
        assert len(counted) > 100
        assert {name: found[name] for name in counted} == pytest.approx({n: expected[n] for n in counted}, rel=2e-3)
        for name in found.keys() - counted:
            limit = 1e-4 * (found[name.replace("bias", "weight")] + 1) if ZERO.fullmatch(name) else 10 * NORM
            assert max(found[name], expected.get(name, 0)) < limit, f"{name} trains"


def test_unipixels_text_loss_and_training_masks(case, trained):
    """Its mask losses are not here. In training no mask is blanked."""
    for run in runs_of(case, "unipixel"):
        number = run["conversation"]
        batch, output, losses = step(case, trained, [number], 0)
        assert losses.parts["ce"].item() == pytest.approx(run["llm"], rel=1e-5)
        seen = torch.tensor([presence > 0 for presence in case.told["conversations"][number]["object_score"]])
        assert output.masks[0].min() > REJECTED
        expected = unpacked(case.record[f"conv{number}_mask_packed"], batch.geometry[0].original[1])
        assert differing(output.masks[0][seen] > 0, expected[seen]) <= case.family.pixels
        assert not expected[~seen].any()
