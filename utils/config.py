"""Recipes: frozen dataclasses, YAML, dotted overrides. The resolved recipe is saved in the run folder and read back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.files import write_whole
from utils.plain import leaves, parse_yaml, read_yaml
from utils.registry import unknown

LARGEST_SEED = 2**32 - 1
SAYS_OFF = ("data.exclude_val",)  # fields with the choice "off"


def within(default: Any, low: float | None, high: float | None = None, *, above: bool = False, below: bool = False):
    """A field whose number must lie in low .. high (None: no end there); above, below: the end itself is out. Checked
    when a recipe is read, before anything is loaded."""
    return field(default=default, metadata={"range": (low, high, above, below)})


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the language model's linears; r = 0 turns it off, below 0 the layers train in full instead."""

    r: int = 8
    alpha: int = within(16, 1)
    dropout: float = within(0.05, 0, 1, below=True)
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class TowerConfig:
    """How the vision tower sees a picture. None: as the weights' folder tells, else as the tower was made."""

    size: int | None = within(None, 1)  # side of its view; for another than its own the position table is resized
    pad: bool | None = None  # show the whole picture, with padding that no one attends to, not its centre
    stats: str | None = None  # that normalise a padded view: sam (as released) | tower (its own)
    pool: int | None = within(None, 1)  # so many patches a side are averaged to one image token
    positions: str | None = None  # how the table is resized: released (off by one row) | correct
    preprocessor: str | None = None  # image-processor file: its size, and mean and deviation where nothing is padded
    new_projector: bool = False  # a base's projector makes way for a new one: two layers, twice the width between
    train_projector: bool = False
    train: bool = False  # the tower itself, which all published systems keep frozen


@dataclass(frozen=True)
class CacheConfig:
    """Embeddings of the frozen mask encoder, kept on disk (fp16, 2 MiB a picture) for later epochs and evaluations.

    Evaluation keeps them only where its own command line says so.
    """

    folder: str  # processes and runs may share it
    max_gib: float = within(20.0, 0, above=True)  # what was not used for longest goes first


