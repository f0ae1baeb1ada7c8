"""What every reader of raw data yields: a catalogue of items and the interactions of users with them."""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from .files import BadRows, shown
from .texts import TEXT_FIELDS, compose_text, field_text, is_missing, price_of


# Type of the fields that every reader knows; any other is text.
FIELD_TYPES = {
    "title": pa.string(),
    "description": pa.string(),
    "brand": pa.string(),
    "categories": pa.list_(pa.string()),
    "price": pa.float64(),
}

# Items, and interactions or ids, that are copied at a time on their way into Arrow and NumPy.
_ITEMS_AT_ONCE = 8192
_ROWS_AT_ONCE = 65_536


@dataclass
class Catalogue:
    """
    Items in the order in which they become rows. What they are described by lies in Arrow memory: a million
    descriptions are not a million Python objects.

    Args:
        item_ids (`list[str]`): Raw id of every item, no two alike.
        fields (`pa.Table`): One row per item, nulls where it lacks a field: those of `FIELD_TYPES` and of the source's
            own that any item has, and `title`.
        text_fields (`list[str]`): Which of them an item's text is made of, in this order.
        images (`Sequence[str | Path | bytes | None]`, *optional*): URL, file or bytes of every item's picture, `None`
            where there is none; `None` instead of a sequence if no item has one.
        pictures_by_id (`dict[str, Path]`, *optional*, defaults to none): Pictures called after items, for those that
            have no other.
        picture_folders (`list[Path]`, *optional*): Where files of pictures may lie that items name, links followed;
            by default anywhere.
    """

    item_ids: list[str]
    fields: pa.Table
    text_fields: list[str]
    images: Sequence[str | Path | bytes | None] | None = None
    pictures_by_id: dict[str, Path] = field(default_factory=dict)
    picture_folders: list[Path] | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    def titles(self, positions: np.ndarray | None = None) -> list[str]:
        """Titles of the items at `positions`, ascending, by default of all; empty where there is none."""
        return [title or "" for title in self.columns(["title"], positions)["title"].to_pylist()]

    def texts(self, positions: np.ndarray | None = None) -> list[str]:
        """What an encoder reads of the items at `positions`, ascending, by default of all; empty where there is
        nothing."""
        columns = [column.to_pylist() for column in self.columns(self.text_fields, positions).columns]
        return [
            compose_text(field_text(value, field, "the catalogue") for field, value in zip(self.text_fields, values))
            for values in zip(*columns, strict=True)
        ]

    def columns(self, names: list[str], positions: np.ndarray | None) -> pa.Table:
        """The fields of these names of the items at `positions`, ascending, or of all."""
        table = self.fields.select(names)
        if positions is None:
            return table
        if len(positions) == 0:
            return table.slice(0, 0)
        wanted = np.zeros(positions[-1] + 1 - positions[0], bool)
        wanted[positions - positions[0]] = True
        # `Table.take` would first join the parts of every column into a copy of the whole.
        return table.slice(positions[0], len(wanted)).filter(pa.array(wanted))


@dataclass
class Interactions:
    """
    One entry per interaction, in any order.

    Args:
        user_ids (`Sequence[str]`): Raw id of every user, no two alike.
        users, items (`np.ndarray`): `(interactions,)` int32 positions in `user_ids` and in the catalogue.
        times (`np.ndarray`): `(interactions,)` int64; anything that grows with time. Equal times of one user keep the
            order they are given in.
        ratings (`np.ndarray`, *optional*): `(interactions,)` float32, NaN where an interaction has none; `None` if
            the source has no ratings at all.
    """

    user_ids: Sequence[str]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclass
class Source:
    """
    Items and what users did with them, with the `name` and the `licence` that the statistics and the dataset card
    state, and whether they are `synthetic`: said wherever results on them appear. `bad_rows` were left out.
    """

    name: str
    licence: str
    synthetic: bool
    catalogue: Catalogue
    interactions: Interactions
    bad_rows: BadRows = field(default_factory=BadRows)


