"""Does with a record all that training does before the model: its words, ids, masks and views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AddedToken, PreTrainedTokenizerBase

from data.collate import SampleBuilder
from data.encode import Encoder
from data.pieces import Pieces
from data.templates import template
from data.tokenizer_family import TokenizerFamily
from data.tokens import TokenSpec, added_tokens, family_for, load_tokenizer
from data.types import Record
from data.views import ClipView, LanguageView, SamView, Views
from model.checkpoints.config_file import read_config
from model.checkpoints.load import vlm_class
from model.vlm.base import VisionLanguageModel
from systems.assistant import system_of
from systems.base import System
from tools.memory.released_sizes import released_config
from utils.config import ModelConfig, Recipe

SIDE = 256  # of the mask encoder's view: small, since no record fails at one size and not at another


class NoWords:
    """Stands in for a vocabulary that is not on this machine: every text is a single unknown piece."""

    def __init__(self, unknown: int):
        self.unknown = unknown

    def encode(self, text: str, *, blank: bool) -> list[int]:
        return [self.unknown] if text else []

    def piece(self, index: int) -> str:
        return ""

    def index(self, piece: str) -> int:
        return self.unknown


class OnlyTokens:
    """Stands in for a tokenizer that is not on this machine: knows the tokens that a system adds.

    A text becomes a single id, so that rows have their tokens and their masks, though not their length.
    """

    bos_token_id = None

    def __init__(self, spec: TokenSpec, family: TokenizerFamily):
        self.family = family
        self.eos_token = self.family.stop
        names = (*sorted(self.family.control), *added_tokens(self.family, spec))
        self.added_tokens_decoder = {index: AddedToken(name) for index, name in enumerate(names)}
        self.pieces = Pieces(NoWords(len(names)))

    def get_vocab(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}


@dataclass(frozen=True)
class Rehearsal:
    """A recipe's system and the builder of its samples. unchecked: what cannot be checked on this machine, and why."""

    system: System
    maker: SampleBuilder
    unchecked: str = ""

    @classmethod
    def of(cls, recipe: Recipe) -> Rehearsal:
        system = system_of(recipe)
        encoder, unchecked = _encoder(system, recipe.model, recipe.data.long_rows)
        maker = SampleBuilder(
            system.task,
            encoder,
            Views(_view(recipe.model), SamView(SIDE)),
            ignore_region=recipe.loss.ignore_region,
            drop_long_rows=recipe.data.on_bad_sample == "skip",
        )
        return cls(system, maker, unchecked)


def texts_of(record: Record) -> Iterator[str]:
    """Every text of a record that training may put into a row.

    Dialogues without masks are left out: they are trained on as they are, and contain the image's placeholder, which no
    other text may contain.
    """
    for target in record.targets:
        yield target.phrase
        if target.correction:
            yield target.correction
        yield from target.aliases
    if record.kind == "vqa":
        return
    for turn in (turn for dialogue in record.dialogues for turn in dialogue):
        yield from (turn.question, *(part for part in turn.answer if isinstance(part, str)))


def _encoder(system: System, config: ModelConfig, long_rows: str) -> tuple[Encoder, str]:
    folder = Path(config.version).expanduser()
    spec = system.tokens
    try:
        if not config.version or not folder.is_dir():
            raise FileNotFoundError(f"no folder {config.version!r}")
        choices = {"release": config.tokenization, "legacy": config.tokenizer_legacy}
        tokenizer = load_tokenizer(folder, spec, config.model_max_length or 10**9, **choices)
        limit = config.model_max_length
        unchecked = ""
    except (OSError, ValueError, KeyError) as error:
        usual = _backbone(config)[0].FAMILY
        family = family_for(template(config.conv_type or usual.template), usual)
        tokenizer = cast(PreTrainedTokenizerBase, OnlyTokens(spec, family))  # it has what Encoder calls
        limit = 0
        unchecked = f"the length of rows: the tokenizer of model.version is not on this machine ({error})"
    encoder = Encoder(
        tokenizer,
        spec,
        config.conv_type,
        limit,
        system.released.prompt_template,
        long_rows,
    )
    return encoder, unchecked


def _view(config: ModelConfig) -> LanguageView:
    """How the backbone sees an image, where its `config.json` is on this machine or its sizes are known by name; else
    CLIP's view of 256 tokens."""
    backbone, values = _backbone(config)
    try:
        return backbone.view_of(values, config)
    except (OSError, ValueError, KeyError, TypeError):
        return ClipView()


def _backbone(config: ModelConfig) -> tuple[type[VisionLanguageModel], dict[str, Any]]:
    """The backbone's class and its `config.json`, or what its name says where that cannot be read."""
    try:
        values = read_config(Path(config.version).expanduser())
        return vlm_class(values, config.version), values
    except (OSError, ValueError):
        values = released_config(config.version)
        return vlm_class(values, config.version), values
