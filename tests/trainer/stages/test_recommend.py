"""Recommendations for many users: from files and datasets, into files that keep the users' ids."""

import json

import pandas as pd
import pytest

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.stages import recommend
from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor


@pytest.fixture(scope="module")
def recommender(tiny_run):
    directory = tiny_run / "recommender"
    return MMESIDForSequentialRecommendation.from_pretrained(directory), MMESIDProcessor.from_pretrained(directory)


@pytest.fixture
def run(tiny_run, capsys):
    def run(*flags) -> str:
        recommend.main(["--model_dir", str(tiny_run / "recommender"), "--use_cpu", "true", *map(str, flags)])
        return capsys.readouterr().out

    return run


def test_the_users_of_a_prepared_dataset_get_what_comes_after_their_last_item(run, recommender, tiny_run, tmp_path):
    model, processor = recommender
    sequences = PreparedDataset.load(tiny_run / "prepared").sequences("test")
    users = [[*user["history"], user["target"]] for user in map(sequences.__getitem__, range(len(sequences)))]
    expected = processor.convert_rows_to_item_ids(model.recommend(users, top_k=3).items)
    flags = "--prepared_dir", tiny_run / "prepared", "--top_k", 3, "--return_contributions", "true"
    for name in ("new/out.parquet", "new/out.jsonl"):
        # In parts, the last of them smaller.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recommend, "USERS_AT_ONCE", 64)
            assert run(*flags, "--output_file", tmp_path / name).startswith(f"recommend: wrote {len(users)} users to")
        if name.endswith("parquet"):
            table = pd.read_parquet(tmp_path / name).to_dict("records")
        else:
            table = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert [user["user_id"] for user in table] == sequences.user_ids
        assert [[item["item_id"] for item in user["recommendations"]] for user in table] == expected
        for item in table[7]["recommendations"]:
            assert sum(item["contributions"].values()) == pytest.approx(item["score"], abs=1e-4)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.jsonl", "out.parquet"]


def test_unknown_items_are_skipped_where_asked_and_every_user_keeps_a_line(run, recommender, tmp_path):
    _, processor = recommender
    path = tmp_path / "users.jsonl"
    known = processor.item_ids[:2]
    lines = {"user_id": 1, "history": known}, {"user_id": 2, "history": ["new"]}, ["new", *known]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match="users.jsonl', line 2 has item id 'new'"):
        run("--histories_file", path)
    flags = "--histories_file", path, "--on_unknown", "skip", "--top_k", 2
    users = [json.loads(line) for line in run(*flags, "--json").splitlines()]
    assert [user["user_id"] for user in users] == ["1", "2", None]
    assert [len(user["recommendations"]) for user in users] == [2, 0, 2]
    assert users[0]["recommendations"][0].keys() == {"item_id", "title", "score"}
    assert [item["item_id"] for item in users[0]["recommendations"]] == [
        item["item_id"] for item in users[2]["recommendations"]
    ]
    summary = json.loads(run(*flags, "--json", "--output_file", tmp_path / "out.jsonl"))
    assert summary == {
        "output_file": str(tmp_path / "out.jsonl"), "users": 3, "users_without_recommendations": 1, "unknown_items": 1
    }  # fmt: skip
    printed = run(*flags)
    assert "\n2, after nothing that is known:\n" in printed and printed.count(processor.titles[1]) == 2


def test_a_run_that_fails_leaves_the_earlier_file(run, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "out.parquet").write_text("earlier")
    monkeypatch.setattr(recommend, "recommended", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--prepared_dir", tiny_run / "prepared", "--output_file", tmp_path / "out.parquet")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_a_title_cannot_write_to_the_terminal_what_it_likes(capsys, recommender):
    _, processor = recommender
    item = {"item_id": "a\x1b[31m", "title": "red\x1b[2J\nnew line", "score": 1.0}
    recommend.print_users([{"user_id": "u\x07", "recommendations": [item]}], [pd.array([1]).to_numpy()], processor)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and len(printed.splitlines()) == 3
