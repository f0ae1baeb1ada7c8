"""The public call: tables in memory give what the same tables give as files, and what cannot be read is named."""

import io

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmesid.trainer.data.preparation import prepare
from mmesid.trainer.data.prepared import SEQUENCE_FILES, PreparedDataset
from mmesid.trainer.stages.prepare import main

from .pictures import png


ORDERS = {
    "customer": ["ann", "ann", "bob", "bob", "ann", "bob", "ann"],
    "sku": [7, 3, 3, 5, 5, 7, 3],
    "at": ["2026-03-01", "2026-01-01", "2026-01-02", "2026-02-01", "2026-02-02", "2026-04-01", "2026-05-01"],
}
PRODUCTS = {"sku": [3, 5, 7], "title": ["Pen", "Ink", None], "brand": ["Acme", None, None], "price": [1.5, None, 2.0]}
NAMES = {"user_id": "customer", "item_id": "sku", "timestamp": "at"}
COLUMNS = {"columns": NAMES}


def assert_equal(data: PreparedDataset, expected: PreparedDataset) -> None:
    assert (data.item_ids, data.titles, data.texts) == (expected.item_ids, expected.titles, expected.texts)
    assert data.frequencies.tolist() == expected.frequencies.tolist()
    for split in SEQUENCE_FILES:
        one, other = data.sequences(split), expected.sequences(split)
        assert one.user_ids == other.user_ids and one.targets.tolist() == other.targets.tolist()
        assert one.histories.tolist() == other.histories.tolist() and one.offsets.tolist() == other.offsets.tolist()
    assert data.items().features == expected.items().features and data.items()[:] == expected.items()[:]


@pytest.mark.parametrize("table", [pd.DataFrame, datasets.Dataset.from_dict])
def test_tables_in_memory_give_what_files_give(tmp_path, table):
    orders, products = pd.DataFrame(ORDERS), pd.DataFrame(PRODUCTS)
    orders.to_csv(tmp_path / "orders.csv", index=False)
    products.to_parquet(tmp_path / "products.parquet")
    flags = ["--columns", *(f"{ours}={theirs}" for ours, theirs in NAMES.items())]
    files = ["--interactions", str(tmp_path / "orders.csv"), "--items", str(tmp_path / "products.parquet")]
    main(["--source", "tabular", *files, *flags, "--output_dir", str(tmp_path / "prepared")])
    data = prepare(table(ORDERS), table(PRODUCTS), **COLUMNS)
    assert_equal(data, PreparedDataset.load(tmp_path / "prepared"))
    assert data.texts == ["", "Pen. Acme", "Ink", ""] and data.statistics["missing_text"] == 1
    # ann bought 3, 5, 7, 3 and bob 3, 5, 7.
    assert data.sequences("test")[0]["history"].tolist() == [1, 2, 3] and data.sequences("test")[0]["target"] == 1

    data.save(tmp_path / "saved")
    saved = PreparedDataset.load(tmp_path / "saved")
    assert_equal(saved, data)
    saved.save(tmp_path / "again")
    for name in ("items.parquet", "statistics.json", *SEQUENCE_FILES.values()):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_settings_reach_the_sequences():
    frame = pd.DataFrame(ORDERS | {"stars": [5, 5, 5, 5, 5, 5, 1], "sku": pd.Categorical(ORDERS["sku"])})
    data = prepare(frame, columns=NAMES | {"rating": "stars"}, min_rating=2, min_interactions=2)
    assert data.statistics["dropped_low_ratings"] == 1 and data.statistics["interactions"] == 6
    assert data.titles == data.texts == [""] * 4 and "image" not in data.items().column_names
    times = pd.to_datetime(frame["at"], utc=True)
    later = prepare(frame.assign(at=times), **COLUMNS, split="global_time", validation_fraction=0.3, test_fraction=0.3)
    assert later.statistics["split"] == "global_time"
    in_order = prepare(frame, columns=NAMES | {"timestamp": None})
    assert [in_order.item_ids[row] for row in in_order.sequences("test")[0]["history"]] == ["7", "3", "5"]


@pytest.mark.parametrize("kind", ["decoded", "bytes", "frame of bytes", "frame of structs", "paths"])
def test_pictures_of_a_table_are_kept(tmp_path, kind):
    pictures = [png("red"), None, png("blue")]
    if kind == "decoded":
        pictures = [picture and Image.open(io.BytesIO(picture)) for picture in pictures]
    elif kind == "frame of structs":
        pictures = [picture and {"bytes": picture, "path": None} for picture in pictures]
    elif kind == "paths":
        for name, picture in (("0.png", pictures[0]), ("2.png", pictures[2])):
            (tmp_path / name).write_bytes(picture)
        pictures = [str(tmp_path / "0.png"), None, str(tmp_path / "2.png")]
    table = PRODUCTS | {"photo": pictures}
    products = pd.DataFrame(table) if kind.startswith("frame") else datasets.Dataset.from_dict(table)
    data = prepare(pd.DataFrame(ORDERS), products, **COLUMNS, item_fields={"image": "photo"})
    data.save(tmp_path / "prepared")
    for items in (data.items(), PreparedDataset.load(tmp_path / "prepared").items()):
        colours = [image and image.convert("RGB").getpixel((1, 1)) for image in items["image"]]
        assert colours == [(255, 0, 0), None, (0, 0, 255)]
    assert data.statistics["missing_image"] == 1


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"columns": {}}, "'interactions' has no column 'user_id', only customer, sku, at; set user_id in col"),
        ({}, {"columns": {"user": "customer"}}, "columns has no 'user'; name columns for user_id, item_id, "),
        ({}, {"item_fields": {"rating": "x"}}, "item_fields has no 'rating'; name columns for item_id, title, desc"),
        ({}, {"item_fields": {"title": "name"}}, "'items' has no column 'name', only sku, .*; set title in item_fi"),
        ({}, {"text_fields": ["colour"]}, "'items' has no column 'colour', only .*; correct text_fields"),
        ({}, {"on_bad_image": "skip"}, "on_bad_image is 'skip'; choose one of error, missing"),
        ({}, {"min_interactions": 4}, "No user of 2 is left with min_interactions=4"),
        ({"at": [1, 2, "x", 3, 4, 5, 6]}, {}, r"interactions cannot be read as a table \(.*\); give every column"),
        ({"sku": [7, None, 3, 5, 5, 7, 3]}, {}, "'interactions', row 2 has sku=None; an id is"),
        ({"sku": np.arange(100, 107)}, {}, "'items' describes no item of the interactions, where ids look like '100'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(change, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        prepare(pd.DataFrame(ORDERS | change), pd.DataFrame(PRODUCTS), **COLUMNS | settings)
    assert "\n" not in str(error.value)


def test_what_is_no_table_is_refused():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(ORDERS)})
    with pytest.raises(ValueError, match=r"interactions holds the splits train; pass one .*interactions\['train'\]"):
        prepare(splits, **COLUMNS)
    assert prepare(splits["train"], **COLUMNS).num_items == 3
    with pytest.raises(ValueError, match=r"items is a list; pass a pandas.DataFrame or a datasets.Dataset"):
        prepare(splits["train"], [1], **COLUMNS)
