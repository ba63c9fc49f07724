"""Ids of the plain text between added tokens, as the slow LLaMA tokenizers of the published stacks gave them.

Where the folder has a SentencePiece model, SentencePiece itself encodes. A library that rebuilds the merges from that
model may order them differently: transformers 5 merges runs of blanks first, SentencePiece last.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer
from tokenizers.models import BPE, Model
from transformers.tokenization_utils_base import generate_merges

from data.tokenizer_family import check_characters

if TYPE_CHECKING:  # the package is needed where there is a SentencePiece model, and imported there
    from sentencepiece import SentencePieceProcessor

BLANK = "▁"  # how a vocabulary writes a blank
STRIP, KEEP = "transformers-4.31", "transformers-4.44"
RELEASES = (STRIP, KEEP)


class Vocabulary(Protocol):
    """Turns text into ids. Models without LLaMA's byte pieces give an unknown letter the id `unknown`."""

    unknown: int

    def encode(self, text: str, *, blank: bool) -> list[int]:
        """Ids of a text. blank: put one more blank in front of it."""

    def piece(self, index: int) -> str: ...

    def index(self, piece: str) -> int: ...


class SentencePieces:
    """The vocabulary of a `tokenizer.model`; ValueError with its name if the file is something else."""

    def __init__(self, file: Path):
        try:
            self._pieces = _processor()(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{file} ({file.stat().st_size} bytes) is no SentencePiece model (a pointer, or half a download?); "
                f"fetch it again: {error}"
            ) from None
        self._bare = _without_blank(self._pieces)
        self.unknown = self._pieces.unk_id()

    def encode(self, text: str, *, blank: bool) -> list[int]:
        # Two processors: one puts a blank in front of every text, the other never; a processor cannot do both.
        if blank and text:
            return self._pieces.encode(text)
        return self._bare.encode(" " if blank else text)  # SentencePiece puts no blank in front of an empty text

    def piece(self, index: int) -> str:
        return self._pieces.id_to_piece(index)

    def index(self, piece: str) -> int:
        return self._pieces.piece_to_id(piece)

    def table(self) -> dict[str, int]:
        return {self.piece(index): index for index in range(self._pieces.get_piece_size())}

    def merges(self) -> BPE:
        """The same as a BPE model of the library `tokenizers`: merges in the order of their scores, highest first."""
        table = self.table()
        scores = {piece: self._pieces.get_score(index) for piece, index in table.items()}
        return BPE(vocab=table, merges=generate_merges(table, scores), fuse_unk=True, byte_fallback=True)


class Merges:
    """The vocabulary of a folder that has a `tokenizer.json` only."""

    def __init__(self, model: Model, unknown: int):
        self._tokenizer = Tokenizer(model)
        self.unknown = unknown

    def encode(self, text: str, *, blank: bool) -> list[int]:
        text = (BLANK if blank else "") + text.replace(" ", BLANK)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""

    def index(self, piece: str) -> int:
        index = self._tokenizer.token_to_id(piece)
        return self.unknown if index is None else index


class Pieces:
    """Ids of the texts between added tokens (`TextIds`).

    file: the SentencePiece model that the vocabulary was read from, if there is one.
    release: the library release that is reproduced (RELEASES). transformers 4.31 strips the white space on both sides
        of an added token; 4.34 and later keep it, so that a lone blank may stand before a mask token.
    legacy: every text gets a blank in front, also after an added token: "." after [SEG] becomes the piece "▁.".
        Without it, only the beginning of the prompt and the text after the image get one. There, 4.31 encodes with a
        blank and then cuts it off the first piece; if the vocabulary has no such piece, the release gives `<unk>`,
        which its own label rule refuses (lisa.md 2.2), and here it is an error.
    """

    def __init__(self, vocabulary: Vocabulary, release: str = STRIP, legacy: bool = True, file: Path | None = None):
        self.vocabulary, self.release, self.legacy, self.file = vocabulary, release, legacy, file

    @property
    def strips(self) -> bool:
        """Whether added tokens strip the white space next to them."""
        return self.release == STRIP

    def plain(self, text: str) -> str:
        """The text to cut at added tokens. Without `legacy`, a literal "▁" counts as a blank."""
        return text if self.legacy else text.replace(BLANK, " ")

    def stretch(self, text: str, *, opens: bool, continues: bool) -> list[int]:
        """Ids of a text without added tokens, see `TextIds.stretch`."""
        # No piece of the vocabulary has a blank inside, so a text may be cut at one: the blank between a prefix and its
        # answer is given to the encoder as that of the next piece.
        if continues and text.startswith(" "):
            return self.encode(text[1:], blank=True)
        return self.encode(text, blank=opens)

    def encode(self, text: str, *, blank: bool) -> list[int]:
        """Ids of a text without added tokens.

        blank: put one in front, because the text begins a prompt or a blank separates it from the text before.
        Raises ValueError for half a surrogate pair, which is no character, and for a word that has no id without a
        blank in front (see `legacy`).
        """
        check_characters(text)
        if self.legacy:
            return self.vocabulary.encode(text, blank=True)  # SentencePiece's own behaviour, for every stretch of text
        if blank or not self.strips:
            return self.vocabulary.encode(text, blank=blank)
        return self._encode_without_blank(text)

    def _encode_without_blank(self, text: str) -> list[int]:
        """Ids with a blank in front that is then cut off the first piece, as transformers 4.31 does."""
        ids = self.vocabulary.encode(text, blank=True)
        if text.startswith(" "):  # the release cuts nothing off a text with a blank of its own
            return ids
        word = self.vocabulary.piece(ids[0]).removeprefix(BLANK)
        if not word:  # the first piece was the blank alone
            return ids[1:]
        first = self.vocabulary.index(word)
        if first == self.vocabulary.unknown:
            raise ValueError(
                f"{word!r} after an added token has no id without a blank in front, as {self.release} with legacy: "
                f"false wants it: {text[:160]!r}. Set model.tokenizer_legacy=true or model.tokenization={KEEP}"
            )
        return [first, *ids[1:]]


def _processor() -> type[SentencePieceProcessor]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ImportError("a tokenizer.model is read with SentencePiece: pip install sentencepiece protobuf") from None
    return SentencePieceProcessor


def _without_blank(pieces: SentencePieceProcessor) -> SentencePieceProcessor:
    """The same model without SentencePiece's own blank in front of a text."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # ty: ignore[missing-module-member]  (made at import)

    proto = ModelProto.FromString(pieces.serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    return _processor()(model_proto=proto.SerializeToString())
