"""What every backbone is held to, next to its class in transformers: a new one derives from `BackboneContract`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from data.tokens import TokenSpec, load_tokenizer
from data.types import IGNORE_ID, IMAGE_ID, Batch, Geometry
from model.checkpoints.save import save_folder, save_original
from model.finetune.trainable import prepare_training, trainable_names
from model.losses import objective
from model.seg_model import SegModel
from model.vlm.prefix_packing import can_pack
from tests.tiny_qwen import EOS, IMAGE_PAD, SEG, load_backbone, segmenter
from utils.config import LoraConfig, LossConfig, ModelConfig

SPEC = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
LORA = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "o_proj", "down_proj"))
SIZES = [(30, 41), (50, 20), (26, 26)]  # of the images
ROWS = [  # several rows about the first image; the others have grids of their own, and a row that does not show one
    ([5, 52, IMAGE_ID, 53, 6, 7, SEG, 9, EOS], 0),
    ([5, 52, IMAGE_ID, 53, 6, 11, SEG, EOS], 0),
    ([5, 52, IMAGE_ID, 53, 14, 15, SEG, 12, 13, EOS], 1),
    ([52, IMAGE_ID, 53, 20, SEG, EOS], 2),
    ([5, 8, 9], 2),
]
SHOWING = ROWS[:4]
Rows = Sequence[tuple[list[int], int]]


def seen_by(vlm: Any) -> tuple[Tensor, list[Geometry], list[int]]:
    """The pixels of the images end to end, where they lie, and their tokens."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    pixels = torch.cat([vlm.view(image) for image in images])
    return pixels, [vlm.view.geometry(*size) for size in SIZES], [vlm.view.tokens(*size) for size in SIZES]


