"""
Tables wherever they are: CSV, TSV, Parquet, JSON lines and RecBole's atomic files (gzipped, zipped or neither, on disk
or on the Hub), and what `datasets` loads from a folder or a repository, and tables in memory.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from .files import listed, local_file, on_the_hub, one_line, opened


# What a suffix says of a file.
FORMATS = {
    ".jsonl": "lines", ".json": "lines", ".ndjson": "lines", ".csv": "csv", ".tsv": "csv", ".txt": "csv",
    ".inter": "csv", ".item": "csv", ".parquet": "parquet",
}  # fmt: skip
# RecBole's files, whose columns are called name:type, and where quotes are characters like any others.
_ATOMIC = (".inter", ".item")
_SEPARATORS = (",", "\t", ";", "|", " ")
# Lines that tell what separates the columns of a file without a header.
_LINES_LOOKED_AT = 20
_LONGEST_LOOKED_AT = 2**20

# Bytes of a CSV file that are parsed at a time; a row must fit.
_CSV_BLOCK = 2**23

# Only a repository has a revision: an @ in the path of a folder belongs to it.
_LOCATION = re.compile(
    r"((?P<repository>[\w.-]+(?:/[\w.-]+)?)|.*?)(?::([^:@\[\]/\\]+))?(?(repository)(?:@([\w./-]+))?)(?:\[(.+)\])?",
    re.S,
)


@dataclass(frozen=True)
class TableLocation:
    """
    Where a table is.

    Args:
        path (`str`): A file, `hf://datasets/owner/name/file` for one on the Hub, or a folder or repository
            `owner/name` of the Hub that `datasets` loads.
        config, split, revision (`str`, *optional*): What to load of a folder or repository.
        reader (`str`, *optional*): How `datasets` calls its reader of a file's format, `json` or `text`, if it is to
            read the file.
        table (`datasets.Dataset`, *optional*): A table in memory; the path is then what errors call it.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    reader: str | None = None
    table: datasets.Dataset | None = None

    def is_file(self) -> bool:
        """Whether this is one file, there or not, rather than a folder or a repository."""
        path = Path(self.path)
        return (
            self.table is None
            and not path.is_dir()
            and (path.is_file() or "://" in self.path or format_of(path) is not None)
        )

    def is_repository(self) -> bool:
        """Whether this is a repository of the Hub."""
        return not self.is_file() and not Path(self.path).exists()

    def load(self, streaming: bool) -> datasets.Dataset | datasets.IterableDataset | None:
        """The table by `datasets`; `None` if the location is a file that is not left to it. Raises `FileNotFoundError`
        if there is nothing of that name, here or on the Hub, and `ValueError` if it cannot be read or lacks the
        configuration or the split."""
        if self.table is not None:
            return self.table
        if self.is_file() and self.reader is None:
            return None
        try:
            with on_the_hub(self.path) if self.is_repository() else nullcontext():
                table = self._load(streaming)
        except (RuntimeError, ValueError, pa.ArrowException, DatasetGenerationError) as error:
            files = f", as hf://datasets/{self.path}/<file>" if self.is_repository() else ""
            raise ValueError(
                f"`datasets` does not load '{self.path}' ({one_line(error.__cause__ or error)}); correct the "
                f"configuration or the split, or name its files{files}."
            ) from error
        if not isinstance(table, datasets.DatasetDict):
            return table
        if self.split not in table:
            raise ValueError(f"'{self.path}' has no split '{self.split}', only {', '.join(table)}; name one of them.")
        return table[self.split]

    def _load(self, streaming: bool) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict:
        if any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(self.path)
        if self.reader is not None:
            return datasets.load_dataset(self.reader, data_files=self.path, split=self.split, streaming=streaming)
        return datasets.load_dataset(
            self.path, self.config, split=self.split, revision=self.revision, streaming=streaming
        )


