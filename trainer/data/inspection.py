"""What two tables of strangers look like: which columns mean what, and how times are written."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import TimeReader
from .files import parse_json, read_lines
from .table_files import TableLocation, csv_batches, csv_layout, file_of_known_format, parquet_batches


# Rows that are looked at; the tables are read as a whole afterwards, with what these tell.
SAMPLE_ROWS = 20_000
# What columns are often called in English and German, letters without accents and digits alone, the likelier first.
INTERACTION_NAMES = {
    "timestamp": "timestamp time datetime date eventtime createdat orderedat purchasedat unixreviewtime ts when "
    "zeitpunkt zeit datum bestelldatum kaufdatum uhrzeit",
    "rating": "rating overall stars score bewertung sterne",
    "user_id": "userid user uid reviewerid reviewer customerid customer buyerid buyer memberid member visitorid "
    "visitor clientid client accountid account profileid profile sessionid session "
    "kundennr kundennummer kundenid kunde kaufer nutzerid nutzer benutzerid benutzer mitglied",
    "item_id": "itemid item iid productid product sku asin parentasin movieid movie filmid film bookid book isbn "
    "articleid article trackid track songid song videoid video gameid game businessid contentid newsid id "
    "artikelnr artikelnummer artikelid artikel produktnr produktnummer produktid produkt",
}
ITEM_NAMES = {
    "title": "title name productname itemname producttitle label headline "
    "titel bezeichnung artikelbezeichnung produktbezeichnung artikelname",
    "description": "description desc summary overview plot abstract synopsis text details "
    "beschreibung artikelbeschreibung produktbeschreibung",
    "brand": "brand manufacturer author artist maker publisher store director marke hersteller autor verlag",
    "categories": "categories category genres genre tags type department kategorie kategorien warengruppe rubrik",
    "price": "price cost preis",
    "image": "image imageurl imurl picture pictureurl photo img poster posterurl thumbnail cover bild bildurl foto",
}
# Ways to write times besides numbers and ISO 8601. Days come first where both orders read all rows.
TIME_FORMATS = [
    *(f"{date}{clock}" for date in ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d")
      for clock in (" %H:%M:%S", " %H:%M", "")),
    *("%m %d, %Y", "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d %B %Y", "%Y%m%d%H%M%S", "%m/%d/%Y %I:%M %p"),
]  # fmt: skip


@dataclass
class Guess:
    """
    Which columns mean what, by what we call them.

    Args:
        columns (`dict[str, str]`): Those of the interactions: `user_id`, `item_id`, and `timestamp`, which is `""`
            where there is none.
        item_fields (`dict[str, str]`): Those of the items, with `item_id`; empty without items.
        rating (`str`, *optional*): A column that looks like ratings.
        time_formats (`list[str]`): Formats in which all times that were looked at can be read, if they are neither
            numbers nor ISO 8601; several where days and months cannot be told apart.
    """

    columns: dict[str, str]
    item_fields: dict[str, str] = field(default_factory=dict)
    rating: str | None = None
    time_formats: list[str] = field(default_factory=list)


def sample(location: TableLocation) -> pa.Table:
    """The first rows of a table, as they are written; columns of a text file without a header are called by their
    numbers, from 1."""
    table = location.load(streaming=True)
    if table is not None:
        return pa.Table.from_pylist(list(islice(table.with_format(None), SAMPLE_ROWS)))
    path, kind = file_of_known_format(location)
    if kind == "lines":
        return pa.Table.from_pylist([parse_json(line, where) for where, line in islice(read_lines(path), SAMPLE_ROWS)])
    if kind == "parquet":
        return pa.Table.from_batches(islice(parquet_batches(path, SAMPLE_ROWS), 1))
    # No file has this column: the separator is then the one that makes the most of them.
    names = csv_layout(path, ["\0"]).names
    if any(re.fullmatch(r"\s*[-+]?\d+([.,]\d+)?\s*", name) for name in names):
        names = [str(number + 1) for number in range(len(names))]
    batches = csv_batches(path, names, dict.fromkeys(names, pa.string()))
    return pa.Table.from_batches(islice(batches, 1)).slice(0, SAMPLE_ROWS)


def guess(
    interactions: pa.Table,
    items: pa.Table | None,
    columns: Mapping[str, str] | None = None,
    item_fields: Mapping[str, str] | None = None,
) -> Guess:
    """
    Which columns mean what, from the first rows of the tables; `columns` and `item_fields` are known already.

    Raises:
        ValueError: If users or items cannot be told; the sentence names the flag that tells them.
    """
    columns, item_fields = dict(columns or {}), dict(item_fields or {})
    free = [name for name in interactions.column_names if name not in columns.values()]
    if "timestamp" not in columns:
        columns["timestamp"] = max(free, key=lambda name: _looks_like_time(interactions[name], name), default="")
        if not columns["timestamp"] or _looks_like_time(interactions[columns["timestamp"]], columns["timestamp"]) <= 0:
            columns["timestamp"] = ""
        free = [name for name in free if name != columns["timestamp"]]
    rating = next((name for name in free if _named(name, INTERACTION_NAMES["rating"]) > 0), None)
    free = [name for name in free if name != rating]
    if items is not None:
        if "item_id" not in columns or "item_id" not in item_fields:
            ours = [columns["item_id"]] if "item_id" in columns else free
            theirs = [item_fields["item_id"]] if "item_id" in item_fields else items.column_names
            columns["item_id"], item_fields["item_id"] = _matching(interactions, items, ours, theirs)
        others = [name for name in items.column_names if name not in item_fields.values()]
        for ours_name, known in ITEM_NAMES.items():
            best = max(others, key=lambda name: _named(name, known), default=None)
            if ours_name not in item_fields and best is not None and _named(best, known) > 0:
                item_fields[ours_name] = best
                others.remove(best)
    for ours_name in ("user_id", "item_id"):
        free = [name for name in free if name not in columns.values()]
        if ours_name not in columns:
            columns[ours_name] = _named_or_first(free, ours_name, interactions)
    formats = [] if not columns["timestamp"] else time_formats(interactions[columns["timestamp"]])
    order = ("user_id", "item_id", "timestamp", "rating")
    return Guess({name: columns[name] for name in order if name in columns}, item_fields, rating, formats)


def _named(name: str, known: str) -> float:
    """How well the name of a column fits those that are known, of a list of words: 0 if not at all."""
    words = known.split()
    # An accent is a sign of its own behind its letter, which goes with all others.
    name = normalize("NFKD", name)
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    if plain in words:
        return 2 - words.index(plain) / len(words)
    parts = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    return 0.5 if parts & set(words) else 0


def _named_or_first(free: list[str], ours: str, interactions: pa.Table) -> str:
    best = max(free, key=lambda name: _named(name, INTERACTION_NAMES[ours]), default=None)
    if best is not None and _named(best, INTERACTION_NAMES[ours]) > 0:
        return best
    # Columns by number have no names to go by, and the user comes first in every such format.
    if free and all(name.isdecimal() for name in free):
        return free[0]
    whom = "users" if ours == "user_id" else "items"
    raise ValueError(
        f"Which column of the interactions holds {whom} cannot be told from their names: "
        f"{', '.join(interactions.column_names)}; say it with --columns {ours}=<name>."
    )


def _values(column: pa.ChunkedArray) -> set[str]:
    if pa.types.is_nested(column.type):
        return set()
    return {str(value) for value in pc.unique(column).to_pylist() if value not in (None, "")}


def _matching(interactions: pa.Table, items: pa.Table, ours: Iterable[str], theirs: Iterable[str]) -> tuple[str, str]:
    """The column of the interactions and the one of the items that name the same items: by what they hold, and by
    their names where several do."""
    known = INTERACTION_NAMES["item_id"]
    best: tuple[float, str, str] = (0, "", "")
    described = {name: _values(items[name]) for name in theirs}
    for our in ours:
        bought = _values(interactions[our])
        for their, values in described.items():
            found = len(bought & values) / max(len(bought), 1)
            # A brand or a price occurs on both sides too, and tells no item.
            tells_items = len(values) > 0.99 * len(items)
            names = _named(our, known) + _named(their, known) + (our == their)
            names -= _named(our, INTERACTION_NAMES["user_id"])
            if found > 0 and tells_items:
                best = max(best, (3 * found + names, our, their))
    if not best[1]:
        raise ValueError(
            "No column of the interactions names items that a column of the items describes (those of the "
            f"interactions are {', '.join(interactions.column_names)}, those of the items "
            f"{', '.join(items.column_names)}); say which they are with --columns item_id=<name> and --item_fields "
            "item_id=<name>."
        )
    return best[1:]


def _looks_like_time(column: pa.ChunkedArray, name: str) -> float:
    """0 or less if a column holds no times."""
    if pa.types.is_nested(column.type) or pa.types.is_boolean(column.type):
        return 0
    named = _named(name, INTERACTION_NAMES["timestamp"]) or 0.5 * name.lower().endswith(("_at", "date", "time"))
    if pa.types.is_temporal(column.type):
        return 2 + named
    reader = TimeReader(next(iter(time_formats(column)), None))
    read = reader.read(column.combine_chunks(), name, "the table")
    if len(column) == 0 or len(read.bad) > 0.01 * len(column):
        return 0
    if reader.kind in ("local", "zoned"):
        return 2 + named
    # Numbers may be anything: seconds since 1970 are large, and others are times by their name alone.
    seconds = float(np.median(read.values)) / reader.per_second
    return named + (1 if 1e8 < seconds < 1e14 else 0)


def time_formats(column: pa.ChunkedArray) -> list[str]:
    """The formats in which a column's times can be read that are neither numbers nor ISO 8601; none if they are."""
    texts = column.combine_chunks()
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        return []
    if len(TimeReader().read(texts, "", "the table").bad) <= 0.01 * len(texts):
        return []
    first = texts.slice(0, 100)
    formats = [one for one in TIME_FORMATS if not TimeReader(one).read(first, "", "the table").bad]
    return [one for one in formats if len(TimeReader(one).read(texts, "", "the table").bad) <= 0.01 * len(texts)]
