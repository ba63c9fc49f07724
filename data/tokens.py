"""The vocabulary a system adds, and a tokenizer that gives the published ids with any library version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import normalizers
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerBase

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of a system.

    added: in the order they were added (ids matter to published weights), without the image wrap, which comes last.
    mask: the group of tokens that stands for one mask, e.g. ("[SEG]",) or ("[SEG0]", ..., "[SEG5]").
    refuse: the token that says a target is absent; None where the system refuses in plain words.
    wrap_image: put <im_start> and <im_end> around the picture (all published LISA-family weights do).
    """

    added: tuple[str, ...]
    mask: tuple[str, ...]
    refuse: str | None = None
    wrap_image: bool = True

    def __post_init__(self) -> None:
        for token in (*self.mask, *([self.refuse] if self.refuse else [])):
            if token not in self.added:
                raise ValueError(f"token {token!r} is used but not among the added tokens {self.added}")

    @property
    def all_added(self) -> tuple[str, ...]:
        return (*self.added, *((IMAGE_START, IMAGE_END) if self.wrap_image else ()))


def load_tokenizer(folder: str | Path, spec: TokenSpec, max_length: int = 512) -> PreTrainedTokenizerBase:
    """The LLaMA tokenizer of `folder` with `spec` added, behaving as in transformers 4.31 around added tokens.

    White space on both sides of an added token disappears and each piece between them starts anew, which decides the
    state before a mask token (lisa.md 2.5, measured). `<s>`, `</s>` and `<unk>` do not strip. Pad is `<unk>`, id 0.
    Tokens that the folder already has keep their ids.
    """
    folder = Path(folder)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected tokenizer.model or tokenizer.json there")
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), legacy=True, model_max_length=max_length)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side = "right"
    plain = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    known = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    names = dict.fromkeys([name for name, _ in known if name not in plain] + list(spec.all_added))
    tokens = [AddedToken(name, lstrip=True, rstrip=True, normalized=False, special=True) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokenizer.is_fast:  # as SentencePiece: one blank before every piece, even where the text begins with one
        blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer = blanks, None
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of an added token, looked up by name (tokenising the string may give a lone space piece first)."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise KeyError(f"the tokenizer has no token {token!r}; added ones: {sorted(tokenizer.get_added_vocab())}")
    return found


def mask_ids(tokenizer: PreTrainedTokenizerBase, spec: TokenSpec) -> tuple[int, ...]:
    """Ids of the K tokens of one mask group."""
    return tuple(token_id(tokenizer, token) for token in spec.mask)


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of generated ids: added tokens verbatim, the pieces between them decoded on their own, `<s>`/`</s>` dropped.

    Library versions differ in the blanks they put around added tokens; here there are none beyond the text's own:
    `sky<ins>traffic light<no_ins>wall<ins>`.
    """
    added = {index: name for name, index in tokenizer.get_added_vocab().items()}
    drop = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text, run = [], []

    def flush() -> None:
        if run:
            text.append(tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip())
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
