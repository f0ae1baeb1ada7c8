"""Small files in the three forms in which Amazon reviews were published, written here with the quirks of each."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.sources import reader_of
from mmesid.trainer.data.sources.amazon import read_amazon_2023
from mmesid.trainer.data.table_files import TableLocation

from ....processes import run_python


REVIEWS = [("ann", "B01", 100, 5.0), ("bob", "B02", 200, 3.0), ("ann", "B03", 150, 4.0)]
THUMBNAIL = "https://images.example/I/b01._SS40_.jpg"
LARGE, HIGH = "https://images.example/I/b01._AC_.jpg", "https://images.example/I/b01.jpg"


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(year, reviews, metadata, **settings):
    return reader_of(f"amazon_{year}")(TableLocation(str(reviews)), TableLocation(str(metadata)), **settings)


def reviews_by_reviewer(path):
    return write_lines(
        path,
        [
            json.dumps(
                {
                    "reviewerID": user, "asin": item, "reviewerName": 'A "B" C', "helpful": [3, 4],
                    "reviewText": "Very oily\nand it's creamy.", "overall": rating, "summary": "Don't",
                    "unixReviewTime": time, "reviewTime": "01 30, 2014",
                }
            )
            for user, item, time, rating in REVIEWS
        ],
    )  # fmt: skip


@pytest.fixture
def files_2014(tmp_path):
    items = [
        {
            "asin": "B01", "title": "Nail 'Lacquer' &amp; more", "description": "Shiny.<br />Red.", "price": 9.99,
            "imUrl": HIGH, "brand": "OPI", "salesRank": {"Beauty": 7}, "related": {"also_bought": ["B09"]},
            "categories": [["Beauty", "Makeup", "Nails"], ["Beauty", "Tools"]],
        },
        {"asin": "B09", "title": "Nobody reviewed it", "categories": [["Beauty"]]},
        {"asin": "B02", "description": 'It\'s "new"', "categories": [["Beauty"]]},
    ]  # fmt: skip
    return (
        reviews_by_reviewer(tmp_path / "reviews_Beauty_5.json.gz"),
        write_lines(tmp_path / "meta_Beauty.json.gz", [repr(item) for item in items]),
    )


@pytest.fixture
def files_2018(tmp_path):
    items = [
        {
            "asin": "B01", "title": "Nail 'Lacquer' &amp; more", "description": ["Shiny.", "<p>Red.</p>", ""],
            "price": "$9.99", "imageURL": [THUMBNAIL], "imageURLHighRes": [HIGH], "brand": "OPI", "also_buy": ["B09"],
            "category": ["Beauty", "Makeup", "Nails", "Tools", "</span></span>"], "feature": ["Lasts <b>long</b>"],
            "rank": "7 in Beauty (", "details": {}, "tech1": "", "date": "", "main_cat": "All Beauty",
        },
        {"asin": "B02", "title": "var aPageStart = (new Date()).getTime();", "description": ['It\'s "new"'],
         "category": ["Beauty"], "price": ".a-box-inner{background-color:#fff}", "imageURL": [], "brand": ""},
        {"asin": "B01", "title": "The same line again", "category": []},
    ]  # fmt: skip
    return (
        reviews_by_reviewer(tmp_path / "All_Beauty_5.json.gz"),
        write_lines(tmp_path / "meta_All_Beauty.json.gz", [json.dumps(item) for item in items]),
    )


def items_2023():
    return [
        {
            "main_category": "All Beauty", "title": "Nail 'Lacquer' &amp; more", "average_rating": 4.8, "price": 9.99,
            "rating_number": 10, "features": ["Lasts long"], "description": ["Shiny.", "Red."], "videos": [],
            "images": [
                {"thumb": "t", "large": "https://images.example/side.jpg", "variant": "PT01", "hi_res": None},
                {"thumb": THUMBNAIL, "large": LARGE, "variant": "MAIN", "hi_res": HIGH},
            ],
            "store": "The OPI store", "categories": ["Beauty", "Makeup", "Nails", "Tools"],
            "details": {"Brand": "OPI"}, "parent_asin": "B01", "bought_together": None,
        },
        {
            "main_category": "Beauty", "title": None, "average_rating": 3.0, "price": None, "rating_number": 1,
            "features": [], "description": ['It\'s "new"'], "videos": [], "images": [], "store": None,
            "categories": [], "details": {}, "parent_asin": "B02", "bought_together": None,
        },
    ]  # fmt: skip


def review_2023(user, item, time, rating):
    return {
        "rating": rating, "title": "Ok", "text": "Fine<br />", "images": [], "asin": f"{item}-red",
        "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True,
    }  # fmt: skip


@pytest.fixture
def files_2023(tmp_path):
    return (
        write_lines(tmp_path / "All_Beauty.jsonl", [json.dumps(review_2023(*review)) for review in REVIEWS]),
        write_lines(tmp_path / "meta_All_Beauty.jsonl.gz", [json.dumps(item) for item in items_2023()]),
    )


@pytest.mark.parametrize(("year", "picture"), [(2014, HIGH), (2018, HIGH), (2023, LARGE)])
def test_every_generation_yields_the_same_items_and_interactions(year, picture, request):
    source = read(year, *request.getfixturevalue(f"files_{year}"))
    catalogue, interactions = source.catalogue, source.interactions
    # B03 was reviewed but is not in the metadata: it has no fields; nobody reviewed B09.
    assert catalogue.item_ids == ["B01", "B02", "B03"]
    assert catalogue.fields.to_pydict() == {
        "title": ["Nail 'Lacquer' & more", None, None],
        "description": ["Shiny. Red.", 'It\'s "new"', None],
        "brand": ["OPI", None, None],
        "categories": [["Beauty", "Makeup", "Nails", "Tools"], ["Beauty"], None],
        "price": [9.99, None, None],
        **({} if year == 2014 else {"features": ["Lasts long", None, None]}),
    }
    assert catalogue.texts() == [
        "Nail 'Lacquer' & more. OPI. Beauty, Makeup, Nails, Tools. "
        f"{'' if year == 2014 else 'Lasts long. '}Shiny. Red.",
        'Beauty. It\'s "new"',
        "",
    ]
    assert catalogue.images == [picture, None, None]
    entries = zip(interactions.users, interactions.items, interactions.times, interactions.ratings, strict=True)
    assert [
        (interactions.user_ids[user], catalogue.item_ids[item], time, rating) for user, item, time, rating in entries
    ] == REVIEWS
    assert str(year) in source.name and "Beauty" in source.name


def test_ratings_and_metadata_of_2023_as_the_repository_has_them_too(files_2023, tmp_path):
    """Ratings alone as CSV (`benchmark/`), metadata as Parquet with pictures by size and details as JSON."""
    ratings = write_lines(
        tmp_path / "Beauty.csv",
        ["user_id,parent_asin,rating,timestamp", *(f"{u},{i},{rating},{time}" for u, i, time, rating in REVIEWS)],
    )
    items = items_2023()
    sizes = ("hi_res", "large", "thumb", "variant")
    for item in items:
        item["images"] = {size: [image[size] for image in item["images"]] for size in sizes}
        item["details"] = json.dumps(item["details"])
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "meta.parquet")
    check_alike(read(2023, ratings, tmp_path / "meta.parquet"), read(2023, *files_2023))


def check_alike(source, expected):
    assert source.catalogue == expected.catalogue
    assert list(source.interactions.user_ids) == list(expected.interactions.user_ids)
    for name in ("users", "items", "times", "ratings"):
        assert getattr(source.interactions, name).tolist() == getattr(expected.interactions, name).tolist()


def test_what_datasets_reads_is_what_the_files_say(files_2023, tmp_path):
    """By its reader of a format, and from a folder that it saved."""
    reviews, metadata = map(str, files_2023)
    expected = read(2023, reviews, metadata)
    by_reader = TableLocation(reviews, reader="json"), TableLocation(metadata, reader="text")
    check_alike(read_amazon_2023(*by_reader), expected)
    datasets.Dataset.from_list([review_2023(*review) for review in REVIEWS]).save_to_disk(tmp_path / "reviews")
    items = [item | {"details": json.dumps(item["details"])} for item in items_2023()]
    datasets.DatasetDict({"full": datasets.Dataset.from_list(items)}).save_to_disk(tmp_path / "items")
    folders = TableLocation(str(tmp_path / "reviews")), TableLocation(str(tmp_path / "items"), split="full")
    check_alike(read_amazon_2023(*folders), expected)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (0, b"[1]", r"All_Beauty.jsonl' cannot be read \(.*\); correct the file, or download"),
        (
            0,
            b'{"user_id": null, "parent_asin": "B01", "timestamp": 1}',
            r"All_Beauty.jsonl', row 4 has user_id=None; an id is",
        ),
        (1, b'{"title": "no id"}', r"meta_All_Beauty.jsonl', line 3 has no field 'parent_asin', only title"),
        (1, b'{"parent_asin": "B03"', r"meta_All_Beauty.jsonl', line 3 is not JSON"),
        (1, b'{"parent_asin": "B03", "title": "\xe9"}', r"meta_All_Beauty.jsonl' cannot be read \('utf-8' codec"),
    ],
)
def test_bad_lines_that_datasets_reads_are_named(files_2023, tmp_path, file, line, message):
    items = write_lines(tmp_path / "meta_All_Beauty.jsonl", [json.dumps(item) for item in items_2023()])
    files = files_2023[0], items
    with open(files[file], "ab") as damaged:
        damaged.write(line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_amazon_2023(TableLocation(str(files[0]), reader="json"), TableLocation(str(items), reader="text"))


HUB_SCRIPT = """
import sys
from huggingface_hub import HfApi
from mmesid.trainer.stages.prepare import main

