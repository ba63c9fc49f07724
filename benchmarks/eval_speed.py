"""Queries per second of the evaluator against the one-by-one path, on the same random weights in the same run.

    python benchmarks/eval_speed.py --json speed.json
    python benchmarks/eval_speed.py --backbone qwen3_vl --json qwen.json

one by one: each query alone, with its image encoded, its prompt read, its answer generated and its masks decoded.
together: all queries about an image in one batch, as in `evaluation/protocols.py`. Both must give the same answers, or
the program fails. With one query both are the same calls.

Class lists: a question lists all classes, the answer names each with a mask token (one in 15) or a refusal. Token by
token against drafts of the answer (`model.draft_tokens`), with equal answers, in label sets per second. Which words the
model chooses is forced, by position, as random weights follow no list; all that it computes stays.

Weights are random but for a few rows, so that every answer begins with the mask token and has
exactly --new_tokens tokens. The mask encoder has the depth and the attention pattern of the smallest SAM (ViT-B), and a
small width. Memory is the peak resident size (GPU: allocated) while the queries are answered together. At the end one
query is answered with `model.embedding_cache`, for a new image and for a cached one. The JSON also has the ratio of CPU
seconds (cpu_speedup), which is more reliable where other programs run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import BACKBONES, ModelShape, architecture, look, sam_head, vlm_of
from data.types import IMAGE_ID, Batch, Geometry
from data.views import LanguageView
from model.checkpoints.load import assemble
from model.embedding_cache import EmbeddingCache, fingerprint
from model.seg_model import Answer, SegModel
from model.vlm.base import States

BOS, EOS, MASK, ASK, REFUSE, COMMA, FIRST_WORD = 1, 2, 3, 4, 5, 6, 7
MIB = 2**20
IMAGE = (480, 640)  # height and width
TOLERANCE = 0.02  # of mask logits, in float32
LOUD = 30  # gain of ASK's embedding, so large that the layers cannot hide it


@dataclass
class Timing:
    seconds: float
    cpu_seconds: float
    peak_mib: float
    answers: list[Answer]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = build_model(args).to(device)
    view = model.vlm.view
    table: dict[str, Any] = {}
    answer(model, questions(args, view, 2).to(device, model.dtype), 2)  # warm-up
    titles = ("queries", "one by one", "together", "speed-up", "in CPU s", "queries/s", "peak MiB", "masks")
    print("".join(f"{title:>11}" for title in titles))
    for queries in args.queries:
        batch = questions(args, view, queries).to(device, model.dtype)
        table[str(queries)] = row = compare(model, batch, args.new_tokens, args.repeats)
        values = [row[key] for key in ("one_by_one_seconds", "seconds", "speedup", "cpu_speedup")]
        values += [queries / row["seconds"], row["peak_mib"]]
        print(f"{queries:>11}" + "".join(f"{value:>11.2f}" for value in values) + f"{row['masks']:>11}", flush=True)
    lists: dict[str, Any] = {}
    titles = ("classes", "tokens", "by token", "drafted", "speed-up", "in CPU s", "sets/s", "passes", "masks")
    print("".join(f"{title:>11}" for title in titles))
    for classes in args.classes:
        lists[str(classes)] = row = compare_lists(model, args, classes)
        values = [row[key] for key in ("by_token_seconds", "seconds", "speedup", "cpu_speedup", "sets_per_second")]
        print(f"{classes:>11}{row['tokens']:>11}" + "".join(f"{value:>11.2f}" for value in values), end="")
        print(f"{row['passes']:>11}{row['masks']:>11}", flush=True)
    cache = measure_cache(model, questions(args, view, 1).to(device, model.dtype), args.new_tokens, args.repeats)
    print(
        f"embedding cache, 1 query: {cache['without_seconds']:.2f} s without, {cache['new_seconds']:.2f} s for a new "
        f"image, {cache['seen_seconds']:.2f} s for a cached one ({cache['speedup']:.2f}x), {cache['mib']:.2f} MiB"
    )
    if args.json:
        setup = {key: value for key, value in vars(args).items() if key != "json"}
        setup |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "image_tokens": view.tokens(*IMAGE)}
        args.json.write_text(
            json.dumps(
                {"setup": setup, "queries_per_picture": table, "class_lists": lists, "embedding_cache": cache}, indent=1
            )
            + "\n"
        )
    return 0


def compare(model: SegModel, batch: Batch, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Both paths in turn, `repeats` times; the fastest of each counts. Raises where answers differ."""
    rows = range(len(batch.ids))
    together = [lambda: answer(model, batch, new_tokens)]
    single = [lambda row=row: answer(model, single_query(batch, row), new_tokens) for row in rows]
    (fast, fast_cpu), (slow, slow_cpu) = in_turns(lambda: time_calls(together), lambda: time_calls(single), repeats)
    difference = largest_difference(model, fast, slow)
    return {
        "speedup": round(slow.seconds / fast.seconds, 3),
        "cpu_speedup": round(slow_cpu / fast_cpu, 3),
        "seconds": round(fast.seconds, 4),
        "one_by_one_seconds": round(slow.seconds, 4),
        "peak_mib": round(fast.peak_mib, 1),
        "one_by_one_peak_mib": round(slow.peak_mib, 1),
        "masks": sum(len(one.masks) for one in fast.answers),
        "largest_logit_difference": difference,
    }


