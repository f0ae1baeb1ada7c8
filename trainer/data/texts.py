"""Fields of items as plain words, and the text that an encoder reads of an item, composed from them once."""

import math
import re
from collections.abc import Iterable
from html.parser import HTMLParser

from .files import shown


# The fields that an item's text is made of by default, in this order.
TEXT_FIELDS = ("title", "attributes", "genres", "brand", "categories", "features", "description")

# Tags inside a word's line; every other tag separates words.
_INLINE_TAGS = frozenset("a abbr b big em font i mark small span strong sub sup u".split())
_PRICE = re.compile(r"(?:from\s+)?(?:US)?[$€£]?\s*(\d[\d,]*(?:\.\d+)?)(?:\s*-\s*[$€£]?\s*[\d,.]+)?", re.IGNORECASE)


class _Words(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in ("script", "style")
        if tag not in _INLINE_TAGS:
            self.words.append(" ")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style") and self.hidden > 0
        if tag not in _INLINE_TAGS:
            self.words.append(" ")

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def plain_text(markup: str) -> str:
    """What a reader sees of HTML: without tags, scripts and styles, entities resolved, white space collapsed."""
    if "<" in markup or "&" in markup:
        parser = _Words()
        parser.feed(markup)
        parser.close()
        markup = "".join(parser.words)
    return " ".join(markup.split())


def is_missing(value) -> bool:
    """Whether a value says that there is none: null, or what pandas and JSON write for a number that is none (NaN,
    infinity)."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def field_text(value, field: str, where: str) -> str:
    """
    A field as text: numbers and strings as they are, lists joined by commas, what is missing empty.

    Raises:
        ValueError: If it is anything else; the sentence names where it was read and the field.
    """
    values = value if isinstance(value, list) else [value]
    for element in values:
        if not isinstance(element, str | int | float | None):
            raise ValueError(
                f"{where} has {field}={shown(value)}; text is a string, a number, a list of them, or null."
            )
    text = ", ".join(str(element).strip() for element in values if not is_missing(element) and str(element).strip())
    # Half of a character, as titles that were cut have it, is no text in any encoding.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def price_of(value) -> float | None:
    """A number, or a string like `"$1,299.00"`, `"from 9.99"` or `"$5 - $7"` (the lower end), as a price; `None` for
    anything else, which in shops' exports is markup or a dash."""
    match = _PRICE.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 100 else None
    number = match[1].replace(",", "") if match else value
    if isinstance(number, bool) or not (match or isinstance(value, int | float)):
        return None
    try:
        price = float(number)
    # An integer beyond what a float can be.
    except OverflowError:
        return None
    return price if math.isfinite(price) else None


def compose_text(parts: Iterable[str]) -> str:
    """Joins the non-empty parts as sentences: `"Title. Brand, Category. Description"`."""
    parts = [part for part in parts if part]
    return " ".join([part if part.endswith((".", "!", "?")) else f"{part}." for part in parts[:-1]] + parts[-1:])
