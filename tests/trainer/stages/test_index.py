"""The exported index, as somebody reads it who has `datasets` and FAISS."""

import shutil

import datasets
import numpy as np
import pytest
import torch

from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages import index
from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor


HISTORIES = [[3, 4, 5], [20], [7, 7, 31, 2], [80]]


def export(model_dir, output_dir, *flags) -> datasets.Dataset:
    index.main(["--model_dir", str(model_dir), "--output_dir", str(output_dir), *flags])
    items = datasets.Dataset.from_parquet(str(output_dir / "items.parquet"), cache_dir=str(output_dir / "cache"))
    items.load_faiss_index("vector", output_dir / "items.faiss")
    return items


@pytest.fixture(scope="module")
def model(tiny_run):
    return MMESIDForSequentialRecommendation.from_pretrained(tiny_run / "recommender")


@torch.no_grad()
def users(model) -> np.ndarray:
    return model.encode_histories(HISTORIES).numpy()


def test_exact_index_ranks_as_recommend_does(tiny_run, model, tmp_path):
    items = export(tiny_run / "recommender", tmp_path / "exact")
    expected = model.recommend(HISTORIES, top_k=12, exclude_history=False)
    scores, examples = items.get_nearest_examples_batch("vector", users(model), k=12)
    np.testing.assert_allclose(scores, expected.scores.numpy(), rtol=1e-4, atol=1e-5)
    processor = MMESIDProcessor.from_pretrained(tiny_run / "recommender")
    for example, rows in zip(examples, expected.items, strict=True):
        assert example["row"] == rows.tolist()
        assert example["item_id"] == processor.convert_rows_to_item_ids(rows)
        assert example["title"] == processor.convert_rows_to_titles(rows)
    assert StageRecord.load(tmp_path / "exact").metrics == {"recall@10": 1.0}


def test_hnsw_index_finds_nearly_all_and_says_how_many(tiny_run, model, tmp_path):
    items = export(tiny_run / "recommender", tmp_path / "hnsw", "--kind", "hnsw")
    assert "HNSW" in type(items.get_index("vector").faiss_index).__name__
    assert items.get_index("vector").faiss_index.hnsw.efSearch == 128
    expected = model.recommend(HISTORIES, top_k=10, exclude_history=False).items.tolist()
    _, examples = items.get_nearest_examples_batch("vector", users(model), k=10)
    found = [len(set(rows) & set(example["row"])) / 10 for rows, example in zip(expected, examples, strict=True)]
    assert np.mean(found) > 0.9
    assert 0.9 < StageRecord.load(tmp_path / "hnsw").metrics["recall@10"] <= 1.0


def test_removed_items_are_not_indexed(tiny_run, model, tmp_path):
    best = model.recommend(HISTORIES[:1], top_k=1, exclude_history=False).items[0].tolist()
    model.model.items.removed[best] = True
    try:
        shutil.copytree(tiny_run / "recommender", tmp_path / "removed")
        model.save_pretrained(tmp_path / "removed")
        expected = model.recommend(HISTORIES, top_k=5, exclude_history=False).items.tolist()
    finally:
        model.model.items.removed[best] = False
    (tmp_path / "removed" / "record.json").unlink()
    items = export(tmp_path / "removed", tmp_path / "index")
    assert len(items) == 79 and best[0] not in items["row"]
    _, examples = items.get_nearest_examples_batch("vector", users(model), k=5)
    assert [example["row"] for example in examples] == expected


def test_without_faiss_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mmesid\[index\]'"):
        index.main(["--model_dir", str(tmp_path), "--output_dir", str(tmp_path / "index")])
