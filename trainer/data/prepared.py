"""
The prepared dataset: the one format between any source of data and every later stage.

    sequences/{train,validation,test}.parquet   user_id, history (rows, oldest first), target (row)
    items.parquet                               row, item_id, title, text, frequency (in the training split), further
                                                fields of the source (description, brand, categories, price ...),
                                                image (if the source has any)
    statistics.json                             counts, filters, split, source, licence, whether the data are synthetic

Items are rows 1 to N; row 0 is padding. The dataset card beside the files configures `datasets.load_dataset`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..running.records import write_text_atomic
from .files import one_line
from .images import BadImageError, read_image
from .sequences import SPLITS, UserSequences
from .source import Source


ITEMS_FILE = "items.parquet"
STATISTICS_FILE = "statistics.json"
SEQUENCE_FILES = {split: f"sequences/{split}.parquet" for split in SPLITS}

# Rows of a Parquet row group, which is what a writer holds in memory at a time: some ten megabytes.
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

# What `datasets.load_dataset` reads from the dataset card.
CARD_CONFIGS = [
    {
        "config_name": "sequences",
        "data_files": [{"split": split, "path": path} for split, path in SEQUENCE_FILES.items()],
        "default": True,
    },
    {"config_name": "items", "data_files": [{"split": "train", "path": ITEMS_FILE}]},
]


class Sequences:
    """
    One split, held in flat arrays so that a million users take megabytes.

    Args:
        user_ids (`list[str]`): Raw id of every user.
        histories (`np.ndarray`): `(entries,)` int32 rows, user by user, oldest first.
        offsets (`np.ndarray`): `(users + 1,)` int64; user `u` has `histories[offsets[u] : offsets[u + 1]]`.
        targets (`np.ndarray`): `(users,)` int32 rows.
    """

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
    Args:
        path (`Path`): The directory.
        item_ids (`list[str]`): `num_items + 1` raw ids; row 0 is `""`.
        titles (`list[str]`): `num_items + 1` titles; row 0 is `""`.
        texts (`list[str]`): `num_items + 1` texts for an encoder, empty where an item has none; row 0 is `""`.
        frequencies (`torch.LongTensor`): `(num_items + 1,)` occurrences in the training split; row 0 is 0.
        statistics (`dict`): Content of `statistics.json`.
    """

    def __init__(
        self,
        path: Path,
        item_ids: list[str],
        titles: list[str],
        texts: list[str],
        frequencies: torch.Tensor,
        statistics: dict,
    ):
        self.path = path
        self.item_ids = item_ids
        self.titles = titles
        self.texts = texts
        self.frequencies = frequencies
        self.statistics = statistics

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PreparedDataset":
        """
        Reads everything but the sequences and the pictures.

        Raises:
            FileNotFoundError: If the directory lacks one of its files.
            ValueError: If a file is damaged or lacks a column, or the items are not rows 1 to N.
        """
        path = Path(path)
        for name in (ITEMS_FILE, STATISTICS_FILE, *SEQUENCE_FILES.values()):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f"'{path}' is no prepared dataset, it lacks '{name}'; write it with `mmesid prepare`."
                )
        table = _read_table(path / ITEMS_FILE, list(ITEM_FEATURES))
        rows = table["row"].to_numpy()
        if not np.array_equal(rows, np.arange(1, len(rows) + 1)):
            raise ValueError(
                f"'{path / ITEMS_FILE}' does not hold rows 1 to {len(rows)} in order; run `mmesid prepare` again."
            )
        return cls(
            path=path,
            item_ids=["", *table["item_id"].to_pylist()],
            titles=["", *table["title"].to_pylist()],
            texts=["", *table["text"].to_pylist()],
            frequencies=torch.from_numpy(np.concatenate([[0], table["frequency"].to_numpy()])).long(),
            statistics=_read_statistics(path / STATISTICS_FILE),
        )

    @property
    def num_items(self) -> int:
        return len(self.item_ids) - 1

    def sequences(self, split: str) -> Sequences:
        """
        Reads `"train"`, `"validation"` or `"test"`.

        Raises:
            ValueError: If there is no such split, or if its file is damaged or holds a row that is no item.
        """
        if split not in SEQUENCE_FILES:
            raise ValueError(f"A prepared dataset has no split '{split}'; choose one of {', '.join(SEQUENCE_FILES)}.")
        file = self.path / SEQUENCE_FILES[split]
        table = _read_table(file, list(SEQUENCE_FEATURES))
        history = table["history"]
        histories = np.concatenate([np.zeros(0, np.int32), *(chunk.flatten().to_numpy() for chunk in history.chunks)])
        targets = table["target"].to_numpy()
        for rows in (histories, targets):
            if len(rows) and not 1 <= rows.min() <= rows.max() <= self.num_items:
                raise ValueError(
                    f"'{file}' holds a row outside 1 to {self.num_items}; write it again with `mmesid prepare`."
                )
        offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(history).to_numpy(), dtype=np.int64)])
        return Sequences(table["user_id"].to_pylist(), histories, offsets, targets)

    def items(self) -> datasets.Dataset:
        """
        The items in the order of their rows; a picture is decoded when read, `None` where an item has none. Pictures
        may be larger than memory: they are read from the file that `datasets` makes of them in its cache.
        """
        return datasets.Dataset.from_parquet(str(self.path / ITEMS_FILE))


