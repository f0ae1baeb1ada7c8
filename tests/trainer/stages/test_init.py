"""From two files of strangers to a recipe that runs."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from mmesid.trainer.cli import STAGES, main
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.sources.synthetic import generate_catalogue
from mmesid.trainer.recipes import plan, read_recipe
from mmesid.trainer.running.arguments import parse
from mmesid.trainer.running.files import to_flags

from ..running.test_arguments import CLASSES


@pytest.fixture(scope="module")
def shop():
    source = generate_catalogue(num_items=60, num_users=150, seed=0)
    catalogue, events = source.catalogue, source.interactions
    items = pd.DataFrame({"SKU": catalogue.item_ids, "name": catalogue.titles(), "price": 3.5})
    moments = pd.to_datetime(1_577_836_800 + 86_400 * events.times, unit="s")
    log = pd.DataFrame(
        {
            "customer": [events.user_ids[user] for user in events.users],
            "product": [catalogue.item_ids[item] for item in events.items],
            "stars": 5,
            "ordered": moments.strftime("%d/%m/%Y %H:%M"),
        }
    )
    return log, items


@pytest.fixture
def folder(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, items = shop
    log.to_csv("orders.csv", sep=";", index=False)
    items.to_csv("products.csv", index=False)
    return tmp_path


def checked(recipe: str) -> dict:
    """The recipe, every section of which its stage takes."""
    path = Path(recipe)
    content = read_recipe(path, STAGES)
    for stage, settings in plan(path, content, STAGES):
        parse(CLASSES[stage], to_flags(settings))
    return content


def test_two_files_become_a_recipe_that_runs(folder, shop, capsys):
    main(["init", "my.yaml", "--interactions", "orders.csv", "--items", "products.csv"])
    printed = capsys.readouterr().out
    assert "user_id      customer" in printed and "wrote 'my.yaml'" in printed
    recipe = checked("my.yaml")
    (prepare,) = recipe["prepare"]
    assert prepare == {
        "source": "tabular", "interactions": "orders.csv", "items": "products.csv",
        "columns": ["user_id=customer", "item_id=product", "timestamp=ordered"], "time_format": "%d/%m/%Y %H:%M",
        "item_fields": ["item_id=SKU", "title=name"], "repeats": "first", "min_interactions": 5,
    }  # fmt: skip
    assert [run["modality"] for run in recipe["embed"]] == ["collaborative", "text"]
    assert [run["modalities"] for run in recipe["finetune"]] == [["text"], []]
    assert "looks like ratings: with rating=stars" in (folder / "my.yaml").read_text(encoding="utf-8")
    main(["run", "my.yaml", "--only", "prepare"])
    data = PreparedDataset.load("runs/my/prepared")
    assert set(data.item_ids[1:]) <= set(shop[1]["SKU"]) and set(data.titles[1:]) <= set(shop[1]["name"])
    with pytest.raises(SystemExit, match="2"):
        main(["init", "my.yaml", "--interactions", "orders.csv"])
    assert "'my.yaml' exists already" in capsys.readouterr().err


def test_without_items_there_are_ids_alone(folder):
    main(["init", "ids.yml", "--interactions", "orders.csv"])
    recipe = checked("ids.yml")
    assert list(recipe) == ["output_dir", "prepare", "sasrec", "finetune", "evaluate"]
    assert recipe["finetune"][0]["modalities"] == []


def test_names_that_yaml_would_read_otherwise_stay_what_they_are(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, items = shop
    (tmp_path / "my: data # 1").mkdir()
    log.rename(columns={"customer": 'user: "id" #'}).to_csv("my: data # 1/null.csv", index=False)
    items.assign(picture=[f"https://x.test/{item}.jpg" for item in items["SKU"]]).to_csv("true.csv", index=False)
    main(["init", "my.yaml", "--interactions", "my: data # 1/null.csv", "--items", "true.csv"])
    recipe = checked("my.yaml")
    (prepare,) = recipe["prepare"]
    assert prepare["interactions"] == "my: data # 1/null.csv" and prepare["columns"][0] == 'user_id=user: "id" #'
    assert prepare["download_images"] is True and prepare["on_bad_image"] == "missing"
    assert recipe["quantize"][0]["modalities"] == ["collaborative", "text", "visual"]


def test_rows_that_cannot_be_read_are_named_in_the_recipe(folder):
    with open("orders.csv", "a", encoding="utf-8") as file:
        file.write("someone;;5;01/01/2020 00:00\n")
    main(["init", "my.yaml", "--interactions", "orders.csv", "--items", "products.csv"])
    text = (folder / "my.yaml").read_text(encoding="utf-8")
    assert "# Some rows cannot be read, for example: 'orders.csv'" in text
    assert yaml.safe_load(text)["prepare"]["on_bad_row"] == "skip"
