"""The reader of ready sequences: what it makes of good lines, and the one sentence for each kind of bad one."""

import json

import pytest

from mmesid.trainer.data.sources.sequence_files import read_sequence_files


ITEMS = [
    {"item": 1, "title": "Nail Polish", "attributes": ["OPI", "Makeup", "Nails"]},
    {"item": "b-2", "title": "Toy Story (1995)", "genres": ["Animation"], "image": "pictures/2.png"},
    {"item": 3, "title": "Why not?", "brand": "Acme", "description": "A question. Answered", "image": None},
]
SEQUENCES = "alice 1 b-2 3\nbob 3 3 1\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    (tmp_path / "sequences.txt").write_text(SEQUENCES, encoding="utf-8")
    return tmp_path


def test_items_and_interactions_are_read(folder):
    source = read_sequence_files(folder)
    catalogue = source.catalogue
    assert catalogue.item_ids == ["1", "b-2", "3"]
    assert catalogue.titles() == ["Nail Polish", "Toy Story (1995)", "Why not?"]
    assert catalogue.texts() == [
        "Nail Polish. OPI, Makeup, Nails",
        "Toy Story (1995). Animation",
        "Why not? Acme. A question. Answered",
    ]
    assert catalogue.images == [None, folder / "pictures/2.png", None]
    assert source.interactions.user_ids == ["alice", "bob"]
    assert source.interactions.users.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.interactions.items.tolist() == [0, 1, 2, 2, 2, 0]
    assert (source.synthetic, source.name, source.licence) == (False, folder.name, "unknown")


def test_text_fields_choose_and_order_the_text(folder):
    item = {"id": 9, "title": "T", "brand": "B", "price": 3.5, "tags": ["x", None, "y"]}
    (folder / "items.jsonl").write_text(json.dumps(item), encoding="utf-8")
    (folder / "sequences.txt").write_text("u 9 9 9", encoding="utf-8")
    source = read_sequence_files(folder, text_fields=["tags", "price"], item_fields={"item_id": "id"})
    assert source.catalogue.texts() == ["x, y. 3.5"]
    assert source.catalogue.images is None, "no line has a picture"
    with pytest.raises(
        ValueError, match=r"items.jsonl', line 1 has no field 'attributes', only id, title, brand, pri"
    ):
        read_sequence_files(folder, text_fields=["title", "attributes"], item_fields={"item_id": "id"})


def line(**changes) -> str:
    return json.dumps({"item": 4, "title": "Four", **changes}) + "\n"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (json.dumps({"item": 4}) + "\n", r"items.jsonl', line 4 has no field 'title', only item; add it"),
        ('{"item": 4, "title"\n', r"items.jsonl', line 4 is not JSON \(.* at column 20\)"),
        (line(item="1"), r"items.jsonl', line 4 repeats item '1', number 1 of the items"),
        (line(item=None), r"items.jsonl', line 4 has item=None; an id is"),
        (line(item="a b"), r"items.jsonl', line 4 has item='a b'; an item id is"),
        (line(item=True), r"items.jsonl', line 4 has item=True; an id is"),
        (line(title=5), r"items.jsonl', line 4 has title=5; it must be a string or null"),
        (line(image=["a.png"]), r"items.jsonl', line 4 has image=\['a.png'\]; it must be a string or null"),
        (line(brand={"name": "x"}), r"items.jsonl', line 4 has brand=\{'name': 'x'\}; text is a string"),
    ],
)
def test_bad_item_lines_are_named(folder, added, message):
    with open(folder / "items.jsonl", "a", encoding="utf-8") as file:
        file.write(added)
    with pytest.raises(ValueError, match=message):
        read_sequence_files(folder)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("carol 1 77\n", r"sequences.txt', line 3 names item '77', which '.*items.jsonl' lacks"),
        ("carol\n", r"sequences.txt', line 3 has no item for user 'carol'"),
        ("\n", r"sequences.txt', line 3 is empty"),
        ("alice 3\n", r"sequences.txt', line 3 repeats user 'alice' of '.*sequences.txt', line 1"),
    ],
)
def test_bad_sequence_lines_are_named(folder, added, message):
    (folder / "sequences.txt").write_text(SEQUENCES + added, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_sequence_files(folder)


def test_other_encodings_empty_files_and_missing_files_are_named(folder):
    (folder / "sequences.txt").write_bytes(SEQUENCES.encode() + "zoë 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"sequences.txt', line 3 is not UTF-8"):
        read_sequence_files(folder)
    (folder / "sequences.txt").write_text("")
    with pytest.raises(ValueError, match=r"sequences.txt' is empty; write one line per user"):
        read_sequence_files(folder)
    (folder / "sequences.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sequences.txt' does not exist"):
        read_sequence_files(folder)
    (folder / "items.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"items.jsonl' is empty; write one line per item"):
        read_sequence_files(folder)
