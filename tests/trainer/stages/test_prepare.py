"""The prepare stage from its flags to its files, and what is left when it fails."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from tqdm.auto import tqdm

import mmesid
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.table_files import parse_location
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages import sasrec
from mmesid.trainer.stages.prepare import main
from modeling_mmesid.checkpoints import file_digest

from ..data.pictures import png


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
    assert set(first) == {*data_files, "README.md", "companions.json", "record.json"}
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
    assert items.features == data.items().features and items["title"][:] == data.titles[1:]
    for loaded, read in zip(items["image"], data.items()["image"], strict=True):
        assert (loaded is None) == (read is None) and (loaded is None or loaded.tobytes() == read.tobytes())
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


def test_a_card_tells_the_language_that_is_known(folder, tmp_path):
    flags = ["--source", "sequences", "--source_dir", str(folder), "--output_dir", str(tmp_path / "prepared")]
    for further, language in (([], None), (["--language", "de"], "de")):
        main([*flags, *further])
        assert DatasetCard.load(tmp_path / "prepared" / "README.md").data.language == language
    synthetic(tmp_path / "synthetic")
    assert DatasetCard.load(tmp_path / "synthetic" / "README.md").data.language == "en"
    with pytest.raises(ValueError, match="language is 'German'; give its code of two or three letters"):
        main([*flags, "--language", "German"])


def test_bad_input_leaves_earlier_outputs_untouched(folder, tmp_path):
    flags = ["--source", "sequences", "--source_dir", str(folder), "--output_dir", str(tmp_path / "prepared")]
    main(flags)
    before = digests(tmp_path / "prepared")
    (folder / "sequences.txt").write_text("u 1 1 1\n")
    (folder / "items.jsonl").write_text('{"item": 1, "title": "A", "image": "no.png"}\n')
    with pytest.raises(ValueError, match=r"image of item '1' cannot be read \('.*no.png'"):
        main(flags)
    assert digests(tmp_path / "prepared") == before


def test_a_source_is_told_where_its_data_are_and_nothing_else(folder, tmp_path):
    with pytest.raises(ValueError, match="`--source sequences` needs source_dir; see"):
        main(["--source", "sequences", "--output_dir", str(tmp_path / "prepared")])
    with pytest.raises(ValueError, match="`--source synthetic` has no use for source_dir, got '.*folder'"):
        synthetic(tmp_path / "prepared", "--source_dir", str(folder))
    for flag in ("image_dir", "licence", "source_name", "text_fields"):
        with pytest.raises(ValueError, match=f"`--source synthetic` has no use for {flag}, got .*; leave it out"):
            synthetic(tmp_path / "prepared", f"--{flag}", "x")
    for flags, message in {
        ("--columns", "user_id=u"): r"`--source sequences` has no use for columns, got \['user_id=u'\]",
        ("--item_fields", "title=name"): "item_fields has no 'title'; name columns for item_id, image",
        ("--item_fields", "titel=name"): "item_fields has no 'titel'; name columns for item_id, title, ",
        ("--item_fields", "name"): "--item_fields takes ours=theirs, for example item_id=sku, got 'name'; correct it",
    }.items():
        with pytest.raises(ValueError, match=message):
            main(["--source", "sequences", "--source_dir", str(folder), "--output_dir", str(tmp_path / "p"), *flags])
    with pytest.raises(FileNotFoundError, match="'.*nowhere' does not exist"):
        main(["--source", "sequences", "--source_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "p")])


def test_a_mistyped_path_is_named_where_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    def unreachable(*arguments, **settings):
        raise httpx2.ConnectError("Connection refused")

    flags = ["--source", "tabular", "--interactions", "ordrs", "--output_dir", str(tmp_path / "prepared")]
    monkeypatch.setattr("mmesid.trainer.stages.prepare.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("mmesid.trainer.stages.prepare.HfApi.dataset_info", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'ordrs' is not on this machine, .* \(Connection refused\); correct"):
        main(flags)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("me/shop", ("me/shop", None, "train", None)),
        ("me/shop:orders@v1[all]", ("me/shop", "orders", "all", "v1")),
        ("me/shop@refs/pr/1[train[:10%]]", ("me/shop", None, "train[:10%]", "refs/pr/1")),
        ("hf://datasets/me/shop@v1/orders.csv", ("hf://datasets/me/shop@v1/orders.csv", None, "train", None)),
        ("{folder}", ("{folder}", None, "train", None)),
        ("{folder}:orders[all]", ("{folder}", "orders", "all", None)),
        ("a@b:c/orders.csv.gz", ("a@b:c/orders.csv.gz", None, "train", None)),
        *((wrong, None) for wrong in ("me/shop@v1:a", "me/shop:", "me/shop[]", "orders.csv[all]", "/me@home/shop")),
    ],
)  # fmt: skip
def test_a_location_is_a_file_or_what_load_dataset_is_told(tmp_path, location, expected):
    folder = tmp_path / "me@home:1"
    folder.mkdir()
    if expected is None:
        with pytest.raises(ValueError, match="is neither on this machine nor of the form owner/name:config@revision"):
            parse_location(location)
    else:
        path, *others = expected
        found = parse_location(location.format(folder=folder))
        assert (found.path, found.config, found.split, found.revision) == (path.format(folder=folder), *others)


@pytest.fixture
def shop(tmp_path):
    """Orders of 12 users over 60 days, and ten products."""
    rng = np.random.default_rng(0)
    lines = [
        f"u{user},{rng.integers(10)},{rng.integers(60)},{rng.integers(1, 6)}" for user in range(12) for _ in range(9)
    ]
    (tmp_path / "orders.csv").write_text("\n".join(["user_id,item_id,timestamp,stars", *lines]))
    write_products(tmp_path, {})
    return tmp_path


def write_products(folder, images: dict[int, str]) -> None:
    products = [{"item_id": item, "title": f"Item {item}", "image": images.get(item)} for item in range(10)]
    (folder / "products.jsonl").write_text("".join(json.dumps(product) + "\n" for product in products))


def tabular(folder, *flags) -> PreparedDataset:
    sources = ["--interactions", str(folder / "orders.csv"), "--items", str(folder / "products.jsonl")]
    main(["--source", "tabular", *sources, "--output_dir", str(folder / "prepared"), *flags])
    return PreparedDataset.load(folder / "prepared")


def test_a_split_in_time_reaches_files_card_and_training(shop):
    data = tabular(
        shop, "--split", "global_time", "--validation_fraction", "0.2", "--test_fraction", "0.2",
        "--columns", "rating=stars", "--min_rating", "2", "--repeats", "first",
    )  # fmt: skip
    orders = [line.split(",") for line in (shop / "orders.csv").read_text().splitlines()[1:]]
    start, end = data.statistics["validation_starts"], data.statistics["test_starts"]
    assert data.statistics["split"] == "global_time" and 0 < start < end < 60
    assert data.statistics["dropped_low_ratings"] == sum(stars == "1" for *_, stars in orders)
    train, test = data.sequences("train"), data.sequences("test")
    assert len(test) == data.statistics["test_users"] > 0 and len(train) == data.statistics["training_users"] > 0
    first_day = {}
    for user, item, day, stars in orders:
        if stars != "1":
            first_day[user, item] = min(int(day), first_day.get((user, item), 60))
    for index, user in enumerate(train.user_ids):
        rows = [*train[index]["history"].tolist(), train[index]["target"]]
        assert {str(row - 1) for row in rows} == {i for (u, i), day in first_day.items() if u == user and day < start}
    for index, user in enumerate(test.user_ids):
        assert all(first_day[user, str(row - 1)] < end for row in test[index]["history"])
        assert first_day[user, str(test[index]["target"] - 1)] >= end

    card = (shop / "prepared/README.md").read_text()
    assert f"validation starts at {start} and test at {end}" in card and "split in time" in card
    assert "| min rating | 2 |" in card and "| repeats | first |" in card and "| dropped repeats |" in card
    flags = "--hidden_size 8 --num_train_epochs 1 --disable_tqdm true --use_cpu true".split()
    sasrec.main(["--prepared_dir", str(shop / "prepared"), "--output_dir", str(shop / "sasrec"), *flags])
    assert 0 <= StageRecord.load(shop / "sasrec").metrics["validation"]["ndcg@10"] <= 1


def pictures_folder(folder, **pictures):
    folder.mkdir()
    for name, colour in pictures.items():
        (folder / f"{name}.png").write_bytes(png(colour))
    return folder


def pictured(data: PreparedDataset) -> dict[str, tuple]:
    """The colours of the items that have a picture."""
    return {row["item_id"]: row["image"].getpixel((2, 2)) for row in data.items() if row["image"] is not None}


def test_pictures_called_after_items_stand_in_where_items_name_none_that_is_there(shop):
    pictures_folder(shop / "pics", **{"3": "red", "4": "blue", "5": "red", "cover": "lime"})
    write_products(shop, {3: "cover.png", 5: "http://127.0.0.1:9/5.png"})
    data = tabular(shop, "--image_dir", str(shop / "pics"))
    assert pictured(data) == {"3": (0, 255, 0), "4": (0, 0, 255), "5": (255, 0, 0)}
    assert data.statistics["image_urls_not_downloaded"] == 1 and data.statistics["missing_image"] == 7


def test_pictures_of_an_archive_are_those_called_after_items(shop):
    archive = shutil.make_archive(shop / "archive", "zip", pictures_folder(shop / "pics", **{"3": "red", "7": "lime"}))
    with pytest.raises(ValueError, match="An archive as image_dir needs image_cache_dir"):
        tabular(shop, "--image_dir", archive)
    data = tabular(shop, "--image_dir", archive, "--image_cache_dir", str(shop / "cache"))
    assert pictured(data) == {"3": (255, 0, 0), "7": (0, 255, 0)}
    pictures_folder(shop / "others", pen="red")
    with pytest.raises(ValueError, match="No picture of image_dir is called after an item: the first is 'pen.png'"):
        tabular(shop, "--image_dir", str(shop / "others"))


def test_a_folder_of_pictures_beside_a_table_that_holds_its_own_is_refused(shop):
    products = pa.table({"item_id": ["3"], "title": ["Item 3"], "image": [png("red")]})
    pq.write_table(products, shop / "products.parquet")
    pictures_folder(shop / "pics", **{"3": "blue"})
    flags = ["--items", str(shop / "products.parquet"), "--image_dir", str(shop / "pics")]
    with pytest.raises(ValueError, match=r"hold their pictures themselves, in 'image'; leave out image_dir"):
        tabular(shop, *flags)


def test_pictures_behind_urls_are_downloaded_only_when_asked_for(shop):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/3.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(png("red") if found else b"")

        def log_message(self, *arguments):
            """Requests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_products(shop, {item: f"http://127.0.0.1:{server.server_port}/{item}.png" for item in (3, 4)})

    without = tabular(shop)
    assert without.statistics["image_urls_not_downloaded"] == 2 and without.statistics["missing_image"] == 10
    with pytest.raises(ValueError, match="download_images needs image_cache_dir"):
        tabular(shop, "--download_images", "true")
    flags = ["--download_images", "true", "--image_cache_dir", str(shop / "cache")]
    refused = tabular(shop, *flags)
    assert refused.statistics["image_urls_private_address"] == 2 and refused.statistics["missing_image"] == 10
    data = tabular(shop, *flags, "--allow_private_addresses", "true")
    server.shutdown()
    server.server_close()
    assert [row["item_id"] for row in data.items() if row["image"] is not None] == ["3"]
    counted = {name: count for name, count in data.statistics.items() if name.startswith("image_urls_") and count}
    assert counted == {"image_urls_fetched": 1, "image_urls_missing": 1} and data.statistics["missing_image"] == 9