@dataclass(frozen=True)
class ModelConfig:
    version: str = ""  # base LLaVA or a finished checkpoint: a folder, or a name on the hub
    vision_tower: str | None = "openai/clip-vit-large-patch14"  # CLIP folder; None: the one inside or named by version
    weight: str | None = None  # a whole training file over version's weights (a bare .bin; its LoRA has lora.alpha)
    mask_head: str | None = None  # sam | pixel, over any system; None: the system's own
    vision_pretrained: str | None = None  # SAM weights (file or folder); None: those inside version
    conv_type: str = "llava_v1"
    tokenization: str | None = None  # whose ids: transformers-4.31 | transformers-4.44; None: the folder's, else 4.31
    tokenizer_legacy: bool | None = True  # a blank before text that follows a token; None: as the folder's files say
    model_max_length: int = within(512, 0)  # longest row after image expansion that may be trained on; 0: no limit
    image_size: int | None = within(None, 1)  # mask-side view; None: what the mask encoder was built for (SAM: 1024)
    out_dim: int | None = within(None, 1)  # width of the mask prompt; None: what the mask decoder takes (SAM: 256)
    precision: str = "bf16"  # fp32 | bf16 | fp16
    attn_implementation: str = "auto"  # auto | sdpa | eager | flash_attention_2
    pack_rows: bool = True  # rows of one picture share what they begin with (flash attention: they lose padding only)
    pack_length: int = within(
        0, 0
    )  # with pack_rows: pictures share a sequence up to so many positions; 0: each has its own
    use_mm_start_end: bool = True
    train_mask_decoder: bool = True
    train_language: bool = True  # without LoRA (lora.r = 0): train the language model in full, not its vocabulary alone
    train_vocabulary: str = "full"  # full (published): every row in and out | new_tokens: those the system adds
    gradient_checkpointing: bool = True  # the language model's layers are computed again in the backward pass
    decoder_checkpointing: bool = True  # masks are drawn again in it: 100 MB less a mask (fp32)
    compile: str = ""  # backend of torch.compile for the language model's layers in training, e.g. inductor; "": none
    liger: bool = False  # Liger's kernels in the language model's layers in training (NVIDIA GPU)
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    allow_missing: bool = False  # go on when a checkpoint lacks a needed weight or has unexpected ones
    decoder_heads: int = within(8, 1)  # heads of the mask decoder (not readable from tensor shapes)
    embedding_cache: CacheConfig | None = None  # None: every picture is encoded anew
    tower: TowerConfig = TowerConfig()
    head: dict[str, Any] = field(default_factory=dict)  # options of the mask head
    lora: LoraConfig = LoraConfig()


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a task: a name in SOURCES with its rate inside the task and its own options."""

    source: str
    rate: float = within(1.0, 0)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskConfig:
    """One task of the mixture (sem_seg, refer_seg, vqa, reason_seg, or any name) with its rate and its sets."""

    task: str
    sets: tuple[DatasetConfig, ...]
    rate: float = within(1.0, 0)


@dataclass(frozen=True)
class SuiteConfig:
    """A benchmark of one's own: a source with options (all of them: none are taken from the mixture), and its metric.

    present_only: ask about what is there, though the data also ask about what is not.
    """

    name: str  # to be used in suites and final_suites
    source: str  # a name in SOURCES, alone or with its split
    metric: str  # a name in SCORERS
    options: dict[str, Any] = field(default_factory=dict)
    present_only: bool = False


@dataclass(frozen=True)
class DataConfig:
    dataset_dir: str = "./dataset"
    mixture: tuple[TaskConfig, ...] = ()
    on_bad_sample: str = "raise"  # raise | skip (skipped ones are counted and reported)
    long_rows: str = "error"  # beyond model_max_length: error | cut (as most released) | cut_rounds | keep (LaSagnA)
    workers: int = within(4, 0)
    prefetch: int = within(2, 1)  # batches that each worker keeps ready
    val_workers: int = within(2, 0)
    exclude_val: str = "off"  # off | eval_suites | refer_family | cross_refer: whose pictures are not trained on
    index_dir: str | None = None  # where annotation indexes are kept; None: ASSISTANT_INDEX_DIR, else in dataset_dir
    sampling: str = "rates"  # rates: draw by the rates for ever | once: every record once an epoch, rates but 0 ignored


@dataclass(frozen=True)
class LossConfig:
    ce: float = within(1.0, 0)
    dice: float = within(0.5, 0)
    bce: float = within(2.0, 0)
    mask_size: str = "full"  # where masks are compared: full (published: the picture's pixels) | decoder (its cells)
    ignore_region: bool = False  # published: ignored pixels are background in training
    refinement: str = "none"  # of bce, where a question's masks overlap: none (released) | paper | overlap_only
    alpha: float = within(2.0, 0)  # refinement paper: weight of such pixels
    refused: str = "excluded"  # excluded | counted (published: constant masks beside the true ones of a picture)


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = within(10, 1)
    steps_per_epoch: int | None = within(
        None, 1
    )  # None: 500, as released; with data.sampling once, what visits every record
    batch_size: int = within(2, 1)  # pictures a device
    grad_accumulation_steps: int = within(10, 1)
    lr: float = within(3e-4, 0, above=True)
    beta1: float = within(0.9, 0, 1, below=True)
    beta2: float = within(0.95, 0, 1, below=True)
    weight_decay: float = within(0.0, 0)
    warmup_steps: int = within(100, 0)
    clip: float = within(1.0, 0)
    zero_stage: int = 2  # 0 | 1 | 2 | 3: what DeepSpeed divides among the processes (in half precision 0 is 1)
    offload: str = "none"  # to the CPU's memory: none | optimizer (with zero_stage 1 to 3) | all (with 3: weights, too)
    zero_options: dict[str, Any] = field(default_factory=dict)  # further fields of DeepSpeed's zero_optimization
    timeout_minutes: float = within(60.0, 0, above=True)  # how long processes wait for one another before they give up
    on_bad_loss: str = "stop"  # at a loss that is no number: stop | skip (all processes draw other pictures; counted)
    seed: int = within(0, 0, LARGEST_SEED)
    print_freq: int = within(1, 1)
    auto_resume: bool = True
    resume: str | None = None
    keep_checkpoints: int = within(2, 1)  # newest ones kept beside the best
    save_steps: int = within(0, 0)  # also save every so many steps; 0: after each epoch only
    time_limit_minutes: float = within(0.0, 0)  # stop and save cleanly after so long; 0: no limit


@dataclass(frozen=True)
class EvalConfig:
    suites: tuple[str, ...] = ("ReasonSeg|val",)  # validation; the first one decides which checkpoint is best
    final_suites: tuple[str, ...] = ()  # also scored after the last step, and by eval_only
    custom: tuple[SuiteConfig, ...] = ()  # suites of one's own, beside those of `test_sem.py --list`
    final_eval: bool = True
    every_epochs: int = within(1, 1)
    no_eval: bool = False
    eval_only: bool = False
    protocol: str = "teacher_forced"  # teacher_forced | generate
    limit: int = within(0, 0)  # pictures a suite; 0: all
    pictures: int = within(4, 0)  # of the first suite, drawn at each validation with predicted and true masks; 0: none
    batch_size: int = within(1, 1)
    max_new_tokens: int = within(512, 1)
    best_by: str = "gIoU"


@dataclass(frozen=True)
class RunConfig:
    log_base_dir: str = "./runs"
    exp_name: str = "run"
    tensorboard: bool = True
    wandb: str | None = None  # project on Weights & Biases (pip install wandb) that the run also reports to

    @property
    def folder(self) -> Path:
        return Path(self.log_base_dir) / self.exp_name


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs, saved as `recipe.yaml` in its folder. `options` go to the system (a name in SYSTEMS)."""

    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Builds a (nested) dataclass from plain values; an unknown key or a wrong type raises and names its place."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or cls.__name__}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(unknown(f"field in {where or 'the recipe'}", key, hints))
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where}: needs {', '.join(missing)}; its fields are {', '.join(hints)}")
    made = cls(**{key: _cast(value, hints[key], f"{where}.{key}".lstrip(".")) for key, value in values.items()})
    for entry in dataclasses.fields(cls):
        if "range" in entry.metadata and (value := getattr(made, entry.name)) is not None:
            _check_range(value, *entry.metadata["range"], f"{where}.{entry.name}".lstrip("."))
    if cls is RunConfig:
        _check_run(made, where)
    return made


