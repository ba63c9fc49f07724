"""Stage 2: tower, projector and language model learn to talk about scenes, with the dense head of stage 1 still on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention

from toy.base.attention import IMPLEMENTATION, dialogue_mask
from toy.base.dense import COLOR_NAMES, FOLD, DenseHead, dense_loss
from toy.base.facts import CELLS, GRID
from toy.base.pictures import held_out_batches, normalise_tower, prefetch
from toy.base.rows import IGNORED, RowBuilder, RowWriter
from toy.base.sizes import llava_config
from toy.base.tower import TowerStage, init_tower_embeddings, patch_features, tower_sample
from toy.base.trainer import StagePlan, train_stage
from toy.base.turns import find, knowledge, present, refer
from toy.base.vocabulary import IMAGE_PATCH
from toy.world.scene import CLASSES

BATCH = 8
# For a while the words are known and small objects are still hard to recognise: in these steps the vision losses get
# more images, which have no dialogue.
DENSE_ONLY_BATCH = 24
DENSE_ONLY_STEPS = range(574, 1125)
DENSE_WEIGHT, NAMING_WEIGHT = 0.3, 0.3
LOGIT_SCALE = 16.0  # of the cosine between a patch and a word
SIMILARITY_LAYERS = 2  # first layers whose attention starts from similarity
FAST_SHARE = 0.6  # of the rotary frequencies: they turn too fast along a row for equal states to match
PROBES = {"present": present, "find": find, "refer": refer, "knowledge": knowledge}


class LlavaStage(nn.Module):
    """LLaVA and the dense head on its vision tower."""

    def __init__(self, writer: RowWriter):
        super().__init__()
        self.image_token = writer.images[IMAGE_PATCH]
        self.words = [[writer.word(name) for name in names] for names in (CLASSES, COLOR_NAMES, CELLS)]
        config = llava_config(len(writer.cell_table()), self.image_token)
        self.llava = LlavaForConditionalGeneration(config)
        self.head = DenseHead(self.llava.model.vision_tower.config.hidden_size)
        init_tower_embeddings(self.llava.model.vision_tower)
        for module in (self.llava.model.language_model, self.llava.model.multi_modal_projector):
            init_by_width(module)
        for layer in self.llava.model.language_model.layers[:SIMILARITY_LAYERS]:
            init_by_similarity(layer.self_attn)

    def copy_tower(self, stage: TowerStage) -> None:
        """Start from the weights of stage 1."""
        self.llava.model.vision_tower.load_state_dict(stage.tower.state_dict())
        self.head.load_state_dict(stage.head.state_dict())

    def dense_only_loss(self, pixels: Tensor, codes: Tensor, boxes: Tensor) -> Tensor:
        """Dense and naming loss of images without a dialogue."""
        patches = patch_features(self.llava.model.vision_tower, normalise_tower(pixels))
        projected = self.llava.model.multi_modal_projector(patches)
        dense, _ = dense_loss(self.head(patches), codes, boxes)
        return DENSE_WEIGHT * dense + NAMING_WEIGHT * self.naming_loss(projected, codes)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states (R, L, D) of the language model, the dense head's output, and the naming loss."""
        model, ids = self.llava.model, batch["ids"]
        patches = patch_features(model.vision_tower, normalise_tower(batch["pixels"]))
        projected = model.multi_modal_projector(patches)
        states = model.language_model.embed_tokens(ids)
        states = states.masked_scatter((ids == self.image_token)[..., None], projected.flatten(0, 1))
        states = run_language_model(model.language_model, states, batch["group"], batch["place"])
        return states, self.head(patches), self.naming_loss(projected, batch["codes"])

    def naming_loss(self, projected: Tensor, codes: Tensor) -> Tensor:
        """Projected patches (B, P, D) should point towards the words for their class, colour and place.

        A word then finds its patches by similarity from the first layer on. codes: (B, 3, S, S) of the dense targets,
        S = FOLD * GRID. A patch with two classes among its FOLD x FOLD points has both as target, by their shares.
        """
        table = F.normalize(self.llava.model.language_model.embed_tokens.weight.float(), dim=-1)
        directions = F.normalize(projected.float(), dim=-1)
        rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        places = (columns * GRID + rows).flatten().expand(len(directions), -1)  # as CELLS counts
        loss = F.cross_entropy((LOGIT_SCALE * directions @ table[self.words[2]].T).flatten(0, 1), places.flatten())
        for words, truth in zip(self.words, codes[:, :2].unbind(1), strict=False):
            shares = F.one_hot(truth, len(words) + 1).float().unflatten(1, (GRID, FOLD)).unflatten(3, (GRID, FOLD))
            shares = shares.mean((2, 4)).flatten(1, 2)[..., : len(words)]  # the last code, no colour, has no word
            logits = LOGIT_SCALE * directions @ table[words].T
            loss = loss + F.cross_entropy(logits.flatten(0, 1), shares.flatten(0, 1))
        return loss


