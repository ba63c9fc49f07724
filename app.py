"""A web page on which people ask an assistant about images: questions, phrases, class lists, conversations.

    python app.py                                  # the toy assistant of assets/toy, in a browser at 127.0.0.1:7860
    python app.py --version CHECKPOINT             # a run folder, a merged folder or a published checkpoint
    python app.py --version CHECKPOINT --host 0.0.0.0 --port 8000    # for other machines of the network

Needs Gradio: pip install -r requirements-web.txt. Programs can ask the same server; docs/web.md has the calls.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from evaluation.cli import Parser, add_model_flags, load_assistant
from utils.flags import at_least
from web.server import Place, check_address, launch, own_folder

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
TOY = Path(__file__).resolve().parent / "assets" / "toy"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise SystemExit("app.py needs Gradio, which is not installed: pip install -r requirements-web.txt")
    try:
        check_address(args.host, args.port)
    except OSError as error:
        raise SystemExit(f"app.py: {error}") from None
    ended: list[int] = []

    def end(number: int, _: object) -> None:
        """As Ctrl-C does. A second signal, as of a terminal and then its shell, leaves the clean-up alone."""
        ended.append(number)
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup the page outlives its terminal
            signal.signal(number, end)
    with contextlib.suppress(KeyboardInterrupt), served(args) as address:
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        while not ended:  # an exception that a handler raises is lost where C code asks Python something
            time.sleep(1)
    return 0


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Generator[str]:
    """The address of the page, which is served until the block ends."""
    with own_folder() as folder:
        # These take seconds, and Gradio reads its settings when it is imported: not before `own_folder`.
        from evaluation.predictor import Predictor
        from toy.page_examples import write_examples
        from utils.log import setup_logging
        from web.page import STYLE, build
        from web.view import Sample
        from web.visit import Visits

        setup_logging()
        name, note = (Path(args.version).name, "") if args.version else use_toy(args)
        predictor = Predictor(load_assistant(args), max_new_tokens=args.max_new_tokens)
        visits = Visits(predictor, folder, max_pixels=args.max_pixels * 10**6, most=args.max_visitors)
        samples = [Sample(*example) for example in write_examples(folder / "toy_images")]
        blocks = build(visits, name, samples, note)
        try:
            address = launch(blocks, Place(args.host, args.port, args.share, args.max_upload * 2**20), STYLE)
        except OSError as error:
            raise SystemExit(f"app.py: {error}") from None
        try:
            yield address
        finally:
            visits.close()
            blocks.close(verbose=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_model_flags(parser)
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all networks [127.0.0.1]")
    page.add_argument("--port", type=at_least(1), metavar="N", help="default: the first free one from 7860")
    page.add_argument(
        "--share", action="store_true", help="also publish the page at an address of gradio.live, for a week"
    )
    page.add_argument("--max_upload", type=at_least(1), default=20, metavar="MB", help="size of an image's file [20]")
    page.add_argument("--max_pixels", type=at_least(1), default=25, metavar="MILLION", help="of an image [25]")
    page.add_argument(
        "--max_visitors", type=at_least(1), default=32, metavar="N", help="conversations that are kept at once [32]"
    )
    page.add_argument(
        "--max_new_tokens", type=at_least(1), default=512, metavar="N", help="token limit of an answer [512]"
    )
    return parser.parse(argv)


def use_toy(args: argparse.Namespace) -> tuple[str, str]:
    """Makes the toy assistant the one to load; returns its name and what there is to say about it."""
    args.version = str(TOY / "assistant")
    base = {"version": TOY / "llava", "vision_pretrained": TOY / "sam_vit_toy.safetensors"}
    args.set = [*(f"model.{field}={json.dumps(str(path))}" for field, path in base.items()), *args.set]
    return "The toy assistant", "It knows rendered toy scenes only; --version loads another one."


if __name__ == "__main__":
    raise SystemExit(main())
