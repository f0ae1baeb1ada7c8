"""Fields as words: what is left of a shop's markup, which prices are prices, and how parts become one text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmesid.trainer.data.texts import compose_text, field_text, plain_text, price_of


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("A <b>bo</b>ld <br/>claim<br>and  more", "A bold claim and more"),
        ("<p>One.</p><p>Two.</p>", "One. Two."),
        ("<style>.a{color:red}</style>Soap<script>var a = 1 < 2;</script> bar", "Soap bar"),
        ("7 < 9 & I <3 it", "7 < 9 & I <3 it"),
        ("</span></span></span>", ""),
        ("caf&eacute; &#8482;", "café ™"),
        ("  spaces\tand\nlines ", "spaces and lines"),
    ],
)
def test_markup_becomes_what_a_reader_sees(markup, text):
    assert plain_text(markup) == text


@given(st.text(alphabet=st.characters(exclude_characters="<&"), max_size=40))
def test_text_without_markup_keeps_its_words(text):
    assert plain_text(text) == " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "price"),
    [
        (9.99, 9.99), (12, 12.0), ("$5.99", 5.99), ("$1,299.00", 1299.0), ("from 9.99", 9.99), ("$5.00 - $7.50", 5.0),
        ("14", 14.0), (None, None), ("", None), ("—", None), (True, None), ([3], None),
        (float("nan"), None), (float("inf"), None),
        (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{border-color:#e77600}", None),
    ],
)  # fmt: skip
def test_prices_are_numbers_and_markup_is_none(value, price):
    assert price_of(value) == price


def test_parts_join_as_sentences():
    assert compose_text(["Why?", "", "Acme", "A pen. Blue"]) == "Why? Acme. A pen. Blue"
    assert field_text(["x", None, " y ", float("nan"), 3], "tags", "here") == "x, y, 3"
    with pytest.raises(ValueError, match=r"here has tags=\{'a': 1\}; text is a string"):
        field_text({"a": 1}, "tags", "here")