def init_by_width(module: nn.Module, gain: float = 0.7) -> None:
    """Initialise linear layers with standard deviation gain / sqrt(inputs).

    The usual 0.02 is meant for models sixteen times as wide. A gain of 1, or of sqrt(2) before a ReLU, keeps the scale
    of a signal.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_by_similarity(attention: LlamaAttention) -> None:
    """Make every head attend, at first, to states similar to the query: a word to the patches that it names.

    Queries and keys start equal in the channels whose rotary angle hardly changes along a row. Small objects, a few
    patches of hundreds, are otherwise found late in training.
    """
    half = attention.head_dim // 2
    slow = torch.arange(half) >= FAST_SHARE * half  # rotary frequencies fall with the channel
    slow = slow.repeat(2).repeat(attention.config.num_attention_heads)  # a frequency turns channels i and i + half
    width = attention.q_proj.in_features
    with torch.no_grad():
        shared = torch.randn(int(slow.sum()), width) * 2.0 * width**-0.5
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[slow] = shared


def run_language_model(model: LlamaModel, states: Tensor, group: Tensor, place: Tensor) -> Tensor:
    """The LLaMA layers on rows of several dialogues, without the masks and caches of their own forward pass."""
    model.config._attn_implementation = IMPLEMENTATION
    rotary = model.rotary_emb(states, place)
    mask = dialogue_mask(group, states.dtype)
    for layer in model.layers:
        states = layer(states, attention_mask=mask, position_ids=place, position_embeddings=rotary)
    return model.norm(states)


def supervised_logits(model: LlavaStage, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (N, V) and labels (N,) of the supervised positions, the dense head's output and the naming loss."""
    states, dense, naming = model(batch)
    labels = batch["labels"][:, 1:]  # the state at t predicts the token at t + 1
    supervised = labels != IGNORED
    return model.llava.lm_head(states[:, :-1][supervised]).float(), labels[supervised], dense, naming


def llava_objective(model: LlavaStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits, labels, dense, naming = supervised_logits(model, batch)
    text = F.cross_entropy(logits, labels)
    vision, accuracy = dense_loss(dense, batch["codes"], batch["boxes"])
    correct = (logits.detach().argmax(-1) == labels).float().mean()
    parts = {"spoken": text.detach(), "naming": naming.detach(), "token_accuracy": correct, "spot_accuracy": accuracy}
    loss = text + DENSE_WEIGHT * vision + NAMING_WEIGHT * naming
    if "dense_only.pixels" in batch:
        extra = {name: batch[f"dense_only.{name}"] for name in ("pixels", "codes", "boxes")}
        loss = loss + DENSE_ONLY_BATCH / BATCH * model.dense_only_loss(**extra)
    return loss, parts


class Probe:
    """Held-out questions of one kind each, scored per token with teacher forcing."""

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
        """Token accuracy of each kind; accuracy on present and absent classes; share of place words within one cell."""
        figures: dict[str, float] = {}
        for name, batches in self.tests.items():
            outputs = [supervised_logits(model, batch) for batch in batches]
            labels = torch.cat([labels for _, labels, *_ in outputs])
            guesses = torch.cat([logits.argmax(-1) for logits, *_ in outputs])
            figures[name] = _share(guesses == labels)
            figures |= {f"{name}_{key}": value for key, value in self._details(guesses, labels, name).items()}
        return figures

    def _details(self, guesses: Tensor, labels: Tensor, name: str) -> dict[str, float]:
        true_cell = self.cells[labels]  # -1 where the token is no place word
        guessed_cell = self.cells[guesses]
        details = {}
        if name in ("present", "find"):
            absent = labels == self.no
            in_view = labels == self.yes if name == "present" else true_cell >= 0
            details["absent"] = _share(guesses[absent] == self.no)
            details["shown"] = _share(guesses[in_view] != self.no)
        places = true_cell >= 0
        if places.any():
            columns_apart = (true_cell // GRID - guessed_cell // GRID).abs()
            rows_apart = (true_cell % GRID - guessed_cell % GRID).abs()
            details["near"] = _share(((columns_apart <= 1) & (rows_apart <= 1) & (guessed_cell >= 0))[places])
        return details


def _share(correct: Tensor) -> float:
    return correct.float().mean().item()


def train_llava(
    plan: StagePlan, seed: int, folder: Path, tower: TowerStage, publish: Callable[[LlavaStage], object]
) -> dict[str, float]:
    """Train LLaVA from the stage-1 weights in `tower`, with the vocabulary in `folder`; the held-out figures."""
    build_row = RowBuilder(folder)
    stage = LlavaStage(build_row.writer)
    stage.copy_tower(tower)

    def batches(step: int) -> Iterator[dict[str, Tensor]]:
        dense_only = None  # its worker starts with the first step that needs it
        for batch in prefetch(build_row, "llava", first=step, size=BATCH, seed=seed):
            if step in DENSE_ONLY_STEPS:
                if dense_only is None:
                    dense_only = prefetch(tower_sample, "look", first=step, size=DENSE_ONLY_BATCH, seed=seed)
                batch |= {f"dense_only.{name}": tensor for name, tensor in next(dense_only).items()}
            yield batch
            step += 1

    return train_stage(plan, stage, batches, llava_objective, Probe(folder, seed), publish)
