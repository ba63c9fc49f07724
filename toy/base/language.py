"""Write the language model of the toy base as a plain LLaMA folder, for a LLaVA with another vision tower.

    python -m toy.base.language runs/language
"""

import argparse
import shutil
from pathlib import Path

from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from toy.base.blank import FILES, TOKENIZER


def main(argv: list[str] | None = None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.base.language", description=__doc__, formatter_class=style)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"{args.out} is there already; give another OUT, or remove it")
    llava = LlavaForConditionalGeneration.from_pretrained(TOKENIZER)
    language = LlamaForCausalLM(llava.config.text_config)
    language.model, language.lm_head = llava.model.language_model, llava.lm_head
    language.save_pretrained(args.out)
    for name in FILES:
        shutil.copy(TOKENIZER / name, args.out / name)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
