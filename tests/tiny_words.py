"""A tiny tokenizer of Qwen's kind: byte-level BPE of few merges, with all of Qwen's added tokens in Qwen's order."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
OF_QWEN_3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")
CORPUS = (
    "A chat about a picture. Please segment the red car and the dog in this image.",
    "Sure, it is the sky. What is on the table? Where are the people? It is not there.",
    "user\nassistant\nsystem\nYou are a helpful assistant.\nWhere is the kite?",
)


def tiny_qwen_tokenizer(folder: Path, *, version: int = 3, parts: bool = False) -> int:
    """Writes the tokenizer files of a Qwen2.5-VL (`version` 2) or Qwen3-VL folder; returns the number of its ids.

    parts: vocab.json and merges.txt instead of tokenizer.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    added = [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    plain = (*PLAIN, *(OF_QWEN_3 if version == 3 else ()))
    added += [AddedToken(name, special=False, normalized=False) for name in plain]
    tokenizer.add_tokens(added)
    if parts:
        tokenizer.model.save(str(folder))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    style = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    described = {
        str(tokenizer.token_to_id(token.content)): {"content": token.content, **style, "special": token.special}
        for token in added
    }
    settings = {"added_tokens_decoder": described, "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None}
    settings |= {"pad_token": "<|endoftext|>", "model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer.get_vocab_size()