def parse_location(location: str) -> TableLocation:
    """Where a flag says that a table is: a file or an address as it is, otherwise `path:config@revision[split]`, of
    which all but the path may be left out; raises `ValueError` if it has another form."""
    if Path(location).exists() or "://" in location or format_of(Path(location)) is not None:
        return TableLocation(location)
    path, _, config, revision, split = _LOCATION.fullmatch(location).groups()  # type: ignore[union-attr]
    table = TableLocation(path, config, split or "train", revision)
    if table.is_file() or (table.is_repository() and re.search(r"[:@\[\]]", path)):
        raise ValueError(
            f"'{location}' is neither on this machine nor of the form owner/name:config@revision[split], of which all "
            "but the name may be left out; correct it."
        )
    return table


def format_of(path: Path) -> str | None:
    """`"lines"` (of JSON), `"csv"` or `"parquet"`, as the name says, its compression aside; `None` if it does not."""
    return FORMATS.get(_own_suffix(path))


def _own_suffix(path: Path) -> str:
    """The suffix of a file, in small letters, its compression aside."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zip")).suffix


def file_of_known_format(location: TableLocation) -> tuple[Path, str]:
    """The file at a location, downloaded if it is on the Hub, and its format; raises `ValueError` if its name does not
    tell that."""
    path = local_file(location.path)
    kind = format_of(path)
    if kind is None:
        raise ValueError(
            f"The name of '{path}' does not tell its format; call it .csv, .tsv, .txt, .parquet, .jsonl, .inter or "
            ".item, with .gz if gzipped and .zip if zipped."
        )
    return path, kind


def parquet_batches(path: Path, rows_at_once: int, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, some at a time; all columns by default. Raises `ValueError` if a column is missing,
    or the file is damaged."""
    with readable(path):
        file = pq.ParquetFile(path)
        require_columns(columns or (), file.schema_arrow.names, path)
        yield from file.iter_batches(rows_at_once, columns=columns and list(columns))


@contextmanager
def readable(location: str | Path) -> Iterator[None]:
    """Says which table it is that Arrow or `datasets` cannot read, as a `ValueError`."""
    try:
        yield
    except (pa.ArrowException, OSError, DatasetGenerationError, UnicodeDecodeError) as error:
        raise ValueError(
            f"'{location}' cannot be read ({one_line(error.__cause__ or error)}); correct the file, or download or "
            "write it again."
        ) from error


@dataclass(frozen=True)
class CSVLayout:
    """
    How the rows of a text file are laid out.

    Args:
        separator (`str`): What stands between two columns.
        names (`list[str]`): What the columns are called; by their numbers, from 1, where the file has no header.
        first_row (`int`): Lines before the first row: 0 where the file has no header.
        quoted (`bool`): Whether a value may stand in quotes.
    """

    separator: str
    names: list[str]
    first_row: int
    quoted: bool


