"""The preparation of the Amazon recipe, on small files under the names, and in the format, of the published ones."""

import gzip
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from PIL import Image

from mmesid.trainer.cli import STAGES, main
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.recipes import read_recipe


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
USERS, ITEMS = 6, 5
# What the 5-core drops: a user with two reviews, and the item that nobody else reviewed.
REVIEWS = [
    (f"A{user}", f"B{item:03}", 1_400_000_000 + 10 * item + user) for user in range(USERS) for item in range(ITEMS)
]
REVIEWS += [("A9", "B000", 1_400_000_500), ("A9", "B900", 1_400_000_501)]
# A user reviews an item again, which the files of 2014 do not have: `repeats: first` keeps the earlier one.
AGAIN = [("A0", "B000", 1_400_009_000)]
WITHOUT_PICTURE, GONE, UNREADABLE = "B001", "B002", "B003"


class Shop(BaseHTTPRequestHandler):
    def do_GET(self):
        item = Path(self.path).stem
        file = io.BytesIO()
        Image.new("RGB", (6, 4), "red").save(file, "JPEG")
        self.send_response(404 if item == GONE else 200)
        self.end_headers()
        self.wfile.write(b"<html>" if item == UNREADABLE else file.getvalue())

    def log_message(self, *arguments):
        """Requests print nothing."""


@pytest.fixture
def shop_url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def review(year: int, user: str, item: str, time: int) -> dict:
    if year == 2023:
        return {
            "rating": 5.0, "title": "Good", "text": "Good<br />", "images": [], "asin": f"{item}X",
            "parent_asin": item, "user_id": user, "timestamp": 1000 * time, "helpful_vote": 0,
            "verified_purchase": True,
        }  # fmt: skip
    return {
        "reviewerID": user, "asin": item, "reviewerName": "J. \"Jo\"", "overall": 5.0, "unixReviewTime": time,
        "reviewText": "It's good", "summary": "Good", "reviewTime": "05 13, 2014",
    }  # fmt: skip


def metadata(year: int, item: str, picture: str | None) -> dict:
    title, description = f"Item {item} of 'this' &amp; that", "Soft.<br />Red."
    if year == 2014:
        own = {"imUrl": picture} if picture else {}
        return {"asin": item, "title": title, "description": description, "price": 9.5, "brand": "OPI",
                "categories": [["Shop", "Aisle"]], "salesRank": {"Shop": 3}, **own}  # fmt: skip
    if year == 2018:
        return {"asin": item, "title": title, "description": [description], "price": "$9.50", "brand": "OPI",
                "category": ["Shop", "Aisle"], "imageURL": [], "imageURLHighRes": [picture] if picture else [],
                "feature": [], "details": {}, "also_buy": []}  # fmt: skip
    image = {"thumb": None, "large": picture, "variant": "MAIN", "hi_res": None}
    return {"main_category": "Shop", "title": title, "average_rating": 4.5, "rating_number": 3, "features": [],
            "description": [description], "price": 9.5, "images": [image] if picture else [], "videos": [],
            "store": "OPI", "categories": ["Shop", "Aisle"], "details": {}, "parent_asin": item,
            "bought_together": None}  # fmt: skip


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


HUB = "McAuley-Lab/Amazon-Reviews-2023"
# What the head of the recipe says to set, by generation.
OVERRIDES = {
    2014: [],
    2018: [
        "prepare.source=amazon_2018",
        "prepare.interactions=data/amazon/Sports_and_Outdoors_5.json.gz",
        "prepare.items=data/amazon/meta_Sports_and_Outdoors.json.gz",
    ],
    2023: [
        "prepare.source=amazon_2023",
        f"prepare.interactions=hf://datasets/{HUB}/raw/review_categories/Toys_and_Games.jsonl",
        f"prepare.items=hf://datasets/{HUB}/raw/meta_categories/meta_Toys_and_Games.jsonl",
    ],
}