class CatalogueBuilder:
    """
    Collects items one after the other into a [`Catalogue`]: with the `text_fields` that are named, by default those of
    `TEXT_FIELDS` that any item has, and with `pictures` by name, which are those that items name or, for items without
    a picture, those called after their ids. Others lie in `folder`, by default anywhere.
    """

    def __init__(
        self,
        text_fields: list[str] | None = None,
        pictures: dict[str, Path] | None = None,
        folder: Path | None = None,
    ):
        self.text_fields = text_fields
        self.folder = folder
        self.pictures = pictures or {}
        others = (*TEXT_FIELDS, *(text_fields or ()))
        self.schema = pa.schema(FIELD_TYPES | {name: pa.string() for name in others if name not in FIELD_TYPES})
        self.positions: dict[str, int] = {}
        self.images: list[str | Path | bytes | None] = []
        self._rows: list[dict] = []
        self._batches: list[pa.RecordBatch] = []

    def append(self, item_id: str, values: dict, image: str | Path | bytes | None, where: str) -> None:
        """Adds an item with its fields (strings, numbers, lists of them, or null; others than those wanted are left
        out) and picture. Raises `ValueError`, which says `where` it was read, if it was added before or a field is
        none of these."""
        if item_id in self.positions:
            number = self.positions[item_id] + 1
            raise ValueError(f"{where} repeats item {shown(item_id)}, number {number} of the items; keep one of them.")
        row: dict[str, Any] = {}
        for name in self.schema.names:
            value = values.get(name)
            if name == "price":
                row[name] = price_of(value)
            elif name == "categories":
                elements = value if isinstance(value, list) else [value]
                row[name] = [text for element in elements if (text := field_text(element, name, where))] or None
            else:
                row[name] = field_text(value, name, where) or None
        self.positions[item_id] = len(self.positions)
        self._rows.append(row)
        self.images.append(image)
        if len(self._rows) == _ITEMS_AT_ONCE:
            self._flush()

    def image_location(self, image: Any, folder: Path) -> str | Path | None:
        """What a field says of a picture: a URL stays one, any other string names a picture or a file in `folder`."""
        if is_missing(image) or image == "":
            return None
        if image.startswith(("http://", "https://")):
            return image
        return self.pictures.get(image) or self._listed.get(os.path.abspath(folder / image)) or folder / image

    @cached_property
    def _listed(self) -> dict[str, Path]:
        """The pictures by their places: items may name them by these too."""
        return {os.path.abspath(path): path for path in self.pictures.values()}

    def _flush(self) -> None:
        self._batches.append(pa.RecordBatch.from_pylist(self._rows, schema=self.schema))
        self._rows = []

    def build(self) -> Catalogue:
        """The catalogue; `ValueError` if no item has one of the text fields that were asked for, or no picture belongs
        to an item."""
        self._flush()
        table = pa.Table.from_batches(self._batches, schema=self.schema)
        present = [name for name in table.column_names if name == "title" or table[name].null_count < len(table)]
        for name in self.text_fields or ():
            if name not in present:
                raise ValueError(
                    f"No item has the field '{name}' that text_fields names; the items have {', '.join(present)}."
                )
        text_fields = self.text_fields or [name for name in TEXT_FIELDS if name in present]
        images = self.images if any(image is not None for image in self.images) else None
        folders = None if self.folder is None else [self.folder]
        if folders is not None and self.pictures:
            folders.append(Path(os.path.commonpath({path.parent for path in self.pictures.values()})))
        return Catalogue(
            list(self.positions), table.select(present), text_fields, images, self._pictures_by_id(), folders
        )

    def _pictures_by_id(self) -> dict[str, Path]:
        by_id = {PurePosixPath(name).stem: path for name, path in self.pictures.items()}
        named = {image for image in self.images if isinstance(image, Path)}
        if by_id and by_id.keys().isdisjoint(self.positions) and named.isdisjoint(self.pictures.values()):
            raise ValueError(
                f"No picture of image_dir is called after an item: the first is '{next(iter(self.pictures))}', the "
                f"first item '{next(iter(self.positions))}'; rename the pictures, or name them in a field of items."
            )
        return by_id


class ArrowStrings(Sequence):
    """Strings in Arrow memory, a third of what Python objects take."""

    def __init__(self, strings: list[str]):
        # A single array would need as much memory again for the last time that it doubles.
        starts = range(0, len(strings), _ROWS_AT_ONCE)
        parts = [pa.array(strings[start : start + _ROWS_AT_ONCE], pa.string()) for start in starts]
        self._array = pa.chunked_array(parts, pa.string())

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, position):
        return self._array[int(position)].as_py()