def test_what_takes_long_shows_how_far_it_is(shop, monkeypatch, capsys):
    def at_once(*arguments, **settings):
        return tqdm(*arguments, **settings | {"delay": 0, "mininterval": 0})

    for module in ("running.records", "data.sources.tabular", "data.sequences", "data.prepared"):
        monkeypatch.setattr(f"mmesid.trainer.{module}.tqdm", at_once)
    (shop / "products.csv").write_text("item_id,title\n" + "".join(f"{item},Item {item}\n" for item in range(10)))
    tabular(shop, "--items", str(shop / "products.csv"))
    shown = capsys.readouterr().err
    size = (shop / "orders.csv").stat().st_size
    for bar in (
        "orders.csv: 108 rows", "products.csv: 10 rows", f"hashing orders.csv: 100%|██████████| {size / 1000:.2f}k/",
        "building sequences: 100%|██████████| 4/4", "sequences: 100%|██████████| 3/3",
        "hashing outputs of prepare: 100%|██████████|",
    ):  # fmt: skip
        assert bar in shown, shown


def test_what_was_read_decides_whether_prepare_runs_again(shop, capsys):
    tabular(shop)
    (shop / "unrelated.csv").write_text("x")
    capsys.readouterr()
    tabular(shop)
    assert "is up to date, skipped" in capsys.readouterr().out
    with open(shop / "orders.csv", "a") as file:
        file.write("\nu1,1,59,5")
    tabular(shop)
    assert "prepare: wrote" in capsys.readouterr().out
    for split in ("train", "test"):
        (shop / "parts").mkdir(exist_ok=True)
        (shop / "orders.csv").rename(shop / f"parts/{split}.csv")
        (shop / "orders.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,{item},1\n" for item in range(4)))
    assert tabular(shop, "--interactions", str(shop / "parts")).statistics["users"] == 12
    assert tabular(shop, "--interactions", f"{shop / 'parts'}[test]").statistics["users"] == 1