def _check_range(value: float, low: float | None, high: float | None, above: bool, below: bool, where: str) -> None:
    inside = (low is None or value > low or (value == low and not above)) and (
        high is None or value < high or (value == high and not below)
    )
    if not (inside and math.isfinite(value)):
        ends = [] if low is None else [f"above {low}" if above else f"{low} or more"]
        ends += [] if high is None else [f"below {high}" if below else f"at most {high}"]
        raise ValueError(f"{where}: {value!r} is out of range; it must be {' and '.join(ends)}")


def _check_run(run: RunConfig, where: str) -> None:
    """A run folder of its own below the folder of all runs."""
    parts = Path(run.exp_name).parts
    if not run.exp_name.strip() or not parts or leaves(run.exp_name):
        raise ValueError(
            f"{where}.exp_name: {run.exp_name!r} names no folder below run.log_base_dir; give the run a name "
            "(--exp_name), such as lisa-7b"
        )
    if not run.log_base_dir.strip():
        raise ValueError(f"{where}.log_base_dir is empty; name the folder of all runs, such as ./runs")


def _cast(value: Any, kind: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _cast(value, next(arg for arg in args if arg is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_cast(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict or kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if kind is DatasetConfig and isinstance(value, str):  # `- ade20k` is short for `- {source: ade20k}`
            value = {"source": value}
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(float, value, where)
    if kind is int and isinstance(value, str):
        return _number(int, value, where)
    if kind is str and value is False and where in SAYS_OFF:  # how YAML reads a bare off
        return "off"
    if kind is str and not isinstance(value, (str, Path)):
        raise ValueError(f"{where}: expected str, got {value!r} ({type(value).__name__}); write text in quotes")
    if kind is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _number(kind: type, value: Any, where: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}") from None


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain values (lists, not tuples) that YAML and `from_dict` take."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(recipe))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; lists and scalars replace."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load_yaml(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as plain values. `base: other.yaml` (relative to the file) is read first and overridden.

    above: the files whose `base` led here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}; see configs/ for the ones shipped")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    base = values.pop("base", None)
    if not base:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the name of a recipe file, got {base!r}")
    above = (*above, path.resolve())
    if (path.parent / base).resolve() in above:
        raise ValueError(f"{path}: its base {base} leads back to it")
    return merge(load_yaml(path.parent / base, above), values)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file or of a run folder (its `recipe.yaml`)."""
    path = Path(path)
    if not path.is_dir():
        return from_dict(Recipe, load_yaml(path))
    path = path / "recipe.yaml"
    if path.is_file() and "base" in (read_yaml(path) or {}):
        raise ValueError(f"{path}: the recipe in a folder of weights is a whole one, without a base")
    return from_dict(Recipe, load_yaml(path))


def save_recipe(recipe: Recipe, folder: str | Path) -> Path:
    path = Path(folder) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True))
    return path


def override(values: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Applies one `a.b=v` (v is read as YAML) to plain values; list items by index (`data.mixture.0.rate=2`)."""
    if "=" not in assignment:
        raise ValueError(f"--set takes a.b=value, got {assignment!r}")
    dotted, text = assignment.split("=", 1)
    head, *rest = dotted.split(".")
    return _put(values, [head, *rest], _value(text, dotted), dotted)


def _value(text: str, dotted: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {dotted}: {error}") from None


def _put(values: Any, keys: list[str], value: Any, dotted: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(values, list):
        if not key.isdigit() or int(key) >= len(values):
            raise ValueError(f"--set {dotted}: {key!r} is not an index below {len(values)}")
        return [_put(item, rest, value, dotted) if i == int(key) else item for i, item in enumerate(values)]
    values = values if isinstance(values, dict) else {}
    return {**values, key: _put(values.get(key, {}), rest, value, dotted)}
