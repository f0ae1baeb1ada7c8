"""Names as a card can show them and as the Hub takes them, from whatever text a source is called by."""

import re


# A name longer than a line is no name.
LONGEST_NAME = 120


def printable(text: str) -> str:
    """The text on one line, without control characters and other signs that nobody sees."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def escaped(text: str) -> str:
    """The text on one line as Markdown shows it letter by letter: neither markup nor HTML of its own."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", printable(text)).replace("<", "&lt;")
    # Underscores inside a word mean nothing.
    return re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def name_or(text: str | None, otherwise: str) -> str:
    """The text as a name of at most 120 characters; `otherwise` if nothing that can be read is left of it."""
    name = printable(text or "")
    if not any(sign.isalnum() for sign in name):
        return otherwise
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"


def slug(text: str, otherwise: str) -> str:
    """Lower-case letters, digits, single hyphens and single dots, at most 96 characters, as the Hub wants them;
    `otherwise` if nothing is left of the text."""
    words = re.sub(r"[^a-z0-9.]+", "-", text.lower())
    words = re.sub(r"[-.]*-[-.]*|\.{2,}", "-", words)[:96].strip("-.")
    return words.removesuffix(".git") or otherwise
