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

from ..files import BadRows, parse_json, raw_id, read_lines, require, require_regular, shown
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
    on_bad_row: str = "error",
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """Reads a folder whose lines of items have `item_fields`, by default an id in `item`, an integer or a string, and
    the path of a picture or none in `image`, and all `text_fields` that are named; the other arguments are those of
    [`~mmesid.trainer.data.sources.tabular.read_tabular`]."""
    directory = Path(source_dir)
    bad_rows = BadRows(on_bad_row)
    builder = CatalogueBuilder(text_fields, pictures, directory)
    names = renamed({"item_id": "item", "image": "image"}, item_fields, "item_fields")
    catalogue = _read_items(directory / ITEMS_FILE, builder, names["item_id"], names["image"], bad_rows)
    interactions = _read_sequences(directory / SEQUENCES_FILE, catalogue.item_ids, bad_rows)
    return Source(source_name or directory.resolve().name, licence, False, catalogue, interactions, bad_rows)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' does not exist; a source of sequences is a folder with {SEQUENCES_FILE} and {ITEMS_FILE}."
        )
    require_regular(path)
    for where, line in read_lines(path):
        yield where, line.strip()


def _read_items(
    path: Path, builder: CatalogueBuilder, item_field: str, image_field: str, bad_rows: BadRows
) -> Catalogue:
    for where, line in _lines(path):
        try:
            _add_item(parse_json(line, where), where, path.parent, builder, item_field, image_field)
        except ValueError as error:
            bad_rows.refuse("items", error)
    if not builder.positions:
        raise ValueError(f"'{path}' is empty; write one line per item.")
    return builder.build()


def _add_item(
    item: dict, where: str, folder: Path, builder: CatalogueBuilder, item_field: str, image_field: str
) -> None:
    require(item, [item_field, "title", *(builder.text_fields or ())], where)
    item_id, title, image = raw_id(item[item_field], item_field, where), item["title"], item.get(image_field)
    # Ids stand between spaces in the file of sequences.
    if item_id.split() != [item_id]:
        raise ValueError(
            f"{where} has {item_field}={shown(item_id)}; an item id is an integer, or a string without spaces."
        )
    for field, value in (("title", title), (image_field, image)):
        if not isinstance(value, str) and not is_missing(value):
            raise ValueError(f"{where} has {field}={shown(value)}; it must be a string or null.")
    builder.append(item_id, item, builder.image_location(image, folder), where)


def _read_sequences(path: Path, item_ids: list[str], bad_rows: BadRows) -> Interactions:
    positions = {item_id: position for position, item_id in enumerate(item_ids)}
    places: dict[str, str] = {}
    sequences = []
    for where, line in _lines(path):
        try:
            user_id, sequence = _sequence(line, where, places, positions, path)
        except ValueError as error:
            bad_rows.refuse("sequences", error)
        else:
            places[user_id] = where
            sequences.append(sequence)
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


def _sequence(
    line: str, where: str, places: dict[str, str], positions: dict[str, int], path: Path
) -> tuple[str, np.ndarray]:
    """The user of a line, and positions of the user's items."""
    user_id, *items = line.split() or [""]
    if not items:
        problem = f"has no item for user {shown(user_id)}" if user_id else "is empty"
        raise ValueError(f"{where} {problem}; write `user item item ...` or remove the line.")
    if user_id in places:
        raise ValueError(
            f"{where} repeats user {shown(user_id)} of {places[user_id]}; join the two lines in the order of time."
        )
    try:
        return user_id, np.fromiter((positions[item] for item in items), np.int32, len(items))
    except KeyError as error:
        raise ValueError(
            f"{where} names item {shown(error.args[0])}, which '{path.parent / ITEMS_FILE}' lacks; add it there."
        ) from error
