"""From weights on disk to a SegModel: a base with a mask head's weights, a published assistant, or our own folder.

Nothing here knows a backbone or a mask head: their classes say what their files look like (model/vlm/base.py,
model/heads/base.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.tokens import TokenSpec, added_tokens, token_id
from data.views import LanguageView, Views
from model.checkpoints.architecture import Architecture
from model.checkpoints.bounds import check_sizes, naming_size_errors
from model.checkpoints.config_file import SECTION, read_config, saved_head
from model.checkpoints.files import read_tensors
from model.checkpoints.hub import fetch, fetch_folder
from model.checkpoints.layouts import LORA_WRAPPER, Report, reading_table, to_model_names
from model.checkpoints.lora_file import merge_factors, note_scale
from model.checkpoints.name_table import NameTable
from model.checkpoints.weight_source import WeightSource, untie
from model.heads import HEADS, HeadContext, MaskHead
from model.projection import Projection, new_weight
from model.seg_model import SegModel
from model.vlm import VLMS, VisionLanguageModel
from model.vlm.base import BackboneSizes
from utils import dist
from utils.config import ModelConfig
from utils.log import log
from utils.registry import unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEW_ROW_STD = 0.02  # of new vocabulary rows (lisa.md 2.3)
DEFAULT_VLM = "llava"  # of a config.json without model_type, as some old LLaVA files are


def build_model(
    config: ModelConfig, spec: TokenSpec, tokenizer: PreTrainedTokenizerBase, head: str = "sam", *, seed: int = 0
) -> SegModel:
    """The model that `config` names, on the CPU in its precision, with a row for every token of `tokenizer`.

    `config.version` is a base, which takes the mask head from `vision_pretrained` and gets a new text projection, or
    a finished assistant (published or our own), whose weights all count. `config.checkpoint_file`, a training program's
    full-model file, makes any base a finished assistant. A needed weight that is missing, or one without a place, is
    an error unless `allow_missing`.

    head: the mask head of the system. The one that a finished folder names in its `config.json` overrides it, and
    `config.mask_head` overrides both.
    """
    folder = fetch_folder(config.version)
    generator = torch.Generator().manual_seed(seed)
    where = str(folder / "config.json")
    # Weights before sizes: what `config.json` asks for is bounded by the weights that are there, and a part that lies
    # elsewhere may bring sizes of its own.
    with naming_size_errors(where):
        values = read_config(folder)
        backbone = vlm_class(values, where)
        head = choose_head(values, config, head)
        head_class = _head_class(head, where)
        _check_head(folder, saved_head(values), head)
        head_class.check_options(dict(config.head_options), config.image_size)
        check_parts(backbone, head_class, head, config)
        table = reading_table(backbone.WEIGHT_NAMES, head_class.WEIGHT_NAMES)
        source = _read(folder, values, table, backbone, head_class)
        if not source.finished and not config.allow_missing:
            _check_head(folder, _published_head(source.report.unexpected), head)
        options = _add_head(source, config, head_class)
        if config.checkpoint_file:
            _add_weight(source, fetch(config.checkpoint_file), table, backbone, head_class, config)
        source.check_numbers()
        _check_language(source, backbone)
        _fit_vocabulary(source, backbone, spec, tokenizer, generator, config.allow_missing)
        vlm_config, view = backbone.config_for(source, config, tokenizer)
        projection = projection_of(config)
        prompts = len(spec.mask) * projection.prompts
        context = _head_context(source, backbone.sizes(vlm_config), backbone.EMBEDDING, prompts, config)
        head_config = head_class.config_for(_head_tensors(source), options, context)
        architecture = Architecture(backbone.NAME, vlm_config, head, head_config, projection)
    check_sizes(architecture, source.tensors, where)
    attention = resolve_attention(config.attn_implementation, dtype_of(config.precision))
    added_ids = [token_id(tokenizer, token) for token in added_tokens(tokenizer.family, spec)]
    # on the meta device: no memory for values that the file's tensors replace
    with torch.device("meta"), naming_size_errors(where):
        model = assemble(architecture, attention, view, added_ids)
    model.read_states(spec)
    model.report = source.report
    _check_recipe(model, config)
    if not source.finished:
        source.fresh.extend(f"project.{name}" for name in model.project.state_dict())
    _init_head(source, model, options, seed)
    _fill(model, source, dtype_of(config.precision), generator, config.allow_missing)
    return model


def load_folder(
    folder: str | Path,
    spec: TokenSpec,
    tokenizer: PreTrainedTokenizerBase,
    head: str = "sam",
    config: ModelConfig | None = None,
) -> SegModel:
    """A finished assistant for inference, frozen: a published folder or one that `save_folder` wrote.

    `config` gives precision, attention, quantisation, decoder_heads and a vision tower for folders without one; its
    `version` is not read. A folder without a mask head is refused.
    """
    config = replace(config or ModelConfig(vision_tower=None), version=str(folder), vision_pretrained=None)
    model = build_model(config, spec, tokenizer, head).eval().requires_grad_(False)
    if config.load_in_4bit or config.load_in_8bit:
        from model.finetune.quantize import quantize  # bitsandbytes is optional

        quantize(model, bits=4 if config.load_in_4bit else 8)
    return model


def assemble(
    architecture: Architecture,
    attention: str = "sdpa",
    view: LanguageView | None = None,
    added_ids: Sequence[int] = (),
) -> SegModel:
    """An uninitialised model of this architecture. view: of the language side; None: the backbone's usual one."""
    # flash attention is the language model's alone: mask decoders attend with biases, which it does not take
    head_attention = "eager" if attention == "eager" else "sdpa"
    head = HEADS[architecture.head].build(architecture.head_config, head_attention)
    vlm = VLMS[architecture.vlm].build(architecture.vlm_config, attention, view)
    project = architecture.projection.build(vlm.hidden_size, head.prompt_dim)
    return SegModel(vlm, head, project, architecture=architecture, added_ids=added_ids)


