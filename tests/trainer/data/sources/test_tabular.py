"""One pair of tables in every form: files of each format, folders and repositories that `datasets` loads."""

import gzip
import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmesid.trainer.data.files import local_file
from mmesid.trainer.data.source import InteractionCollector
from mmesid.trainer.data.sources.tabular import (
    InteractionColumns,
    read_interactions,
    read_tabular,
)
from mmesid.trainer.data.table_files import TableLocation

from ....processes import run_python


# Ids with leading zeros, a comma, a line break and quotes in texts, missing values.
INTERACTIONS = {
    "customer": ["ann", "bob", "ann", "cy"],
    "sku": ["007", "010", "010", "099"],
    "at": [30, 10, 20, 40],
    "stars": [5.0, None, 2.5, 4.0],
}
ITEMS = {
    "sku": ["010", "007", "500"],
    "name": ["Pen, red", 'Ink\n"deep" blue', None],
    "brand": ["Acme", None, "Solo"],
    "tags": ["office|writing", "office", None],
    "cost": ["$1.50", None, "3"],
    "colour": ["red", "blue", None],
    "picture": ["pen.png", "https://images.example/ink.png", None],
}
COLUMNS = {"columns": {"user_id": "customer", "item_id": "sku", "timestamp": "at", "rating": "stars"}}
ITEM_COLUMNS = {
    "item_fields": {"title": "name", "categories": "tags", "price": "cost", "image": "picture"},
    "text_fields": ["title", "colour", "categories"],
}  # fmt: skip
UNTIMED = {"columns": {"user_id": "customer", "item_id": "sku", "timestamp": None}}


def write_table(path, columns: dict):
    """Writes the columns in the format of the path's name."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    content = io.BytesIO()
    if ".jsonl" in path.name:
        content.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())
    else:
        pa_csv.write_csv(table, content, pa_csv.WriteOptions(delimiter="\t" if ".tsv" in path.name else ","))
    data = content.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(orders, products=None, **settings):
    """The source of two tables, each a location or a file."""
    orders, products = (TableLocation(str(one)) if isinstance(one, Path) else one for one in (orders, products))
    return read_tabular(orders, products, **{**COLUMNS, **settings})


def check(source, folder) -> None:
    catalogue, interactions = source.catalogue, source.interactions
    # All items of the table, in its order, then those that it lacks.
    assert catalogue.item_ids == ["010", "007", "500", "099"]
    assert catalogue.fields.to_pydict() == {
        "title": ["Pen, red", 'Ink\n"deep" blue', None, None],
        "brand": ["Acme", None, "Solo", None],
        "categories": [["office", "writing"], ["office"], None, None],
        "price": [1.5, None, 3.0, None],
        "colour": ["red", "blue", None, None],
    }
    assert catalogue.texts() == ["Pen, red. red. office, writing", 'Ink\n"deep" blue. blue. office', "", ""]
    assert catalogue.images == [folder / "pen.png", "https://images.example/ink.png", None, None]
    assert [interactions.user_ids[user] for user in interactions.users] == INTERACTIONS["customer"]
    assert [catalogue.item_ids[item] for item in interactions.items] == INTERACTIONS["sku"]
    assert interactions.times.tolist() == INTERACTIONS["at"]
    assert [None if np.isnan(rating) else rating for rating in interactions.ratings] == INTERACTIONS["stars"]


FORMATS = ["csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_every_format_give_the_same_source(tmp_path, suffix):
    interactions = write_table(tmp_path / f"orders.{suffix}", INTERACTIONS)
    items = write_table(tmp_path / f"products.{suffix}", ITEMS)
    source = read(interactions, items, **ITEM_COLUMNS)
    check(source, tmp_path)
    assert source.name == "orders"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_number_that_is_none_counts_as_missing(tmp_path, suffix):
    """Tables of pandas hold NaN where a column of numbers has a gap, and Python's `json` writes it as NaN."""
    nan = float("nan")
    products = {"sku": ["007", "010"], "title": [nan, 4.0], "price": [nan, 2.5], "weight": [1.5, nan]}
    if suffix == "jsonl":
        products["image"] = [nan, nan]
    items = write_table(tmp_path / f"products.{suffix}", products)
    orders = write_table(tmp_path / "orders.csv", INTERACTIONS)
    catalogue = read(orders, items, text_fields=["title", "weight"]).catalogue
    assert catalogue.fields.to_pydict() == {
        "title": [None, "4.0", None],
        "price": [None, 2.5, None],
        "weight": ["1.5", None, None],
    }
    assert catalogue.texts() == ["1.5", "4.0", ""] and catalogue.images is None


