"""Stage 2: tower, projector and language model learn to talk about scenes; the tower's dense head stays beside them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from toy.base.attention import IMPLEMENTATION, dialogue_mask
from toy.base.dense import COLOR_NAMES, FOLD, DenseHead, dense_loss
from toy.base.facts import CELLS, GRID
from toy.base.pictures import held_out_batches, normalise_tower, prefetch
from toy.base.rows import IGNORED, RowBuilder, RowWriter
from toy.base.sizes import llava_config
from toy.base.tower import TowerStage, init_tower_embeddings, patch_features
from toy.base.tower import tower_sample as look_sample
from toy.base.trainer import StagePlan, train_stage
from toy.base.turns import find, knowledge, present, refer
from toy.base.vocabulary import IMAGE_PATCH
from toy.world.scene import CLASSES

BATCH = 8
DENSE_ONLY_BATCH = 24  # pictures without words, in the steps where words are known and objects are still hard to see
DENSE_ONLY_STEPS = range(574, 1125)
DENSE_WEIGHT, NAMING_WEIGHT = 0.3, 0.3
LOGIT_SCALE = 16.0  # of the cosine between a patch and a word
SIMILARITY_LAYERS, STEADY_SHARE = 2, 0.6  # first layers; the part of the rotary frequencies that turn too fast
PROBES = {"present": present, "find": find, "refer": refer, "knowledge": knowledge}


class LlavaStage(nn.Module):
    """LLaVA and the dense head on its tower."""

    def __init__(self, writer: RowWriter):
        super().__init__()
        self.image_token = writer.images[IMAGE_PATCH]
        self.words = [[writer.word(name) for name in names] for names in (CLASSES, COLOR_NAMES, CELLS)]
        config = llava_config(len(writer.cell_table()), self.image_token)
        self.llava = LlavaForConditionalGeneration(config)
        self.head = DenseHead(config.vision_config.hidden_size)
        init_tower_embeddings(self.llava.model.vision_tower)
        for module in (self.llava.model.language_model, self.llava.model.multi_modal_projector):
            init_by_width(module)
        for layer in self.llava.model.language_model.layers[:SIMILARITY_LAYERS]:
            init_by_similarity(layer.self_attn)

    def copy_tower(self, stage: TowerStage) -> None:
        """Go on from stage 1."""
        self.llava.model.vision_tower.load_state_dict(stage.tower.state_dict())
        self.head.load_state_dict(stage.head.state_dict())

    def dense_only_loss(self, pixels: Tensor, codes: Tensor, boxes: Tensor) -> Tensor:
        """Dense and naming loss of pictures without words."""
        patches = patch_features(self.llava.model.vision_tower, normalise_tower(pixels))
        seen = self.llava.model.multi_modal_projector(patches)
        looked, _ = dense_loss(self.head(patches), codes, boxes)
        return DENSE_WEIGHT * looked + NAMING_WEIGHT * self.naming_loss(seen, codes)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states (R, L, D) of the language model, the dense answer, and the naming loss."""
        model, ids = self.llava.model, batch["ids"]
        patches = patch_features(model.vision_tower, normalise_tower(batch["pixels"]))
        seen = model.multi_modal_projector(patches)
        states = model.language_model.embed_tokens(ids)
        states = states.masked_scatter((ids == self.image_token)[..., None], seen.flatten(0, 1))
        states = run_language_model(model.language_model, states, batch["group"], batch["place"])
        return states, self.head(patches), self.naming_loss(seen, batch["codes"])

    def naming_loss(self, seen: Tensor, codes: Tensor) -> Tensor:
        """Projected patches (B, P, D) should point towards the words for their class, colour and place.

        A word then finds its patches by likeness from the first layer on. codes are (B, 3, S, S) of the dense targets.
        """
        table = F.normalize(self.llava.model.language_model.embed_tokens.weight.float(), dim=-1)
        seen = F.normalize(seen.float(), dim=-1)
        rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        places = (columns * GRID + rows).flatten().expand(len(seen), -1)
        loss = F.cross_entropy((LOGIT_SCALE * seen @ table[self.words[2]].T).flatten(0, 1), places.flatten())
        for words, truth in zip(self.words, codes[:, :2].unbind(1), strict=False):
            shares = F.one_hot(truth, len(words) + 1).float().unflatten(1, (GRID, FOLD)).unflatten(3, (GRID, FOLD))
            shares = shares.mean((2, 4)).flatten(1, 2)[..., : len(words)]
            loss = loss + F.cross_entropy((LOGIT_SCALE * seen @ table[words].T).flatten(0, 1), shares.flatten(0, 1))
        return loss


