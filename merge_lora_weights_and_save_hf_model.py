"""Merges a training run into one folder that the other entry points and Hugging Face load, also without this project.

    python merge_lora_weights_and_save_hf_model.py --run runs/mine --save_path mine
    python merge_lora_weights_and_save_hf_model.py --run runs/mine --save_path mine --push_to_hub me/mine
    python merge_lora_weights_and_save_hf_model.py --run runs/mine --save_path mine --format original
    python merge_lora_weights_and_save_hf_model.py --version=LLAVA --weight=pytorch_model.bin --save_path=mine

The last form takes the single file that `zero_to_fp32.py` writes from a DeepSpeed checkpoint, of this project or of the
original programs, and the flags (or the --config) of its training.

The folder has a model card, and the code that `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` needs where
this project is not installed (docs/share.md). Nothing is uploaded without --push_to_hub and a yes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from model.checkpoints.files import read_tensors
from model.checkpoints.load import dtype_of
from model.checkpoints.save import check_target, read_from, save_folder, save_original
from model.finetune.trainable import from_training_file, load_frozen_head, load_trainable, merge_lora
from systems.assistant import Assistant, build, load
from systems.base import systems_accepting
from tools.portable.card import read_results, results_of_run
from tools.portable.folder import complete
from tools.portable.push import check_name, push
from utils.config import Recipe, load_recipe
from utils.flags import resolve
from utils.log import log, setup_logging

FORMATS = ("project", "original")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Merges a training run into one model folder.",
        allow_abbrev=False,
        epilog="With --weight, give the flags of train_ds.py with which the weights were trained.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="FOLDER", help="run folder of train_ds.py")
    source.add_argument("--weight", metavar="FILE", help="single file of full weights, as zero_to_fp32.py writes it")
    parser.add_argument("--tag", default="best", help="checkpoint of the run: best, last or a name [best]")
    parser.add_argument("--save_path", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, default="project", help="project: safetensors; original: as released"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the weights written [as trained]")
    parser.add_argument("--overwrite", action="store_true", help="replace a --save_path that this did not write")
    share = parser.add_argument_group("model card and upload", "of the project's format")
    share.add_argument(
        "--results", nargs="+", default=[], metavar="FOLDER", help="of test_sem.py, whose figures the card shows"
    )
    share.add_argument("--license", default="other", metavar="ID", help="of the weights, as the hub names it [other]")
    share.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder, after a question")
    share.add_argument("--public", action="store_true", help="if the repository is new [private]")
    share.add_argument("--yes", action="store_true", help="upload without the question")
    args, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    setup_logging()
    if args.format == "original" and (args.results or args.push_to_hub):
        parser.error("--results and --push_to_hub are for the project's format, which has a model card")
    if args.push_to_hub:
        check_name(args.push_to_hub, yes=args.yes)
    results = {folder: read_results(Path(folder)) for folder in args.results}
    log.info("reading %s", args.run or args.weight)
    if args.run and flags:
        parser.error(f"a run folder has its own recipe, so flags of training are not taken: {' '.join(flags)}")
    recipe = load_recipe(args.run) if args.run else resolve(flags, systems_accepting)
    check_target(args.save_path, [args.run or args.weight, *read_from(recipe.model)], overwrite=args.overwrite)
    assistant = load_run(args.run, args.tag) if args.run else load_file(args.weight, recipe)
    precision = args.precision or assistant.recipe.model.precision
    assistant.model.to(dtype_of(precision))
    if args.format == "original":
        architectures = assistant.system.released.architectures
        architecture = architectures[0] if architectures else "LlavaLlamaForCausalLM"
        save_original(assistant.model, args.save_path, assistant.tokenizer, architecture, overwrite=args.overwrite)
    else:
        if args.run:
            results |= results_of_run(Path(args.run), args.tag)
        name = args.push_to_hub or Path(args.save_path).resolve().name
        more = partial(complete, assistant=assistant, name=name, results=results, licence=args.license)
        parts = (assistant.model, args.save_path, assistant.tokenizer, assistant.recipe)
        save_folder(*parts, more=more, overwrite=args.overwrite)
    log.info("wrote %s (%s, %s)", args.save_path, args.format, precision)
    if args.push_to_hub:
        push(Path(args.save_path), args.push_to_hub, public=args.public, yes=args.yes)


def load_run(run: str, tag: str) -> Assistant:
    """A run's assistant with its adapters merged, in fp32.

    Adapters trained on 4-bit layers are merged into the base's original weights, which are more precise. The recipe of
    the result keeps the precision of the run.
    """
    precision = load_recipe(run).model.precision
    unquantized = {"precision": "fp32", "load_in_4bit": False, "load_in_8bit": False}
    assistant = load(run, checkpoint=tag, model=unquantized, device="cpu")
    return replace(assistant, recipe=with_precision(assistant.recipe, precision))


def load_file(weight: str, recipe: Recipe) -> Assistant:
    """The assistant of a single file of full weights and the recipe of their training, adapters merged, in fp32."""
    assistant = build(with_precision(recipe, "fp32"), device="cpu")
    tensors = read_tensors(weight)
    load_trainable(assistant.model, from_training_file(assistant.model, tensors))
    load_frozen_head(assistant.model, tensors, assistant.recipe.model.head_options)
    merge_lora(assistant.model)
    assistant.model.requires_grad_(False).eval()
    return replace(assistant, recipe=recipe)


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    return replace(recipe, model=replace(recipe.model, precision=precision))


if __name__ == "__main__":
    main()
