"""
Reader of a folder with sequences that are already in order and items that are already joined to them:

    sequences.txt   one user a line: `user item item ...`, oldest first
    items.jsonl     one item a line: `{"item": 1, "title": "...", ...}`, in the order of the rows

Pictures are files named by the items, relative to the folder.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .source import Catalogue, Interactions, Source


SEQUENCES_FILE = "sequences.txt"
ITEMS_FILE = "items.jsonl"
TEXT_FIELDS = ("title", "attributes", "genres", "brand", "categories", "description")


def read_sequence_files(
    directory: str | os.PathLike,
    text_fields: list[str] | None = None,
    item_field: str = "item",
    image_field: str = "image",
    name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """
    Args:
        directory (`str` or `os.PathLike`): The folder.
        text_fields (`list[str]`, *optional*): Fields that an item's text is made of, in this order; every line must
            have them, possibly null. By default those of `TEXT_FIELDS` that a line has.
        item_field (`str`, *optional*, defaults to `"item"`): Field with an item's raw id, a string or an integer.
        image_field (`str`, *optional*, defaults to `"image"`): Field with the path of an item's picture, null or
            absent if there is none.
        name (`str`, *optional*, defaults to the folder's name): What the data are called.
        licence (`str`, *optional*, defaults to `"unknown"`): Their terms of use.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line cannot be read; the sentence names file and line.
    """
    directory = Path(directory)
    catalogue = _read_items(directory / ITEMS_FILE, text_fields, item_field, image_field)
    interactions = _read_sequences(directory / SEQUENCES_FILE, catalogue.item_ids)
    return Source(name or directory.resolve().name, licence, False, catalogue, interactions)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Every line with the place to name if it is wrong."""
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' does not exist; a source of sequences is a folder with {SEQUENCES_FILE} and {ITEMS_FILE}."
        )
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"'{path}', line {number}"
            try:
                yield place, line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place} is not UTF-8 ({error.reason} at byte {error.start}); convert the file."
                ) from error


def _read_items(path: Path, text_fields: list[str] | None, item_field: str, image_field: str) -> Catalogue:
    places: dict[str, str] = {}
    titles, texts, images = [], [], []
    for place, line in _lines(path):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place} is not JSON ({error.msg} at column {error.colno}); write one JSON object a line."
            ) from error
        if not isinstance(item, dict):
            raise ValueError(f"{place} holds {type(item).__name__}, not a JSON object; write one JSON object a line.")
        for field in (item_field, "title", *(text_fields or ())):
            if field not in item:
                raise ValueError(
                    f"{place} has no field '{field}', only {', '.join(item) or 'none at all'}; add it or name another."
                )
        item_id, title, image = item[item_field], item["title"], item.get(image_field)
        if not isinstance(item_id, str | int) or isinstance(item_id, bool) or str(item_id).split() != [str(item_id)]:
            raise ValueError(
                f"{place} has {item_field}={item_id!r}; an item id is an integer, or a string without spaces."
            )
        item_id = str(item_id)
        if item_id in places:
            raise ValueError(f"{place} repeats item '{item_id}' of {places[item_id]}; keep one of them.")
        for field, value in (("title", title), (image_field, image)):
            if not isinstance(value, str | None):
                raise ValueError(f"{place} has {field}={value!r}; it must be a string or null.")
        places[item_id] = place
        titles.append((title or "").strip())
        fields = [field for field in TEXT_FIELDS if field in item] if text_fields is None else text_fields
        texts.append(compose_text(_parts(item[field], field, place) for field in fields))
        images.append(path.parent / image if image else None)
    if not places:
        raise ValueError(f"'{path}' is empty; write one item a line.")
    return Catalogue(list(places), titles, texts, images if any(images) else None)


def _parts(value, field: str, place: str) -> str:
    """A field as text: numbers and strings as they are, lists joined by commas, null empty."""
    values = value if isinstance(value, list) else [value]
    for element in values:
        if not isinstance(element, str | int | float | None):
            raise ValueError(f"{place} has {field}={value!r}; text is a string, a number, a list of them, or null.")
    return ", ".join(str(element).strip() for element in values if element is not None and str(element).strip())


def compose_text(parts: Iterator[str]) -> str:
    """Joins the non-empty parts as sentences: `"Title. Brand, Category. Description"`."""
    parts = [part for part in parts if part]
    return " ".join([part if part.endswith((".", "!", "?")) else f"{part}." for part in parts[:-1]] + parts[-1:])


def _read_sequences(path: Path, item_ids: list[str]) -> Interactions:
    positions = {item_id: position for position, item_id in enumerate(item_ids)}
    places: dict[str, str] = {}
    sequences = []
    for place, line in _lines(path):
        user_id, *items = line.split() or [""]
        if not items:
            problem = f"has no item for user '{user_id}'" if user_id else "is empty"
            raise ValueError(f"{place} {problem}; write `user item item ...` or remove the line.")
        if user_id in places:
            raise ValueError(
                f"{place} repeats user '{user_id}' of {places[user_id]}; join the two lines in the order of time."
            )
        places[user_id] = place
        try:
            sequences.append(np.fromiter((positions[item] for item in items), np.int32, len(items)))
        except KeyError as error:
            raise ValueError(
                f"{place} names item '{error.args[0]}', which '{path.parent / ITEMS_FILE}' lacks; add it there."
            ) from error
    if not sequences:
        raise ValueError(f"'{path}' is empty; write one user a line.")
    lengths = [len(sequence) for sequence in sequences]
    return Interactions(
        user_ids=list(places),
        users=np.repeat(np.arange(len(sequences), dtype=np.int32), lengths),
        items=np.concatenate(sequences),
        # Within a user the order of the line is the order in time.
        times=np.arange(sum(lengths), dtype=np.int64),
    )
