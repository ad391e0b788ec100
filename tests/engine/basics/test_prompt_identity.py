"""Which spellings are one prompt."""

from __future__ import annotations

import unicodedata

import pytest
from cdpo.engine.basics.prompt_identity import identity_of
from hypothesis import given
from hypothesis import strategies as st

INVISIBLE = ["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u202e", "\ufe0f", "\x00", "\u3164"]
SPACES = ["  ", "\u00a0", "\u3000", "\t", "\n", " \u2009 ", "\u2028", "\x1c", "\u200b \u200b"]


@st.composite
def spellings(draw, text):
    """A text, and another spelling of it."""
    plain = draw(text)
    other = draw(st.sampled_from([plain, plain.upper(), plain.lower(), plain.casefold()]))
    form = draw(st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
    letters = unicodedata.normalize(form, other)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(letters)))
        letters = letters[:place] + draw(st.sampled_from(INVISIBLE)) + letters[place:]
    spaced = letters.replace(" ", draw(st.sampled_from(SPACES)))
    end = draw(st.sampled_from(["", ".", "!", "?", " .", "...", "\u3002", "\uff01", "\u2026"]))
    around = draw(st.sampled_from(["", " ", "\u200b", "\ufeff "]))
    return plain, around + spaced + end + around


@given(
    spellings(
        st.text(
            "aZ \u00e9\u00c5\ufb01\uff21\u00df\u0130\u03c3\u0301\uac00.,'\u2019-\u2014",
            min_size=1,
            max_size=20,
        )
    )
)
def test_every_spelling_has_the_identity_of_the_prompt(pair):
    plain, other = pair
    if identity_of(plain).strip(" .,;:!?"):  # a prompt of marks alone is its marks
        assert identity_of(other) == identity_of(plain)


@given(st.text(max_size=30))
def test_an_identity_is_its_own(text):
    identity = identity_of(text)
    assert identity_of(identity) == identity
    assert identity == " ".join(identity.split())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red apple", "a green apple"),
        ("a red apple", "red apple"),
        ("2 dogs", "3 dogs"),
        ("a #1 fan", "a 1 fan"),
        ("a (red) apple", "a red apple"),
        ("man, dog", "man dog"),
        ("resume", "r\u00e9sum\u00e9"),
        ("?", "!"),
        ("\u732b", "\u72ac"),
    ],
)
def test_other_words_are_another_prompt(one, other):
    assert identity_of(one) != identity_of(other)


def test_a_text_of_which_nothing_is_seen_has_none():
    assert identity_of(" \u200b\ufeff\x00") == "" and identity_of("...") == "..."


def test_case_and_final_dot_alone_decide_nothing_else():
    """What most prompts are: in normal form but for their case."""
    assert identity_of("A dog riding a Bike.") == "a dog riding a bike"
    assert identity_of("\u201cA dog\u2019s bed\u201d \u2014 \uff34") == '"a dog\'s bed" - t'