def test_the_head_of_the_recipe_says_these_settings():
    head = (RECIPES / "amazon.yaml").read_text(encoding="utf-8").split("output_dir: runs/amazon")[0]
    for overrides in OVERRIDES.values():
        assert all(override in head for override in overrides)


# The pictures of these tests come from this machine.
LOOPBACK = "prepare.allow_private_addresses=true"


def write_files(folder: Path, year: int, url: str) -> None:
    """The two files where the recipe looks for them, below `folder`."""
    (prepare,) = read_recipe(RECIPES / "amazon.yaml", STAGES, OVERRIDES[year])["prepare"]
    interactions, items = (
        folder / prepare[name].removeprefix(f"hf://datasets/{HUB}/") for name in ("interactions", "items")
    )
    reviews = REVIEWS if year == 2014 else REVIEWS + AGAIN
    write_lines(interactions, [json.dumps(review(year, *entry)) for entry in reviews])
    encode = repr if year == 2014 else json.dumps
    described = [*(f"B{item:03}" for item in range(ITEMS)), "B900", "B901"]
    write_lines(
        items,
        [encode(metadata(year, item, None if item == WITHOUT_PICTURE else f"{url}/{item}.jpg")) for item in described],
    )


def check(prepared: Path, year: int) -> None:
    data = PreparedDataset.load(prepared)
    assert data.item_ids == ["", *(f"B{item:03}" for item in range(ITEMS))]
    assert data.titles[1] == "Item B000 of 'this' & that"
    assert data.texts[1] == "Item B000 of 'this' & that. OPI. Shop, Aisle. Soft. Red."
    statistics = data.statistics
    assert (statistics["users"], statistics["interactions"]) == (USERS, USERS * ITEMS)
    assert (statistics["dropped_short_users"], statistics["dropped_items"]) == (1, 1)
    assert statistics["dropped_repeats"] == (year != 2014)
    assert str(year) in statistics["source"] and "Amazon" in statistics["source"]
    counted = {name: count for name, count in statistics.items() if name.startswith("image_urls_") and count}
    assert counted == {"image_urls_fetched": 2, "image_urls_missing": 1, "image_urls_unreadable": 1}
    assert [item["image"] is not None for item in data.items()] == [True, False, False, False, True]
    for split, target in (("validation", 4), ("test", 5)):
        examples = data.sequences(split)
        assert [examples[user]["target"] for user in range(USERS)] == [target] * USERS
        assert examples[0]["history"].tolist() == list(range(1, target))


@pytest.mark.parametrize("year", [2014, 2018])
def test_the_recipe_prepares_downloaded_files(year, shop_url, tmp_path, monkeypatch):
    write_files(tmp_path, year, shop_url)
    # A recipe looks for the files, and writes, below the directory it is run in.
    monkeypatch.chdir(tmp_path)
    main(["run", "amazon", "--only", "prepare", "--set", LOOPBACK, *OVERRIDES[year]])
    prepared = tmp_path / "runs" / "amazon" / "prepared"
    check(prepared, year)
    assert len(load_dataset(str(prepared), cache_dir=str(tmp_path / "cache"))["test"]) == USERS


def test_the_recipe_prepares_the_files_of_the_hub(shop_url, tmp_path, monkeypatch, on_hub):
    write_files(tmp_path / "repository", 2023, shop_url)
    api, dataset = HfApi(), {"repo_id": HUB, "repo_type": "dataset"}
    api.create_repo(**dataset, exist_ok=True)
    api.upload_folder(folder_path=tmp_path / "repository", **dataset)
    # The published repository has a loading script, which `datasets` refuses; its files are read as they are.
    script = b"raise SystemExit('a loading script ran')"
    api.upload_file(path_or_fileobj=script, path_in_repo="Amazon-Reviews-2023.py", **dataset)
    monkeypatch.chdir(tmp_path)
    main(["run", "amazon", "--only", "prepare", "--set", LOOPBACK, *OVERRIDES[2023]])
    check(tmp_path / "runs" / "amazon" / "prepared", 2023)
