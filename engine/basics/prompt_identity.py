"""When two texts are one prompt: the same words in another spelling are not new ones.

A held-out prompt with another case, a final dot or two spaces is held out; of training prompts that
are one, the first is trained on, as it is written. Text encoders, files and keyed randomness see
what the user wrote: the identity is compared, and never used in its place.
"""

from __future__ import annotations

import re
import unicodedata

# Characters that are not shown: controls, formats (zero-width ones, byte order marks, marks of
# direction, soft hyphens), halves of characters, and what Unicode has ignored by default beside
# them: fillers of Hangul, selectors of variants (of emoji, too), the joiner of graphemes.
_CATEGORIES = {"Cc", "Cf", "Cs"}
_IGNORED = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Marks that editors put in place of those that keyboards have.
_AS_TYPED = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
)
_END = " .,;:!?\u3002"  # what may close a prompt


def identity_of(prompt: str) -> str:
    """What all spellings of a prompt share; "" for a text of which nothing is seen.

    Compatibility characters are those they stand for (NFKC: fullwidth letters, ligatures,
    no-break spaces, composed and decomposed accents), case is folded, invisible characters go,
    quotation marks and dashes are those of a keyboard, white space is one space between words,
    and marks at the end (:data:`_END`) do not count unless there is nothing else.
    """
    text = prompt
    if not text.isascii():
        text = _spelled("".join(map(_seen, text)).translate(_AS_TYPED)).translate(_AS_TYPED)
    elif not text.isprintable():
        text = "".join(map(_seen, text))
    text = " ".join(text.lower().split())
    return text.rstrip(_END) or text


def _seen(letter: str) -> str:
    if letter.isspace():
        return " "
    hidden = unicodedata.category(letter) in _CATEGORIES or _IGNORED.match(letter)
    return "" if hidden else letter


def _spelled(text: str) -> str:
    """NFKC with case folded, as Unicode defines it (3.13, D146): either can undo the other."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return unicodedata.normalize("NFKC", text.casefold())
