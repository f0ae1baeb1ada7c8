"""
Reader of any pair of tables, interactions and items, whose columns are named by flags: CSV, TSV, Parquet, JSON lines
and RecBole's atomic files (gzipped, zipped or neither, on disk or on the Hub), and whatever `datasets` loads from a
folder or a repository.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm.auto import tqdm

from ..columns import Column, TimeReader, array_of, implausible_times, read_ids, read_ratings
from ..files import BadRows, parse_json, raw_id, read_lines, require, shown
from ..source import CatalogueBuilder, InteractionCollector, Source, join
from ..table_files import (
    TableLocation,
    csv_batches,
    file_of_known_format,
    format_of,
    parquet_batches,
    readable,
    renamed,
    require_columns,
)
from ..texts import is_missing


_ROWS_AT_ONCE = 65_536

# What the columns are called by default; there is no rating unless one is named.
COLUMNS = {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp", "rating": None}
ITEM_FIELDS = {name: name for name in ("item_id", "title", "description", "brand", "categories", "price", "image")}


@dataclass(frozen=True)
class InteractionColumns:
    """Names of the columns of interactions. Without `timestamp` the order of the rows counts; `fixed` are the names of
    a format, which no setting chooses."""

    user_id: str
    item_id: str
    timestamp: str | None = None
    rating: str | None = None
    fixed: bool = False

    @property
    def names(self) -> list[str]:
        return [self.user_id, self.item_id, *(name for name in (self.timestamp, self.rating) if name is not None)]

    @property
    def required(self) -> list[str] | dict[str, str]:
        """The columns, with the remedy for each that is missing where a setting chooses it."""
        if self.fixed:
            return self.names
        remedies = {name: f"set {ours} in columns to one of them" for ours, name in vars(self).items()}
        remedies[self.timestamp] = (
            "name the one of times, as in --columns timestamp=ordered_at, or give --columns timestamp= (None in "
            "Python) if the rows are in the order of time"
        )
        return {name: remedies[name] for name in self.names}


def read_tabular(
    interactions: TableLocation,
    items: TableLocation | None = None,
    *,
    columns: dict[str, str | None] | None = None,
    item_fields: dict[str, str] | None = None,
    text_fields: list[str] | None = None,
    time_format: str | None = None,
    on_bad_row: str = "error",
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """
    Args:
        interactions, items (`TableLocation`): The tables; without the second, items have nothing but ids.
        pictures (`dict[str, Path]`, *optional*): See [`CatalogueBuilder`]; others are looked for beside the items.
        source_name (`str`, *optional*, defaults to where the interactions are): What the data are called.
        others: See [`~mmesid.prepare`].

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a name is unknown, a column is missing or a row cannot be read.
    """
    names = renamed(COLUMNS, columns, "columns")
    item_names = renamed(ITEM_FIELDS | {"item_id": names["item_id"]}, item_fields, "item_fields")
    bad_rows = BadRows(on_bad_row)
    collector = InteractionCollector()
    read_interactions(
        interactions,
        InteractionColumns(names["user_id"], names["item_id"], names["timestamp"] or None, names["rating"] or None),
        collector,
        bad_rows,
        time_format,
    )
    collector.finish()
    builder = CatalogueBuilder(text_fields, pictures, None if items is None else _folder_of(items))
    embedded = None if items is None else _read_items(items, item_names, builder, bad_rows)
    name = source_name or Path(interactions.path).name.split(".")[0]
    if embedded is not None and pictures:
        raise ValueError(
            f"The items hold their pictures themselves, in '{item_names['image']}'; leave out image_dir, or set image "
            "in item_fields to another column."
        )
    source = join(name, licence, collector, builder, None if items is None else items.path, bad_rows)
    if embedded is not None:
        source.catalogue.images = EmbeddedImages(embedded, item_names["image"], len(source.catalogue))
        if source.catalogue.picture_folders is not None:
            # What `datasets` fetched or unpacked.
            source.catalogue.picture_folders += [Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    return source


def read_interactions(
    location: TableLocation,
    columns: InteractionColumns,
    collector: InteractionCollector,
    bad_rows: BadRows | None = None,
    time_format: str | None = None,
) -> None:
    """
    Adds the interactions of a table to a collector, some ten thousand rows at a time.

    Raises:
        ValueError: If a column is missing, an id or a time is null, or a value has no use as what it should be, unless
            `bad_rows` leaves out such rows.
    """
    bad_rows = bad_rows or BadRows()
    clock, path, times_of = columns.timestamp, Path(location.path), TimeReader(time_format)
    rows = 0
    # Lines are counted where they are read.
    counted = location.reader is None and format_of(path) == "lines"
    with tqdm(desc=path.name, unit=" rows", delay=2, disable=counted) as progress:
        for batch, places in _interaction_batches(location, columns, bad_rows):
            where = f"'{location.path}', {places},"
            users, items = (read_ids(batch[name], name, where) for name in (columns.user_id, columns.item_id))
            times, ratings = Column(np.arange(rows, rows + len(batch)), {}), None
            read = {columns.user_id: users, columns.item_id: items}
            if clock is not None:
                read[clock] = times = times_of.read(batch[clock], clock, where)
            if columns.rating is not None:
                read[columns.rating] = ratings = read_ratings(batch[columns.rating], columns.rating, where)
            rows += len(batch)
            progress.update(len(batch))
            good = _good_rows(read, batch, location, places, bad_rows)
            if good is None:
                collector.extend(users.values, items.values, times.values, ratings and ratings.values)
            elif good.any():
                kept = pa.array(good)
                collector.extend(
                    users.values.filter(kept),
                    items.values.filter(kept),
                    times.values[good],
                    None if ratings is None else ratings.values[good],
                )
    _leave_out_implausible(collector, location, times_of, bad_rows)


class _Places(NamedTuple):
    """What errors call the rows of a batch: `unit` is line or row, `numbers` has one number per row."""

    unit: str
    numbers: Sequence[int]

    def __str__(self) -> str:
        return f"{self.unit}s {self.numbers[0]} to {self.numbers[-1]}"


def _good_rows(
    read: dict[str, Column], batch: pa.RecordBatch, location: TableLocation, places: _Places, bad_rows: BadRows
) -> np.ndarray | None:
    """Which rows of a batch can be read, `(rows,)` bool; `None` where all can."""
    bad = {position for column in read.values() for position in column.bad}
    if not bad:
        return None
    good = np.ones(len(batch), bool)
    for position in sorted(bad):
        name, problem = next((name, one.bad[position]) for name, one in read.items() if position in one.bad)
        where = f"'{location.path}', {places.unit} {places.numbers[position]}"
        value = batch[name][position].as_py()
        bad_rows.refuse("interactions", ValueError(f"{where} has {name}={shown(value)}; {problem}."))
        good[position] = False
    return good


def _leave_out_implausible(
    collector: InteractionCollector, location: TableLocation, times_of: TimeReader, bad_rows: BadRows
) -> None:
    """Refuses or leaves out the interactions whose times lie apart from all others."""
    times = collector.times()
    implausible = implausible_times(times, times_of.per_second)
    usual = times_of.shown(np.median(times)) if len(implausible) else ""
    for position in implausible.tolist():
        # The order of the rows is that of the interactions as long as none was left out.
        number = f", interaction {position + 1}," if not bad_rows.counts["interactions"] else ""
        bad_rows.refuse(
            "interactions",
            ValueError(
                f"'{location.path}'{number} has the time {times_of.shown(times[position])} where others are "
                f"like {usual}; write all times in one unit, and leave out rows whose time is not known."
            ),
        )
    if len(implausible):
        collector.remove(implausible)


def _interaction_batches(
    location: TableLocation, columns: InteractionColumns, bad_rows: BadRows
) -> Iterator[tuple[pa.RecordBatch, _Places]]:
    """The rows of a table, some at a time, with what errors call them."""
    table = location.load(streaming=True)
    if table is None:
        path, kind = file_of_known_format(location)
        if kind == "lines":
            rows = _interaction_lines(path, columns, bad_rows)
            while part := list(islice(rows, _ROWS_AT_ONCE)):
                numbers, *values = zip(*part)
                yield pa.record_batch([array_of(one) for one in values], columns.names), _Places("line", numbers)
            return
    start = 1
    for batch in _arrow_batches(location, columns, bad_rows, table):
        if len(batch):
            yield batch, _Places("row", range(start, start + len(batch)))
        start += len(batch)


def _arrow_batches(
    location: TableLocation, columns: InteractionColumns, bad_rows: BadRows, table
) -> Iterator[pa.RecordBatch]:
    if table is not None:
        with readable(location.path):
            # A streamed table may not know its columns before its first row.
            require_columns(columns.required, table.column_names or list(next(iter(table))), location.path)
            for part in table.select_columns(columns.names).with_format("arrow").iter(_ROWS_AT_ONCE):
                yield from part.combine_chunks().to_batches()
        return
    path, kind = file_of_known_format(location)
    if kind == "parquet":
        yield from parquet_batches(path, _ROWS_AT_ONCE, columns.required)
    else:
        # All as text: what a first part of the file tells of a column's type need not be true of the next.
        types = dict.fromkeys(columns.names, pa.string())
        skip = partial(bad_rows.refuse, "interactions") if bad_rows.action == "skip" else None
        yield from csv_batches(path, columns.required, types, on_bad_row=skip)


def _interaction_lines(path: Path, columns: InteractionColumns, bad_rows: BadRows) -> Iterator[list]:
    """The number of every line, and its values of the columns."""
    required = columns.names if columns.fixed else [name for name in columns.names if name != columns.rating]
    for number, (where, line) in enumerate(read_lines(path), start=1):
        try:
            row = parse_json(line, where)
            require(row, required, where)
            for name in (columns.user_id, columns.item_id):
                row[name] = raw_id(row[name], name, where)
            time, rating = row.get(columns.timestamp), row.get(columns.rating)
            if columns.fixed and not (isinstance(time, int) and isinstance(rating, int | float)):
                raise ValueError(
                    f"{where} has {columns.timestamp}={shown(time)} and {columns.rating}={shown(rating)}; they must "
                    "be an integer and a number."
                )
        except ValueError as error:
            bad_rows.refuse("interactions", error)
        else:
            yield [number, *(row.get(name) for name in columns.names)]


def _folder_of(location: TableLocation) -> Path | None:
    """The folder that pictures are named in; `None` for a table in memory, whose owner may name any."""
    if location.table is not None:
        return None
    return Path(location.path).parent if location.is_file() else Path(location.path)


def _read_items(
    location: TableLocation, names: dict[str, str], builder: CatalogueBuilder, bad_rows: BadRows
) -> datasets.Dataset | None:
    """Adds the items of a table to a builder; returns the table if it holds the pictures itself."""
    table = location.load(streaming=False)
    folder = _folder_of(location) or Path()
    path, kind = folder, None
    if table is None:
        path, kind = file_of_known_format(location)
        if kind == "parquet":
            with readable(path):
                table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    own_fields = [name for name in builder.text_fields or () if name not in names]
    wanted = [*names.values(), *own_fields]
    # The id, and columns with another name than ours.
    required = {
        name: f"set {ours} in item_fields to one of them"
        for ours, name in names.items()
        if ours == "item_id" or ours != name
    }
    required |= dict.fromkeys(own_fields, "correct text_fields")

    embedded = False
    if table is not None:
        require_columns(required, table.column_names, location.path)
        embedded = _holds_pictures(table.features.get(names["image"]))
        present = [name for name in wanted if name in table.column_names and not (embedded and name == names["image"])]
        rows = _numbered(_rows_of(table.select_columns(present), location), location.path)
    elif kind == "lines":
        rows = read_lines(path)
    else:
        # Text in any case: an id keeps its leading zeros.
        skip = partial(bad_rows.refuse, "items") if bad_rows.action == "skip" else None
        batches = csv_batches(path, required, dict.fromkeys(wanted, pa.string()), wanted, skip)
        rows = _numbered((row for batch in batches for row in batch.to_pylist()), location.path)
    for where, row in rows:
        try:
            if isinstance(row, str):
                row = parse_json(row, where)
                require(row, sorted(required), where)
            values = {field: row.get(name) for field, name in [*names.items(), *zip(own_fields, own_fields)]}
            item_id, image = raw_id(values.pop("item_id"), names["item_id"], where), values.pop("image")
            if isinstance(values["categories"], str):
                values["categories"] = values["categories"].split("|")
            if not is_missing(image) and not isinstance(image, str):
                raise ValueError(
                    f"{where} has {names['image']}={shown(image)}; a picture is a URL or the name of a file."
                )
            builder.append(item_id, values, builder.image_location(image, folder), where)
        except ValueError as error:
            # The rows of pictures are those of the items.
            if embedded:
                raise
            bad_rows.refuse("items", error)
    return table if embedded else None


def _rows_of(table: datasets.Dataset, location: TableLocation) -> Iterator[dict]:
    with readable(location.path):
        yield from table.with_format(None)


def _numbered(rows: Iterable[dict], location: str) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(tqdm(rows, desc=Path(location).name, unit=" rows", delay=2), start=1):
        yield f"'{location}', row {number},", row


def _holds_pictures(feature) -> bool:
    """Whether a column of this type holds pictures: decoded ones, their bytes, or what `datasets` stores of them."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or feature in (datasets.Value("binary"), datasets.Value("large_binary"))


class EmbeddedImages(Sequence):
    """Pictures in a column of a table, whose rows are the first of `num_items` items, read when they are asked for."""

    def __init__(self, table: datasets.Dataset, column: str, num_items: int):
        self.table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.num_items = num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, position):
        if not 0 <= position < self.num_items:
            raise IndexError(f"There are {self.num_items} pictures, not one at {position}.")
        image = self.table[int(position)][self.column] if position < len(self.table) else None
        return image and (image["bytes"] or (Path(image["path"]) if image["path"] else None))