class InteractionCollector:
    """
    Collects interactions into arrays: sixteen bytes for each, and one string for each user and item, whose positions
    follow the order in which they first appear. After the last interaction comes [`~InteractionCollector.finish`].
    """

    def __init__(self):
        self.user_positions: dict[str, int] = {}
        self.item_positions: dict[str, int] = {}
        # These grow in place: parts that are joined at the end would be there twice.
        self._users, self._items, self._times, self._ratings = array("i"), array("i"), array("q"), array("f")

    def __len__(self) -> int:
        return len(self._users)

    def extend(self, users: pa.Array, items: pa.Array, times: np.ndarray, ratings: np.ndarray | None = None) -> None:
        """Adds interactions: ids as strings without nulls, times as integers, ratings as floats, NaN where there is
        none; each of shape `(interactions,)`."""
        self._users.frombytes(_positions(users, self.user_positions).tobytes())
        self._items.frombytes(_positions(items, self.item_positions).tobytes())
        self._times.frombytes(times.astype(np.int64).tobytes())
        if ratings is not None:
            self._ratings.frombytes(ratings.astype(np.float32).tobytes())

    def extend_rows(self, rows: Iterator[tuple[str, str, int, float]]) -> None:
        """Adds interactions `(user, item, time, rating)` that come one at a time."""
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            users, items, times, ratings = zip(*chunk)
            self.extend(pa.array(users), pa.array(items), np.array(times), np.array(ratings))

    def times(self) -> np.ndarray:
        """`(interactions,)` times, in the memory that they were collected in: to be let go before more are added."""
        return np.frombuffer(self._times, np.int64)

    def remove(self, positions: np.ndarray) -> None:
        """Leaves out the interactions at `positions`."""
        kept = np.ones(len(self), bool)
        kept[positions] = False
        for name in ("_users", "_items", "_times", "_ratings"):
            values = getattr(self, name)
            if len(values):
                setattr(self, name, array(values.typecode, np.asarray(values)[kept].tobytes()))

    def finish(self) -> None:
        """Lets go of what only further interactions would need: raw data have millions of users, and the items that
        are read next need the memory."""
        user_ids, item_ids = list(self.user_positions), list(self.item_positions)
        del self.user_positions, self.item_positions
        self.user_ids, item_ids = ArrowStrings(user_ids), ArrowStrings(item_ids)
        del user_ids
        # Anew, for Python gives no memory back that lies between objects which stay, and the ids of items lie between
        # those of users.
        self.item_positions = {item_id: position for position, item_id in enumerate(item_ids)}

    def interactions(self, positions: dict[str, int]) -> Interactions:
        """The interactions, in the memory that they were collected in, with the items' positions in the catalogue."""
        remap = np.fromiter((positions[item_id] for item_id in self.item_positions), np.int32)
        ratings = np.asarray(self._ratings)
        return Interactions(
            user_ids=self.user_ids,
            users=np.asarray(self._users),
            items=remap[np.asarray(self._items)],
            times=np.asarray(self._times),
            ratings=None if np.isnan(ratings).all() else ratings,
        )


def _positions(ids: pa.Array, positions: dict[str, int]) -> np.ndarray:
    """Positions of the ids, int32; those of new ids are added."""
    encoded = ids.dictionary_encode()
    known = np.fromiter(
        (positions.setdefault(raw_id, len(positions)) for raw_id in encoded.dictionary.to_pylist()), np.int32
    )
    return known[encoded.indices.to_numpy()]


def join(
    name: str,
    licence: str,
    collector: InteractionCollector,
    builder: CatalogueBuilder,
    items_file: str | None,
    bad_rows: BadRows,
) -> Source:
    """The source of collected interactions and items; items with interactions but no description come last. Raises
    `ValueError` if there are no interactions, or none of them is with an item of `items_file`."""
    if not len(collector):
        raise ValueError(f"'{name}' has no interactions; check the file that they are read from.")
    if items_file is not None and builder.positions.keys().isdisjoint(collector.item_positions):
        there = "".join(f" and there like '{item_id}'" for item_id in islice(builder.positions, 1))
        raise ValueError(
            f"'{items_file}' describes no item of the interactions, where ids look like "
            f"'{next(iter(collector.item_positions))}'{there}; {_remedy_of_ids(builder.positions, collector)}."
        )
    for item_id in collector.item_positions:
        if item_id not in builder.positions:
            builder.append(item_id, {}, None, "the interactions")
    positions = builder.positions
    catalogue = builder.build()
    return Source(name, licence, False, catalogue, collector.interactions(positions), bad_rows)


def _remedy_of_ids(described: dict[str, int], collector: InteractionCollector) -> str:
    for floats, others, where in (
        (described, collector.item_positions, "of the items"),
        (collector.item_positions, described, "of the interactions"),
    ):
        if any(item_id.endswith(".0") and item_id.removesuffix(".0") in others for item_id in floats):
            return (
                f"the ids {where} were written as floats: write them again as integers, as "
                "table['item_id'].astype('Int64') makes them in pandas"
            )
    return "name files, or fields, that belong together"
