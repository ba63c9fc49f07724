"""From weights on disk to a SegModel: a base LLaVA with a SAM, a published assistant, or one of our own folders."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, list_repo_files, snapshot_download
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerBase

from data.tokens import TokenSpec, token_id
from data.views import LanguageView, Views
from model.checkpoints.architecture import (
    SECTION,
    Architecture,
    feature_layer,
    language_sizes,
    projector_depth,
    projector_width,
    read_config,
    tower_name,
    tower_sizes,
)
from model.checkpoints.bounds import check_sizes, laying_out
from model.checkpoints.files import read_tensors
from model.checkpoints.layouts import Report, reading_table, to_model_names, tower_to_model_names
from model.checkpoints.lora_file import merge_factors
from model.heads import HEADS, HeadContext
from model.seg_model import SegModel, text_mlp
from model.vlm.llava import Llava
from model.vlm.tower import TowerInput, fit_tower, tower_input, tower_view
from utils.config import ModelConfig
from utils.log import log
from utils.plain import leaves

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
NEW_ROW_STD = 0.02  # of new vocabulary rows (lisa.md 2.3)
NEW_DEPTH, NEW_GROWTH = 2, 2  # of a new projector: layers, and the width between them in widths of the language model
_EMBED, _LM_HEAD = "vlm.language.model.embed_tokens.weight", "vlm.language.lm_head.weight"


def build_model(
    config: ModelConfig, spec: TokenSpec, tokenizer: PreTrainedTokenizerBase, head: str = "sam", *, seed: int = 0
) -> SegModel:
    """The model that `config` names, on the CPU in its precision, with a row for every token of `tokenizer`.

    `config.version` is a base LLaVA (Hugging Face's or the original layout), which takes the mask head from
    `vision_pretrained` and gets a new text MLP, or a finished assistant (published or our own), whose weights all
    count. `config.checkpoint_file`, a training program's whole-model file, makes any base a finished assistant. A
    needed weight that is missing, or one without a place, is an error unless `allow_missing`.
    """
    folder = fetch(config.version)
    generator, where = torch.Generator().manual_seed(seed), str(folder / "config.json")
    with laying_out(where):
        source = _read(folder, config, head)
        for step in (_add_head, _add_weight, _add_tower, _drop_projector):
            source = step(source, config)
        _fit_vocabulary(source, spec, tokenizer, generator, config.allow_missing)
        architecture = _architecture(source, tokenizer, len(spec.mask))
    check_sizes(architecture, source.tensors, where)
    attention = resolve_attention(config.attn_implementation, config.precision)
    added_ids = [token_id(tokenizer, token) for token in spec.all_added]
    with torch.device("meta"), laying_out(where):
        model = assemble(architecture, attention, source.view, added_ids)
    model.report = source.report
    _check_sizes(model, config)
    _init_head(source, model, seed)
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
    """An uninitialised model of these sizes. view: of the vision tower; None: CLIP's at the tower's side."""
    head = HEADS[architecture.head].build(architecture.head_config, "eager" if attention == "eager" else "sdpa")
    vlm = Llava.build(
        CLIPVisionConfig(**architecture.tower),
        LlamaConfig(**architecture.language),
        projector_depth=architecture.projector_depth,
        projector_width=architecture.projector_width,
        feature_layer=architecture.feature_layer,
        pool=architecture.tower_input.get("pool", 1),
        attention=attention,
        view=view,
    )
    project = text_mlp(vlm.hidden_size, head.prompt_dim)
    return SegModel(vlm, head, project, architecture=architecture, added_ids=added_ids)


def views_for(model: SegModel) -> Views:
    """How the language side and the mask head see an image."""
    return Views(language=model.vlm.view, seg=model.head.view)


def dtype_of(precision: str) -> torch.dtype:
    return DTYPES[precision]


def resolve_attention(name: str, precision: str) -> str:
    """`auto` is flash-attention 2 where it is installed and can run (GPU, 16 bit), else SDPA."""
    installed = importlib.util.find_spec("flash_attn") is not None
    if name == "flash_attention_2" and not installed:
        raise ImportError("attn_implementation=flash_attention_2 needs the flash-attn package (requirements-gpu.txt)")
    if name != "auto":
        return name
    return "flash_attention_2" if installed and torch.cuda.is_available() and precision != "fp32" else "sdpa"


def fetch(name: str | Path) -> Path:
    """The folder `name`, or its copy from the hub when it reads like `owner/repository`."""
    if not str(name):
        raise ValueError("model.version is empty: give the folder or hub name of a LLaVA or of a finished assistant")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if len(path.parts) != 2 or path.suffix in (".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(f"no file or folder {name}")
    try:
        return _download(str(name))
    except Exception as error:  # the hub's client raises many kinds
        raise FileNotFoundError(f"no folder {name} here, and the hub did not give it: {error}") from error


def _download(name: str) -> Path:
    """Weights once: pickles only where there are no safetensors. Offline, whatever the cache has."""
    files = [] if constants.HF_HUB_OFFLINE else list_repo_files(name)
    twice = ["*.bin"] if any(file.endswith(".safetensors") for file in files) else None
    return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=twice))


@dataclass
class _Source:
    """Weights under our names with what was learnt about them on the way."""

    folder: Path
    values: dict[str, Any]  # config.json
    head: str
    tensors: dict[str, Tensor]
    report: Report
    finished: bool  # it holds a mask head: an assistant, not a base
    options: dict[str, Any]  # of the head
    tower_input: TowerInput
    tower: dict[str, Any] | None = None  # sizes
    tower_name: str | None = None
    view: LanguageView | None = None
    fresh: list[str] = field(default_factory=list)
    weight: Path | None = None  # the file of model.checkpoint_file, which counts before the folder's own weights

    @property
    def blamed(self) -> str:
        """Whose weights they are, for messages."""
        return f"{self.weight} (model.checkpoint_file, over {self.folder})" if self.weight else str(self.folder)


def _read(folder: Path, config: ModelConfig, head: str) -> _Source:
    values, report = read_config(folder), Report()
    tensors = to_model_names(read_tensors(folder), reading_table(HEADS[head].WEIGHT_NAMES), report)
    if _LM_HEAD not in tensors and _EMBED in tensors and values.get("text_config", values).get("tie_word_embeddings"):
        tensors[_LM_HEAD] = tensors[_EMBED].clone()
    finished = any(name.startswith("head.") for name in tensors)
    view = tower_input(values, config.tower)
    return _Source(folder, values, head, tensors, report, finished, dict(config.head_options), view)


def _add_head(source: _Source, config: ModelConfig) -> _Source:
    head = HEADS[source.head]
    if (source.finished or not head.NEEDS_WEIGHTS) and config.vision_pretrained:
        log.info("the mask head of %s takes nothing from %s: it is not read", source.folder, config.vision_pretrained)
    if source.finished:
        return source
    source.fresh += ["project.0.weight", "project.0.bias", "project.2.weight", "project.2.bias"]
    if not head.NEEDS_WEIGHTS:
        return source
    if not config.vision_pretrained:
        if config.checkpoint_file:
            return source
        raise ValueError(
            f"{source.folder} is a base model without a mask head: name the head's weights in model.vision_pretrained "
            "(--vision_pretrained), e.g. sam_vit_h_4b8939.pth"
        )
    read, source.options = head.read_weights(fetch(config.vision_pretrained), source.options)
    source.tensors.update({f"head.{name}": tensor for name, tensor in read.items()})
    return source


def _add_weight(source: _Source, config: ModelConfig) -> _Source:
    """A training program's file counts before everything else; what it lacks (frozen parts) is kept."""
    if not config.checkpoint_file:
        return source
    file = fetch(config.checkpoint_file)
    try:
        merged = merge_factors(read_tensors(file), config.lora.alpha)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    source.tensors.update(to_model_names(merged, reading_table(HEADS[source.head].WEIGHT_NAMES), source.report))
    source.finished, source.fresh, source.weight = True, [], file
    return source


def _add_tower(source: _Source, config: ModelConfig) -> _Source:
    """The tower inside the folder counts; one outside gives what is lacking (sizes, weights, picture settings)."""
    inside = any(name.startswith("vlm.tower.") for name in source.tensors)
    source.tower_name = tower_name(source.values)
    folder = source.folder if "vision_config" in source.values and inside else _find_tower(source, config)
    if not inside:
        source.tensors.update(tower_to_model_names(read_tensors(folder), source.report))
    values = source.values if folder == source.folder else read_config(folder)
    source.tower = fit_tower(tower_sizes(values), source.tensors, source.tower_input)
    source.view = tower_view(folder, source.tower["image_size"], source.tower_input, config.tower.preprocessor)
    return source


def _find_tower(source: _Source, config: ModelConfig) -> Path:
    """Folders before hub names, the recipe's before the one that `config.json` names (beside it or anywhere)."""
    named = source.tower_name
    if not config.vision_tower and leaves(named):
        raise ValueError(
            f"{source.folder / 'config.json'} names the vision tower {named!r}, which lies outside the folder: give "
            "the tower yourself (--vision_tower, model.vision_tower)"
        )
    local = [config.vision_tower, named and source.folder / named, named]
    for place in local:
        if place and (Path(place) / "config.json").is_file():
            return Path(place)
    name = config.vision_tower or named
    if not name:
        raise ValueError(f"{source.folder} holds no vision tower and names none: set model.vision_tower")
    if named and name != named:
        log.warning("%s was made with the vision tower %s; model.vision_tower=%s is used", source.folder, named, name)
    source.tower_name = str(name)
    try:
        return fetch(name)
    except FileNotFoundError as error:
        who = "model.vision_tower names" if config.vision_tower else f"{source.folder / 'config.json'} names"
        raise FileNotFoundError(
            f"{who} the vision tower {name}, which is not here ({error}); say where it is with --vision_tower "
            "(model.vision_tower): a folder, or a hub name like openai/clip-vit-large-patch14"
        ) from None


def _drop_projector(source: _Source, config: ModelConfig) -> _Source:
    """A base's projector may make way for a new, wider one."""
    if config.tower.new_projector and not source.finished:
        old = [name for name in source.tensors if name.startswith("vlm.projector.")]
        source.report.ignored += old
        source.tensors = {name: tensor for name, tensor in source.tensors.items() if name not in old}
        source.fresh += [f"vlm.projector.{2 * i}.{kind}" for i in range(NEW_DEPTH) for kind in ("weight", "bias")]
    return source


def _fit_vocabulary(
    source: _Source, spec: TokenSpec, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator, lenient: bool
) -> None:
    """Embedding and output rows for exactly the tokenizer's ids. A base grows; a finished model must fit already."""
    if _EMBED not in source.tensors or _LM_HEAD not in source.tensors:
        absent = [name for name in (_EMBED, _LM_HEAD) if name not in source.tensors]
        raise ValueError(f"{source.blamed} has no language model: {', '.join(absent)} missing")
    rows, size = len(source.tensors[_EMBED]), len(tokenizer)
    if (most := max(tokenizer.get_vocab().values())) >= size:
        raise ValueError(f"{source.folder}: the tokenizer's ids go up to {most}, but it has only {size} tokens")
    strange = [token for token in spec.all_added if token_id(tokenizer, token) >= rows]
    if source.finished and strange and not lenient:
        raise ValueError(
            f"{source.blamed} is a checkpoint of another system: its vocabulary of {rows} rows has no "
            f"{', '.join(strange)}; choose the system it was trained with"
        )
    tables = {"embedding": rows, "output": len(source.tensors[_LM_HEAD])}
    wrong = [f"{count} {kind} rows" for kind, count in tables.items() if count != size]  # the first says enough
    if source.finished and wrong and not lenient:
        raise ValueError(
            f"{source.blamed}: wrong vocabulary size, {wrong[0]} for a tokenizer of {size} tokens; "
            "its tokenizer files belong to another checkpoint"
        )
    for name in (_EMBED, _LM_HEAD):
        table = source.tensors[name]
        new = torch.randn(max(0, size - len(table)), table.shape[1], generator=generator) * NEW_ROW_STD
        source.tensors[name] = torch.cat([table[:size], new.to(table.dtype)]) if len(table) != size else table


def _architecture(source: _Source, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Architecture:
    where = str(source.folder / "config.json")
    told = source.values.get(SECTION, {}).get("head_config") if source.finished else None
    if told is not None and not isinstance(told, dict):
        raise ValueError(f"{where}: {SECTION}.head_config must be a mapping of sizes, got {told!r}")
    parts = {name.removeprefix("head."): value for name, value in source.tensors.items() if name.startswith("head.")}
    width = source.tensors[_EMBED].shape[1]
    new = "vlm.projector.0.weight" in source.fresh
    host = HeadContext(source.tower["hidden_size"], source.tower["num_hidden_layers"], width, tokens, told)
    return Architecture(
        language=language_sizes(source.values, tokenizer, where),
        tower=source.tower,
        projector_depth=NEW_DEPTH if new else projector_depth(source.tensors, where),
        projector_width=NEW_GROWTH * width if new else projector_width(source.tensors),
        feature_layer=feature_layer(source.values, where),
        head=source.head,
        head_config=HEADS[source.head].config_for(parts, source.options, host),
        tower_input=asdict(source.tower_input),
        tower_name=source.tower_name,
    )


def _init_head(source: _Source, model: SegModel, seed: int) -> None:
    """A mask head that starts from no file, or what options add to a finished one, as its class draws it."""
    head = HEADS[source.head]
    absent = [name for name in model.state_dict() if name.startswith("head.") and name not in source.tensors]
    new = [name for name in absent if not source.finished or name.removeprefix("head.") in head.OPTIONAL_WEIGHTS]
    if head.NEEDS_WEIGHTS or not new:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = head.build(model.architecture.head_config, "sdpa").state_dict()
    source.tensors |= {name: drawn[name.removeprefix("head.")] for name in new}
    source.fresh += new


def _check_sizes(model: SegModel, config: ModelConfig) -> None:
    """Sizes that the recipe repeats must be those of the weights."""
    if config.out_dim not in (None, model.head.prompt_dim):
        raise ValueError(f"model.out_dim is {config.out_dim}, the mask decoder takes {model.head.prompt_dim}")
    view = model.head.view
    if view and config.image_size not in (None, view.size):
        raise ValueError(f"model.image_size is {config.image_size}, the mask encoder takes {view.size}")
    model.head.check_view(model.vlm.view)


def _fill(model: SegModel, source: _Source, dtype: torch.dtype, generator: torch.Generator, lenient: bool) -> None:
    """Puts the weights in place of the meta tensors; the report tells what was not so."""
    wanted, report = model.state_dict(), source.report
    report.unexpected += [name for name in source.tensors if name not in wanted]
    absent = [name for name in wanted if name not in source.tensors]
    report.fresh = [name for name in wanted if name in source.fresh]
    report.missing = [name for name in absent if name not in source.fresh]
    if (report.missing or report.unexpected) and not lenient:
        raise ValueError(_complaint(source.blamed, report))
    state = {name: source.tensors[name] for name in wanted if name in source.tensors}
    report.mapped = len(state.keys() - set(source.fresh))
    wrong = [
        f"{n} {tuple(t.shape)} for {tuple(wanted[n].shape)}" for n, t in state.items() if t.shape != wanted[n].shape
    ]
    if wrong:
        raise ValueError(f"{source.blamed}: shapes differ from the sizes in config.json: {'; '.join(wrong[:8])}")
    bound = 1 / math.sqrt(model.vlm.hidden_size)
    state |= {name: _init_weight(name, tuple(wanted[name].shape), bound, generator) for name in absent}
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    model.vlm.reset_buffers()
    log.info("%s: %s", source.folder, report)


def _init_weight(name: str, shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """A new weight: the text MLP within `bound` as torch draws linears, normalisation as identity, others small."""
    if name.startswith("project."):
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape, generator=generator) * NEW_ROW_STD


def _complaint(blamed: str, report: Report) -> str:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")

    parts = [f"{blamed}: the weights do not fit the model"]
    parts += [f"missing: {listed(report.missing)}"] if report.missing else []
    parts += [f"unexpected: {listed(report.unexpected)}"] if report.unexpected else []
    return "; ".join(parts) + " (model.allow_missing=true, --allow_missing, goes on and draws the missing ones anew)"