def vlm_class(values: dict[str, Any], where: str) -> type[VisionLanguageModel]:
    """The backbone of a `config.json`. where: the file, for messages."""
    kind = str(values.get("model_type") or DEFAULT_VLM)
    # A system that wraps a backbone of the library gives the whole a name of its own, e.g. sa2va_chat; its vision part
    # still says which backbone that is.
    inner = str(values.get("vision_config", {}).get("model_type", "")).removesuffix("_vision")
    if kind not in VLMS and inner not in VLMS:
        raise ValueError(f"{where}: " + unknown(VLMS.kind, kind, VLMS))
    return VLMS[kind if kind in VLMS else inner]


def check_parts(
    backbone: type[VisionLanguageModel], head_class: type[MaskHead], head: str, config: ModelConfig
) -> None:
    """Raises where a backbone and a mask head do not go together, or where a recipe sets what the backbone does not
    have; before any weight is read."""
    if head_class.READS_TOWER and not backbone.KEEPS_LAYERS:
        others = [name for name in HEADS if not HEADS[name].READS_TOWER]
        raise ValueError(
            f"the mask head {head!r} decodes the hidden states of a vision tower that sees all images in one size, "
            f"which the backbone {backbone.NAME!r} does not have; choose model.mask_head from {', '.join(others)}"
        )
    for item in fields(config.tower):
        if getattr(config.tower, item.name) != item.default and item.name not in backbone.TOWER_FIELDS:
            raise ValueError(
                f"model.tower.{item.name}: the backbone {backbone.NAME!r} has no such setting; it has "
                f"{', '.join(sorted(backbone.TOWER_FIELDS))}"
            )


def projection_of(config: ModelConfig) -> Projection:
    """The recipe's text projection."""
    return Projection(config.text_projection, config.prompts_per_token)