CARD = """---
configs:
- {config_name: orders, data_files: [{split: all, path: orders.parquet}]}
- {config_name: products, data_files: [{split: train, path: products.parquet}]}
---
"""


def test_a_folder_that_load_dataset_knows_gives_it_too(tmp_path):
    write_table(tmp_path / "orders.parquet", INTERACTIONS)
    write_table(tmp_path / "products.parquet", ITEMS)
    (tmp_path / "README.md").write_text(CARD)
    orders, products = TableLocation(str(tmp_path), "orders", "all"), TableLocation(str(tmp_path), "products")
    check(read(orders, products, **ITEM_COLUMNS), tmp_path)


def test_pictures_in_a_saved_dataset_stay_there_until_they_are_read(tmp_path):
    pictures = [Image.new("RGB", (4, 4), "red"), None]
    items = datasets.Dataset.from_dict({"sku": ["010", "007"], "picture": pictures})
    items.save_to_disk(tmp_path / "products")
    items.to_parquet(tmp_path / "products.parquet")
    orders = write_table(tmp_path / "orders.csv", INTERACTIONS)
    for products in (tmp_path / "products", tmp_path / "products.parquet"):
        images = read(orders, products, item_fields={"image": "picture"}).catalogue.images
        assert len(images) == 3 and [image is None for image in images] == [False, True, True]
        with Image.open(io.BytesIO(images[0])) as image:
            assert image.getpixel((1, 1)) == (255, 0, 0)


HUB_SCRIPT = """
import sys
from huggingface_hub import HfApi
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages.prepare import main

folder, output = sys.argv[1:]
api, dataset = HfApi(), {"repo_id": "tester/market", "repo_type": "dataset"}
api.create_repo(**dataset)
api.upload_folder(folder_path=folder, **dataset)
columns = "--source tabular --columns user_id=customer item_id=sku timestamp=at --item_fields title=name".split()
files = ["--interactions", "hf://datasets/tester/market/orders.parquet",
         "--items", "hf://datasets/tester/market@main/products.parquet"]
main([*columns, *files, "--output_dir", f"{output}/files"])
repository = ["--interactions", "tester/market:orders[all]", "--items", "tester/market:products@main",
              "--output_dir", f"{output}/repository"]
main([*columns, *repository])
by_file, by_repository = (PreparedDataset.load(f"{output}/{name}") for name in ("files", "repository"))
assert by_file.item_ids == by_repository.item_ids == ["", "010", "007", "500"], by_file.item_ids
assert by_file.sequences("test")[1]["target"] == by_repository.sequences("test")[1]["target"] == 3
commit = api.dataset_info("tester/market").sha
read = StageRecord.load(f"{output}/repository").arguments
of_orders = {"": "tester/market", "_config": "orders", "_split": "all", "_revision": commit}
assert {part: read[f"interactions{part}"] for part in of_orders} == of_orders, read
assert read["items_revision"] == commit and "items_split" not in read, read
main([*columns, *repository])
api.upload_file(path_or_fileobj=b"x", path_in_repo="other.txt", **dataset)
main([*columns, *repository])
for mistyped in ("tester/markte", "hf://datasets/tester/market/ordrs.parquet"):
    try:
        main([*columns, "--interactions", mistyped, "--output_dir", f"{output}/mistyped"])
    except FileNotFoundError as error:
        print("refused:", error)
# As the repository of Amazon's reviews has one.
scripted = {"repo_id": "tester/scripted", "repo_type": "dataset"}
api.create_repo(**scripted)
api.upload_folder(folder_path=folder, **scripted)
api.upload_file(path_or_fileobj=b"raise SystemExit('a loading script ran')", path_in_repo="scripted.py", **scripted)
main([*columns, *(flag.replace("market", "scripted") for flag in files), "--output_dir", f"{output}/scripted"])
main([*columns, *(flag.replace("market", "scripted") for flag in repository)])
"""


