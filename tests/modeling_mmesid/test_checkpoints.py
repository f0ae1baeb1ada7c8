"""Checkpoints of earlier versions keep loading; those of later formats and those in pickles are refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import modeling_mmesid  # noqa: F401 (registers the Auto classes)


# Written by version 0.1.0 at commit c622c0f, with the recommendations that it gave.
EARLIER = Path(__file__).parent / "checkpoints_0_1"


@pytest.fixture(scope="module")
def expected():
    return json.loads((EARLIER / "expected.json").read_text())


@pytest.mark.parametrize("name", ["recommender", "recommender_paper", "sasrec"])
def test_an_earlier_checkpoint_recommends_what_it_did(name, expected):
    best = AutoModel.from_pretrained(EARLIER / name).recommend(expected["histories"], top_k=10)
    assert best.items.tolist() == expected[name]["items"]
    torch.testing.assert_close(best.scores, torch.tensor(expected[name]["scores"]), rtol=1e-4, atol=1e-5)


def test_an_earlier_adapter_recommends_what_it_did(expected, monkeypatch):
    # Its configuration names the base model `base`, found here.
    monkeypatch.chdir(EARLIER)
    best = AutoModel.from_pretrained("recommender_lora").recommend(expected["histories"], top_k=10)
    assert best.items.tolist() == expected["recommender_lora"]["items"]
    torch.testing.assert_close(best.scores, torch.tensor(expected["recommender_lora"]["scores"]), rtol=1e-4, atol=1e-5)


def test_an_earlier_quantizer_gives_the_same_semantic_ids(expected):
    embeddings = {name: torch.tensor(values) for name, values in expected["quantizer"]["embeddings"].items()}
    codes = AutoModel.from_pretrained(EARLIER / "quantizer").encode(embeddings).codes
    assert {name: values.tolist() for name, values in codes.items()} == expected["quantizer"]["codes"]


def test_an_earlier_processor_knows_its_items():
    processor = AutoProcessor.from_pretrained(EARLIER / "recommender")
    assert processor([["id-3", "id-40"]]) == [[3, 40]]
    assert processor.convert_rows_to_titles([1]) == ["part 1"]