def init_by_width(module: nn.Module, gain: float = 0.7) -> None:
    """Initial weights in proportion to the layer's width; 0.02 is meant for models sixteen times as wide. With a gain
    of 1, or of the root of 2 before a ReLU, they neither shrink nor grow a signal."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_by_similarity(attention: nn.Module) -> None:
    """Let every head attend, at first, to what is like the state that asks: a word to the patches that it names.

    Queries and keys start equal where the rotary angle hardly changes along a row. Small objects, a few patches of
    hundreds, are otherwise found late.
    """
    half = attention.head_dim // 2
    steady = torch.arange(half) >= STEADY_SHARE * half
    steady = steady.repeat(2).repeat(attention.config.num_attention_heads)
    width = attention.q_proj.in_features
    with torch.no_grad():
        shared = torch.randn(int(steady.sum()), width) * 2.0 * width**-0.5
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[steady] = shared


def run_language_model(model: nn.Module, states: Tensor, group: Tensor, place: Tensor) -> Tensor:
    """The LLaMA layers on rows of several dialogues, without the masks and caches of their own forward pass."""
    model.config._attn_implementation = IMPLEMENTATION
    turns, mask = model.rotary_emb(states, place), dialogue_mask(group, states.dtype)
    for layer in model.layers:
        states = layer(states, attention_mask=mask, position_ids=place, position_embeddings=turns)
    return model.norm(states)


def supervised_logits(model: LlavaStage, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (N, V) and labels (N,) of the labelled positions, the dense answer and the naming loss."""
    states, dense, naming = model(batch)
    wanted = batch["labels"][:, 1:]
    kept = wanted != IGNORED
    return model.llava.lm_head(states[:, :-1][kept]).float(), wanted[kept], dense, naming


def llava_objective(model: LlavaStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits, labels, dense, naming = supervised_logits(model, batch)
    spoken = F.cross_entropy(logits, labels)
    looked, accuracy = dense_loss(dense, batch["codes"], batch["boxes"])
    right = (logits.detach().argmax(-1) == labels).float().mean()
    parts = {"spoken": spoken.detach(), "naming": naming.detach(), "token_accuracy": right, "spot_accuracy": accuracy}
    loss = spoken + DENSE_WEIGHT * looked + NAMING_WEIGHT * naming
    if "look" in batch:
        loss = loss + DENSE_ONLY_BATCH / BATCH * model.dense_only_loss(**batch["look"])
    return loss, parts


class Probe:
    """Held-out questions of one kind each, scored token by token with the truth so far given."""

    def __init__(self, folder: Path, seed: int):
        self.tests = {
            name: held_out_batches(
                RowBuilder(folder, {make: 1.0}), batches=2, size=BATCH, seed=seed, first=100 * (1 + index)
            )
            for index, (name, make) in enumerate(PROBES.items())
        }
        writer = RowBuilder(folder).writer
        self.cells = torch.from_numpy(writer.cell_table())
        self.yes, self.no = writer.word("yes"), writer.word("no")

    def __call__(self, model: LlavaStage) -> dict[str, float]:
        """Token accuracy of each kind; accuracy on present and absent classes; place words within one cell."""
        figures: dict[str, float] = {}
        for name, batches in self.tests.items():
            found = [supervised_logits(model, batch) for batch in batches]
            labels = torch.cat([labels for _, labels, *_ in found])
            guesses = torch.cat([logits.argmax(-1) for logits, *_ in found])
            figures[name] = _share(guesses == labels)
            figures |= {f"{name}_{key}": value for key, value in self._details(guesses, labels, name).items()}
        return figures

    def _details(self, guesses: Tensor, labels: Tensor, name: str) -> dict[str, float]:
        wanted, given = self.cells[labels], self.cells[guesses]
        details = {}
        if name in ("present", "find"):
            absent = labels == self.no
            shown = labels == self.yes if name == "present" else wanted >= 0
            details["absent"] = _share(guesses[absent] == self.no)
            details["shown"] = _share(guesses[shown] != self.no)
        places = wanted >= 0
        if places.any():
            across = (wanted // GRID - given // GRID).abs()
            down = (wanted % GRID - given % GRID).abs()
            details["near"] = _share(((across <= 1) & (down <= 1) & (given >= 0))[places])
        return details


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def train_llava(plan: StagePlan, seed: int, folder: Path, tower: TowerStage, publish) -> dict[str, float]:
    """The held-out figures of LLaVA trained on from `tower`, with the vocabulary in `folder`."""
    make = RowBuilder(folder)
    stage = LlavaStage(make.writer)
    stage.copy_tower(tower)

    def batches(step: int):
        looks = None
        for row in prefetch(make, "llava", first=step, size=BATCH, seed=seed):
            if step in DENSE_ONLY_STEPS and looks is None:
                looks = prefetch(look_sample, "look", first=step, size=DENSE_ONLY_BATCH, seed=seed)
            yield {**row, "look": next(looks)} if step in DENSE_ONLY_STEPS else row
            step += 1

    return train_stage(plan, stage, batches, llava_objective, Probe(folder, seed), publish)
