"""The tokens that a system adds, and a tokenizer that gives the published ids under any library version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from tokenizers import normalizers
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerBase

from data.pieces import BLANK, RELEASES, STRIP, Merges, Pieces, SentencePieces, Vocabulary
from utils.registry import unknown

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of a system.

    added: all of them in the order of their ids, which published weights fix, without the image wrap, which comes last.
    mask: the K tokens that stand for one mask, e.g. ("[SEG]",) or ("[SEG0]", ..., "[SEG5]").
    refuse: the token that says that a target is absent; None where the system refuses in plain words.
    wrap_image: put <im_start> and <im_end> around the image, as all published LISA-family weights do.
    read: which state of the language model prompts masks: the one "before" a mask token, which predicts it (LISA and
        its family, UniPixel), or the one "at" it (Sa2VA).
    norm: whether that state is read "after" the language model's final norm or "before" it.
    """

    added: tuple[str, ...]
    mask: tuple[str, ...]
    refuse: str | None = None
    wrap_image: bool = True
    read: Literal["before", "at"] = "before"
    norm: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        used = (*self.mask, self.refuse) if self.refuse else self.mask
        for token in used:
            if token not in self.added:
                raise ValueError(f"token {token!r} is used but not among the added tokens {self.added}")

    @property
    def all_added(self) -> tuple[str, ...]:
        """`added`, then the image wrap if there is one."""
        return (*self.added, IMAGE_START, IMAGE_END) if self.wrap_image else self.added


def load_tokenizer(
    folder: str | Path,
    spec: TokenSpec,
    max_length: int = 512,
    *,
    release: str | None = None,
    legacy: bool | None = True,
) -> PreTrainedTokenizerBase:
    """The LLaMA tokenizer of `folder` with `spec` added; its `pieces` (data/pieces.py) encode the text between tokens.

    release: the library release whose ids around added tokens are reproduced: transformers-4.31, which strips white
        space next to them (lisa.md 2.5, measured), or transformers-4.44, which keeps it (gsva.md 2). None: what
        `tokenizer_config.json` of the folder says under "tokenization" (this project saves it), else
        transformers-4.31.
    legacy: whether text after an added token gets a blank in front. None: what `tokenizer_config.json` says, True if
        it says nothing.

    `<s>`, `</s>` and `<unk>` do not strip. Pad is `<unk>`, id 0. Tokens that the folder already has keep their ids.
    Raises FileNotFoundError if there is no tokenizer, ValueError for an unknown release or for files that disagree.
    """
    folder = Path(folder)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected tokenizer.model or tokenizer.json there")
    settings = _settings(folder)
    if (folder / "tokenizer.model").is_file():
        SentencePieces(folder / "tokenizer.model")  # raises if it is broken; the library would try another file format
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), model_max_length=max_length)
    legacy = settings.get("legacy") is not False if legacy is None else legacy
    release = release or settings.get("tokenization") or STRIP
    if release not in RELEASES:
        raise ValueError(unknown("model.tokenization", release, RELEASES))
    # save_pretrained writes init_kwargs, but prefers attributes of the same name: set both.
    tokenizer.init_kwargs |= {"legacy": legacy, "tokenization": release}
    tokenizer.legacy = legacy
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side = "right"
    tokenizer.pieces = Pieces(_vocabulary(tokenizer, folder), release, legacy)
    strip = tokenizer.pieces.strips
    plain = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    saved = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    # The folder's own added tokens, in the order of their ids, then those of the system; each once. The folder's are
    # added again to give them this release's stripping.
    names = dict.fromkeys([name for name, _ in saved if name not in plain] + list(spec.all_added))
    tokens = [AddedToken(name, lstrip=strip, rstrip=strip, normalized=False, special=True) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, read here because the library drops the fields that it does not know."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(settings, dict) or settings.get("legacy") not in (None, True, False):
        raise ValueError(
            f"{file}: expected a JSON object whose legacy is true, false or null, got {str(settings)[:99]}"
        )
    return settings


def _vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Vocabulary:
    """What encodes plain text. The library's own model is replaced by one that gives the same ids."""
    backend = tokenizer.backend_tokenizer
    # Every version of the library sets up its own treatment of blanks; this is SentencePiece's.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    backend.pre_tokenizer = None
    file = pieces_file(tokenizer)
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


def pieces_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The SentencePiece file that the tokenizer was read from; None if it came from a `tokenizer.json`."""
    places = [getattr(tokenizer, "vocab_file", None), Path(str(tokenizer.name_or_path)) / "tokenizer.model"]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of an added token, looked up by name (tokenising the string may give a lone space piece first)."""
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise KeyError(f"the tokenizer has no token {token!r}; added ones: {sorted(tokenizer.get_added_vocab())}")
    return index


def mask_ids(tokenizer: PreTrainedTokenizerBase, spec: TokenSpec) -> tuple[int, ...]:
    """Ids of the K tokens of one mask group."""
    return tuple(token_id(tokenizer, token) for token in spec.mask)


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of generated ids: added tokens verbatim, the pieces between them decoded on their own, `<s>`/`</s>` dropped.

    Library versions differ in the blanks that they put around added tokens; here there are none, and what lies between
    two tokens is stripped: `sky<ins>traffic light<no_ins>wall<ins>`.
    """
    added = {index: name for name, index in tokenizer.get_added_vocab().items()}
    drop = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text: list[str] = []
    run: list[int] = []  # ids since the last added token

    def flush() -> None:
        if run:
            words = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text.append(cast(str, words).strip())
            run.clear()

    for index in ids:
        if index in drop or index < 0:
            continue
        if index in added:
            flush()
            text.append(added[index])
        else:
            run.append(index)
    flush()
    return "".join(text)
