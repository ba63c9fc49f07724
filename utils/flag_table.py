"""The flags of train_ds.py, the LISA family's, and the recipe fields that they set (docs/flags.md)."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from utils.config import Recipe, without_none


@dataclass(frozen=True)
class Flag:
    """A flag, and the dotted recipe field that it sets.

    separator: between the items of a list. kind: the type of the value; None: the field's. switch: what --name without
    a value and --no_name set, where the field is no bool. value: what the flag sets, where it takes none and cannot be
    negated.
    """

    name: str
    field: str
    help: str
    separator: str = ","
    kind: type | None = None
    switch: tuple[str, str] | None = None
    value: bool | None = None

    @property
    def value_type(self) -> Any:
        return self.kind or _field_type(self.field)

    @property
    def spellings(self) -> tuple[str, ...]:
        """With underscores; the parser takes dashes as well."""
        negated = self.value is None and (self.value_type is bool or self.switch)
        return (f"--{self.name}", f"--no_{self.name}") if negated else (f"--{self.name}",)


FLAGS = (
    Flag("version", "model.version", "base LLaVA, or a finished checkpoint to continue from"),
    Flag("mllm_model_path", "model.version", "the same, as another paper calls it"),
    Flag("weight", "model.checkpoint_file", "training file over version's weights, e.g. a bare .bin of zero_to_fp32"),
    Flag("vision_tower", "model.vision_tower", "folder or hub name of CLIP, SigLIP, DINOv2 or DINOv3"),
    Flag("resize_vision_tower_size", "model.tower.size", "side of the vision tower's view"),
    Flag("pad_train_clip_images", "model.tower.pad", "show the tower the full image, padded, not its centre"),
    Flag("preprocessor_config", "model.tower.preprocessor", "image-processor file that says the size of the view"),
    Flag("vision_pretrained", "model.vision_pretrained", "SAM weights, file or folder"),
    Flag("segmentation_model_path", "model.vision_pretrained", "the same, as another paper calls it"),
    Flag("precision", "model.precision", "fp32, bf16, fp16 or auto"),
    Flag("image_size", "model.image_size", "side of the mask encoder's view"),
    Flag("model_max_length", "model.model_max_length", "longest row that is trained on"),
    Flag("out_dim", "model.out_dim", "width of the mask prompt"),
    Flag("conv_type", "model.conv_type", "conversation template"),
    Flag("use_mm_start_end", "model.use_mm_start_end", "wrap the image in `<im_start>` and `<im_end>`"),
    Flag("train_mask_decoder", "model.train_mask_decoder", "train the mask decoder"),
    Flag("gradient_checkpointing", "model.gradient_checkpointing", "recompute activations in the backward pass"),
    Flag("load_in_8bit", "model.load_in_8bit", "8-bit language model (inference)"),
    Flag("load_in_4bit", "model.load_in_4bit", "4-bit language model; training adapters on it is QLoRA"),
    Flag("allow_missing", "model.allow_missing", "continue when a checkpoint lacks weights or has unexpected ones"),
    Flag("lora_r", "model.lora.r", "LoRA rank, 0: none"),
    Flag("lora_alpha", "model.lora.alpha", "LoRA scale times rank"),
    Flag("lora_dropout", "model.lora.dropout", "LoRA dropout"),
    Flag("lora_target_modules", "model.lora.target_modules", "linears that get LoRA"),
    Flag("dataset_dir", "data.dataset_dir", "root of all datasets"),
    Flag("workers", "data.workers", "loader processes"),
    Flag(
        "exclude_val",
        "data.exclude_val",
        "whose images to keep out of training: off, eval_suites, refer_family or cross_refer",
        switch=("refer_family", "off"),
    ),
    Flag(
        "sampling",
        "data.sampling",
        "rates: sample by rate; epoch: every record once per epoch",
        switch=("rates", "epoch"),
    ),
    Flag("num_classes_per_sample", "options.num_classes_per_sample", "dialogues per image at most", kind=int),
    Flag("num_all_classes", "options.num_all_classes", "classes per answer at most", kind=int),
    Flag("num_classes_per_question", "options.num_classes_per_question", "targets per question at most", kind=int),
    Flag("seg_token_num", "options.seg_token_num", "mask tokens per scale", kind=int),
    Flag("image_feature_scale_num", "options.image_feature_scale_num", "scales of mask tokens", kind=int),
    Flag("use_expand_question_list", "options.use_expand_question_list", "train on more questions", kind=bool),
    Flag("explanatory", "options.explanatory", "share of samples that ask for an explanation", kind=float),
    Flag("ce_loss_weight", "loss.ce", "weight of the text loss"),
    Flag("dice_loss_weight", "loss.dice", "weight of the dice loss"),
    Flag("bce_loss_weight", "loss.bce", "weight of the mask cross entropy"),
    Flag("epochs", "train.epochs", "epochs"),
    Flag("steps_per_epoch", "train.steps_per_epoch", "optimizer steps per epoch; without: 500, or every record once"),
    Flag("batch_size", "train.batch_size", "images per device and micro-step"),
    Flag("grad_accumulation_steps", "train.grad_accumulation_steps", "micro-steps per optimizer step"),
    Flag("lr", "train.lr", "peak learning rate"),
    Flag("beta1", "train.beta1", "AdamW"),
    Flag("beta2", "train.beta2", "AdamW"),
    Flag("print_freq", "train.print_freq", "steps between two log lines"),
    Flag("resume", "train.resume", "checkpoint folder to resume from"),
    Flag("auto_resume", "train.auto_resume", "resume from the run folder's last checkpoint"),
    Flag("val_dataset", "eval.suites", "validation suites", separator="||"),
    Flag("val_dataset_list", "eval.final_suites", "suites of the final evaluation"),
    Flag("final_eval", "eval.final_eval", "evaluate the final suites after the last step"),
    Flag("val_batch_size", "eval.batch_size", "images per step of a validation"),
    Flag("no_eval", "eval.validate", "no validation while training", value=False),
    Flag("eval_only", "eval.eval_only", "evaluate and exit"),
    Flag("log_base_dir", "run.log_base_dir", "folder of all runs"),
    Flag("exp_name", "run.exp_name", "name of the run folder"),
)

TASK_DATA = "_data"  # --<task>_data "a||b": the sets of a task of the mixture
MIXTURE = {
    "dataset": 'tasks of the mixture, "sem_seg||refer_seg||vqa||reason_seg"',
    "sample_rates": "their rates, 9,3,3,1",
    "sem_seg_data": 'sets of the task sem_seg, "ade20k||cocostuff"',
    "refer_seg_data": "sets of the task refer_seg",
    "neg_refer_seg_data": "sets of the task neg_refer_seg: expressions of other images",
    "correct_refer_seg_data": "sets of the task correct_refer_seg: false premises with corrections",
    "vqa_data": "sets of the task vqa",
    "multi_reason_seg_data": "sets of the task multi_reason_seg: questions about several objects",
    "reason_seg_data": 'sets of the task reason_seg, "ReasonSeg|train"',
}


@dataclass(frozen=True)
class Swap:
    """A flag that replaces one validation suite by another."""

    help: str
    removes: str
    adds: str


SWAPS = {"val_refzom": Swap("validate on Ref-ZOM instead of gRefCOCO", "grefcoco|unc|val", "refzom|final|test")}
WITHOUT_MEANING = {  # flags of the originals that are accepted, and why they change nothing
    "vis_save_path": "training renders no images of its own; chat.py and test_sem.py have it",
    "save_inter": "set train.save_steps to save between epochs",
    "start_epoch": "the checkpoint that is resumed knows its step",
    "resize_vision_tower": "--resize_vision_tower_size or --preprocessor_config gives it",
    "vision_tower_for_mask": "a mask head that decodes from the tower's features always does",
    "separate_mm_projector": "such a head always has a projector of its own",
    "merge_lora_path": "the original never reads it; merge_lora_weights_and_save_hf_model.py merges",
    "local_rank": "",  # every launcher passes it; the environment has the same
}


def markdown() -> str:
    """The table of flags."""
    lines = ["| flag | recipe field | default | what |", "| --- | --- | --- | --- |"]
    for flag in FLAGS:
        spelling = ", ".join(f"`{name}`" for name in flag.spellings)
        lines.append(f"| {spelling} | `{flag.field}` | {_default(flag)} | {flag.help} |")
    for name, text in MIXTURE.items():
        escaped = text.replace("|", "\\|")
        lines.append(f"| `--{name}` | `data.mixture` | | {escaped} |")
    lines += [f"| `--{name}` | `eval.suites` | | {swap.help} |" for name, swap in SWAPS.items()]
    lines += [f"| `--{name}` | | | accepted, changes nothing: {why} |" for name, why in WITHOUT_MEANING.items() if why]
    return "\n".join(lines)


def page() -> str:
    """docs/flags.md: the flags of train_ds.py."""
    return f"""# Flags of train_ds.py

The command lines of the releases work as they stand, with dashes or underscores in the names of flags. Each flag sets
a field of the recipe ([configuration.md](configuration.md)). `--config recipe.yaml` gives the values below the flags,
`--set section.field=value` sets any field on top of them. Without `--config`, what a release's command line means
([configs/released/](../configs/released)) lies below: the recipe of `--system`, or of the system that has the given
flags and tasks. This page is printed by `python -m utils.flags`.

{markdown()}
"""


def _field_type(dotted: str) -> Any:
    kind: Any = Recipe
    for key in dotted.split("."):
        kind = typing.get_type_hints(kind)[key]
    kind = without_none(kind)
    return str if typing.get_origin(kind) is Literal else kind  # from_dict checks the choices


def _default(flag: Flag) -> str:
    if flag.value is not None:
        return ""
    value: Any = Recipe()
    for key in flag.field.split("."):
        if not dataclasses.is_dataclass(value):
            return "the system's"
        value = getattr(value, key)
    if value is None:
        return "`null`"
    text = flag.separator.join(value) if isinstance(value, tuple) else str(value)
    return f"`{text}`".replace("|", "\\|") if text else ""