def test_files_and_repositories_of_the_hub_are_read_at_the_commit_they_are_at(tmp_path, hub_environment):
    (tmp_path / "shop").mkdir()
    orders = {"customer": ["ann"] * 3 + ["bob"] * 3, "sku": ["007", "010", "500"] * 2, "at": [1, 2, 3, 6, 4, 7]}
    write_table(tmp_path / "shop/orders.parquet", orders)
    write_table(tmp_path / "shop/products.parquet", ITEMS | {"picture": [None] * 3})
    (tmp_path / "shop/README.md").write_text(CARD)
    result = run_python("-c", HUB_SCRIPT, tmp_path / "shop", tmp_path / "runs", env=hub_environment)
    assert "name its files, as hf://datasets/tester/scripted/<file>" in result.stderr.splitlines()[-1], result.stderr
    refused = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 2 and all("the Hub at http://127.0.0.1" in line for line in refused)
    assert "'tester/markte' is not on this machine" in refused[0] and "it answers 404" in refused[0]
    assert "'hf://datasets/tester/market/ordrs.parquet' is not on this machine" in refused[1]
    assert result.stdout.count("is up to date, skipped") == 1, "once unchanged"
    assert result.stdout.count("prepare: wrote") == 4, "by file, by name, again with a new commit, by file"


def times_of(tmp_path, name, times) -> list[int]:
    path = write_table(
        tmp_path / name, {"user_id": ["a"] * len(times), "item_id": [1] * len(times), "timestamp": times}
    )
    collector = InteractionCollector()
    read_interactions(TableLocation(str(path)), InteractionColumns("user_id", "item_id", "timestamp"), collector)
    collector.finish()
    return collector.interactions({"1": 0}).times.tolist()


def test_times_of_any_kind_become_integers_in_their_order(tmp_path):
    dates = np.array(["2024-01-02T10:00:00", "2023-12-31T23:59:59", "2024-01-02T10:00:01"], "datetime64[s]")
    microseconds = dates.astype("datetime64[us]").astype(np.int64).tolist()
    strings = [str(date) for date in dates]
    assert times_of(tmp_path, "timestamps.parquet", dates) == microseconds
    assert times_of(tmp_path, "strings.jsonl", strings) == microseconds
    assert times_of(tmp_path, "strings.csv", strings) == microseconds
    zoned = ["2024-01-02T12:00:00+02:00", "2023-12-31T23:59:59Z", "2024-01-02T10:00:01Z"]
    assert times_of(tmp_path, "zoned.jsonl", zoned) == times_of(tmp_path, "zoned.csv", zoned) == microseconds
    given = ["2024-01-02", "2023-12-31"]
    days = np.array(times_of(tmp_path, "days.jsonl", given), "datetime64[us]")
    assert days.astype("datetime64[D]").astype(str).tolist() == given
    assert times_of(tmp_path, "floats.csv", [1.5, 0.25, 1.500001]) == [1_500_000, 250_000, 1_500_001]
    with pytest.raises(ValueError, match=r"words.jsonl', line 2 has timestamp='yesterday'; a time is a number or in"):
        times_of(tmp_path, "words.jsonl", ["2024-01-01", "yesterday"])
    with pytest.raises(ValueError, match=r"row 2 has timestamp=nan; a time with a fraction is a finite number"):
        times_of(tmp_path, "infinite.parquet", [1.5, float("nan")])
    with pytest.raises(ValueError, match=r"row 2 has timestamp=None; fill in the time, or remove"):
        times_of(tmp_path, "gaps.parquet", [5, None])


def test_ids_of_users_leave_pythons_memory_when_the_last_has_come():
    collector = InteractionCollector()
    tracemalloc.start()
    users = pa.array((f"user-{number:08}" for number in range(30_000)), pa.string())
    collector.extend(users, pa.array(["item"] * 30_000), np.arange(30_000))
    before, _ = tracemalloc.get_traced_memory()
    collector.finish()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert before - after > 30_000 * 60, "one object per user"
    interactions = collector.interactions({"item": 0})
    assert len(interactions.user_ids) == 30_000 and interactions.user_ids[29_999] == "user-00029999"


