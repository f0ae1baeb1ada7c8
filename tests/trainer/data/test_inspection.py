"""What is guessed of tables: their columns, their separator, and how their times are written."""

import json

import pandas as pd
import pytest

from mmesid.trainer.data.inspection import Guess, guess, sample
from mmesid.trainer.data.table_files import parse_location


ITEMS = {"p1": "Red mug", "p2": "Blue lamp", "p3": "Green sofa", "p4": "White cup"}
LOG = [(user, item, 1_600_000_000 + 86_400 * day) for day, (user, item) in enumerate(zip("aabbccab", [*ITEMS] * 2))]


def table(names: str, separator: str = ",", when=str, header: bool = True, user: str = "{}") -> str:
    rows = [separator.join((user.format(who), item, when(time))) for who, item, time in LOG]
    return "\n".join([separator.join(names.split())] * header + rows) + "\n"


def dates(code: str):
    return lambda time: pd.Timestamp(time, unit="s").strftime(code)


def guessed(tmp_path, interactions: str, items: str | None = None, name: str = "log.csv", **kwargs) -> Guess:
    (tmp_path / name).write_text(interactions, encoding="utf-8")
    (tmp_path / "items.csv").write_text(items or "", encoding="utf-8")
    described = None if items is None else sample(parse_location(str(tmp_path / "items.csv")))
    return guess(sample(parse_location(str(tmp_path / name))), described, **kwargs)


PRODUCTS = "sku,name,maker,photo\n" + "".join(f"{item},{title},Ostara,{item}.png\n" for item, title in ITEMS.items())


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "names",
    [
        "customerId product ordered_at",
        "reviewerID asin unixReviewTime",
        "user_id item_id timestamp",
        "Kundennr Artikelnr Bestelldatum",
        "Käufer Artikel Zeitpunkt",
    ],
)
def test_columns_are_found_by_their_names(tmp_path, separator, names):
    found = guessed(tmp_path, table(names, separator), PRODUCTS)
    assert list(found.columns.values()) == names.split() and list(found.columns) == ["user_id", "item_id", "timestamp"]
    assert found.item_fields == {"item_id": "sku", "title": "name", "brand": "maker", "image": "photo"}
    assert found.time_formats == [] and found.rating is None


def test_columns_are_found_by_what_they_hold(tmp_path):
    """The items are those that the other table describes, the times those that can be read as times."""
    found = guessed(tmp_path, table("member thing moment", when=dates("%Y-%m-%dT%H:%M:%S")), PRODUCTS)
    assert found.columns == {"user_id": "member", "item_id": "thing", "timestamp": "moment"}
    # Without names, and where both tables number from 1, too.
    headless = guessed(tmp_path, table("", "\t", header=False, user="9{}9"), PRODUCTS, name="log.txt")
    assert headless.columns == {"user_id": "1", "item_id": "2", "timestamp": "3"}


@pytest.mark.parametrize(
    ("code", "formats"),
    [
        ("%d/%m/%Y %H:%M", ["%d/%m/%Y %H:%M"]),
        ("%m/%d/%Y", ["%m/%d/%Y"]),
        ("%d.%m.%Y %H:%M:%S", ["%d.%m.%Y %H:%M:%S"]),
        ("%b %d, %Y", ["%b %d, %Y"]),
        ("%Y-%m-%d %H:%M:%S+00:00", []),
    ],
)
def test_the_way_that_times_are_written_is_found(tmp_path, code, formats):
    found = guessed(tmp_path, table("user item date", ";", when=dates(code)))
    assert found.columns["timestamp"] == "date" and found.time_formats == formats


def test_dates_that_can_be_read_in_two_ways_are_told(tmp_path):
    log = "user,item,date\na,p1,01/02/2020\na,p2,03/04/2020\n"
    assert guessed(tmp_path, log).time_formats == ["%d/%m/%Y", "%m/%d/%Y"]


def test_what_is_not_there_is_not_guessed(tmp_path):
    found = guessed(tmp_path, "user,item,stars\na,p1,5\nb,p2,3\n")
    assert found == Guess({"user_id": "user", "item_id": "item", "timestamp": ""}, {}, "stars", [])
    for log, items, words in (
        ("x,y\na,p1\nb,p2\n", None, "Which column of the interactions holds users cannot be told from .*: x, y; say"),
        ("user,y\na,q1\nb,q2\n", PRODUCTS, "No column of the interactions names items that a column of the items"),
    ):
        with pytest.raises(ValueError, match=words):
            guessed(tmp_path, log, items)
    told = guessed(tmp_path, "x,y\na,p1\nb,p2\n", columns={"user_id": "x", "item_id": "y"})
    assert told.columns == {"user_id": "x", "item_id": "y", "timestamp": ""}


def test_other_formats_say_the_same(tmp_path):
    rows = [{"buyer": who, "sku": item, "time": time, "tags": ["x"]} for who, item, time in LOG]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pd.DataFrame(rows).to_parquet(tmp_path / "log.parquet")
    for name in ("log.jsonl", "log.parquet"):
        found = guess(sample(parse_location(str(tmp_path / name))), None)
        assert found.columns == {"user_id": "buyer", "item_id": "sku", "timestamp": "time"}
