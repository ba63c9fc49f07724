"""The recipe: every field of a run with its type, choices, default and line of help (docs/configuration.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.model_recipe import ModelConfig
from utils.setting import MISSING, setting

LARGEST_SEED = 2**32 - 1
EPOCHS = 10  # as released


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of a task."""

    source: str = setting(MISSING, "a name in SOURCES, alone or with its split")
    rate: float = setting(1.0, "its rate inside the task", 0)
    options: dict[str, Any] = setting(dict, "the source's own options")


@dataclass(frozen=True)
class TaskConfig:
    """A task of the mixture."""

    task: str = setting(MISSING, "sem_seg, refer_seg, vqa, reason_seg, or any name")
    sets: tuple[DatasetConfig, ...] = setting(MISSING, "its datasets; `- ade20k` is short for `- {source: ade20k}`")
    rate: float = setting(1.0, "its rate inside the mixture", 0)


@dataclass(frozen=True)
class SuiteConfig:
    """A benchmark of your own: a source and its metric."""

    name: str = setting(MISSING, "its name in suites and final_suites")
    source: str = setting(MISSING, "a name in SOURCES, alone or with its split")
    metric: str = setting(MISSING, "a name in SCORERS")
    options: dict[str, Any] = setting(dict, "all options of the source: none are taken from the mixture")
    present_only: bool = setting(False, "ask only about what is present, though the data also ask about absent things")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is read."""

    dataset_dir: str = setting("./dataset", "root of all datasets", path=True)
    mixture: tuple[TaskConfig, ...] = setting((), "the tasks and their datasets")
    on_bad_sample: Literal["raise", "skip"] = setting(
        "raise", "at a sample that cannot be used: stop, or take another one (counted and reported)"
    )
    long_rows: Literal["error", "cut", "cut_rounds", "keep"] = setting(
        "error",
        "rows beyond model_max_length: an error, cut text (as most released), cut last rounds, keep (LaSagnA)",
    )
    workers: int = setting(4, "loader processes", 0)
    prefetch: int = setting(2, "batches that each worker keeps ready", 1)
    val_workers: int = setting(2, "loader processes of a validation", 0)
    exclude_val: Literal["off", "eval_suites", "refer_family", "cross_refer"] = setting(
        "off", "whose images are kept out of training"
    )
    index_dir: str | None = setting(
        None, "where annotation indexes are kept; null: $ASSISTANT_INDEX_DIR, else inside dataset_dir", path=True
    )
    sampling: Literal["rates", "epoch"] = setting(
        "rates", "rates: sample by rate, without end; epoch: every record once per epoch, whatever its rate (0: never)"
    )


@dataclass(frozen=True)
class LossConfig:
    """The objective: ce * CE + bce * BCE + dice * Dice."""

    ce: float = setting(1.0, "weight of the text loss", 0)
    dice: float = setting(0.5, "weight of the Dice loss", 0)
    bce: float = setting(2.0, "weight of the masks' cross entropy", 0)
    mask_size: Literal["full", "decoder"] = setting(
        "full", "where masks are compared: in the image's pixels (published) or in the decoder's cells"
    )
    truth_resize: Literal["area", "nearest"] = setting(
        "area", "with mask_size decoder: a cell's truth is the share of it that is covered, or one pixel of it (Sa2VA)"
    )
    points: int = setting(
        0,
        "points per mask that the mask losses compare, most of them at uncertain places (Sa2VA: 12544); 0: all pixels",
        0,
    )
    dice_smooth: float = setting(
        1e-3, "pixels that the Dice loss adds to twice the overlap and to the areas (Sa2VA: 1)", 0, above=True
    )
    masks_per_image: int = setting(
        0, "masks of an image that count, by random choice or by repetition (published by Sa2VA: 5); 0: each once", 0
    )
    ignore_region: bool = setting(
        False, "leave ignored pixels out of the mask losses; published: they are background in training"
    )
    overlap_refinement: Literal["none", "paper", "overlap_only"] = setting(
        "none", "PixelLM's refinement of bce where masks of a question overlap; none as released"
    )
    overlap_weight: float = setting(
        2.0, "with overlap_refinement paper: weight of the pixels that several masks claim", 0
    )
    count_refused: bool = setting(
        False, "count refused phrases as constant masks next to the image's true ones (published by GSVA)"
    )


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. Its length is given either by `steps` or by `epochs` and `steps_per_epoch`."""

    steps: int | None = setting(
        None, "optimizer steps of the run, without epochs; validates and saves at the end and every eval.every_steps", 1
    )
    epochs: int | None = setting(None, f"epochs; null: {EPOCHS} as released, or none with `steps`", 1)
    steps_per_epoch: int | None = setting(
        None, "optimizer steps per epoch; null: 500 as released; with data.sampling epoch, what visits every record", 1
    )
    batch_size: int = setting(2, "images per device and micro-step", 1)
    grad_accumulation_steps: int = setting(10, "micro-steps per optimizer step", 1)
    lr: float = setting(3e-4, "peak learning rate", 0, above=True)
    beta1: float = setting(0.9, "AdamW", 0, 1, below=True)
    beta2: float = setting(0.95, "AdamW", 0, 1, below=True)
    weight_decay: float = setting(0.0, "AdamW", 0)
    warmup_steps: int = setting(100, "steps of linear warm-up", 0)
    warmup_share: float = setting(0.0, "above 0: the warm-up as a share of the run's steps, not warmup_steps", 0, 1)
    schedule: Literal["linear", "cosine"] = setting(
        "linear",
        "how the learning rate falls to 0 after the warm-up: linearly (published by LISA's family) or as a cosine",
    )
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: not clipped", 0)
    zero_stage: Literal[0, 1, 2, 3] = setting(2, "what DeepSpeed shards over the processes (in half precision 0 is 1)")
    offload: Literal["none", "optimizer", "all"] = setting(
        "none", "what lies in CPU memory: nothing, optimizer states (zero_stage 1 to 3), or weights too (zero_stage 3)"
    )
    zero_options: dict[str, Any] = setting(dict, "further fields of DeepSpeed's zero_optimization")
    timeout_minutes: float = setting(60.0, "how long processes wait for one another before they give up", 0, above=True)
    on_bad_loss: Literal["stop", "skip"] = setting(
        "stop", "at a loss that is not finite: stop, or take other images on all processes (counted)"
    )
    seed: int = setting(0, "seed of the data, of dropout and of new weights", 0, LARGEST_SEED)
    print_freq: int = setting(1, "steps between two log lines", 1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept, in addition to the best", 1)
    save_steps: int = setting(0, "also save every this many steps; 0: after each epoch only", 0)

    patience: int = setting(
        0, "stop after this many validations in a row whose eval.best_by is no better than the best before; 0: never", 0
    )

    # What follows belongs to one start of the program, not to the experiment.
    auto_resume: bool = setting(True, "resume from the run folder's last checkpoint", start=True)
    resume: str | None = setting(None, "checkpoint folder to resume from", start=True, path=True)
    time_limit_minutes: float = setting(0.0, "save and stop after this time; 0: no limit", 0, start=True)

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", EPOCHS)
        if self.steps is not None and (self.epochs is not None or self.steps_per_epoch is not None):
            epochs = ", ".join(
                f"train.{name} ({value})"
                for name, value in (("epochs", self.epochs), ("steps_per_epoch", self.steps_per_epoch))
                if value is not None
            )
            raise ValueError(
                f"train.steps ({self.steps}) and {epochs} both say how long to train; give train.steps alone, or "
                "train.epochs with train.steps_per_epoch"
            )

    @property
    def known_steps_per_epoch(self) -> int:
        """`steps_per_epoch`, which `training.run.with_epochs` fills in."""
        if self.steps_per_epoch is None:
            raise ValueError("train.steps_per_epoch is not known before the mixture is")
        return self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or EPOCHS) * self.known_steps_per_epoch

    @property
    def total_warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return round(self.warmup_share * self.total_steps) if self.warmup_share else self.warmup_steps


