"""Tokenizers of the LLaMA family: SentencePiece, `<s>` first, `<unk>` as pad, tokens that may strip blanks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerBase

from data.pieces import BLANK, RELEASES, STRIP, Merges, Pieces, SentencePieces, Vocabulary
from data.tokenizer_family import TokenizerFamily
from utils.registry import unknown

MODEL = "tokenizer.model"


def _reads(folder: Path) -> bool:
    return (folder / MODEL).exists() or (folder / "tokenizer.json").exists()


def _load(folder: Path, max_length: int, release: str | None, legacy: bool | None) -> PreTrainedTokenizerBase:
    settings = _settings(folder)
    if (folder / MODEL).is_file():
        SentencePieces(folder / MODEL)  # raises if it is broken; the library would try another file format
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), model_max_length=max_length)
    legacy = settings.get("legacy") is not False if legacy is None else legacy
    release = release or settings.get("tokenization") or STRIP
    if release not in RELEASES:
        raise ValueError(unknown("model.tokenization", release, RELEASES))
    # save_pretrained writes init_kwargs, but prefers attributes of the same name: set both.
    tokenizer.init_kwargs |= {"legacy": legacy, "tokenization": release}
    tokenizer.legacy = legacy
    tokenizer.pad_token = tokenizer.unk_token
    file = _pieces_file(tokenizer)
    tokenizer.pieces = Pieces(_vocabulary(tokenizer, folder, file), release, legacy, file)
    _restyle(tokenizer)
    return tokenizer


def _restyle(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the folder's own tokens again, in the order of their ids, to give them the release's stripping."""
    plain = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    strip = tokenizer.pieces.strips
    saved = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    names = [name for name, _ in saved if name not in plain]
    tokens = [AddedToken(name, lstrip=strip, rstrip=strip, normalized=False, special=True) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, read here because the library drops the fields that it does not know."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(settings, dict) or settings.get("legacy") not in (None, True, False):
        raise ValueError(
            f"{file}: expected a JSON object whose legacy is true, false or null, got {str(settings)[:99]}"
        )
    return settings


def _vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, file: Path | None) -> Vocabulary:
    """What encodes plain text. The library's own model is replaced by one that gives the same ids."""
    backend = tokenizer.backend_tokenizer
    # Every version of the library sets up its own treatment of blanks; this is SentencePiece's.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    backend.pre_tokenizer = None
    if file is None:
        return Merges(backend.model, tokenizer.unk_token_id)
    pieces = SentencePieces(file)
    vocabulary = tokenizer.get_vocab()
    for piece, index in pieces.table().items():
        if vocabulary.get(piece) != index:
            raise ValueError(
                f"{folder}: tokenizer.model is of another vocabulary than the other tokenizer files there: {piece!r} "
                f"has the ids {index} and {vocabulary.get(piece)}; delete those that do not belong to the weights"
            )
    backend.model = pieces.merges()
    return pieces


def _pieces_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The SentencePiece file that the tokenizer was read from; None if it came from a `tokenizer.json`."""
    places = [getattr(tokenizer, "vocab_file", None), Path(str(tokenizer.name_or_path)) / MODEL]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


LLAMA = TokenizerFamily(
    name="LLaMA",
    reads=_reads,
    load=_load,
    stop="</s>",
    wrap=("<im_start>", "<im_end>"),
    adds_wrap=True,
    template="llava_v1",
    padded=False,
    verbatim=False,
    control=frozenset({"<s>", "</s>", "<unk>"}),
    optional=frozenset({"<pad>", "[PAD]", "<image>", "<im_patch>", "<im_start>", "<im_end>"}),
)
