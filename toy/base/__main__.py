"""Train the small pretrained base of the toy world from scratch: a LLaVA folder and a SAM file.

    python -m toy.base                                                      # about 65 minutes on two CPU cores
    python -m toy.base --resume                                             # continue an interrupted run
    python -m toy.base --minutes 2 --out runs/trial --scratch runs/trial    # a short trial

SAM trains on one core. On the other core the vision tower learns to recognise objects, then the whole LLaVA learns to
talk about scenes, then its language model to repeat phrases; they take both cores once SAM has finished. Each stage is
a process that writes a checkpoint and the weights every few minutes, so that an interrupted run leaves a usable base.
No scene is used twice, and none belongs to the train or val split of the toy datasets.
"""

import argparse
import subprocess
import sys
from pathlib import Path

SHARES = {"tower": 0.13, "llava": 0.64, "repeat": 0.23, "sam": 0.54}  # of --minutes; the first three run in this order
SAM_DONE = "sam.done"  # file in --scratch that frees the second core for LLaVA
RATES = {"tower": 1e-3, "llava": 1e-3, "repeat": 5e-4, "sam": 1e-3}  # peak learning rates


def main() -> None:
    args = parse_args()
    if args.only:
        run_stage(args)
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    (args.scratch / SAM_DONE).unlink(missing_ok=True)
    sam = start_stage("sam", args)
    for stage in ("tower", "llava", "repeat"):
        wait_for(start_stage(stage, args), stage)
    wait_for(sam, "sam")
    wait_for(start_stage("report", args), "report")


def parse_args() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.base", description=__doc__, formatter_class=style)
    parser.add_argument("--out", type=Path, default=Path("assets/toy"), help="folder of the base (%(default)s)")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/toy_base"), help="checkpoints and logs (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=65, help="training time on two cores (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and words (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --scratch")
    parser.add_argument("--only", choices=("tower", "sam", "llava", "repeat", "report"), help="run one stage and stop")
    return parser.parse_args()


def start_stage(stage: str, args: argparse.Namespace) -> subprocess.Popen:
    """A process that runs one stage of this program."""
    command = [sys.executable, "-m", "toy.base", "--only", stage, "--out", args.out, "--scratch", args.scratch]
    command += ["--minutes", str(args.minutes), "--seed", str(args.seed)]
    if args.resume:
        command.append("--resume")
    return subprocess.Popen([str(part) for part in command])


def wait_for(process: subprocess.Popen, stage: str) -> None:
    if code := process.wait():
        raise SystemExit(f"stage {stage} of the toy base ended with code {code}; --resume continues it")


def run_stage(args: argparse.Namespace) -> None:
    """Run the stage `args.only` in this process, on one thread."""
    import torch

    from toy.base.trainer import StagePlan

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    stage = args.only
    seconds = 60 * args.minutes * SHARES.get(stage, 0)
    spare_core = args.scratch / SAM_DONE if stage in ("llava", "repeat") else None
    plan = StagePlan(stage, seconds, RATES.get(stage, 0), args.scratch, args.resume, spare_core)
    if stage == "tower":
        from toy.base.tower import train_tower

        train_tower(plan, args.seed)
    elif stage == "sam":
        from toy.base.publish import save_sam
        from toy.base.sam import train_sam

        train_sam(plan, args.seed, publish=lambda trained: save_sam(trained.sam, args.out))
        (args.scratch / SAM_DONE).touch()
    elif stage == "llava":
        from toy.base.llava import train_llava
        from toy.base.publish import save_llava
        from toy.base.tower import load_tower
        from toy.base.vocabulary import train_vocabulary

        folder = args.out / "llava"
        if not (args.resume and (folder / "tokenizer.model").exists()):
            train_vocabulary(folder, args.seed)
        tower = load_tower(args.scratch / "tower.pt")
        train_llava(plan, args.seed, folder, tower, publish=lambda trained: save_llava(trained.llava, args.out))
    elif stage == "repeat":
        from toy.base.publish import LLAVA_FOLDER, save_llava
        from toy.base.repeat import train_repeat

        folder = args.out / LLAVA_FOLDER
        train_repeat(plan, args.seed, folder, publish=lambda trained: save_llava(trained.llava, args.out))
    else:
        from toy.base.publish import write_report

        print(f"wrote {write_report(args.scratch, args.out)}")


if __name__ == "__main__":
    main()