@dataclass(frozen=True)
class EvalConfig:
    """Validation while training, and the evaluation after it."""

    suites: tuple[str, ...] = setting(
        ("ReasonSeg|val",), "suites of the validation; the first one decides which checkpoint is best"
    )
    final_suites: tuple[str, ...] = setting((), "suites that are also scored after the last step, and by eval_only")
    custom: tuple[SuiteConfig, ...] = setting((), "suites of your own, next to those of `test_sem.py --list`")
    validate: bool = setting(True, "validate while training")
    final_eval: bool = setting(True, "score the final suites after the last step")
    every_epochs: int = setting(1, "epochs between two validations", 1)
    every_steps: int = setting(
        0, "with train.steps: also validate and save every this many steps; 0: at the end only", 0
    )
    protocol: Literal["teacher_forced", "generate"] = setting(
        "teacher_forced", "score the masks of the true answer, or of the answer that the model generates"
    )
    limit: int = setting(0, "images per suite; 0: all", 0)
    num_examples: int = setting(
        4, "images of the first suite, rendered at each validation with predicted and true masks; 0: none", 0
    )
    batch_size: int = setting(1, "images per step of a validation", 1)
    max_new_tokens: int = setting(512, "longest generated answer", 1)
    best_by: str = setting("gIoU", "figure of the first suite by which the best checkpoint is chosen")

    # What follows belongs to one start of the program, not to the experiment.
    eval_only: bool = setting(False, "evaluate and exit", start=True)