def choose_head(values: dict[str, Any], config: ModelConfig, default: str) -> str:
    """The recipe's mask head, else the one that a finished folder's `config.json` (`values`) names, else `default`."""
    return config.mask_head or saved_head(values) or default


def views_for(model: SegModel) -> Views:
    """How the language side and the mask head see an image."""
    return Views(language=model.vlm.view, seg=model.head.view)


def dtype_of(precision: str) -> torch.dtype:
    return DTYPES[dist.precision(precision)]


def resolve_attention(name: str, dtype: torch.dtype) -> str:
    """`auto` is flash-attention 2 where it is installed and can run (GPU, 16 bit), else SDPA."""
    installed = importlib.util.find_spec("flash_attn") is not None
    if name == "flash_attention_2" and not installed:
        raise ImportError("attn_implementation=flash_attention_2 needs the flash-attn package (requirements-gpu.txt)")
    if name != "auto":
        return name
    return "flash_attention_2" if installed and torch.cuda.is_available() and dtype != torch.float32 else "sdpa"


def _head_class(name: str, where: str) -> type[MaskHead]:
    if name not in HEADS:
        raise ValueError(f"{where}: " + unknown(HEADS.kind, name, HEADS))
    return HEADS[name]


def _read(
    folder: Path, values: dict[str, Any], table: NameTable, backbone: type[VisionLanguageModel], head: type[MaskHead]
) -> WeightSource:
    report = Report()
    tensors = to_model_names(read_tensors(folder), table, report, head.IGNORED)
    untie(tensors, values, backbone.EMBEDDING, backbone.LM_HEAD)
    finished = any(name.startswith("head.") for name in tensors)
    return WeightSource(folder, values, tensors, report, finished)


def _published_head(unexpected: list[str]) -> str | None:
    """Published files name no head: whose names are the unexpected ones?"""
    return next((head for head in HEADS if _fits(unexpected, HEADS[head])), None)


def _check_head(folder: Path, saved: str | None, head: str) -> None:
    """Raises where the folder holds the weights of another mask head than `head`."""
    if saved not in (None, head):
        raise ValueError(
            f"{folder} holds the weights of the mask head {saved!r}, which do not fit {head!r}: remove "
            f"model.mask_head, or set it to {saved}; another head starts from a base model"
        )


def _fits(names: list[str], head: type[MaskHead]) -> bool:
    table = NameTable(head.WEIGHT_NAMES)
    return any(table.to_model(name.removeprefix(LORA_WRAPPER)) for name in names)


def _add_head(source: WeightSource, config: ModelConfig, head: type[MaskHead]) -> dict[str, Any]:
    """Adds the mask head's pretrained weights to those of a base. Returns the options of the head."""
    options = dict(config.head_options)
    random = head.starts_random(options)
    if config.vision_pretrained and random and head.NEEDS_WEIGHTS and not source.finished:
        raise ValueError(
            f"model.head_options.from_scratch: the mask head starts from random weights, so {config.vision_pretrained} "
            "would not be read; set model.vision_pretrained=null"
        )
    if config.vision_pretrained and (source.finished or random):
        log.info("the mask head of %s takes nothing from %s: it is not read", source.folder, config.vision_pretrained)
    if source.finished or random:
        return options
    if config.vision_pretrained:
        try:
            tensors, options = head.read_weights(fetch(config.vision_pretrained), options)
        except ValueError as error:
            raise ValueError(f"model.vision_pretrained={config.vision_pretrained}: {error}") from None
        source.tensors.update({f"head.{name}": tensor for name, tensor in tensors.items()})
    elif not config.checkpoint_file:
        raise ValueError(
            f"{source.folder} is a base model without a mask head: name the head's weights in model.vision_pretrained "
            "(--vision_pretrained), e.g. sam_vit_h_4b8939.pth"
        )
    return options