def expand(rows: Rows, counts: list[int], left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (R, L) with an image position for every token, attention, and the image of each row."""
    long = [[t for id in ids for t in [id] * (counts[i] if id == IMAGE_ID else 1)] for ids, i in rows]
    length = max(map(len, long))
    ids, attention = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(long):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[index, place], attention[index, place] = torch.tensor(row), True
    return ids, attention, torch.tensor([image for _, image in rows])


def images_shown(ids: Tensor, row_image: Tensor) -> list[int]:
    """The image of each row that shows one: the library's classes take it again for every such row."""
    return [image for row, image in enumerate(row_image.tolist()) if bool((ids[row] == IMAGE_ID).any())]


def batch_of(vlm: Any) -> Batch:
    """`ROWS` with random masks and a random view for SAM."""
    generator = torch.Generator().manual_seed(3)
    pixels, geometry, counts = seen_by(vlm)
    ids, real, row_image = expand(ROWS, counts)
    labels = ids.masked_fill(~real | (ids == IMAGE_ID), IGNORE_ID)
    labels[:, 0] = IGNORE_ID
    places = (ids == SEG).nonzero()
    number = row_image[places[:, 0]].bincount(minlength=3).tolist()
    masks = [
        (torch.rand(n, *place.original, generator=generator) > 0.5).float()
        for n, place in zip(number, geometry, strict=True)
    ]
    return Batch(
        pixels=pixels,
        seg_pixels=torch.randn(3, 3, 64, 64, generator=generator),
        ids=ids,
        labels=labels,
        attention=real,
        row_image=row_image,
        mask_rows=places[:, 0],
        mask_positions=places[:, 1:] - 1,
        masks=masks,
        geometry=[Geometry(place.original, (64, 64)) for place in geometry],
        names=["a", "b", "c"],
        ignore=[None] * 3,
    )


def stock_of(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    """The library's model of a folder, in evaluation mode."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


class BackboneContract:
    """States, logits and answers of the library's class, packed or not; what trains; folders that both read.

    The file of a backbone gives the fixtures `folder` (a tiny base as the library saves it), `vlm` (what
    `load_backbone` makes of it, without gradients), `base` (the same with tokenizer files) and `finished` (an assistant
    on that base, written by `save_folder`), and the members below.
    """

    PATCHES: ClassVar[str]  # a weight of the tower that has a gradient when all trains
    PARTS: ClassVar[dict[str, str]]  # what a recipe can train -> a piece of the names of its weights

    def stock_inputs(self, vlm: Any, ids: Tensor, attention: Tensor, row_image: Tensor) -> dict[str, Tensor]:
        """What the library's class takes for the images of `seen_by`."""
        raise NotImplementedError

    def stock_features(self, stock: Any, vlm: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """Image tokens (T, H) of `seen_by`, and those of deepstack, by the library's class."""
        raise NotImplementedError

    def write_windowed(self, folder: Path) -> None:
        """A base whose text model has sliding windows of 8 tokens."""
        raise NotImplementedError

    def read(self, folder: Path) -> SegModel:
        """An assistant in a folder, as it says itself."""
        raise NotImplementedError

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_states_and_logits_are_those_of_the_library(self, folder, attention):
        vlm, stock = load_backbone(folder, attention=attention), stock_of(folder, attention)
        pixels, geometry, counts = seen_by(vlm)
        assert len(set(counts)) > 1
        ids, real, row_image = expand(ROWS, counts)
        with torch.no_grad():
            vision = vlm.encode_images(pixels, geometry)
            states = vlm(ids, real, vision, row_image).final
            inputs = self.stock_inputs(vlm, ids, real, row_image)
            expected = stock(**inputs)
            features, deep = self.stock_features(stock, vlm)
            hidden = stock.model(**inputs).last_hidden_state
        assert torch.equal(vision.states, features) and vision.counts == counts
        assert len(deep) == len(vision.deepstack) and all(map(torch.equal, deep, vision.deepstack))
        assert torch.equal(states[real], hidden[real])
        assert torch.equal(vlm.logits(states)[real], expected.logits[real])

    @pytest.mark.parametrize("most", [0, 200])
    def test_packed_rows_have_the_states_of_rows(self, vlm, most):
        pixels, geometry, counts = seen_by(vlm)
        ids, real, row_image = expand(ROWS, counts)
        vision = vlm.encode_images(pixels, geometry)
        vlm.set_packing(False, 0)
        apart = vlm(ids, real, vision, row_image).final[real]
        shapes = []
        hook = vlm.decoder_layers[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
        vlm.set_packing(True, most)
        packed = vlm(ids, real, vision, row_image).final[real]
        hook.remove()
        vlm.set_packing(False, 0)
        assert shapes[0][0] == (1 if most else 3) and shapes[0].numel() < ids.numel()
        torch.testing.assert_close(packed, apart, atol=5e-6, rtol=1e-5)

    @pytest.mark.parametrize("rows", [SHOWING, ROWS[1:4]], ids=["shared", "one each"])
    def test_answers_are_those_of_the_library(self, folder, vlm, rows):
        """Greedy, of prompts of unequal length about images of different grids, with and without a shared prefix."""
        pixels, geometry, counts = seen_by(vlm)
        ids, real, row_image = expand([(row[:-2], image) for row, image in rows], counts, left=True)
        vision = vlm.encode_images(pixels, geometry)
        written = vlm.generate(ids, real, vision, row_image, max_new_tokens=12, eos=EOS)
        inputs = self.stock_inputs(vlm, ids, real, row_image)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
        with torch.no_grad():
            expected = stock_of(folder).generate(**inputs, **options)[:, ids.shape[1] :].tolist()
        for mine, theirs in zip(written.ids, expected, strict=True):
            assert mine == theirs[: len(mine)] and (len(mine) == 12 or mine[-1] == EOS)
        assert len({tuple(row) for row in written.ids}) > 1

    def test_the_states_of_an_answer_are_those_of_teacher_forcing(self, vlm):
        pixels, geometry, counts = seen_by(vlm)
        ids, real, row_image = expand([(row[:-2], image) for row, image in SHOWING], counts, left=True)
        vision = vlm.encode_images(pixels, geometry)
        written = vlm.generate(ids, real, vision, row_image, max_new_tokens=6, eos=EOS)
        for row, new in enumerate(written.ids):
            whole = torch.cat([ids[row, real[row]], torch.tensor(new)])[None]
            states = vlm(whole, torch.ones_like(whole, dtype=torch.bool), vision, row_image[row : row + 1]).final[0]
            torch.testing.assert_close(
                written.states[row, : len(new)], states[-len(new) - 1 : -1], atol=1e-5, rtol=1e-4
            )

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_packed_rows_have_the_loss_and_gradients_of_rows(self, folder, checkpointed):
        results = []
        for packed in (False, True):
            model = segmenter(folder).double()
            model.vlm.set_packing(packed, 0)
            model.train()
            if checkpointed:
                model.vlm.checkpoint_gradients()
            batch = batch_of(model.vlm).to("cpu", torch.float64)
            losses = objective(model(batch), batch, LossConfig())
            losses.total.backward()
            grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            results.append((losses.total.detach(), grads))
        torch.testing.assert_close(results[1][0], results[0][0], atol=1e-6, rtol=1e-6)
        assert results[0][1].keys() == results[1][1].keys() > {self.PATCHES}
        torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-5)

    def check_gradients(self, folder: Path, recipe: dict[str, Any], expected: set[str]) -> None:
        """Gradients reach what the recipe trains, named as in PARTS, and nothing else."""
        model = segmenter(folder)
        prepare_training(model, ModelConfig(**{"precision": "fp32", "lora": LORA} | recipe))
        batch = batch_of(model.vlm)
        objective(model(batch), batch, LossConfig()).total.backward()
        have = {name for name, weight in model.named_parameters() if weight.grad is not None}
        wanted = set(trainable_names(model))
        # scores of masks are in no loss, and one of the decoder's candidate masks counts
        assert have <= wanted and not [name for name in wanted - have if not name.startswith("head.")]
        assert all(bool(model.get_parameter(name).grad.isfinite().all()) for name in have)
        assert {part for part, key in self.PARTS.items() if any(key in name for name in have)} == expected
        mine = {name for name in have if ".lora_" in name}
        assert all(name.startswith("vlm.language.model.layers.") for name in mine)
        assert {"project.0.weight", "head.decoder.transformer.layers.0.self_attn.q_proj.weight"} <= have

    def test_rotary_frequencies_stay_float32_whatever_the_weights_are(self, folder):
        vlm = load_backbone(folder)
        before = {name: buffer.clone() for name, buffer in vlm.named_buffers() if "inv_freq" in name}
        assert before
        vlm.bfloat16()
        for name, buffer in vlm.named_buffers():
            assert name not in before or torch.equal(buffer, before[name])
        pixels, geometry, counts = seen_by(vlm)
        ids, real, row_image = expand(ROWS, counts)
        with torch.no_grad():
            states = vlm(ids, real, vlm.encode_images(pixels.bfloat16(), geometry), row_image).final
        assert states.dtype == torch.bfloat16 and bool(states.isfinite().all())

    def test_a_sliding_window_switches_packing_off(self, tmp_path, caplog, monkeypatch):
        self.write_windowed(tmp_path)
        vlm, stock = load_backbone(tmp_path).requires_grad_(False), stock_of(tmp_path)
        assert not vlm.packs
        monkeypatch.setattr("utils.log.log.propagate", True)
        assert not can_pack(True, "sdpa", vlm.packs)
        assert "model.pack_rows" in caplog.text and "sliding window" in caplog.text
        vlm.set_packing(True, 0)
        pixels, geometry, counts = seen_by(vlm)
        ids, real, row_image = expand(ROWS, counts)
        vision = vlm.encode_images(pixels, geometry)
        with torch.no_grad():
            expected = stock.model(**self.stock_inputs(vlm, ids, real, row_image)).last_hidden_state
        assert torch.equal(vlm(ids, real, vision, row_image).final[real], expected[real])
        prompts, seen, images = expand([(row[:-2], image) for row, image in ROWS[:2]], counts, left=True)
        written = vlm.generate(prompts, seen, vision, images, max_new_tokens=5, eos=EOS)
        inputs = self.stock_inputs(vlm, prompts, seen, images)
        answers = stock.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
        for mine, theirs in zip(written.ids, answers[:, prompts.shape[1] :].tolist(), strict=True):
            assert mine == theirs[: len(mine)]

    def test_our_folder_gives_the_library_the_same_logits(self, finished):
        ours, vlm = stock_of(finished), self.read(finished).vlm
        assert ours.config.image_token_id == IMAGE_PAD
        pixels, geometry, counts = seen_by(vlm)
        ids, real, row_image = expand(ROWS, counts)
        with torch.no_grad():
            mine = vlm(ids, real, vlm.encode_images(pixels, geometry), row_image).final
            theirs = ours(**self.stock_inputs(vlm, ids, real, row_image)).logits
        assert torch.equal(vlm.logits(mine)[real], theirs[real])

    def test_our_folder_reads_back_equal(self, finished, tmp_path):
        model = self.read(finished)
        save_folder(model, tmp_path / "again", load_tokenizer(finished, SPEC))
        again, expected = self.read(tmp_path / "again"), model.state_dict()
        assert again.architecture == model.architecture and again.vlm.view == model.vlm.view
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())

    def test_there_is_no_released_layout_to_write(self, finished, tmp_path):
        with pytest.raises(ValueError, match=r"no common layout.*ForConditionalGeneration"):
            save_original(self.read(finished), tmp_path / "out", load_tokenizer(finished, SPEC))