@dataclass(frozen=True)
class RunConfig:
    """Where a run is written and reported."""

    log_base_dir: str = setting("./runs", "folder of all runs")
    exp_name: str = setting("run", "name of the run folder")
    tensorboard: bool = setting(True, "write tensorboard/")
    wandb: str | None = setting(None, "project on Weights & Biases (pip install wandb) that the run also reports to")

    @property
    def folder(self) -> Path:
        return Path(self.log_base_dir).expanduser() / self.exp_name


@dataclass(frozen=True)
class Recipe:
    """Everything that a run needs, saved as `recipe.yaml` in its folder."""

    system: str = setting("", "a name in SYSTEMS")
    options: dict[str, Any] = setting(dict, "options of the system")
    model: ModelConfig = setting(ModelConfig(), "")
    data: DataConfig = setting(DataConfig(), "")
    loss: LossConfig = setting(LossConfig(), "")
    train: TrainConfig = setting(TrainConfig(), "")
    eval: EvalConfig = setting(EvalConfig(), "")
    run: RunConfig = setting(RunConfig(), "")

    def __post_init__(self) -> None:
        if self.eval.every_steps and self.train.steps is None:
            raise ValueError(
                "eval.every_steps goes with train.steps; where train.epochs gives the length, set eval.every_epochs"
            )
        if self.train.patience:
            self._check_patience()

    def _check_patience(self) -> None:
        """Raises where `train.patience` would wait for validations that never come."""
        asked = f"train.patience ({self.train.patience}) counts validations"
        if not (self.eval.validate and self.eval.suites):
            raise ValueError(f"{asked}, and this recipe has none: set eval.validate=true and name eval.suites")
        if self.train.steps is not None and not self.eval.every_steps:
            raise ValueError(f"{asked}; with train.steps there is only the last one: set eval.every_steps")

    def ends_epoch(self, step: int) -> bool:
        """Whether the run saves after `step` and asks for a validation: after each epoch, or, where the recipe counts
        steps alone, after every eval.every_steps and the last one."""
        train = self.train
        if train.steps is None:
            return step % train.known_steps_per_epoch == 0
        every = self.eval.every_steps
        return step == train.steps or bool(every and step % every == 0)

    def validates_after(self, step: int) -> bool:
        """Whether the suites are scored after this step, which ends an epoch: after the last one, and after every
        eval.every_epochs of them."""
        train = self.train
        if train.steps is not None:
            return True
        epoch = step // train.known_steps_per_epoch
        return epoch == train.epochs or epoch % self.eval.every_epochs == 0