def test_what_was_kept_and_dropped_is_told_with_the_first_examples(shop, capsys):
    orders = shop / "orders.csv"
    orders.write_text(orders.read_text() + "\nlonely,1,3,5\n,2,3,5\nu0,3,soon,5")
    write_products(shop, {3: "http://127.0.0.1:9/3.png"})
    with pytest.raises(ValueError, match="orders.csv', row 110 has user_id=''; .*set on_bad_row to 'skip'"):
        tabular(shop)
    data = tabular(shop, "--on_bad_row", "skip", "--columns", "rating=stars", "--min_rating", "2")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    low = sum(line.endswith(",1") for line in orders.read_text().splitlines())
    kept = data.statistics["interactions"]
    gone = low + data.statistics["dropped_duplicates"] + data.statistics["dropped_repeats"] + 1
    assert f"kept: 12 of 13 users, 10 of 10 items, {kept} of {kept + gone} interactions" in lines
    assert "dropped users: 1 too short for the split" in lines
    assert f"dropped interactions: {low} with low ratings" in " ".join(lines)
    assert "items without: 10 picture" in lines and "pictures that are not there: 1 by URL: not downloaded" in lines
    assert "skipped rows: 2 of interactions" in lines
    assert any(line.startswith("for example 'orders.csv', row 111 has timestamp='soon'; a time is") for line in lines)
    statistics = json.loads((shop / "prepared/statistics.json").read_text())
    assert statistics["skipped_interactions"] == 2 and len(statistics["skipped_examples"]) == 2
    card = (shop / "prepared/README.md").read_text()
    assert "| skipped interactions | 2 |" in card and "soon" not in card and str(shop) not in card


