"""The language model of the toy base, taken out of its LLaVA."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from toy.base.blank_parts import FILES
from toy.base.publish import LLAVA_FOLDER


def write_language(folder: Path, base: Path) -> None:
    """A plain LLaMA folder with the language model and the tokenizer of the LLaVA in `base`."""
    llava = LlavaForConditionalGeneration.from_pretrained(base / LLAVA_FOLDER)
    language = LlamaForCausalLM(llava.config.text_config)
    language.model, language.lm_head = llava.model.language_model, llava.lm_head
    language.save_pretrained(folder)
    for name in FILES:
        shutil.copy(base / LLAVA_FOLDER / name, folder / name)