def compare_lists(model: SegModel, args: argparse.Namespace, classes: int) -> dict[str, Any]:
    """A label set token by token and with drafts, in turn; the fastest of each counts. Raises where answers differ."""
    batch, script = class_list(args, model.vlm.view, classes)
    batch = batch.to(next(model.parameters()).device, model.dtype)
    drafts, passes = model.vlm.draft_tokens, 0

    def measure(most: int) -> Timing:
        nonlocal passes
        model.vlm.draft_tokens = most
        with reciting(model, batch.ids.shape[1], script) as seen:
            timing = time_calls([lambda: answer(model, batch, len(script))])
        passes = len(seen) if most else passes
        return timing

    (fast, fast_cpu), (slow, slow_cpu) = in_turns(lambda: measure(drafts), lambda: measure(0), args.repeats)
    model.vlm.draft_tokens = drafts
    if fast.answers[0].ids != script:
        raise RuntimeError(f"{fast.answers[0].ids} was written, not {script}")
    return {
        "speedup": round(slow.seconds / fast.seconds, 3),
        "cpu_speedup": round(slow_cpu / fast_cpu, 3),
        "seconds": round(fast.seconds, 4),
        "by_token_seconds": round(slow.seconds, 4),
        "sets_per_second": round(1 / fast.seconds, 3),
        "tokens": len(script),
        "passes": passes,
        "masks": len(fast.answers[0].masks),
        "largest_logit_difference": largest_difference(model, fast, slow),
    }


def in_turns(
    fast: Callable[[], Timing], slow: Callable[[], Timing], repeats: int
) -> tuple[tuple[Timing, float], tuple[Timing, float]]:
    """Both ways `repeats` times, each first in every other turn: the fastest timing and fewest CPU seconds of each."""
    timings: dict[Callable[[], Timing], list[Timing]] = {fast: [], slow: []}
    for repeat in range(repeats):
        for way in (fast, slow) if repeat % 2 else (slow, fast):
            timings[way].append(way())
    best = [
        (min(times, key=lambda timing: timing.seconds), min(timing.cpu_seconds for timing in times))
        for times in timings.values()
    ]
    return best[0], best[1]


def largest_difference(model: SegModel, fast: Timing, slow: Timing) -> float:
    """Of mask logits. Raises where ids differ, or logits in float32 by more than TOLERANCE."""
    difference = 0.0
    for row, (one, other) in enumerate(zip(fast.answers, slow.answers, strict=True)):
        if one.ids != other.ids:
            raise RuntimeError(f"query {row}: {one.ids}, but the plain way {other.ids}")
        if len(one.masks):
            difference = max(difference, float((one.masks - other.masks).abs().max()))
    if model.dtype == torch.float32 and difference > TOLERANCE:
        raise RuntimeError(f"mask logits differ by {difference:.3g} from those of the plain way")
    return difference