def csv_layout(path: Path, wanted: Iterable[str]) -> CSVLayout:
    """
    Finds out what separates the columns of a file: a comma or, in .tsv and RecBole's files, a tab, unless another
    separator alone gives all the columns that are `wanted`. Where these are numbers, and none is a name, the file has
    no header.

    Raises:
        ValueError: If the file is empty, or its first line is none of a table.
    """
    wanted, suffix = list(wanted), _own_suffix(path)
    with opened(path) as file:
        lines = list(islice(iter(lambda: file.readline(_LONGEST_LOOKED_AT), b""), _LINES_LOOKED_AT))
    if any(len(line) == _LONGEST_LOOKED_AT for line in lines):
        raise ValueError(
            f"'{path}' begins with a line of more than {_LONGEST_LOOKED_AT:,} bytes; is it a table of text?"
        )
    try:
        decoded = [line.decode("utf-8-sig").rstrip("\r\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 ({error.reason} at byte {error.start}); convert the file.") from error
    texts = [text for text in decoded if text.strip()]
    if not texts:
        raise ValueError(f"'{path}' is empty; write the names of the columns, and one row per line.")
    below_header = decoded.index(texts[0]) + 1
    separators = sorted(_SEPARATORS, key=lambda one: one != "\t") if suffix in (".tsv", *_ATOMIC) else _SEPARATORS
    quoted = suffix not in _ATOMIC

    def split(text: str, separator: str) -> list[str]:
        if not quoted:
            return text.split(separator)
        try:
            return next(csv.reader([text], delimiter=separator))
        except csv.Error as error:
            raise ValueError(f"'{path}' cannot be read ({one_line(error)}); is it a table of text?") from error

    headers = {separator: split(texts[0], separator) for separator in separators}
    if not quoted:
        headers = {separator: [name.split(":")[0] for name in names] for separator, names in headers.items()}
    for separator, names in headers.items():
        if set(wanted) <= set(names):
            return CSVLayout(separator, names, below_header, quoted)
    if all(name.isdecimal() for name in wanted):
        for separator, first in headers.items():
            if len(first) >= max(map(int, wanted)) and {len(split(text, separator)) for text in texts} == {len(first)}:
                return CSVLayout(separator, [str(number + 1) for number in range(len(first))], 0, quoted)
    separator, names = max(headers.items(), key=lambda one: len(one[1]))
    return CSVLayout(separator, names, below_header, quoted)


def csv_batches(
    path: Path,
    columns: Iterable[str],
    types: dict[str, pa.DataType],
    optional: Iterable[str] = (),
    on_bad_row: Callable[[ValueError], None] | None = None,
) -> Iterator[pa.RecordBatch]:
    """
    The rows of a CSV or TSV file, some at a time: the columns that must be there and those that may be. Raises
    `ValueError` if a column is missing, or a row or a value of the given types cannot be read; `on_bad_row` gets the
    rows that have another number of columns, and they are left out.
    """
    layout = csv_layout(path, columns)
    if len(layout.names) > 1:
        hint = " (by its number, from 1, if the file has no header)"
    else:
        hint = ", and separate columns by a comma, tab, semicolon, bar or space"
    require_columns(columns, layout.names, path, hint)
    named = [*columns, *(name for name in optional if name in layout.names and name not in columns)]
    for name in named:
        if layout.names.count(name) > 1:
            raise ValueError(f"'{path}' has {layout.names.count(name)} columns '{name}'; rename all but one.")

    def skip(row: pa_csv.InvalidRow) -> str:
        assert on_bad_row is not None
        on_bad_row(
            ValueError(
                f"'{path}' has a row of {row.actual_columns} columns where {row.expected_columns} are expected."
            )
        )
        return "skip"

    with opened(path) as file, readable(path):
        with pa_csv.open_csv(
            file,
            pa_csv.ReadOptions(
                block_size=_CSV_BLOCK, column_names=layout.names, skip_rows=layout.first_row, use_threads=False
            ),
            pa_csv.ParseOptions(
                delimiter=layout.separator,
                quote_char='"' if layout.quoted else False,
                newlines_in_values=layout.quoted,
                invalid_row_handler=None if on_bad_row is None else skip,
            ),
            # Strings are taken literally, as in the other formats: "NA" and "null" are ids like any others.
            pa_csv.ConvertOptions(include_columns=named, column_types=types, strings_can_be_null=False),
        ) as reader:
            yield from reader


def require_columns(
    wanted: Iterable[str] | dict[str, str], present: list[str], location: str | Path, hint: str = ""
) -> None:
    """Raises `ValueError` if a table lacks one of the columns; `wanted` may have a remedy for each, which `hint`
    completes."""
    for name in wanted:
        if name not in present:
            remedy = f"{wanted[name]}{hint}" if isinstance(wanted, dict) else "name another table"
            raise ValueError(f"'{location}' has no column '{name}', only {listed(present)}; {remedy}.")


def renamed(names: Mapping[str, str | None], chosen: Mapping[str, str | None] | None, setting: str) -> dict[str, Any]:
    """The names of columns by what we call them: those that were chosen, the defaults `names` for the others. Raises
    `ValueError` if one is chosen for what is not among them; the sentence names the setting."""
    for ours in chosen or {}:
        if ours not in names:
            raise ValueError(f"{setting} has no '{ours}'; name columns for {', '.join(names)}.")
    return {**names, **(chosen or {})}


def chosen_names(setting: str, entries: Iterable[str] | None) -> dict[str, str]:
    """What `ours=theirs` of a setting choose; raises `ValueError` if one has another form."""
    chosen = {}
    for entry in entries or ():
        ours, sign, theirs = entry.partition("=")
        if not sign:
            raise ValueError(f"--{setting} takes ours=theirs, for example item_id=sku, got '{entry}'; correct it.")
        chosen[ours] = theirs
    return chosen