def test_a_picture_outside_the_folder_of_the_items_takes_its_own_folder_as_image_dir(shop):
    pictures_folder(shop / "private", x="red")
    (shop / "in").mkdir()
    for name in ("orders.csv", "products.jsonl"):
        (shop / name).rename(shop / "in" / name)
    for place in ("../private/x.png", str(shop / "private/x.png")):
        write_products(shop / "in", {3: place})
        with pytest.raises(
            ValueError, match="image of item '3' cannot be read .*outside of the items' folder; name its"
        ):
            tabular(shop / "in")
        assert pictured(tabular(shop / "in", "--image_dir", str(shop / "private"))) == {"3": (255, 0, 0)}


def test_all_data_are_for_training_where_nothing_is_to_be_measured(shop):
    data = tabular(shop, "--split", "none")
    assert "all for training" in (shop / "prepared/README.md").read_text()
    flags = "--hidden_size 8 --num_train_epochs 1 --disable_tqdm true --use_cpu true".split()
    train = ["--prepared_dir", str(shop / "prepared"), "--output_dir", str(shop / "sasrec"), *flags]
    with pytest.raises(ValueError, match="The data hold nothing out .* set --eval_strategy no"):
        sasrec.main(train)
    sasrec.main([*train, "--eval_strategy", "no"])
    record = StageRecord.load(shop / "sasrec")
    assert "validation" not in record.metrics and record.details["data"]["split"] == "none"
    with pytest.raises(ValueError, match="hold nothing out .* to measure on"):
        mmesid.evaluate(data, {"sasrec": mmesid.SASRecForSequentialRecommendation.from_pretrained(shop / "sasrec")})