@contextmanager
def reciting(model: SegModel, prompt: int, script: Sequence[int]) -> Generator[list[int]]:
    """While it is open, the token after position `prompt` - 1 + n is the n-th of `script`; the states that prompt masks
    stay those of the model. Gives the number of positions of each pass."""
    vlm, passes = vlm_of(model), []
    extend, output = vlm._extend, vlm.language.lm_head.weight
    words = torch.tensor([*script, MASK], device=output.device)

    def forced(fed: Any, *args: Any) -> States:
        passes.append(fed.embeds.shape[1])
        positions = fed.positions if fed.positions.dim() == 2 else fed.positions[0]
        states = extend(fed, *args)
        return States(output[words[(positions - prompt + 1).clamp(0, len(script))]], states.read)

    vlm._extend = forced  # ty: ignore[invalid-assignment]
    try:
        yield passes
    finally:
        del vlm._extend


def measure_cache(model: SegModel, batch: Batch, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of one batch without the cache, with an empty one, and with one that has the image; the fastest."""
    head = sam_head(model)
    weights = fingerprint(head.encoder)
    seconds: dict[str, list[float]] = {"without": [], "new": [], "seen": []}
    mib = 0.0
    for _ in range(repeats):
        seconds["without"].append(time_calls([lambda: answer(model, batch, new_tokens)]).seconds)
        with tempfile.TemporaryDirectory() as folder:
            head.cache = EmbeddingCache(folder, 1, weights)
            for name in ("new", "seen"):
                seconds[name].append(time_calls([lambda: answer(model, batch, new_tokens)]).seconds)
            mib = sum(path.stat().st_size for path in Path(folder).rglob("*.bin")) / MIB / len(batch)
        head.cache = None
    best = {f"{name}_seconds": round(min(times), 4) for name, times in seconds.items()}
    return {**best, "speedup": round(best["without_seconds"] / best["seen_seconds"], 3), "mib": round(mib, 3)}


def time_calls(calls: Sequence[Callable[[], list[Answer]]]) -> Timing:
    with Peak() as peak:
        began, cpu_began = time.perf_counter(), time.process_time()
        answers = [answer for call in calls for answer in call()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return Timing(seconds, cpu_seconds, peak.mib, answers)


class Peak:
    """Peak memory during the `with` block: of the allocator on a GPU, else sampled resident size of the process."""

    def __enter__(self) -> Peak:
        self.mib, self._stop = 0.0, threading.Event()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_initialized():
            self.mib = torch.cuda.max_memory_allocated() / MIB

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.mib = max(self.mib, int(status.split("VmRSS:")[1].split()[0]) / 1024)
            if self._stop.wait(0.01):
                return


def answer(model: SegModel, batch: Batch, new_tokens: int) -> list[Answer]:
    return model.generate(batch, max_new_tokens=new_tokens, mask_ids=(MASK,), eos=EOS)


def single_query(batch: Batch, row: int) -> Batch:
    """One query with its image, without padding."""
    real = batch.attention[row]
    return replace(batch, ids=batch.ids[row : row + 1, real], attention=real[real][None], row_image=batch.row_image[:1])


def questions(args: argparse.Namespace, view: LanguageView, queries: int) -> Batch:
    """An image of noise with prompts that share all but their last 7 to 14 tokens."""
    generator = torch.Generator().manual_seed(args.seed)

    def words(count: int) -> list[int]:
        return torch.randint(FIRST_WORD, args.vocabulary, (count,), generator=generator).tolist()

    shared = [BOS, *words(args.system_tokens - 1), *[IMAGE_ID] * view.tokens(*IMAGE)]
    rows = [[*shared, *words(6 + row % 8), ASK] for row in range(queries)]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    scale = args.sam_side / max(IMAGE)
    resized = (round(IMAGE[0] * scale), round(IMAGE[1] * scale))
    return Batch(
        pixels=look(view, IMAGE, 1, args.seed),
        seg_pixels=torch.randn(1, 3, args.sam_side, args.sam_side, generator=generator),
        ids=ids,
        labels=torch.full_like(ids, -100),
        attention=torch.arange(length)[None] >= torch.tensor([[length - len(row)] for row in rows]),
        row_image=torch.zeros(queries, dtype=torch.long),
        mask_rows=torch.zeros(0, dtype=torch.long),
        mask_positions=torch.zeros(0, 1, dtype=torch.long),
        masks=[],
        geometry=[Geometry(IMAGE, resized)],
    )


def class_list(args: argparse.Namespace, view: LanguageView, classes: int) -> tuple[Batch, list[int]]:
    """A question that lists names of one to three tokens, and its answer."""
    batch = questions(args, view, 1)
    generator = torch.Generator().manual_seed(args.seed)
    sizes = torch.randint(1, 4, (classes,), generator=generator).tolist()
    present = torch.randperm(classes, generator=generator)[: max(1, classes // 15)].tolist()
    names = [torch.randint(FIRST_WORD, args.vocabulary, (size,), generator=generator).tolist() for size in sizes]
    listed = [token for name in names for token in (*name, COMMA)]
    script = [token for at, name in enumerate(names) for token in (*name, MASK if at in present else REFUSE)]
    ids = torch.cat([batch.ids, torch.tensor([[*listed[:-1], ASK]])], dim=1)
    real = torch.ones_like(ids, dtype=torch.bool)
    return replace(batch, ids=ids, labels=torch.full_like(ids, -100), attention=real), script


def build_model(args: argparse.Namespace) -> SegModel:
    """A model of these sizes with random weights that writes the mask token after ASK and never ends an answer."""
    model = assemble(architecture(shape_of(args), args.backbone)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(args.seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        elif "norm" not in name:
            weight.zero_()
    language = vlm_of(model).language
    embeddings = cast(nn.Embedding, language.get_input_embeddings()).weight
    output = language.lm_head.weight
    output[MASK] = embeddings[ASK]  # the state at ASK then points to the mask token
    embeddings[ASK] *= LOUD
    output[EOS] = 0  # some other logit is always above 0
    return model


def shape_of(args: argparse.Namespace) -> ModelShape:
    """The sizes of the command line."""
    return ModelShape(
        width=args.width,
        inner=args.width * 8 // 3,
        layers=args.layers,
        heads=max(1, args.width // 64),
        vocabulary=args.vocabulary,
        tower_width=args.tower_width,
        tower_layers=args.tower_layers,
        tower_heads=max(1, args.tower_width // 64),
        tower_side=args.tower_side,
        sam_width=args.sam_width,
        sam_layers=args.sam_layers,
        sam_heads=max(1, args.sam_width // 64),
        sam_global=tuple(sorted({max(1, args.sam_layers * quarter // 4) - 1 for quarter in range(1, 5)})),
        sam_side=args.sam_side,
        picture=IMAGE,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="llava")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 8, 16], help="queries per image")
    parser.add_argument("--classes", type=int, nargs="*", default=[20, 80, 150], help="classes of a label set")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--repeats", type=int, default=3, help="measurements; the fastest counts")
    parser.add_argument("--new_tokens", type=int, default=12, help="length of each answer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--seed", type=int, default=0)
    sizes = parser.add_argument_group("sizes")
    for name, value in {
        "vocabulary": 32000,
        "width": 512,
        "layers": 8,
        "system_tokens": 36,
        "tower_side": 224,
        "tower_width": 256,
        "tower_layers": 6,
        "sam_side": 1024,
        "sam_width": 128,
        "sam_layers": 12,
    }.items():
        sizes.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
