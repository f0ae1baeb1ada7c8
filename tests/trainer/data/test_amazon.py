"""Small files in the three forms in which Amazon reviews were published, written here with the quirks of each."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.amazon import read_amazon


REVIEWS = [("ann", "B01", 100, 5.0), ("bob", "B02", 200, 3.0), ("ann", "B03", 150, 4.0)]
THUMBNAIL = "https://images.example/I/b01._SS40_.jpg"
LARGE, HIGH = "https://images.example/I/b01._AC_.jpg", "https://images.example/I/b01.jpg"


def write_lines(path, lines):
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


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


@pytest.fixture
def files_2023(tmp_path):
    reviews = [
        {
            "rating": rating, "title": "Ok", "text": "Fine<br />", "images": [], "asin": f"{item}-red",
            "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True,
        }
        for user, item, time, rating in REVIEWS
    ]  # fmt: skip
    return (
        write_lines(tmp_path / "All_Beauty.jsonl", [json.dumps(review) for review in reviews]),
        write_lines(tmp_path / "meta_All_Beauty.jsonl.gz", [json.dumps(item) for item in items_2023()]),
    )


@pytest.mark.parametrize(("year", "picture"), [(2014, HIGH), (2018, HIGH), (2023, LARGE)])
def test_every_generation_yields_the_same_items_and_interactions(year, picture, request):
    source = read_amazon(year, *request.getfixturevalue(f"files_{year}"))
    catalogue, interactions = source.catalogue, source.interactions
    # B03 was reviewed but is not in the metadata: it has no fields; nobody reviewed B09.
    assert catalogue.item_ids == ["B01", "B02", "B03"]
    assert catalogue.fields.to_pydict() == {
        "title": ["Nail 'Lacquer' & more", None, None],
        "description": ["Shiny. Red.", 'It\'s "new"', None],
        "brand": ["OPI", None, None],
        "categories": [["Beauty", "Makeup", "Nails", "Tools"], ["Beauty"], None],
        "price": [9.99, None, None],
    }
    assert catalogue.texts() == [
        "Nail 'Lacquer' & more. OPI. Beauty, Makeup, Nails, Tools. Shiny. Red.",
        'Beauty. It\'s "new"',
        "",
    ]
    assert catalogue.images == [picture, None, None]
    read = zip(interactions.users, interactions.items, interactions.times, interactions.ratings, strict=True)
    assert [
        (interactions.user_ids[user], catalogue.item_ids[item], time, rating) for user, item, time, rating in read
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
    lines, tables = read_amazon(2023, *files_2023), read_amazon(2023, ratings, str(tmp_path / "meta.parquet"))
    assert tables.catalogue == lines.catalogue
    for name in ("users", "items", "times", "ratings"):
        assert getattr(tables.interactions, name).tolist() == getattr(lines.interactions, name).tolist()


def test_text_fields_may_be_those_of_the_metadata(files_2018):
    source = read_amazon(2018, *files_2018, text_fields=["brand", "feature"])
    assert source.catalogue.texts() == ["OPI. Lasts long", "", ""]
    with pytest.raises(ValueError, match="No item has the field 'features' that text_fields names; the items have ti"):
        read_amazon(2018, *files_2018, text_fields=["features"])


def test_metadata_may_say_that_a_field_is_no_number(files_2018):
    with gzip.open(files_2018[1], "at") as file:
        file.write('{"asin": "B03", "title": NaN, "description": NaN, "category": NaN, "brand": NaN, "price": NaN}\n')
    catalogue = read_amazon(2018, *files_2018).catalogue
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
        read_amazon(2014, *files_2014)


def test_a_download_that_broke_off_and_a_wrong_pair_are_named(files_2014, tmp_path):
    reviews, items = files_2014
    other = write_lines(tmp_path / "meta_Toys.json.gz", [repr({"asin": "T1"})])
    with pytest.raises(ValueError, match=r"meta_Toys.json.gz' describes no item of the interactions.*like 'B01'"):
        read_amazon(2014, reviews, other)
    (tmp_path / "meta_Toys.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"meta_Toys.parquet' cannot be read \(.*\); correct the file, or download"):
        read_amazon(2014, reviews, str(tmp_path / "meta_Toys.parquet"))
    with pytest.raises(FileNotFoundError, match="meta_Nowhere.json.gz' does not exist"):
        read_amazon(2014, reviews, str(tmp_path / "meta_Nowhere.json.gz"))
    whole = open(reviews, "rb").read()
    with open(reviews, "wb") as file:
        file.write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"reviews_Beauty_5.json.gz' is damaged after line"):
        read_amazon(2014, reviews, items)
