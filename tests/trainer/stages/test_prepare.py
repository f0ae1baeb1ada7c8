"""The prepare stage from its flags to its files, and what is left when it fails."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from trainer.data.prepared import PreparedDataset
from trainer.records import StageRecord, file_digest
from trainer.stages.prepare import main


def synthetic(directory, *flags) -> None:
    main(["--source", "synthetic", "--num_items", "60", "--num_users", "50", "--output_dir", str(directory), *flags])


def digests(directory) -> dict[str, str]:
    return {str(file.relative_to(directory)): file_digest(file) for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    items = [{"item": item, "title": f"Item {item}"} for item in range(1, 5)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "sequences.txt").write_text("u 1 2 3\nv 3 2 1 3\nw 1 3 2\nx 1 2\n")
    return folder


def test_synthetic_shop_is_prepared_reproducibly_and_skipped_when_current(tmp_path, capsys):
    for name in ("first", "second"):
        synthetic(tmp_path / name)
    data_files = [
        "items.parquet",
        "statistics.json",
        *(f"sequences/{split}.parquet" for split in ("train", "validation", "test")),
    ]
    first, second = digests(tmp_path / "first"), digests(tmp_path / "second")
    assert set(first) == {*data_files, "README.md", "record.json"}
    assert {name: first[name] for name in data_files} == {name: second[name] for name in data_files}

    capsys.readouterr()
    synthetic(tmp_path / "first")
    assert "is up to date, skipped" in capsys.readouterr().out
    assert digests(tmp_path / "first") == first
    synthetic(tmp_path / "first", "--seed", "1")
    assert digests(tmp_path / "first")["items.parquet"] != first["items.parquet"]

    data = PreparedDataset.load(tmp_path / "second")
    assert data.statistics["synthetic"] is True and "synthetic" in (tmp_path / "second/README.md").read_text().lower()
    assert StageRecord.load(tmp_path / "second").details["data"] == data.statistics


def test_prepared_directory_loads_as_a_dataset(tmp_path):
    synthetic(tmp_path / "prepared")
    options = {"path": str(tmp_path / "prepared"), "cache_dir": str(tmp_path / "cache")}
    sequences = load_dataset(**options)
    assert set(sequences) == {"train", "validation", "test"} and len(sequences["train"]) == 50
    data = PreparedDataset.load(tmp_path / "prepared")
    example = data.sequences("validation")[7]
    assert sequences["validation"][7] == {
        "user_id": data.sequences("validation").user_ids[7],
        "history": example["history"].tolist(),
        "target": example["target"],
    }
    items = load_dataset(**options, name="items", split="train")
    assert items["title"][:] == data.titles[1:]
    assert [image is None for image in items["image"]] == [image is None for image in data.items()["image"]]
    assert items[0]["image"].size == (64, 64)


def test_k_core_setting_reaches_the_files(folder, tmp_path):
    flags = ["--source", "sequences", "--source_dir", str(folder), "--output_dir", str(tmp_path / "prepared")]
    main(flags)
    whole = PreparedDataset.load(tmp_path / "prepared")
    assert (whole.num_items, whole.statistics["dropped_short_users"]) == (4, 1)
    main([*flags, "--min_interactions", "3"])
    core = PreparedDataset.load(tmp_path / "prepared")
    assert core.item_ids == ["", "1", "2", "3"] and core.statistics["dropped_items"] == 1
    assert pq.read_table(tmp_path / "prepared/sequences/test.parquet")["target"].to_pylist() == [3, 3, 2]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sequences.txt", "u 1 2 9\n", r"sequences.txt', line 1 names item '9'"),
        ("items.jsonl", '{"item": 1}\n', r"items.jsonl', line 1 has no field 'title'"),
        (
            "items.jsonl",
            '{"item": 1, "title": "A", "image": "no.png"}\n',
            r"image of item '1' cannot be read \('.*no.png'",
        ),
    ],
)
def test_bad_input_leaves_earlier_outputs_untouched(folder, tmp_path, file, content, message):
    flags = ["--source", "sequences", "--source_dir", str(folder), "--output_dir", str(tmp_path / "prepared")]
    main(flags)
    before = digests(tmp_path / "prepared")
    if "image" in content:
        (folder / "sequences.txt").write_text("u 1 1 1\n")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        main(flags)
    assert digests(tmp_path / "prepared") == before


def test_a_source_is_told_where_its_data_are_and_nothing_else(folder, tmp_path):
    with pytest.raises(ValueError, match="`--source sequences` needs source_dir, got None"):
        main(["--source", "sequences", "--output_dir", str(tmp_path / "prepared")])
    with pytest.raises(ValueError, match="`--source synthetic` does not read source_dir, got '.*folder'"):
        synthetic(tmp_path / "prepared", "--source_dir", str(folder))
    with pytest.raises(FileNotFoundError, match="'.*nowhere' does not exist"):
        main(["--source", "sequences", "--source_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "p")])
