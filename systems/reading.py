"""Reading a generated answer: which mask or refusal stands for what."""

from __future__ import annotations

import re

from data.tokens import WRAPS, TokenSpec
from data.types import Claim

MARKS = " ,.;:"  # around the words before a mask or refusal, no part of a name


def read_claims(answer: str, tokens: TokenSpec) -> list[Claim]:
    """Every mask and refusal of an answer, in order, with the words that stand directly before it.

    answer: the text of the answer alone, added tokens verbatim, without the conversation before it and without the
    end-of-sequence token (`data.tokens.decode` of the generated ids). With `<ins>` for a mask, `<no_ins>` for absence:

        "sky<ins>, boat <no_ins>"  ->  [Claim("sky", mask=0), Claim("boat", mask=None)]

    The k-th complete group of mask tokens is the k-th mask, with or without words before it. The model's mask decoder
    counts the groups in the same way, so a claim's `mask` indexes its masks. Decoders put different blanks around added
    tokens (`sky <ins>`, `sky<ins>`), so blanks carry no meaning.
    """
    group = r"\s*".join(map(re.escape, tokens.mask))
    refuse = re.escape(tokens.refuse) if tokens.refuse else r"(?!)"  # (?!) matches nothing
    # The other added tokens only separate: an incomplete group of mask tokens is no mask, and no words of the next one.
    other = "|".join(map(re.escape, [*tokens.added, *sorted(WRAPS)]))
    claims: list[Claim] = []
    masks = 0
    start = 0  # of the words before the next token
    for match in re.finditer(f"(?P<mask>{group})|(?P<refuse>{refuse})|{other}", answer):
        phrase = " ".join(answer[start : match.start()].split()).strip(MARKS)
        start = match.end()
        if match["mask"]:
            claims.append(Claim(phrase, masks))
            masks += 1
        elif match["refuse"]:
            claims.append(Claim(phrase, None))
    return claims