def _read_table(file: Path, columns: list[str]) -> pa.Table:
    try:
        present = pq.read_schema(file).names
        missing = [name for name in columns if name not in present]
        if not missing:
            return pq.read_table(file, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"'{file}' cannot be read ({one_line(error)}); write it again with `mmesid prepare`."
        ) from error
    raise ValueError(
        f"'{file}' has no column '{missing[0]}', only {', '.join(present)}; write it again with `mmesid prepare`."
    )


def _read_statistics(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON ({error}); write it again with `mmesid prepare`.") from error


def write_prepared(
    directory: str | os.PathLike,
    source: Source,
    sequences: UserSequences,
    on_bad_image: str = "error",
    counts: dict[str, int] | None = None,
) -> dict:
    """
    Writes everything but the dataset card.

    Args:
        directory (`str` or `os.PathLike`): An existing directory.
        source (`Source`): Where the items' texts and pictures come from.
        sequences (`UserSequences`): Who did what, from the same source.
        on_bad_image (`str`, *optional*, defaults to `"error"`): `"error"` refuses a picture that cannot be read,
            `"missing"` leaves it out and counts it by the reason of [`BadImageError`].
        counts (`dict[str, int]`, *optional*): Further statistics to write, of what came before.

    Returns:
        `dict`: The statistics.

    Raises:
        ValueError: If a picture cannot be read and `on_bad_image` is `"error"`.
    """
    directory = Path(directory)
    catalogue = source.catalogue
    frequencies = sequences.training_frequencies()[1:]
    bad_images: Counter = Counter()

    def images(positions: np.ndarray) -> Iterator[dict | None]:
        for position in positions:
            image, data = catalogue.images[position], None
            if image is not None:
                try:
                    data = read_image(image, catalogue.item_ids[position])
                except BadImageError as error:
                    if on_bad_image == "error":
                        raise
                    bad_images[error.reason] += 1
            yield None if data is None else {"bytes": data, "path": None}

    fields = [name for name in catalogue.fields.column_names if name not in ITEM_FEATURES and name != "image"]
    features = datasets.Features(
        ITEM_FEATURES
        | datasets.Features.from_arrow_schema(catalogue.fields.select(fields).schema)
        | ({} if catalogue.images is None else {"image": datasets.Image()})
    )
    row_group = ITEM_ROW_GROUP if catalogue.images is None else IMAGE_ROW_GROUP
    missing_text = missing_image = 0
    with (
        pq.ParquetWriter(directory / ITEMS_FILE, features.arrow_schema) as writer,
        tqdm(total=len(sequences.kept_items), desc="items", unit="item", delay=2) as progress,
    ):
        for start in range(0, len(sequences.kept_items), row_group):
            positions = sequences.kept_items[start : start + row_group]
            columns = {
                "row": np.arange(start + 1, start + len(positions) + 1, dtype=np.int32),
                "item_id": [catalogue.item_ids[position] for position in positions],
                "title": catalogue.titles(positions),
                "text": catalogue.texts(positions),
                "frequency": frequencies[start : start + len(positions)],
            } | dict(zip(fields, catalogue.columns(fields, positions).columns))
            missing_text += columns["text"].count("")
            if catalogue.images is not None:
                columns["image"] = list(images(positions))
                missing_image += columns["image"].count(None)
            writer.write_table(pa.table(columns, schema=features.arrow_schema), row_group_size=row_group)
            progress.update(len(positions))

    user_ids = source.interactions.user_ids
    examples, repeated_targets = {}, 0
    for split, name in SEQUENCE_FILES.items():
        users, histories, offsets, targets = sequences.split(split)
        _write_sequences(directory / name, Sequences([user_ids[user] for user in users], histories, offsets, targets))
        examples[split] = len(targets)
        if split == "test":
            owners = np.repeat(np.arange(len(targets), dtype=np.int32), np.diff(offsets))
            repeated_targets = len(np.unique(owners[histories == targets[owners]]))

    lengths = np.diff(sequences.offsets)
    statistics = {
        "source": source.name,
        "licence": source.licence,
        "synthetic": source.synthetic,
        "split": "global_time" if sequences.starts else "leave_one_out",
        **{f"{split}_starts": time for split, time in sequences.starts.items()},
        "users": len(sequences.users),
        "training_users": examples["train"],
        "validation_users": examples["validation"],
        "test_users": examples["test"],
        "items": len(sequences.kept_items),
        "interactions": len(sequences.rows),
        "training_interactions": int(frequencies.sum()),
        "shortest_sequence": int(lengths.min()),
        "median_sequence": float(np.median(lengths)),
        "longest_sequence": int(lengths.max()),
        "items_without_training_interactions": int((frequencies == 0).sum()),
        # A ranking that leaves out the history can never find these.
        "repeated_test_targets": repeated_targets,
        "missing_text": missing_text,
        "missing_image": len(sequences.kept_items) if catalogue.images is None else missing_image,
        "bad_image": bad_images.total(),
        **{f"bad_image_{reason}": count for reason, count in sorted(bad_images.items())},
        **(counts or {}),
        **{f"dropped_{name}": count for name, count in sequences.dropped.items()},
    }
    write_text_atomic(directory / STATISTICS_FILE, json.dumps(statistics, indent=2) + "\n")
    return statistics


def _write_sequences(path: Path, sequences: Sequences) -> None:
    path.parent.mkdir(exist_ok=True)
    schema = SEQUENCE_FEATURES.arrow_schema
    with (
        pq.ParquetWriter(path, schema) as writer,
        tqdm(total=len(sequences), desc=path.name, unit="user", delay=2) as progress,
    ):
        for start in range(0, len(sequences), SEQUENCE_ROW_GROUP):
            stop = min(start + SEQUENCE_ROW_GROUP, len(sequences))
            offsets = sequences.offsets[start : stop + 1]
            history = pa.ListArray.from_arrays(
                (offsets - offsets[0]).astype(np.int32),
                sequences.histories[offsets[0] : offsets[-1]],
                schema.field("history").type,
            )
            columns = {
                "user_id": sequences.user_ids[start:stop],
                "history": history,
                "target": sequences.targets[start:stop],
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=SEQUENCE_ROW_GROUP)
            progress.update(stop - start)