def test_integers_and_seconds_in_one_column_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmesid.trainer.data.sources.tabular._ROWS_AT_ONCE", 2)
    rows = [{"user_id": "a", "item_id": 1, "timestamp": time} for time in (1, 2, 3.5, 4.5)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = InteractionColumns("user_id", "item_id", "timestamp")
    with pytest.raises(ValueError, match=r"line 3 has timestamp=3.5; that is a number with a fraction, of seconds"):
        read_interactions(TableLocation(str(tmp_path / "mixed.jsonl")), columns, InteractionCollector())


def test_without_times_the_order_of_the_rows_counts_across_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("mmesid.trainer.data.sources.tabular._ROWS_AT_ONCE", 2)
    path = write_table(tmp_path / "orders.jsonl", INTERACTIONS)
    source = read(path, **UNTIMED)
    assert source.interactions.times.tolist() == [0, 1, 2, 3]
    assert source.interactions.ratings is None
    assert source.catalogue.texts() == ["", "", ""] and source.catalogue.images is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("o.csv", "customer,sku,at\nann,1,5\n", r"o.csv' has no column 'stars', only customer, sku, at; set ra"),
        ("o.csv", "customer,sku,at,stars\nann,1,5,2\nbob,2\n", r"o.csv' cannot be read \(.*Expected 4 columns, got 2"),
        ("o.csv", "customer,sku,at,stars\nann,1,5,bad\n", r"o.csv', row 1 has stars='bad'; a rating is a number"),
        ("o.csv", "", r"o.csv' is empty; write the names"),
        ("o.jsonl", '{"customer": "a", "sku": 1, "at": 1}\n{"sku": 1}\n', r"o.jsonl', line 2 has no field 'customer'"),
        ("o.jsonl", '{"customer": "a", "sku": 1.5, "at": 1}\n', r"o.jsonl', line 1 has sku=1.5; an id is"),
        ("o.jsonl", '{"customer": "a"\n', r"o.jsonl', line 1 is not JSON"),
        ("o.dat", "customer sku", r"The name of '.*o.dat' does not tell its format; call it .csv"),
    ],
)  # fmt: skip
def test_bad_tables_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def damaged(path, keep: int | None = None):
    """A Parquet file of many rows, cut off or with garbage in the middle."""
    write_table(path, {"customer": ["ann"] * 50_000, "sku": [str(number) for number in range(50_000)]})
    data = bytearray(path.read_bytes())
    data[400:4000] = b"\xff" * 3600
    path.write_bytes(data[:keep])
    return path


@pytest.mark.parametrize("keep", [None, 100, 0], ids=["garbage", "cut", "empty"])
def test_a_damaged_parquet_file_is_named(tmp_path, keep):
    path = damaged(tmp_path / "damaged.parquet", keep)
    with pytest.raises(ValueError, match=r"'\S*damaged.parquet' cannot be read \(.+\); correct the file, or download"):
        read(path, **UNTIMED)
    orders = write_table(tmp_path / "orders.csv", INTERACTIONS)
    with pytest.raises(ValueError, match=r"'\S*damaged.parquet' cannot be read \(.+\); correct the file, or download"):
        read(orders, path)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder/train.parquet")
    with pytest.raises(ValueError, match=r"'\S*folder'"):
        read(tmp_path / "folder", **UNTIMED)
    with pytest.raises(ValueError, match=r"'\S*folder'"):
        read(orders, tmp_path / "folder")


def test_a_saved_dataset_without_the_split_is_named(tmp_path):
    saved = datasets.DatasetDict({"all": datasets.Dataset.from_dict(INTERACTIONS)})
    saved.save_to_disk(tmp_path / "orders")
    with pytest.raises(ValueError, match=r"'\S*orders' has no split 'train', only all; name one of them"):
        read(tmp_path / "orders")
    located = TableLocation(str(tmp_path / "orders"), split="all")
    assert len(read(located).interactions) == 4
    (tmp_path / "orders/all/state.json").write_text("{")
    with pytest.raises(ValueError, match=r"does not load '\S*orders' \(Expecting property name.*\); correct the conf"):
        read(located)


