"""The tokens that a system adds, and a tokenizer that gives the published ids under any library version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from transformers import AddedToken, PreTrainedTokenizerBase

from data.internvl_tokenizer import INTERNVL
from data.llama_tokenizer import LLAMA
from data.qwen_tokenizer import QWEN
from data.templates import Template
from data.tokenizer_family import TokenizerFamily

FAMILIES = (INTERNVL, QWEN, LLAMA)  # the first that reads a folder has it
WRAPS = frozenset(token for family in FAMILIES for token in family.wrap)


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of a system.

    added: all of them in the order of their ids, which published weights fix, without the image wrap.
    mask: the K tokens that stand for one mask, e.g. ("[SEG]",) or ("[SEG0]", ..., "[SEG5]").
    refuse: the token that says that a target is absent; None where the system refuses in plain words.
    wrap_image: add <im_start> and <im_end> and put them around the image, as all published LISA-family weights do. A
        family that has such tokens of its own (Qwen, InternVL) always uses these and adds none.
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


def load_tokenizer(
    folder: str | Path,
    spec: TokenSpec,
    max_length: int = 512,
    *,
    release: str | None = None,
    legacy: bool | None = True,
) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder` with `spec` added.

    It has three attributes of this project: `family` (data/tokenizer_family.py) is the policy that its files ask for,
    `pieces` encodes the text between added tokens, `own_size` is the number of ids that the folder's files have.

    release: of a LLaMA tokenizer, the library release whose ids around added tokens are reproduced: transformers-4.31,
        which strips white space next to them (lisa.md 2.5, measured), or transformers-4.44, which keeps it (gsva.md 2).
        None: what `tokenizer_config.json` of the folder says under "tokenization" (this project saves it), else
        transformers-4.31.
    legacy: of a LLaMA tokenizer, whether text after an added token gets a blank in front. None: what
        `tokenizer_config.json` says, True if it says nothing.

    LLaMA's `<s>`, `</s>` and `<unk>` do not strip, and its pad is `<unk>`, id 0; a Qwen tokenizer has no BOS, and none
    of its tokens strips. Tokens that the folder already has keep their ids. Raises FileNotFoundError if there is no
    tokenizer, ValueError for an unknown release, for files that disagree and for a vocabulary of no known family.
    """
    folder = Path(folder)
    family = next((family for family in FAMILIES if family.reads(folder)), LLAMA)
    if folder.is_dir() and not family.reads(folder):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: expected tokenizer.model or tokenizer.json there, or vocab.json and merges.txt"
        )
    tokenizer = family.load(folder, max_length, release, legacy)
    tokenizer.family, tokenizer.own_size = family, len(tokenizer)
    tokenizer.padding_side = "right"
    strip = tokenizer.pieces.strips
    names = added_tokens(family, spec)
    tokens = [AddedToken(name, lstrip=strip, rstrip=strip, normalized=False, special=True) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def family_for(template: Template, usual: TokenizerFamily) -> TokenizerFamily:
    """The family of tokenizers that a conversation template is for: answers end in the family's stop token. usual: of
    the backbone, where it is known; several families share a template."""
    return next(family for family in (usual, *reversed(FAMILIES)) if family.stop in template.close)


def added_tokens(family: TokenizerFamily, spec: TokenSpec) -> tuple[str, ...]:
    """The tokens that a system adds to a base of this family, in the order of their ids: the image wrap comes last."""
    return (*spec.added, *family.wrap) if family.adds_wrap and spec.wrap_image else spec.added


def image_wrap(family: TokenizerFamily, spec: TokenSpec) -> tuple[str, str]:
    """What stands directly before and after the image: two tokens or nothing."""
    return family.wrap if spec.wrap_image or not family.adds_wrap else ("", "")


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of an added token, looked up by name (tokenising the string may give a lone space piece first)."""
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise KeyError(f"the tokenizer has no token {token!r}; added ones: {sorted(tokenizer.get_added_vocab())}")
    return index


def mask_ids(tokenizer: PreTrainedTokenizerBase, spec: TokenSpec) -> tuple[int, ...]:
    """Ids of the K tokens of one mask group."""
    return tuple(token_id(tokenizer, token) for token in spec.mask)


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase, *, apart: str = "") -> str:
    """Text of generated ids: added tokens verbatim, the pieces between them decoded on their own; BOS, EOS and pad
    dropped, and ids without a token (rows that only pad the vocabulary matrix).

    Versions of the library differ in the blanks that they put around LLaMA's added tokens; here there are none, and
    what lies between two tokens is stripped: `sky<ins>traffic light<no_ins>wall<ins>`. A family whose tokens strip
    nothing keeps the blanks there, without those at both ends of the text.

    apart: put into words that spell an added token letter by letter, which no reader then takes for the token.
    """
    added = {index: name for name, index in tokenizer.get_added_vocab().items()}
    drop = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text: list[str] = []
    run: list[int] = []  # ids since the last added token

    def flush() -> None:
        if run:
            words = cast(str, tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for name in added.values() if apart else ():
                words = words.replace(name, name[0] + apart + name[1:])
            text.append(words if tokenizer.family.verbatim else words.strip())
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
    return "".join(text).strip()