folder, output = sys.argv[1:]
name = "McAuley-Lab/Amazon-Reviews-2023"
api, dataset = HfApi(), {"repo_id": name, "repo_type": "dataset"}
api.create_repo(**dataset, exist_ok=True)
script = b"raise SystemExit('a loading script ran')"
api.upload_file(path_or_fileobj=script, path_in_repo="Amazon-Reviews-2023.py", **dataset)
first = api.upload_folder(folder_path=folder, **dataset).oid
whole = ["--source", "amazon_2023", "--items", f"{name}:raw_meta_All_Beauty", "--interactions"]
main([*whole, f"{name}:raw_review_All_Beauty", "--output_dir", f"{output}/reviews"])
main([*whole, f"{name}:0core_rating_only_All_Beauty", "--output_dir", f"{output}/ratings"])
api.upload_file(path_or_fileobj=b"{}", path_in_repo="raw/review_categories/All_Beauty.jsonl", **dataset)
main([*whole, f"{name}:raw_review_All_Beauty@{first}", "--output_dir", f"{output}/pinned"])
for wrong in (name, f"{name}:raw_meta_All_Beauty", f"{name}:raw_review_All_Beuty"):
    try:
        main([*whole, wrong, "--output_dir", f"{output}/wrong"])
    except (ValueError, FileNotFoundError) as error:
        print("refused:", error)
