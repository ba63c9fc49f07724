"""The real size on a CPU: LLaVA-7B with SAM ViT-H, random weights in bf16, one image with two dialogues.

    python benchmarks/real_size.py --json real_size.json

Prints seconds to make the model, for a forward pass with teacher forcing (logits of the answers, and their masks) and
for two short answers, and the peak memory of the process. What is written first must be what the forward pass predicts,
or the program fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import MASK_TOKEN, SHAPES, make_batch, random_model, vlm_of
from data.types import IGNORE_ID, Batch
from model.seg_model import SegModel

EOS = 2
CLOSE = 0.05  # of the range of logits: in bf16 passes of other lengths round differently


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="default 7b")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default bf16")
    parser.add_argument("--new_tokens", type=int, default=4, help="of each answer (default 4)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    figures = measure(args.shape, args.precision, args.new_tokens)
    print(", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "precision": args.precision, **figures}, indent=1) + "\n")
    return 0


@torch.no_grad()
def measure(shape_name: str, precision: str, new_tokens: int) -> dict[str, float]:
    """Seconds and peak memory by name; RuntimeError where answers and teacher forcing disagree."""
    shape, began = SHAPES[shape_name], time.perf_counter()
    model = random_model(shape, precision, "sdpa", torch.device("cpu")).eval()
    made = time.perf_counter()
    batch = make_batch(shape, vlm_of(model).view, images=1, each=2).to(model.device, model.dtype)
    forward = model(batch)
    passed = time.perf_counter()
    answers = model.generate(prompts(batch), max_new_tokens=new_tokens, mask_ids=[MASK_TOKEN], eos=EOS)
    answered = time.perf_counter()
    check(forward.token_logits.unflatten(0, (len(answers), -1))[:, 0], [answer.ids[0] for answer in answers])
    if not all(bool(masks.isfinite().all()) and masks.shape[1:] == shape.picture for masks in forward.masks):
        raise RuntimeError("masks are not finite, or not of the size of the image")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = {"make_s": made - began, "forward_s": passed - made, "two_answers_s": answered - passed}
    return {**seconds, "parameters_billion": count(model), "peak_gib": peak}


def prompts(batch: Batch) -> Batch:
    """The batch without its answers."""
    answer = int((batch.labels[0] != IGNORE_ID).sum())
    return replace(batch, ids=batch.ids[:, :-answer], attention=batch.attention[:, :-answer])


def check(logits: torch.Tensor, first: list[int]) -> None:
    """logits: (R, V) at the end of each prompt. first: the token that each answer begins with."""
    logits = logits.float()
    chosen = logits[range(len(first)), first]
    least = logits.amax(-1) - CLOSE * (logits.amax(-1) - logits.amin(-1))
    if bool((chosen < least).any()):
        raise RuntimeError(f"answers begin with {first}, teacher forcing predicts {logits.argmax(-1).tolist()}")


def count(model: SegModel) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


if __name__ == "__main__":
    sys.exit(main())
