"""The page about a run."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mmesid.hub_cards.report import render_report
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.recommender.description import most_alike
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages import compare, report
from mmesid.trainer.stages.report import example_users, shared_codes
from modeling_mmesid import MMESIDForSequentialRecommendation


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tiny_run):
    report.main(["--run_dir", str(tiny_run), "--use_cpu", "true"])
    return (tiny_run / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_figures_pictures_and_settings_and_needs_nothing_else(page, tiny_run):
    parsed = Page(page)
    results = StageRecord.load(tiny_run / "evaluation").metrics
    for name, result in results.items():
        assert name in parsed.text and f"{result['test']['ndcg@10']:.4f}" in parsed.text
    difference = results["recommender"]["test_differences"]["sasrec"]["ndcg@10"]["difference"]
    best = max(results, key=lambda name: results[name]["validation"]["ndcg@10"])
    assert f"On validation, {best} ranks best by nDCG@10." in parsed.text
    assert "recommender is above it by" in parsed.text and f"{difference:+.4f} (" in parsed.text
    assert (
        "nDCG@10 on validation" in " ".join(parsed.text.split())
        and "how much the item is like the latest" in parsed.text
    )
    assert "synthetic" in parsed.text and "token_dropout" in parsed.text and "2 epochs" in parsed.text
    addresses = [
        value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    figures = list(tiny_run.glob("*/figures/*.png"))
    inlined = {base64.b64decode(address.partition(",")[2]) for address in addresses}
    assert len(figures) >= 8 and {path.read_bytes() for path in figures} <= inlined
    sizes = [Image.open(io.BytesIO(content)).size for content in inlined]
    # Small pictures of items beside the plots.
    assert sum(max(size) <= 96 for size in sizes) > 20 and len(page) < 2_000_000


def test_users_are_recommended_what_the_model_recommends(page, tiny_run):
    data = PreparedDataset.load(tiny_run / "prepared")
    model = MMESIDForSequentialRecommendation.from_pretrained(tiny_run / "recommender")
    users, test = example_users(model, data, 10), data.sequences("test")
    assert len(users) == 10 and users[0]["user_id"] == test.user_ids[0] and users[-1]["user_id"] == test.user_ids[-1]
    text = Page(page).text
    for user in users:
        index = test.user_ids.index(user["user_id"])
        history, target = test[index]["history"].tolist(), test[index]["target"]
        best = model.recommend([history], top_k=5)
        assert [item["row"] for item in user["recommended"]] == best.items[0].tolist()
        assert user["earlier"] + len(user["history"]) == len(history)
        assert [item["item_id"] for item in user["history"]] == [data.item_ids[row] for row in history[-5:]]
        assert user["target"]["title"] == data.titles[target]
        for item, score in zip(user["recommended"], best.scores[0].tolist()):
            assert sum(item["contributions"].values()) == pytest.approx(score, abs=1e-4) == item["score"]
            assert item["title"] in text


def test_users_for_whom_nothing_may_be_left_are_not_shown(tiny_run, monkeypatch):
    data = PreparedDataset.load(tiny_run / "prepared")
    model = MMESIDForSequentialRecommendation.from_pretrained(tiny_run / "recommender")
    counts = np.diff(data.sequences("test").offsets)
    longest = int(counts.max())
    for num_items, expected in ((longest, int((counts < longest).sum())), (int(counts.min()), 0)):
        monkeypatch.setattr(PreparedDataset, "num_items", num_items)
        users = example_users(model, data, len(counts))
        assert len(users) == expected and all(user["recommended"] for user in users)
        assert all(user["earlier"] + len(user["history"]) < num_items for user in users)


def test_a_page_that_is_up_to_date_is_not_written_again_and_three_users_are_printed(page, tiny_run, capsys):
    before = (tiny_run / "report.html").stat().st_mtime_ns
    report.main(["--run_dir", str(tiny_run), "--use_cpu", "true"])
    printed = capsys.readouterr().out
    assert (tiny_run / "report.html").stat().st_mtime_ns == before
    assert len(re.findall("^After ", printed, re.MULTILINE)) == 3 and len(re.findall(r"^  \d\. ", printed, re.M)) == 9
    with pytest.raises(FileNotFoundError, match="prepared' does not exist"):
        report.main(["--run_dir", str(tiny_run / "nothing"), "--use_cpu", "true"])
    # What an earlier run noted counts only as it was written.
    state = tiny_run / report.STATE_NAME
    noted = state.read_text(encoding="utf-8")
    for damaged in (noted[:-20], "[]", noted.replace('"history"', '"x"', 1)):
        state.write_text(damaged, encoding="utf-8")
        assert report.read_state(state) == {}
    state.write_text(noted, encoding="utf-8")
    assert len(report.read_state(state)["users"]) >= 3


def test_an_evaluation_that_was_changed_is_compared_with_nothing(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "evaluation", tmp_path / "evaluation")
    results = tmp_path / "evaluation" / "results.json"
    results.write_text(results.read_text(encoding="utf-8").replace("0.", "1.", 1), encoding="utf-8")
    flags = ["--evaluation_dirs", str(tmp_path / "evaluation"), "--output_dir", str(tmp_path / "comparison")]
    with pytest.raises(ValueError, match="results.json' is not as it was written; evaluate"):
        compare.main(["--prepared_dir", str(tiny_run / "prepared"), *flags])


def test_reasons_are_the_longest_common_beginnings():
    codes = {"text": torch.tensor([[-1, -1], [1, 2], [1, 3], [4, 5], [1, 2]]), "visual": torch.full((5, 2), -1)}
    titles = ["", "one", "two", "three", "four"]
    assert shared_codes(1, [3, 4, 2], codes, titles) == "shares all 2 codes of text with “four”"
    assert shared_codes(2, [1, 4, 3], codes, titles) == "shares its first code of text with “four”"
    assert shared_codes(1, [3], codes, titles) is None and shared_codes(1, [3], {}, titles) is None
    # Where no code is shared, the most alike by what is compared.
    vectors = {"text": torch.tensor([[0.0, 0], [1, 0], [0.6, 0.8], [0, 1], [-1, 0]]), "visual": torch.zeros(5, 2)}
    assert most_alike(1, [3, 2, 4], vectors) == ("text", 2)
    assert most_alike(1, [3, 2], {"text": torch.tensor([[0.0, 0], [1, 0], [0.2, 1], [-1, 0]])}) is None
    assert most_alike(1, [3, 4], vectors) is None and most_alike(1, [3], {}) is None


def test_what_comes_from_the_data_does_nothing_on_the_page():
    hostile = "<img src=x onerror=alert(1)>\x1b[31m\"'</style><script>x</script>"
    item = {"title": hostile, "item_id": hostile, "picture": None, "score": 1.0, "reason": hostile, "row": 1}
    item["contributions"] = {hostile: 1.0}
    user = {"user_id": hostile, "earlier": 0, "history": [item], "recommended": [item], "target": item, "largest": 1}
    metrics = dict.fromkeys(("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20", "mrr"), 0.5)
    parsed = Page(
        render_report(
            {
                "source": hostile, "synthetic": False, "statistics": {"items": 1, hostile: hostile},
                "results": {"test": {hostile: metrics}}, "intervals": {hostile: (0.1, 0.2)}, "pictures": [],
                "differences": {hostile: {"difference": 0.25, "interval": [-0.5, 1.0]}},
                "users": [user], "recommender": hostile, "sources": [hostile], "has_pictures": True, "stages": [],
                "versions": {},
            }
        )
    )  # fmt: skip
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img"}) and "\x1b" not in parsed.text
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert parsed.text.count("<script>x</script>") > 8 and "+0.2500 (-0.5000 to +1.0000)" in parsed.text