"""


def test_the_configurations_of_the_hubs_dataset_are_read_whatever_its_loading_script(tmp_path, hub_environment):
    entries = [(user, item, time, 5.0) for user in ("ann", "bob") for time, item in enumerate(("B01", "B02", "0007"))]
    folder, output = tmp_path / "repository", tmp_path / "runs"
    write_lines(folder / "raw/review_categories/All_Beauty.jsonl", [json.dumps(review_2023(*e)) for e in entries])
    # As published: what `details` hold differs from item to item, and so may their types.
    details = [{"Brand": "OPI", "Size": 3}, {"Size": {"in": "small"}, "Age": [7]}]
    items = [item | {"details": detail} for item, detail in zip(items_2023(), details, strict=True)]
    write_lines(folder / "raw/meta_categories/meta_All_Beauty.jsonl", [json.dumps(item) for item in items])
    rows = [f"{user},{item},{rating},{time}" for user, item, time, rating in entries]
    write_lines(folder / "benchmark/0core/rating_only/All_Beauty.csv", ["user_id,parent_asin,rating,timestamp", *rows])

    result = run_python("-c", HUB_SCRIPT, folder, output, env=hub_environment)
    assert result.returncode == 0, result.stderr
    for name in ("reviews", "ratings", "pinned"):
        data = PreparedDataset.load(output / name)
        assert data.item_ids == ["", "B01", "B02", "0007"]
        assert data.texts[1] == "Nail 'Lacquer' & more. OPI. Beauty, Makeup, Nails, Tools. Lasts long. Shiny. Red."
        assert [example["target"] for example in data.sequences("test")] == [3, 3]
        assert data.statistics["source"] == "Amazon 2023, All_Beauty"
    no_name, of_items, mistyped = (line for line in result.stdout.splitlines() if line.startswith("refused: "))
    assert "raw_review_<category>" in no_name and "interactions is None; name one of them" in no_name
    assert "the configuration of interactions is 'raw_meta_All_Beauty'" in of_items
    assert "All_Beuty.jsonl' is not on this machine, and the Hub at http" in mistyped and "answers 404" in mistyped

    read = json.loads((output / "pinned/record.json").read_text())["arguments"]
    name = "McAuley-Lab/Amazon-Reviews-2023"
    again = ["--source", "amazon_2023", "--items", f"{name}:{read['items_config']}", "--interactions"]
    again.append(f"{name}:{read['interactions_config']}@{read['interactions_revision']}")
    again += ["--force", "true", "--output_dir", str(output / "pinned")]
    before = (output / "pinned/items.parquet").read_bytes()
    offline_environment = hub_environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = run_python("-m", "mmesid.trainer.stages.prepare", *again, env=offline_environment)
    assert offline.returncode == 0, offline.stderr
    assert "prepare: wrote" in offline.stdout and (output / "pinned/items.parquet").read_bytes() == before


def test_text_fields_may_be_those_of_the_metadata(files_2018):
    source = read(2018, *files_2018, text_fields=["brand", "feature"])
    assert source.catalogue.texts() == ["OPI. Lasts long", "", ""]
    with pytest.raises(ValueError, match="No item has the field 'colour' that text_fields names; the items have titl"):
        read(2018, *files_2018, text_fields=["colour"])


def test_details_are_text_where_they_are_asked_for(files_2023):
    source = read(2023, *files_2023, text_fields=["details", "features"])
    assert source.catalogue.texts()[0] == "Brand: OPI. Lasts long"


# Each with what damages it, which the item then lacks; the line goes without a title but keeps what is sound.
DAMAGED = {
    2014: [{"categories": [None, "x", 5]}, {"categories": 5}, {"imUrl": 5}, {"imUrl": {"large": HIGH}}],
    2018: [{"category": [None]}, {"category": 5}, {"imageURL": [5]}, {"imageURLHighRes": {"a": 1}}, {"feature": 5}],
    2023: [
        {"categories": [None]}, {"categories": {"a": [1]}}, {"details": [1]}, {"details": "[" * 9999},
        {"images": ["u"]}, {"images": 5}, {"images": {"large": 5}}, {"images": [{"large": 7}]},
        {"store": ["x"]}, {"features": {"a": [1]}},
        {"title": ["x"]}, {"description": {"a": None}}, {"price": 10**400}, {"price": "9" * 400}, {"title": "\ud83d"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("year", DAMAGED)
def test_fields_of_another_type_count_as_missing(year, request):
    reviews, items = request.getfixturevalue(f"files_{year}")
    name = "parent_asin" if year == 2023 else "asin"
    for damage in DAMAGED[year]:
        line = {name: "B03", "brand": "Sound"} | damage
        write_lines(items, [repr(line) if year == 2014 else json.dumps(line)])
        catalogue = read(year, reviews, items).catalogue
        assert catalogue.item_ids == ["B03", "B01", "B02"], damage
        image = None if catalogue.images is None else catalogue.images[0]
        assert image is None and catalogue.fields.column("title").to_pylist()[0] in (None, "x", "?"), damage


def test_metadata_as_a_table_of_text_are_refused_with_what_to_write_instead(files_2023, tmp_path):
    datasets.Dataset.from_list([{"parent_asin": "B01", "features": ["Lasts long"]}]).to_csv(tmp_path / "meta.csv")
    with pytest.raises(ValueError, match=r"meta.csv' is a table of text, .* with Dataset.to_json or Dataset.to_parq"):
        read(2023, files_2023[0], tmp_path / "meta.csv")


def test_a_time_beyond_all_counting_is_named(files_2023):
    with open(files_2023[0], "a") as file:
        file.write(json.dumps(review_2023("ann", "B01", 10**30, 5.0)) + "\n")
    with pytest.raises(ValueError, match=r"All_Beauty.jsonl', line 4 has timestamp='1000.*000'; a time fits into 64"):
        read(2023, *files_2023)


def test_metadata_may_say_that_a_field_is_no_number(files_2018):
    with gzip.open(files_2018[1], "at") as file:
        file.write('{"asin": "B03", "title": NaN, "description": NaN, "category": NaN, "brand": NaN, "price": NaN}\n')
    catalogue = read(2018, *files_2018).catalogue
    assert catalogue.item_ids[2] == "B03" and catalogue.texts()[2] == catalogue.titles()[2] == ""


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (0, '{"reviewerID": "x", "asin": "B01"', r"reviews_Beauty_5.json.gz', line 4 is not JSON"),
        (0, '{"reviewerID": "x", "asin": "B01", "overall": 5.0}', r"line 4 has no field 'unixReviewTime', only revi"),
        (0, '{"reviewerID": "x", "asin": null, "overall": 5.0, "unixReviewTime": 1}', r"line 4 has asin=None; an id"),
        (
            0,
            '{"reviewerID": "x", "asin": "B", "overall": 5.0, "unixReviewTime": "1"}',
            r"line 4 has unixReviewTime='1'",
        ),
        (0, "[1]", r"line 4 holds list, not a JSON object"),
        (
            1,
            "{'asin': 'B03', 'title': __import__('os').getcwd()}",
            r"meta_Beauty.json.gz', line 4 is neither JSON nor",
        ),
        (1, "{'asin': 'B03', 'title': 'never ends}", r"line 4 is neither JSON nor a Python literal"),
        (1, "{'title': 'no id'}", r"line 4 has no field 'asin', only title"),
    ],
)
def test_bad_lines_are_named(files_2014, file, line, message):
    lines = gzip.open(files_2014[file], "rt").read().splitlines()
    with gzip.open(files_2014[file], "wt") as damaged:
        damaged.write("\n".join([*lines, line]))
    with pytest.raises(ValueError, match=message):
        read(2014, *files_2014)


def test_a_download_that_broke_off_and_a_wrong_pair_are_named(files_2014, tmp_path):
    reviews, items = files_2014
    other = write_lines(tmp_path / "meta_Toys.json.gz", [repr({"asin": "T1"})])
    with pytest.raises(ValueError, match=r"meta_Toys.json.gz' describes no item of the interactions.*like 'B01'"):
        read(2014, reviews, other)
    (tmp_path / "meta_Toys.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"meta_Toys.parquet' cannot be read \(.*\); correct the file, or download"):
        read(2014, reviews, tmp_path / "meta_Toys.parquet")
    with pytest.raises(FileNotFoundError, match="meta_Nowhere.json.gz' does not exist"):
        read(2014, reviews, tmp_path / "meta_Nowhere.json.gz")
    whole = open(reviews, "rb").read()
    with open(reviews, "wb") as file:
        file.write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"reviews_Beauty_5.json.gz' is damaged after line"):
        read(2014, reviews, items)
