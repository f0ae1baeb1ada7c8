"""
Reader of any pair of tables, interactions and items, whose columns are named by flags: CSV, TSV, Parquet and JSON
lines (gzipped or not, on disk or on the Hub), and whatever `datasets` loads from a folder or a repository.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ..files import one_line, parse_json, raw_id, read_lines, require
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


_ZONE = re.compile(r":\d\d(\.\d+)?(Z|[+-]\d\d(:?\d\d)?)$")

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
        """The columns, with the setting that chooses each where one does."""
        if self.fixed:
            return self.names
        return {name: f"{ours} in columns" for ours, name in vars(self).items() if name in self.names}


def read_tabular(
    interactions: TableLocation,
    items: TableLocation | None = None,
    *,
    columns: dict[str, str | None] | None = None,
    item_fields: dict[str, str] | None = None,
    text_fields: list[str] | None = None,
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
    collector = InteractionCollector()
    read_interactions(
        interactions,
        InteractionColumns(names["user_id"], names["item_id"], names["timestamp"] or None, names["rating"] or None),
        collector,
    )
    collector.finish()
    builder = CatalogueBuilder(text_fields, pictures)
    embedded = None if items is None else _read_items(items, item_names, builder)
    name = source_name or Path(interactions.path).name.split(".")[0]
    if embedded is not None and pictures:
        raise ValueError(
            f"The items hold their pictures themselves, in '{item_names['image']}'; leave out image_dir, or set image "
            "in item_fields to another column."
        )
    source = join(name, licence, collector, builder, None if items is None else items.path)
    if embedded is not None:
        source.catalogue.images = EmbeddedImages(embedded, item_names["image"], len(source.catalogue))
    return source


def read_interactions(location: TableLocation, columns: InteractionColumns, collector: InteractionCollector) -> None:
    """Adds the interactions of a table to a collector, some ten thousand rows at a time: `ValueError` if a column is
    missing, an id or a time is null, or a value has no use as what it should be."""
    rows, time_type, clock, path = 0, None, columns.timestamp, Path(location.path)
    # Lines are counted where they are read.
    counted = location.reader is None and format_of(path) == "lines"
    with tqdm(desc=path.name, unit=" rows", delay=2, disable=counted) as progress:
        for batch in _interaction_batches(location, columns):
            where = f"'{location.path}', rows {rows + 1} to {rows + len(batch)},"
            times, ratings = np.arange(rows, rows + len(batch)), None
            if columns.rating is not None:
                column = _cast(batch[columns.rating], pa.float32(), columns.rating, where)
                ratings = pc.fill_null(column, float("nan")).to_numpy(zero_copy_only=False)
            users, items = (_ids(batch[name], name, where) for name in (columns.user_id, columns.item_id))
            if clock is not None:
                times = _times(batch[clock], clock, where)
                # Integers are taken as they are and floats as seconds: both in one column would not be one clock.
                kind = batch[clock].type
                time_type = time_type or kind
                if kind != time_type:
                    raise ValueError(f"{where} column '{clock}' is {kind}, and {time_type} before; choose one.")
            collector.extend(users, items, times, ratings)
            rows += len(batch)
            progress.update(len(batch))


def _interaction_batches(location: TableLocation, columns: InteractionColumns) -> Iterator[pa.RecordBatch]:
    table = location.load(streaming=True)
    if table is not None:
        with readable(location.path):
            # A streamed table may not know its columns before its first row.
            require_columns(columns.required, table.column_names or list(next(iter(table))), location.path)
            for part in table.select_columns(columns.names).with_format("arrow").iter(_ROWS_AT_ONCE):
                yield from part.combine_chunks().to_batches()
        return
    path, kind = file_of_known_format(location)
    if kind == "lines":
        rows = _interaction_lines(path, columns)
        while part := list(islice(rows, _ROWS_AT_ONCE)):
            yield _record_batch(columns.names, zip(*part), path)
    elif kind == "parquet":
        yield from parquet_batches(path, _ROWS_AT_ONCE, columns.required)
    else:
        types = {columns.user_id: pa.string(), columns.item_id: pa.string()}
        if columns.rating is not None:
            types[columns.rating] = pa.float64()
        yield from csv_batches(path, columns.required, types)


def _interaction_lines(path: Path, columns: InteractionColumns) -> Iterator[list]:
    required = columns.names if columns.fixed else [name for name in columns.names if name != columns.rating]
    for where, line in read_lines(path):
        row = parse_json(line, where)
        require(row, required, where)
        for name in (columns.user_id, columns.item_id):
            row[name] = raw_id(row[name], name, where)
        time, rating = row.get(columns.timestamp), row.get(columns.rating)
        if columns.fixed and not (isinstance(time, int) and isinstance(rating, int | float)):
            raise ValueError(
                f"{where} has {columns.timestamp}={time!r} and {columns.rating}={rating!r}; they must be an integer "
                "and a number."
            )
        yield [row.get(name) for name in columns.names]


def _record_batch(names: list[str], columns: Iterable[tuple], path: Path) -> pa.RecordBatch:
    arrays = []
    for name, values in zip(names, columns, strict=True):
        try:
            arrays.append(pa.array(values))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"'{path}' has values of more than one type in '{name}' ({error}); choose one."
            ) from error
    return pa.record_batch(arrays, names)


def _cast(column: pa.Array, kind: pa.DataType, name: str, where: str) -> pa.Array:
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{where} column '{name}': {one_line(error)}; correct the value.") from error


def _ids(column: pa.Array, name: str, where: str) -> pa.Array:
    """Raw ids as strings, none of them empty."""
    _refuse_nulls(column, name, where)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(test(column.type) for test in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        raise ValueError(f"{where} column '{name}' holds {column.type}; an id is an integer or a string.")
    ids = column.cast(pa.string())
    _refuse_nulls(pc.if_else(pc.equal(ids, ""), None, ids), name, where)
    return ids


def _refuse_nulls(column: pa.Array, name: str, where: str) -> None:
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py() + 1
        raise ValueError(f"{where} column '{name}' is empty in number {row} of them; fill it in or remove the row.")


def _times(column: pa.Array, name: str, where: str) -> np.ndarray:
    """Times as integers: as they are, or microseconds where they are floats (of seconds), dates or strings."""
    _refuse_nulls(column, name, where)
    if pa.types.is_floating(column.type):
        seconds = column.to_numpy()
        if not np.isfinite(seconds).all():
            raise ValueError(f"{where} column '{name}' has a time that is no finite number; correct the value.")
        return np.round(seconds * 1e6).astype(np.int64)
    if not pa.types.is_integer(column.type):
        # Arrow reads strings with a time zone and strings without one as two types.
        zoned = pa.types.is_string(column.type) and _ZONE.search(column[0].as_py())
        column = _cast(column, pa.timestamp("us", "UTC" if zoned else None), name, where)
    return _cast(column, pa.int64(), name, where).to_numpy()


def _read_items(location: TableLocation, names: dict[str, str], builder: CatalogueBuilder) -> datasets.Dataset | None:
    """Adds the items of a table to a builder; returns the table if it holds the pictures itself."""
    table = location.load(streaming=False)
    folder = Path(location.path) if location.table is None else Path()
    path, kind = folder, None
    if table is None:
        path, kind = file_of_known_format(location)
        folder = path.parent
        if kind == "parquet":
            with readable(path):
                table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    own_fields = [name for name in builder.text_fields or () if name not in names]
    wanted = [*names.values(), *own_fields]
    # The id, and columns with another name than ours.
    required = {name: f"{ours} in item_fields" for ours, name in names.items() if ours == "item_id" or ours != name}
    required |= dict.fromkeys(own_fields, "text_fields")

    embedded = False
    if table is not None:
        require_columns(required, table.column_names, location.path)
        embedded = _holds_pictures(table.features.get(names["image"]))
        present = [name for name in wanted if name in table.column_names and not (embedded and name == names["image"])]
        rows = _numbered(table.select_columns(present).with_format(None), location.path)
    elif kind == "lines":
        rows = _item_lines(path, sorted(required))
    else:
        # Text in any case: an id keeps its leading zeros.
        batches = csv_batches(path, required, dict.fromkeys(wanted, pa.string()), optional=wanted)
        rows = _numbered((row for batch in batches for row in batch.to_pylist()), location.path)
    for where, row in rows:
        values = {field: row.get(name) for field, name in [*names.items(), *zip(own_fields, own_fields)]}
        item_id, image = raw_id(values.pop("item_id"), names["item_id"], where), values.pop("image")
        if isinstance(values["categories"], str):
            values["categories"] = values["categories"].split("|")
        if not is_missing(image) and not isinstance(image, str):
            raise ValueError(f"{where} has {names['image']}={image!r}; a picture is a URL or the name of a file.")
        builder.append(item_id, values, builder.image_location(image, folder), where)
    return table if embedded else None


def _numbered(rows: Iterable[dict], location: str) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(tqdm(rows, desc=Path(location).name, unit=" rows", delay=2), start=1):
        yield f"'{location}', row {number},", row


def _item_lines(path: Path, required: list[str]) -> Iterator[tuple[str, dict]]:
    for where, line in read_lines(path):
        row = parse_json(line, where)
        require(row, required, where)
        yield where, row


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
        return image and (image["bytes"] or Path(image["path"]))
