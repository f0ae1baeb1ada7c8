"""What files of histories say, and what is said of those that are wrong."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from mmesid.trainer.data.histories import known_histories, prepared_users, read_histories
from mmesid.trainer.data.preparation import prepare


ITEMS = ["7", "A", "B"]


def rows(users, **kwargs) -> list[tuple]:
    histories = known_histories(users, ITEMS, **kwargs)
    return list(zip(histories.user_ids, map(np.ndarray.tolist, histories.rows), strict=True))


def test_lines_are_lists_or_users_with_ids(tmp_path):
    text = '\ufeff["A", 7]\n\n{"user_id": 5, "history": ["B"]}\r\n{"user_id": "u", "history": ["A"]}\n'
    expected = [(None, [2, 1]), ("5", [3]), ("u", [2])]
    (tmp_path / "users.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "users.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("users.jsonl", "users.jsonl.gz"):
        assert rows(read_histories(tmp_path / name)) == expected


@pytest.mark.parametrize("history", [[["A", "7"], ["B"]], [[7, 7], [7]], [np.array(["A"]), np.array(["B", "B"])]])
def test_parquet_says_the_same(tmp_path, history):
    expected = [[ITEMS.index(str(item_id)) + 1 for item_id in one] for one in history]
    for columns, user_ids in (({}, [None, None]), ({"user_id": [8, 9]}, ["8", "9"]), ({"user_id": ["x", None]}, None)):
        pd.DataFrame({"other": [0, 1], "history": history} | columns).to_parquet(tmp_path / "users.parquet")
        found = rows(read_histories(tmp_path / "users.parquet"))
        assert found == list(zip(user_ids or ["x", None], expected, strict=True))


def test_unknown_items_are_named_with_their_line_or_left_out_and_counted(tmp_path):
    lines = ["A", "7"], ["A", "x", "x", "B"], ["y"]
    path = tmp_path / "users.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match="users.jsonl', line 2 has item id 'x', .* of 3 items, whose first is '7'"):
        rows(read_histories(path))
    histories = known_histories(read_histories(path), ITEMS, on_unknown="skip")
    assert [row.tolist() for row in histories.rows] == [[2, 1], [2, 3], []]
    assert histories.unknown == {"x": 2, "y": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]\n", "line 1 holds \\[\\] as history; write a list"),
        (b'["A"]\n"A"\n', "line 2 holds 'A' as history"),
        (b'["A"]\n5\n', "line 2 holds 5 as history"),
        (b'["A"]\n{oops\n', "line 2 is not JSON"),
        (b'["A"]\n{"user": 1}\n', "line 2 has no field 'history', only user"),
        (b'{"user_id": [1], "history": ["A"]}', r"line 1 has user_id=\[1\]; an id is an integer or a string"),
        (b"[true]", "line 1 has history=True; an id is"),
        (b'["A"]\n["\xff"]\n', "users.jsonl', line 2 is not UTF-8"),
        (b"\n", "There is no user to recommend to"),
    ],
)
def test_the_line_that_is_wrong_is_named(tmp_path, content, words):
    (tmp_path / "users.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        rows(read_histories(tmp_path / "users.jsonl"))


def test_a_file_that_is_none_of_histories_is_refused(tmp_path):
    (tmp_path / "users.csv").write_text("user_id,history\n1,A\n", encoding="utf-8")
    with pytest.raises(ValueError, match="users.csv' is no file of histories; give JSON Lines"):
        read_histories(tmp_path / "users.csv")
    pd.DataFrame({"items": [["A"]]}).to_parquet(tmp_path / "users.parquet")
    with pytest.raises(ValueError, match="users.parquet' has no column 'history', only items"):
        list(read_histories(tmp_path / "users.parquet"))


def test_users_of_a_prepared_dataset_have_all_their_items():
    bought = {"ann": [3, 1, 2, 3], "bob": [2, 3, 1], "eve": [1]}
    table = [(user, item, time) for user, items in bought.items() for time, item in enumerate(items)]
    data = prepare(pd.DataFrame(table, columns=["user_id", "item_id", "timestamp"]))
    found = {user_id: list(map(int, history)) for _, user_id, history in prepared_users(data)}
    assert found == {user: bought[user] for user in ("ann", "bob")}, "one item is too few to be split"
