"""
The prepared dataset: the one format between any source of data and every later stage. `docs/data.md` has its files.

Items are rows 1 to N; row 0 is padding. The dataset card beside the files configures `datasets.load_dataset`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from modeling_mmesid.checkpoints import SLOW_BYTES

from ..running.records import write_text_atomic
from .files import listed, one_line, shown
from .sequences import SPLITS
from .table_files import readable


ITEMS_FILE = "items.parquet"
STATISTICS_FILE = "statistics.json"
SEQUENCE_FILES = {split: f"sequences/{split}.parquet" for split in SPLITS}

# Rows of a Parquet row group, of which an item's are what a writer holds in memory at a time: some ten megabytes.
SEQUENCE_ROW_GROUP = 65_536
ITEM_ROW_GROUP = 65_536
IMAGE_ROW_GROUP = 256

SEQUENCE_FEATURES = datasets.Features(
    {
        "user_id": datasets.Value("string"),
        "history": datasets.List(datasets.Value("int32")),
        "target": datasets.Value("int32"),
    }
)
ITEM_FEATURES = datasets.Features(
    {
        "row": datasets.Value("int32"),
        "item_id": datasets.Value("string"),
        "title": datasets.Value("string"),
        "text": datasets.Value("string"),
        "frequency": datasets.Value("int32"),
    }
)

_TYPES = {field.name: field.type for field in (*ITEM_FEATURES.arrow_schema, *SEQUENCE_FEATURES.arrow_schema)}

# Statistics that every prepared dataset has, and later stages rely on.
_STATISTICS = {
    "source": str, "licence": str, "synthetic": bool, "split": str, "users": int, "items": int, "interactions": int,
    "missing_text": int, "missing_image": int,
}  # fmt: skip

# What `datasets.load_dataset` reads from the dataset card.
CARD_CONFIGS = [
    {
        "config_name": "sequences",
        "data_files": [{"split": split, "path": path} for split, path in SEQUENCE_FILES.items()],
        "default": True,
    },
    {"config_name": "items", "data_files": [{"split": "train", "path": ITEMS_FILE}]},
]


def rows_at_once(columns: list[str]) -> int:
    """Items of a row group."""
    return IMAGE_ROW_GROUP if "image" in columns else ITEM_ROW_GROUP


class Sequences:
    """
    One split, held in flat arrays so that a million users take megabytes: user `u` has the raw id `user_ids[u]`, the
    rows `histories[offsets[u] : offsets[u + 1]]`, oldest first, and the target `targets[u]`. `histories` `(entries,)`
    and `targets` `(users,)` are int32, `offsets` `(users + 1,)` int64. `split` is its name, if it has one.
    """

    split: str | None = None

    def __init__(self, user_ids: list[str], histories: np.ndarray, offsets: np.ndarray, targets: np.ndarray):
        self.user_ids = user_ids
        self.histories = histories
        self.offsets = offsets
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict:
        """`history`: a view of the user's rows, oldest first, possibly empty; `target`: the row that follows."""
        return {
            "history": self.histories[self.offsets[index] : self.offsets[index + 1]],
            "target": int(self.targets[index]),
        }


