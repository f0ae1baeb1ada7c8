"""What is written is what is read."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmesid.trainer.data import prepared
from mmesid.trainer.data.preparation import prepare_source
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.sequences import SequenceSettings
from mmesid.trainer.data.source import Catalogue, Interactions, Source

from .pictures import png


# Item "d" is in no sequence; user "x" is too short to be split.
SEQUENCES = {"ann": "abcab", "x": "ab", "bea": "cba", "cy": "bbbbcc"}
FIELDS = {"title": ["A", "B", None, "D"], "brand": ["one", None, None, None], "price": [1.5, None, None, 2.0]}
COLOURS = {"a": (250, 0, 0), "c": (0, 0, 250), "d": (9, 99, 9)}


def make_source(images: list | None = None) -> Source:
    users = list(SEQUENCES)
    return Source(
        name="Four items",
        licence="CC0-1.0",
        synthetic=False,
        catalogue=Catalogue(list("abcd"), pa.table(FIELDS), ["title", "brand"], images),
        interactions=Interactions(
            user_ids=users,
            users=np.concatenate([[users.index(user)] * len(items) for user, items in SEQUENCES.items()]),
            items=np.array(["abcd".index(item) for items in SEQUENCES.values() for item in items], dtype=np.int32),
            times=np.concatenate([np.arange(len(items)) for items in SEQUENCES.values()]),
        ),
    )


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.png").write_bytes(png(COLOURS["a"]))
    return make_source([tmp_path / "a.png", None, png(COLOURS["c"]), png(COLOURS["d"])])


def write(directory, source, **options):
    data = prepare_source(source, **options)
    data.save(directory)
    return data.statistics


def test_the_reader_returns_rows_texts_and_frequencies(tmp_path, source):
    statistics = write(tmp_path / "prepared", source)
    data = PreparedDataset.load(tmp_path / "prepared")
    assert data.num_items == 4 and data.item_ids == ["", "a", "b", "c", "d"]
    assert data.titles == ["", "A", "B", "", "D"] and data.texts == ["", "A. one", "B", "", "D"]
    # Training: ann "abc", bea "c", cy "bbbb".
    assert data.items()["price"][:] == FIELDS["price"], "fields of the source are kept as they are"
    assert data.frequencies.dtype == torch.int64 and data.frequencies.tolist() == [0, 1, 5, 2, 0]
    assert data.statistics == statistics
    expected = {
        "users": 3, "items": 4, "interactions": 14, "training_interactions": 8, "dropped_short_users": 1,
        "missing_text": 1, "missing_image": 1, "items_without_training_interactions": 1, "repeated_test_targets": 2,
        "synthetic": False, "source": "Four items",
    }  # fmt: skip
    assert {name: statistics[name] for name in expected} == expected
    for split, end in {"train": -2, "validation": -1, "test": None}.items():
        sequences = data.sequences(split)
        assert sequences.histories.dtype == sequences.targets.dtype == np.int32 and sequences.offsets.dtype == np.int64
        for index, user in enumerate(sequences.user_ids):
            *history, target = ["abcd".index(item) + 1 for item in SEQUENCES[user]][:end]
            assert (sequences[index]["history"].tolist(), sequences[index]["target"]) == (history, target)
    assert sequences.user_ids == ["ann", "bea", "cy"]


def test_row_groups_do_not_change_what_is_read(tmp_path, source, monkeypatch):
    write(tmp_path / "whole", source)
    monkeypatch.setattr(prepared, "SEQUENCE_ROW_GROUP", 2)
    monkeypatch.setattr(prepared, "IMAGE_ROW_GROUP", 2)
    write(tmp_path / "parts", source)
    assert pq.ParquetFile(tmp_path / "parts/items.parquet").num_row_groups == 2
    for name in ("items.parquet", "sequences/train.parquet", "sequences/validation.parquet", "sequences/test.parquet"):
        assert pq.read_table(tmp_path / "parts" / name).equals(pq.read_table(tmp_path / "whole" / name))
    sequences = PreparedDataset.load(tmp_path / "parts").sequences("test")
    assert sequences[2]["history"].tolist() == [2, 2, 2, 2, 3]


def test_pictures_are_read_from_disk_one_by_one(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    source = make_source()
    items = [f"item {number}" for number in range(300)]
    source.catalogue = Catalogue(items, pa.table({"title": items}), ["title"], [file.getvalue()] * 300)
    write(tmp_path / "prepared", source)
    data = PreparedDataset.load(tmp_path / "prepared")
    before = pa.total_allocated_bytes()
    items = data.items()
    assert items["item_id"][:] == data.item_ids[1:] and np.array_equal(np.asarray(items[299]["image"]), noise)
    assert pa.total_allocated_bytes() - before < 0.2 * 300 * len(file.getvalue())


def test_a_bad_picture_is_refused_by_name_or_counted_as_missing(tmp_path, source):
    source.catalogue.images[1] = tmp_path / "broken.png"
    source.catalogue.images[1].write_bytes(png("red")[:45])
    with pytest.raises(ValueError, match=r"The image of item 'b' cannot be read \('.*broken.png'.*set on_bad_image"):
        write(tmp_path / "refused", source)
    source.catalogue.images[2] = tmp_path / "absent.png"
    statistics = write(tmp_path / "prepared", source, on_bad_image="missing")
    assert (statistics["bad_image"], statistics["missing_image"]) == (2, 2)
    assert statistics["bad_image_unreadable"] == statistics["bad_image_missing"] == 1
    assert PreparedDataset.load(tmp_path / "prepared").items()[1]["image"] is None


def test_a_directory_that_is_not_prepared_is_refused(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=r"is no prepared dataset, it lacks 'items.parquet'"):
        PreparedDataset.load(tmp_path)
    write(tmp_path / "prepared", source)
    data = PreparedDataset.load(tmp_path / "prepared")
    with pytest.raises(ValueError, match="has no split 'dev'; choose one of train, validation, test"):
        data.sequences("dev")
    file = tmp_path / "prepared/sequences/test.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(2, "target", pa.array([1, 5, 2], pa.int32())), file)
    with pytest.raises(ValueError, match=r"test.parquet' holds a row outside 1 to 4"):
        data.sequences("test")
    items = pq.read_table(tmp_path / "prepared/items.parquet")
    pq.write_table(items.take([1, 0, 2, 3]), tmp_path / "prepared/items.parquet")
    with pytest.raises(ValueError, match="does not hold rows 1 to 4 in order"):
        PreparedDataset.load(tmp_path / "prepared")


def test_a_file_that_is_damaged_or_lacks_a_column_is_named(tmp_path, source):
    write(tmp_path / "prepared", source)
    items, test = tmp_path / "prepared/items.parquet", tmp_path / "prepared/sequences/test.parquet"
    data = PreparedDataset.load(tmp_path / "prepared")
    pq.write_table(pq.read_table(test).drop_columns(["history"]), test)
    with pytest.raises(ValueError, match="test.parquet' has no column 'history', only user_id, target; write it"):
        data.sequences("test")

    def refuse(message):
        with pytest.raises(ValueError, match=message + "; write it again with `mmesid prepare`"):
            PreparedDataset.load(tmp_path / "prepared")

    (tmp_path / "prepared/statistics.json").write_text("{")
    refuse(r"statistics.json' is not JSON \(.*\)")
    pq.write_table(pq.read_table(items).drop_columns(["text"]), items)
    refuse("items.parquet' has no column 'text', only row, item_id, title, frequency.*")
    items.write_bytes(items.read_bytes()[:50])
    refuse(r"items.parquet' cannot be read \(.+\)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "says None of source, which is no str"),
        ('{"source": "x"}', "says None of licence, which is no str"),
        ("[" * 5000, r"is not JSON \(.+\)"),
        ({"users": True}, "says True of users, which is no int"),
        ({"items": 7}, "tells of 7 items where there are 4; write both again"),
    ],
)
def test_statistics_that_are_not_of_the_dataset_are_named(tmp_path, source, content, message):
    statistics = write(tmp_path / "prepared", source)
    text = content if isinstance(content, str) else json.dumps(statistics | content)
    (tmp_path / "prepared/statistics.json").write_text(text)
    with pytest.raises(ValueError, match=f"statistics.json' {message}"):
        PreparedDataset.load(tmp_path / "prepared")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("item_id", [1, 2, 3, 4], "items.parquet' has int64 in the column 'item_id' where string is expected"),
        ("item_id", ["a", "a", "b", "c"], "items.parquet' repeats an item_id"),
        ("title", ["a", None, "b", "c"], "items.parquet' has nulls in 'title'"),
        ("frequency", pa.array([1, 2, 3, None], pa.int32()), "items.parquet' has nulls in 'frequency'"),
    ],
)
def test_items_of_other_types_are_named(tmp_path, source, name, values, message):
    write(tmp_path / "prepared", source)
    file = tmp_path / "prepared/items.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), file)
    with pytest.raises(ValueError, match=message):
        PreparedDataset.load(tmp_path / "prepared")


def test_sequences_with_gaps_are_named(tmp_path, source):
    write(tmp_path / "prepared", source)
    data = PreparedDataset.load(tmp_path / "prepared")
    file = tmp_path / "prepared/sequences/train.parquet"
    table = pq.read_table(file)
    history = table["history"].to_pylist()
    for gap in ([None], None):
        histories = pa.array([gap, *history[1:]], table["history"].type)
        pq.write_table(table.set_column(1, "history", histories), file)
        with pytest.raises(ValueError, match="train.parquet' has nulls; write it again"):
            data.sequences("train")
    pq.write_table(table.set_column(0, "user_id", pa.array(range(len(table)))), file)
    with pytest.raises(ValueError, match="train.parquet' has int64 in the column 'user_id' where string is expected"):
        data.sequences("train")


def test_without_a_split_everything_is_for_training(tmp_path, source):
    statistics = write(tmp_path / "prepared", source, settings=SequenceSettings(split="none"))
    data = PreparedDataset.load(tmp_path / "prepared")
    assert statistics["split"] == "none" and not data.has_targets
    assert len(data.sequences("validation")) == len(data.sequences("test")) == 0
    train = data.sequences("train")
    assert len(train.histories) + len(train) == statistics["interactions"] == statistics["training_interactions"]
    assert int(data.frequencies.sum()) == statistics["interactions"]