@pytest.mark.parametrize("suffix", FORMATS)
def test_ids_that_look_like_a_gap_are_ids(tmp_path, suffix):
    """The file as pandas writes it, without quotes."""
    names = ["NA", "null", "nan", "None"]
    orders = write_table(tmp_path / f"orders.{suffix}", INTERACTIONS | {"customer": names, "sku": names})
    items = write_table(tmp_path / f"items.{suffix}", {"sku": names[:2], "title": ["n/a", None]})
    if suffix in ("csv", "tsv"):
        for path in (orders, items):
            path.write_text(path.read_text().replace('"', ""))
    source = read(orders, items)
    assert source.catalogue.item_ids == names and source.catalogue.titles() == ["n/a", "", "", ""]
    assert [source.interactions.user_ids[user] for user in source.interactions.users] == names
    assert np.isnan(source.interactions.ratings).tolist() == [False, True, False, False]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_id_is_refused_in_every_format(tmp_path, suffix):
    orders = write_table(tmp_path / f"orders.{suffix}", INTERACTIONS | {"sku": ["007", "010", "", "099"]})
    with pytest.raises(ValueError, match=r"(row|line) 3 has sku=''; an id is"):
        read(orders)


@pytest.mark.parametrize(
    ("name", "columns", "settings", "message"),
    [
        ("a.csv", {"sku": ["007", "007"]}, {}, r"a.csv', row 2, repeats item '007', number 1 of the items"),
        ("a.jsonl", {"sku": [None]}, {}, r"a.jsonl', line 1 has sku=None; an id is"),
        ("a.csv", {"sku": [7]}, {}, r"a.csv' describes no item of the interactions.*'007' and there like '7'"),
        ("a.csv", {"sku": ["007"], "title": ["x"]}, {"item_fields": {"title": "name"}},
         r"a.csv' has no column 'name', only sku, title; set title in item"),
    ],
)  # fmt: skip
def test_bad_items_are_named(tmp_path, name, columns, settings, message):
    orders = write_table(tmp_path / "orders.csv", INTERACTIONS)
    with pytest.raises(ValueError, match=message):
        read(orders, write_table(tmp_path / name, columns), **settings)
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv' does not exist"):
        read(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("separator", [";", " ", "|", "\t", ","])
@pytest.mark.parametrize("suffix", [".csv", ".txt", ".csv.gz", ".tsv.ZIP"])
def test_what_separates_columns_is_found(tmp_path, separator, suffix):
    rows = [("user_id", "extra", "item_id", "timestamp"), ("a", "x,y;z", "007", 5), ("b", "x", "7", 6)]
    if separator in ",;":
        rows[1] = ("a", "x", "007", 5)
    path = packed(tmp_path / f"o{suffix}", "\ufeff" + "".join(separator.join(map(str, row)) + "\n" for row in rows))
    source = read_tabular(TableLocation(str(path)))
    assert source.catalogue.item_ids == ["007", "7"] and list(source.interactions.user_ids) == ["a", "b"]
    assert source.interactions.times.tolist() == [5, 6]


def packed(path, text: str) -> Path:
    """Writes a file, gzipped or zipped if its name says so."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.stem, text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def test_a_file_without_a_header_is_read_by_the_numbers_of_its_columns(tmp_path):
    path = packed(tmp_path / "ratings.txt.gz", "a\t007\t4.5\t5\nb\t010\t3.0\t6\na\t010\t\t7\n")
    source = read_tabular(
        TableLocation(str(path)), columns={"user_id": "1", "item_id": "2", "timestamp": "4", "rating": "3"}
    )
    assert source.catalogue.item_ids == ["007", "010"] and source.interactions.users.tolist() == [0, 1, 0]
    assert source.interactions.ratings.tolist()[:2] == [4.5, 3.0] and np.isnan(source.interactions.ratings[2])
    message = (
        r"txt.gz' has no column 'user_id', only a, 007, 4.5, 5; set user_id in columns .* \(by its number, from 1"
    )
    with pytest.raises(ValueError, match=message):
        read_tabular(TableLocation(str(path)))
    path = packed(tmp_path / "odd.csv", "user_id^item_id^timestamp\na^b^1\n")
    with pytest.raises(
        ValueError, match=r"only user_id\^item_id\^timestamp; .*separate columns by a comma, tab, semi"
    ):
        read_tabular(TableLocation(str(path)))
    twice = tmp_path / "two.csv.zip"
    with zipfile.ZipFile(twice, "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, "user_id,item_id,timestamp\n")
    with pytest.raises(ValueError, match=r"two.csv.zip' holds 2 files where one table is read; unpack it"):
        read_tabular(TableLocation(str(twice)))


def test_atomic_files_are_read_by_their_own_names(tmp_path):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    orders = packed(tmp_path / "shop.inter", header + "1\t007\t4\t1425600000\n2\t008\t5\t1425600001\n")
    titles = 'item_id:token\ttitle:token_seq\n007\tA 7" record\n008\tSecond\n'
    source = read_tabular(
        TableLocation(str(orders)),
        TableLocation(str(packed(tmp_path / "shop.item", titles))),
        columns={"rating": "rating"},
    )
    assert source.catalogue.titles() == ['A 7" record', "Second"] and source.interactions.ratings.tolist() == [4, 5]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("times", "row", "value"),
    [
        (["2020-09-15T05:59:00", "2020-09-15T06:59:00", "2020-09-15T05:59:00+02:00"], 3, "2020-09-15T05:59:00.02:00"),
        (["2020-09-15T05:59:00Z", "15/09/2020 05:59"], 2, "15/09/2020 05:59"),
        (["2020-09-15", "1600149540", "2020-09-16"], 2, "1600149540"),
        (["1600149540", "1600149541.5", "yesterday"], 3, "yesterday"),
        (["1e300", "5"], 1, "1e300"),
        (["5", "1" + "0" * 30], 2, "1000"),
        (["5", ""], 2, ""),
    ],
)
def test_times_of_two_kinds_are_named_by_row_and_value(tmp_path, suffix, times, row, value):
    unit = "line" if suffix == "jsonl" else "row"
    with pytest.raises(ValueError, match=rf"times.{suffix}', {unit} {row} has timestamp='{value}.*; .*on_bad_row"):
        times_of(tmp_path, f"times.{suffix}", times)


def test_times_are_read_in_a_format_that_is_named(tmp_path):
    table = {"user_id": ["a"] * 3, "item_id": [1, 2, 3], "timestamp": ["15/09/2020 05:59", "16/09/2020 05:59", "x"]}
    path = write_table(tmp_path / "o.csv", table)
    with pytest.raises(ValueError, match="row 3 has timestamp='x'; it is not written as time_format '%d/%m/%Y %H:%M'"):
        read_tabular(TableLocation(str(path)), time_format="%d/%m/%Y %H:%M")
    source = read_tabular(TableLocation(str(path)), time_format="%d/%m/%Y %H:%M", on_bad_row="skip")
    expected = np.array(["2020-09-15T05:59", "2020-09-16T05:59"], "datetime64[us]").astype(np.int64)
    assert source.interactions.times.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="time_format is '%Q'"):
        read_tabular(TableLocation(str(path)), time_format="%Q")


def test_a_time_far_from_all_others_is_refused_or_left_out(tmp_path):
    times = [1_600_000_000 + number for number in range(20)]
    for odd, shown in ((0, "0"), (1_600_000_000_000, "1600000000000")):
        table = {"user_id": ["a"] * 21, "item_id": list(range(21)), "timestamp": [*times[:7], odd, *times[7:]]}
        path = write_table(tmp_path / "o.csv", table)
        with pytest.raises(
            ValueError, match=f"o.csv', interaction 8, has the time {shown} where others are like 1600"
        ):
            read_tabular(TableLocation(str(path)))
        source = read_tabular(TableLocation(str(path)), on_bad_row="skip")
        assert source.interactions.times.tolist() == times and source.bad_rows.counts == {"interactions": 1}
    dates = ["2020-09-15T05:59:00"] * 9 + ["1970-01-01T00:00:00"]
    with pytest.raises(ValueError, match="has the time 1970-01-01T00:00:00.000000 where others are like 2020-09-15"):
        times_of(tmp_path, "dates.jsonl", dates)
    # Numbers that count days, and times that are spread over the years, are as they are.
    assert times_of(tmp_path, "days.csv", [1, 2, 60, 3000])
    spread = [10**9 * number for number in range(1, 40)]
    assert times_of(tmp_path, "spread.csv", spread) == spread


def test_ids_that_a_gap_made_floats_are_integers_again(tmp_path):
    orders = pa.table({"user_id": [1.0, 2.0], "item_id": [49.0, 50.0], "timestamp": [1, 2]})
    pq.write_table(orders, tmp_path / "o.parquet")
    (tmp_path / "i.jsonl").write_text('{"item_id": 49.0, "title": "x"}\n{"item_id": 50, "title": "y"}\n')
    source = read_tabular(*(TableLocation(str(tmp_path / name)) for name in ("o.parquet", "i.jsonl")))
    assert source.catalogue.item_ids == ["49", "50"] and list(source.interactions.user_ids) == ["1", "2"]
    write_table(tmp_path / "floats.csv", {"item_id": ["49.0", "50.0"], "title": ["x", "y"]})
    message = (
        r"describes no item .* '49' and there like '49.0'; the ids of the items were written as floats: write the"
    )
    with pytest.raises(ValueError, match=message):
        read_tabular(*(TableLocation(str(tmp_path / name)) for name in ("o.parquet", "floats.csv")))
    pq.write_table(orders.set_column(1, "item_id", pa.array([49.5, 50.0])), tmp_path / "o.parquet")
    with pytest.raises(ValueError, match=r"o.parquet', row 1 has item_id=49.5; an id is an integer or a string"):
        read_tabular(TableLocation(str(tmp_path / "o.parquet")))


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path):
    lines = ["user_id,item_id,timestamp,stars", "a,1,5,4", ",1,6,4", "a,2,7,many", "a,3", "b,2,now,4", "b,3,8,5"]
    (tmp_path / "o.csv").write_text("\n".join(lines))
    (tmp_path / "i.jsonl").write_text('{"item_id": 1}\n{"item_id": 1}\n{"item_id"\n{"item_id": 2, "title": "Two"}\n')
    source = read_tabular(
        *(TableLocation(str(tmp_path / name)) for name in ("o.csv", "i.jsonl")),
        columns={"rating": "stars"},
        on_bad_row="skip",
    )
    assert source.interactions.times.tolist() == [5, 8] and source.interactions.ratings.tolist() == [4, 5]
    assert source.bad_rows.counts == {"interactions": 4, "items": 2}
    assert source.catalogue.item_ids == ["1", "2", "3"] and source.catalogue.titles() == ["", "Two", ""]
    examples = "\n".join(source.bad_rows.examples)
    assert len(source.bad_rows.examples) == 5 and str(tmp_path) not in examples
    assert "'o.csv' has a row of 2 columns where 4 are expected" in examples and "has stars='many'" in examples
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'; choose one of error, skip"):
        read_tabular(TableLocation(str(tmp_path / "o.csv")), on_bad_row="ignore")


def test_a_table_without_times_is_told_which_flag_says_so(tmp_path):
    path = write_table(tmp_path / "o.csv", {"user_id": ["a"], "item_id": [1]})
    with pytest.raises(
        ValueError, match=r"no column 'timestamp', only user_id, item_id; .* give --columns timestamp= "
    ):
        read_tabular(TableLocation(str(path)))


def test_lines_and_archives_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmesid.trainer.data.files.MAX_LINE", 2**16)
    bomb = gzip.compress(b'{"user_id": "' + b"x" * 2**24)
    (tmp_path / "o.jsonl.gz").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"o.jsonl.gz', line 1 is longer than 65,536 bytes; write one row per line"):
        read_tabular(TableLocation(str(tmp_path / "o.jsonl.gz")))
    (tmp_path / "o.csv.gz").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"o.csv.gz' begins with a line of more than 1,048,576 bytes; is it a table"):
        read_tabular(TableLocation(str(tmp_path / "o.csv.gz")))
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe.csv", "/dev/zero"):
        with pytest.raises(FileNotFoundError, match="is no regular file; write what comes from a pipe or a device"):
            local_file(tmp_path / name)
