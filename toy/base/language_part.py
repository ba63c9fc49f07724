"""The language model of the toy base, taken out of its LLaVA."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from toy.base.blank_parts import FILES, TOKENIZER


def write_language(folder: Path) -> None:
    """A plain LLaMA folder with the toy base's tokenizer."""
    llava = LlavaForConditionalGeneration.from_pretrained(TOKENIZER)
    language = LlamaForCausalLM(llava.config.text_config)
    language.model, language.lm_head = llava.model.language_model, llava.lm_head
    language.save_pretrained(folder)
    for name in FILES:
        shutil.copy(TOKENIZER / name, folder / name)