class PreparedDataset:
    """
    Items and sequences as every later stage reads them: in memory as [`~mmesid.prepare`] returns them, or in a
    directory that [`~PreparedDataset.load`] opens. Texts, sequences and pictures are read when they are asked for.

    Args:
        features (`datasets.Features`): Columns of the items: those of `ITEM_FEATURES`, further fields of the source,
            and `image` if it has pictures.
        statistics (`dict`): Counts, filters, split, source and licence.
        read_items (`Callable[[list[str]], Iterator[pa.Table]]`): Reads the columns of these names, in parts that are
            written as row groups.
        read_sequences (`Callable[[str], Sequences]`): Reads one split.
        path (`Path`, *optional*): The directory; `None` for a dataset in memory.

    Attributes:
        item_ids (`list[str]`): `num_items + 1` raw ids; row 0 is `""`.
        titles (`list[str]`): `num_items + 1` titles, empty where an item has none; row 0 is `""`.
        texts (`list[str]`): `num_items + 1` texts for an encoder, empty where an item has none; row 0 is `""`.
        frequencies (`torch.LongTensor`): `(num_items + 1,)` occurrences in the training split; row 0 is 0.
    """

    def __init__(
        self,
        features: datasets.Features,
        statistics: dict,
        read_items: Callable[[list[str]], Iterator[pa.Table]],
        read_sequences: Callable[[str], Sequences],
        path: Path | None = None,
    ):
        self.features = features
        self.statistics = statistics
        self.path = path
        self._read_items = read_items
        self._read_sequences = read_sequences
        self.item_ids = ["", *self._column("item_id")]
        self.frequencies = torch.tensor([0, *self._column("frequency")])

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "PreparedDataset":
        """
        Opens a directory that [`~PreparedDataset.save`] or `mmesid prepare` wrote.

        Raises:
            FileNotFoundError: If the directory lacks one of its files.
            ValueError: If a file is damaged or lacks a column, or the items are not rows 1 to N.
        """
        path = Path(directory)
        for name in (ITEMS_FILE, STATISTICS_FILE, *SEQUENCE_FILES.values()):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f"'{path}' is no prepared dataset, it lacks '{name}'; write it with `mmesid prepare`."
                )
        items = path / ITEMS_FILE
        with _opened(items, ITEM_FEATURES) as parquet:
            features = _features_of(parquet, items)
            rows = parquet.read(["row"])["row"].to_numpy()
            table = parquet.read(["item_id", "title", "text", "frequency"])
            for name in table.column_names:
                if table[name].null_count:
                    raise ValueError(f"'{items}' has nulls in '{name}'; write it again with `mmesid prepare`.")
            if pc.count_distinct(table["item_id"]).as_py() < len(rows):
                raise ValueError(f"'{items}' repeats an item_id; write it again with `mmesid prepare`.")
        if not np.array_equal(rows, np.arange(1, len(rows) + 1)):
            raise ValueError(f"'{items}' does not hold rows 1 to {len(rows)} in order; run `mmesid prepare` again.")
        statistics = _read_statistics(path / STATISTICS_FILE, len(rows))
        return cls(
            features=features,
            statistics=statistics,
            read_items=partial(_read_parts, items),
            read_sequences=partial(_read_sequences, path, len(rows)),
            path=path,
        )

    def save(self, directory: str | os.PathLike) -> None:
        """Writes everything but the dataset card to a directory, some hundred pictures at a time."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with (
            pq.ParquetWriter(directory / ITEMS_FILE, self.features.arrow_schema) as writer,
            tqdm(total=self.num_items, desc="items", unit="item", delay=2) as progress,
        ):
            for part in self._read_items(list(self.features)):
                writer.write_table(part, row_group_size=len(part))
                progress.update(len(part))
        (directory / "sequences").mkdir(exist_ok=True)
        for split, name in tqdm(SEQUENCE_FILES.items(), desc="sequences", unit="split", delay=2):
            pq.write_table(_table(self.sequences(split)), directory / name, row_group_size=SEQUENCE_ROW_GROUP)
        write_text_atomic(directory / STATISTICS_FILE, json.dumps(self.statistics, indent=2) + "\n")

    def __repr__(self) -> str:
        counts = self.statistics
        columns = ", ".join(self.features)
        return (
            f"PreparedDataset({counts['source']!r}: {self.num_items:,} items, {counts['users']:,} users, "
            f"{counts['interactions']:,} interactions, split {counts['split']}; columns of the items: {columns})"
        )

    @property
    def num_items(self) -> int:
        return len(self.item_ids) - 1

    @property
    def has_targets(self) -> bool:
        """Whether something was held out to validate and test on."""
        return self.statistics["split"] != "none"

    def require_targets(self) -> None:
        """Raises `ValueError` if nothing was held out."""
        if not self.has_targets:
            raise ValueError("The data hold nothing out (split none) to measure on; prepare them with a split.")

    @cached_property
    def titles(self) -> list[str]:
        return ["", *self._column("title")]

    @cached_property
    def texts(self) -> list[str]:
        return ["", *self._column("text")]

    def _column(self, name: str) -> list:
        return [value for part in self._read_items([name]) for value in part[name].to_pylist()]

    def sequences(self, split: str) -> Sequences:
        """
        Reads `"train"`, `"validation"` or `"test"`.

        Raises:
            ValueError: If there is no such split, or if its file is damaged or holds a row that is no item.
        """
        if split not in SPLITS:
            raise ValueError(f"A prepared dataset has no split '{split}'; choose one of {', '.join(SPLITS)}.")
        sequences = self._read_sequences(split)
        sequences.split = split
        return sequences

    def items(self) -> datasets.Dataset:
        """
        The items in the order of their rows; a picture is decoded when read, `None` where an item has none. Pictures
        of a directory may be larger than memory: they stay in the file that `datasets` makes of them in its cache. A
        dataset in memory holds their bytes.
        """
        if self.path is not None:
            with readable(self.path / ITEMS_FILE), _bar_if_slow(self.path / ITEMS_FILE):
                return datasets.Dataset.from_parquet(str(self.path / ITEMS_FILE))
        return self._items_in_memory

    @cached_property
    def _items_in_memory(self) -> datasets.Dataset:
        table = pa.concat_tables(self._read_items(list(self.features)))
        return datasets.Dataset(datasets.table.InMemoryTable(table))


@contextmanager
def _bar_if_slow(file: Path) -> Iterator[None]:
    """Lets `datasets` show its bar where the file takes long enough to be looked at."""
    quiet = file.stat().st_size < SLOW_BYTES and not datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.utils.enable_progress_bars()


@contextmanager
def _opened(file: Path, columns: Mapping[str, object]) -> Iterator[pq.ParquetFile]:
    """A Parquet file that has these columns, in their type where it is one of ours; raises `ValueError` if it lacks
    one or cannot be read."""
    try:
        parquet = pq.ParquetFile(file)
        for name in columns:
            if name not in parquet.schema_arrow.names:
                present = listed(parquet.schema_arrow.names)
                raise ValueError(
                    f"'{file}' has no column '{name}', only {present}; write it again with `mmesid prepare`."
                )
            found, expected = parquet.schema_arrow.field(name).type, _TYPES.get(name)
            if expected is not None and found != expected:
                raise ValueError(
                    f"'{file}' has {found} in the column '{name}' where {expected} is expected; write it again with "
                    "`mmesid prepare`."
                )
        yield parquet
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"'{file}' cannot be read ({one_line(error)}); write it again with `mmesid prepare`."
        ) from error


def _features_of(parquet: pq.ParquetFile, file: Path) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(parquet.schema_arrow)
    # Whatever `datasets` stumbles over in what the file says of its columns.
    except Exception as error:
        raise ValueError(
            f"'{file}' does not tell its columns ({one_line(error)}); write it again with `mmesid prepare`."
        ) from error


def _read_statistics(path: Path, num_items: int) -> dict:
    """The statistics of a dataset; raises `ValueError` if they are not those of one with `num_items`."""
    try:
        statistics = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({one_line(error)}); write it again with `mmesid prepare`.") from error
    values = statistics if isinstance(statistics, dict) else {}
    for name, kind in _STATISTICS.items():
        if type(values.get(name)) is not kind:
            raise ValueError(
                f"'{path}' says {shown(values.get(name))} of {name}, which is no {kind.__name__}; write it again with "
                "`mmesid prepare`."
            )
    if values["items"] != num_items:
        raise ValueError(
            f"'{path}' tells of {values['items']:,} items where there are {num_items:,}; write both again with "
            "`mmesid prepare`."
        )
    return values


def _read_parts(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    with _opened(file, dict.fromkeys(columns)) as parquet:
        for batch in parquet.iter_batches(rows_at_once(columns), columns=columns):
            yield pa.Table.from_batches([batch])


def _read_sequences(path: Path, num_items: int, split: str) -> Sequences:
    file = path / SEQUENCE_FILES[split]
    with _opened(file, SEQUENCE_FEATURES) as parquet:
        table = parquet.read(list(SEQUENCE_FEATURES))
    history = table["history"]
    if any(column.null_count for column in table.columns) or pc.list_flatten(history).null_count:
        raise ValueError(f"'{file}' has nulls; write it again with `mmesid prepare`.")
    histories = np.concatenate([np.zeros(0, np.int32), *(chunk.flatten().to_numpy() for chunk in history.chunks)])
    targets = table["target"].to_numpy()
    for rows in (histories, targets):
        if len(rows) and not 1 <= rows.min() <= rows.max() <= num_items:
            raise ValueError(f"'{file}' holds a row outside 1 to {num_items}; write it again with `mmesid prepare`.")
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(history).to_numpy(), dtype=np.int64)])
    return Sequences(table["user_id"].to_pylist(), histories, offsets, targets)


def _table(sequences: Sequences) -> pa.Table:
    schema = SEQUENCE_FEATURES.arrow_schema
    offsets = pa.array(sequences.offsets).cast(pa.int32())
    history = pa.ListArray.from_arrays(offsets, sequences.histories, schema.field("history").type)
    columns = {"user_id": sequences.user_ids, "history": history, "target": sequences.targets}
    return pa.table(columns, schema=schema)
