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

from utils.log import setup_logging

FORMATS = ("project", "original")


def main(argv: list[str] | None = None) -> None:
    args, flags = parse(argv)
    setup_logging()
    from tools.merging import run  # takes seconds, and `--help` does without

    run(args, flags)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The program's own flags, and those of training."""
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
    if args.format == "original" and (args.results or args.push_to_hub):
        parser.error("--results and --push_to_hub are for the project's format, which has a model card")
    if args.run and flags:
        parser.error(f"a run folder has its own recipe, so flags of training are not taken: {' '.join(flags)}")
    return args, flags


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"merge_lora_weights_and_save_hf_model.py: {error}") from None