def _add_weight(
    source: WeightSource,
    file: Path,
    table: NameTable,
    backbone: type[VisionLanguageModel],
    head: type[MaskHead],
    config: ModelConfig,
) -> None:
    """A training program's file counts before everything else; what it lacks (frozen parts) stays the folder's."""
    alpha = config.lora.alpha if config.checkpoint_alpha is None else config.checkpoint_alpha
    try:
        read = read_tensors(file)
        merged = merge_factors(read, alpha)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    note_scale(file, read, alpha, rank=config.lora.r if config.checkpoint_alpha is None else None)
    tensors = to_model_names(merged, table, source.report, head.IGNORED)
    # else the output layer of the base, from before the training, would stay
    untie(tensors, source.values, backbone.EMBEDDING, backbone.LM_HEAD)
    source.tensors.update(tensors)
    source.finished = True
    source.weight = file


def _check_language(source: WeightSource, backbone: type[VisionLanguageModel]) -> None:
    absent = [name for name in (backbone.EMBEDDING, backbone.LM_HEAD) if name not in source.tensors]
    if absent:
        strange = f"; strange names there: {', '.join(source.report.unexpected[:3])}, ..."
        hint = strange if source.report.unexpected else ""
        raise ValueError(f"{source.blamed} has no language model: {', '.join(absent)} missing{hint}")


def _fit_vocabulary(
    source: WeightSource,
    backbone: type[VisionLanguageModel],
    spec: TokenSpec,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
    lenient: bool,
) -> None:
    """Embedding and output rows for the tokenizer's ids. A base grows; a finished model must fit already.

    Of most families, a model has exactly one row per id. A family whose matrices are padded (`TokenizerFamily.padded`,
    Qwen: 151,936 rows for 151,669 ids) keeps its rows, as published, and they grow only where the tokenizer outgrows
    them. What the rows beyond the tokenizer predict is left to the weights, as in every program that runs such a model:
    the base has learned not to, and such an id decodes to nothing (`data.tokens.decode`).

    A base's rows for the tokens that the system adds are initialised with NEW_ROW_STD, also where the padding has rows
    for them: those were never trained as inputs, and as outputs all of them were only pushed down. (The releases of
    Sa2VA and UniPixel start from them; sa2va.md 4.1, unipixel.md 2.)
    """
    embedding, lm_head = source.tensors[backbone.EMBEDDING], source.tensors[backbone.LM_HEAD]
    rows, size, padded = len(embedding), len(tokenizer), tokenizer.family.padded
    if (most := max(tokenizer.get_vocab().values())) >= size:
        raise ValueError(f"{source.folder}: the tokenizer's ids go up to {most}, but it has only {size} tokens")
    # In a padded matrix the number of rows says nothing about tokens, so the folder's own tokenizer must have them; a
    # bare weight file has no tokenizer.
    known = tokenizer.own_size if padded and not source.weight else rows
    strange = [t for t in added_tokens(tokenizer.family, spec) if token_id(tokenizer, t) >= min(known, rows)]
    if source.finished and strange and not lenient:
        raise ValueError(
            f"{source.blamed} is a checkpoint of another system: its vocabulary of {min(known, rows)} rows has no "
            f"{', '.join(strange)}; choose the system it was trained with"
        )
    wanted = max(rows, size) if padded else size
    counts = {"embedding": rows, "output": len(lm_head)}
    wrong = [f"{count} {kind} rows" for kind, count in counts.items() if count != wanted]  # the first says enough
    if source.finished and wrong and not lenient:
        raise ValueError(
            f"{source.blamed}: wrong vocabulary size, {wrong[0]} for a tokenizer of {size} tokens; "
            "its tokenizer files belong to another checkpoint"
        )
    for name, table in ((backbone.EMBEDDING, embedding), (backbone.LM_HEAD, lm_head)):
        old = min(len(table), size if source.finished else tokenizer.own_size)
        new = torch.randn(max(0, size - old), table.shape[1], generator=generator) * NEW_ROW_STD
        if len(new) or len(table) != wanted:
            source.tensors[name] = torch.cat([table[:old], new.to(table.dtype), table[size:wanted]])


