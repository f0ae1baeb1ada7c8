"""
Reader of a folder with sequences that are already in order and items that are already joined to them:

    sequences.txt   one line per user: `user item item ...`, oldest first
    items.jsonl     one line per item: `{"item": 1, "title": "...", ...}`, in the order of the rows

Pictures are files named by the items, relative to the folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import line_of, parse_json, read_lines, require
from ..source import Catalogue, CatalogueBuilder, Interactions, Source
from ..table_files import renamed
from ..texts import is_missing


SEQUENCES_FILE = "sequences.txt"
ITEMS_FILE = "items.jsonl"


def read_sequence_files(
    source_dir: str | os.PathLike,
    *,
    item_fields: dict[str, str] | None = None,
    text_fields: list[str] | None = None,
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """
    Args:
        source_dir (`str` or `os.PathLike`): The folder.
        item_fields (`dict[str, str]`, *optional*, defaults to `{"item_id": "item", "image": "image"}`): Fields with an
            item's raw id, a string or an integer, and with the path of its picture, null or absent if there is none.
        text_fields (`list[str]`, *optional*): Fields that an item's text is made of, in this order; every line must
            have them, possibly null. By default those of `TEXT_FIELDS` that a line has.
        pictures (`dict[str, Path]`, *optional*): See [`CatalogueBuilder`]; others are looked for in the folder.
        source_name (`str`, *optional*, defaults to the folder's name): What the data are called.
        licence (`str`, *optional*, defaults to `"unknown"`): Their terms of use.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line cannot be read; the sentence names file and line.
    """
    directory = Path(source_dir)
    builder = CatalogueBuilder(text_fields, pictures)
    names = renamed({"item_id": "item", "image": "image"}, item_fields, "item_fields")
    catalogue = _read_items(directory / ITEMS_FILE, builder, names["item_id"], names["image"])
    interactions = _read_sequences(directory / SEQUENCES_FILE, catalogue.item_ids)
    return Source(source_name or directory.resolve().name, licence, False, catalogue, interactions)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' does not exist; a source of sequences is a folder with {SEQUENCES_FILE} and {ITEMS_FILE}."
        )
    for number, line in read_lines(path):
        yield number, line.strip()


def _read_items(path: Path, builder: CatalogueBuilder, item_field: str, image_field: str) -> Catalogue:
    for number, line in _lines(path):
        where = line_of(path, number)
        item = parse_json(line, path, number)
        require(item, [item_field, "title", *(builder.text_fields or ())], path, number)
        item_id, title, image = item[item_field], item["title"], item.get(image_field)
        # Ids stand between spaces in the file of sequences.
        if not isinstance(item_id, str | int) or isinstance(item_id, bool) or str(item_id).split() != [str(item_id)]:
            raise ValueError(
                f"{where} has {item_field}={item_id!r}; an item id is an integer, or a string without spaces."
            )
        for field, value in (("title", title), (image_field, image)):
            if not isinstance(value, str) and not is_missing(value):
                raise ValueError(f"{where} has {field}={value!r}; it must be a string or null.")
        builder.append(str(item_id), item, builder.image_location(image, path.parent), where)
    if not builder.positions:
        raise ValueError(f"'{path}' is empty; write one line per item.")
    return builder.build()


def _read_sequences(path: Path, item_ids: list[str]) -> Interactions:
    positions = {item_id: position for position, item_id in enumerate(item_ids)}
    places: dict[str, str] = {}
    sequences = []
    for number, line in _lines(path):
        where = line_of(path, number)
        user_id, *items = line.split() or [""]
        if not items:
            problem = f"has no item for user '{user_id}'" if user_id else "is empty"
            raise ValueError(f"{where} {problem}; write `user item item ...` or remove the line.")
        if user_id in places:
            raise ValueError(
                f"{where} repeats user '{user_id}' of {places[user_id]}; join the two lines in the order of time."
            )
        places[user_id] = where
        try:
            sequences.append(np.fromiter((positions[item] for item in items), np.int32, len(items)))
        except KeyError as error:
            raise ValueError(
                f"{where} names item '{error.args[0]}', which '{path.parent / ITEMS_FILE}' lacks; add it there."
            ) from error
    if not sequences:
        raise ValueError(f"'{path}' is empty; write one line per user.")
    lengths = [len(sequence) for sequence in sequences]
    return Interactions(
        user_ids=list(places),
        users=np.repeat(np.arange(len(sequences), dtype=np.int32), lengths),
        items=np.concatenate(sequences),
        # Within a user the order of the line is the order in time.
        times=np.arange(sum(lengths), dtype=np.int64),
    )
