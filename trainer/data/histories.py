"""Histories to recommend for: JSON Lines, Parquet, or the users of a prepared dataset."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .files import listed, local_file, one_line, raw_id, read_lines, shown
from .prepared import PreparedDataset
from .sequences import SPLITS
from .table_files import format_of, parquet_batches, readable


# What errors call a user, the user's id where there is one, and raw item ids, oldest first.
User = tuple[str, str | None, Sequence]

_ROWS_AT_ONCE = 8192


@dataclass
class Histories:
    """
    Users in the order in which they were given: `user_ids`, `None` where a user has none; `rows`, `(length,)` int32
    each, empty where no item of a user is known; and how often each unknown item was left out.
    """

    user_ids: list[str | None] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def known_histories(users: Iterable[User], item_ids: Sequence[str], on_unknown: str = "error") -> Histories:
    """
    Histories as rows of a model whose rows 1 to N are `item_ids`. `on_unknown="skip"` leaves out the items that are
    not among these and counts them.

    Raises:
        ValueError: If there is no user, a history is empty or none, or an item is unknown and `on_unknown` is
            `"error"`; the sentence says where.
    """
    known = {item_id: row for row, item_id in enumerate(item_ids, start=1)}
    histories = Histories()
    for where, user_id, history in users:
        if isinstance(history, str) or not isinstance(history, Sequence | np.ndarray) or len(history) == 0:
            raise ValueError(f"{where} holds {shown(history)} as history; write a list of one item id at least.")
        names = [raw_id(_plain(item_id), "history", where) for item_id in history]
        rows = [known.get(name, 0) for name in names]
        for name, row in zip(names, rows, strict=True):
            if row == 0 and on_unknown == "error":
                raise ValueError(
                    f"{where} has item id {shown(name)}, which is not in this model's catalogue of {len(known)} "
                    f"items, whose first is '{item_ids[0]}'; correct it, or leave such items out with --on_unknown "
                    "skip."
                )
            if row == 0:
                histories.unknown[name] = histories.unknown.get(name, 0) + 1
        histories.user_ids.append(user_id)
        histories.rows.append(np.array([row for row in rows if row], np.int32))
    if not len(histories):
        raise ValueError("There is no user to recommend to; the file is empty.")
    return histories


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def read_histories(path: str | Path) -> Iterator[User]:
    """
    The users of a file: JSON Lines with a list of item ids per line, or `{"user_id": ..., "history": [...]}`; or
    Parquet with a column `history` and, if users have ids, `user_id`. Oldest items first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its name does not say that it is one of the two, or a line or a column cannot be read.
    """
    path = local_file(path)
    kind = format_of(path)
    if kind == "lines":
        return _from_lines(path)
    if kind == "parquet":
        return _from_parquet(path)
    raise ValueError(
        f"'{path}' is no file of histories; give JSON Lines (.jsonl) with a list of item ids per line, or Parquet "
        "(.parquet) with a column history. Interactions in a table are prepared first: see --prepared_dir."
    )


def _from_lines(path: Path) -> Iterator[User]:
    for where, line in read_lines(path):
        # Some editors end a file with an empty line.
        line = line.strip()
        if not line:
            continue
        try:
            value = json.loads(line)
        # A number of thousands of digits, or lists in lists in lists.
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where} is not JSON ({one_line(error)}); write a list of item ids in quotes."
            ) from error
        user = value if isinstance(value, dict) else {"history": value}
        if "history" not in user:
            raise ValueError(f"{where} has no field 'history', only {listed(user) or 'none at all'}; add it.")
        yield where, _user_id(user.get("user_id"), where), user["history"]


def _from_parquet(path: Path) -> Iterator[User]:
    with readable(path):
        columns = ["history", *(name for name in ("user_id",) if name in pq.read_schema(path).names)]
    number = 0
    for batch in tqdm(parquet_batches(path, _ROWS_AT_ONCE, columns), desc=path.name, unit=" batches", delay=2):
        for user in batch.to_pylist():
            number += 1
            where = f"'{path}', row {number}"
            yield where, _user_id(user.get("user_id"), where), user["history"]


def _user_id(value: Any, where: str) -> str | None:
    return None if value is None else raw_id(value, "user_id", where)


def prepared_users(data: PreparedDataset) -> Iterator[User]:
    """Every user of a prepared dataset with all items that the user has, the held-out ones too: what comes next is
    what is to be recommended."""
    latest: dict[str, np.ndarray] = {}
    for split in SPLITS:
        sequences = data.sequences(split)
        for user_id, user in zip(sequences.user_ids, map(sequences.__getitem__, range(len(sequences)))):
            latest[user_id] = np.append(user["history"], user["target"])
    item_ids = data.item_ids
    for user_id, rows in latest.items():
        yield f"User '{user_id}'", user_id, [item_ids[row] for row in rows.tolist()]