def _head_tensors(source: WeightSource) -> dict[str, Tensor]:
    """The mask head's weights under its own names."""
    return {name.removeprefix("head."): value for name, value in source.tensors.items() if name.startswith("head.")}


def _head_context(
    source: WeightSource, sizes: BackboneSizes, embedding: str, tokens: int, config: ModelConfig
) -> HeadContext:
    """What the mask head's class makes its configuration of, in addition to the shapes of the weights."""
    saved = source.values.get(SECTION, {}).get("head_config") if source.finished else None
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(f"{source.where}: {SECTION}.head_config must be a mapping of sizes, got {saved!r}")
    width = source.tensors[embedding].shape[1]
    return HeadContext(sizes.tower_width, sizes.tower_layers, width, tokens, saved, config.image_size)


def _init_head(source: WeightSource, model: SegModel, options: dict[str, Any], seed: int) -> None:
    """A mask head that starts from no file, or what options add to a finished one, as its class initialises it."""
    head = HEADS[model.architecture.head]
    absent = [name for name in model.state_dict() if name.startswith("head.") and name not in source.tensors]
    new = [name for name in absent if not source.finished or name.removeprefix("head.") in head.OPTIONAL_WEIGHTS]
    if not head.starts_random(options) or not new:
        return
    # on a fork: how the head is initialised must not move the random numbers of the rest of the program
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = head.build(model.architecture.head_config, "sdpa").state_dict()
    source.tensors.update({name: initial[name.removeprefix("head.")] for name in new})
    source.fresh.extend(new)


def _check_recipe(model: SegModel, config: ModelConfig) -> None:
    """Sizes that the recipe repeats must be those of the weights."""
    if config.out_dim not in (None, model.head.prompt_dim):
        raise ValueError(f"model.out_dim is {config.out_dim}, the mask decoder takes {model.head.prompt_dim}")
    view = model.head.view
    if view is not None and config.image_size not in (None, view.size):
        raise ValueError(f"model.image_size is {config.image_size}, the mask encoder takes {view.size}")
    model.head.check_view(model.vlm.view)


def _fill(model: SegModel, source: WeightSource, dtype: torch.dtype, generator: torch.Generator, lenient: bool) -> None:
    """Puts the weights in place of the meta tensors; what was missing or unexpected goes to the report."""
    wanted, report = model.state_dict(), source.report
    report.unexpected.extend(name for name in source.tensors if name not in wanted)
    absent = [name for name in wanted if name not in source.tensors]
    report.fresh = [name for name in wanted if name in source.fresh]
    report.missing = [name for name in absent if name not in source.fresh]
    if (report.missing or report.unexpected) and not lenient:
        raise ValueError(report.complaint(source.blamed))
    state = {name: source.tensors[name] for name in wanted if name in source.tensors}
    report.mapped = len(state.keys() - set(source.fresh))
    wrong = [
        f"{name} {tuple(tensor.shape)} for {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(f"{source.blamed}: shapes differ from the sizes in config.json: {'; '.join(wrong[:8])}")
    width = model.vlm.hidden_size
    # in the order of the state dict, so that a seed keeps its meaning whatever the file's own order is
    state |= {name: _init_weight(name, tuple(wanted[name].shape), width, generator) for name in absent}
    # assigned, not copied: a memory-mapped tensor of the right precision is never read before it is used
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    model.vlm.reset_buffers()
    model.head.reset_buffers()
    log.info("%s: %s", source.folder, report)


def _init_weight(name: str, shape: tuple[int, ...], width: int, generator: torch.Generator) -> Tensor:
    """A new weight: the text projection's, for states of this width, as it says itself; normalisation as the identity;
    others small."""
    if name.startswith("project."):
        return new_weight(name, shape, width, generator)
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape, generator=generator) * NEW_ROW_STD
