"""Checkpoints of earlier versions keep loading; those of later formats and those in pickles are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import modeling_mmesid  # noqa: F401 (registers the Auto classes)
from modeling_mmesid.checkpoints import FORMAT_VERSION

from .save_checkpoints import NUM_ITEMS, REMOVED, new_embeddings


# Written by version 0.1.0 at commit c622c0f, with the recommendations that it gave.
EARLIER = Path(__file__).parent / "checkpoints_0_1"
# Written by `save_checkpoints.py` at commit f234105: a quantizer with anchors, and a recommender with its codes, ID
# vectors, an item that was added after training and one that was removed.
CHANGED = Path(__file__).parent / "checkpoints_0_1_changed"


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["recommender", "recommender_paper", "recommender_lora", "sasrec"])
def test_half_precision_recommends_nearly_the_same(name, dtype, expected, monkeypatch):
    monkeypatch.chdir(EARLIER)
    full, half = AutoModel.from_pretrained(name), AutoModel.from_pretrained(name, dtype=dtype)
    assert any(parameter.dtype == dtype for parameter in half.parameters())
    # Codes, masks and counts are no floats to be rounded.
    kinds = {key: tensor.dtype for key, tensor in full.state_dict().items() if not tensor.is_floating_point()}
    assert {key: half.state_dict()[key].dtype for key in kinds} == kinds
    best = half.recommend(expected["histories"], top_k=10)
    exact = full.recommend(expected["histories"], top_k=40 - max(map(len, expected["histories"])))
    for user in range(len(best.items)):
        score = dict(zip(exact.items[user].tolist(), exact.scores[user].tolist()))
        given = dict(zip(best.items[user].tolist(), best.scores[user].tolist()))
        spread = exact.scores[user].max() - exact.scores[user].min()
        assert max(abs(given[item] - score[item]) for item in given.keys() & score.keys()) < 0.05 * spread
        assert len(given.keys() & set(list(score)[:15])) == 10


def test_an_earlier_quantizer_gives_the_same_semantic_ids(expected):
    embeddings = {name: torch.tensor(values) for name, values in expected["quantizer"]["embeddings"].items()}
    codes = AutoModel.from_pretrained(EARLIER / "quantizer").encode(embeddings).codes
    assert {name: values.tolist() for name, values in codes.items()} == expected["quantizer"]["codes"]


def test_an_earlier_quantizer_for_distances_gives_the_same_semantic_ids():
    expected = json.loads((CHANGED / "expected.json").read_text())
    quantizer = AutoModel.from_pretrained(CHANGED / "quantizer")
    assert quantizer.config.objective == "stress" and quantizer.branches["text"].anchors.shape == (10, 6)
    embeddings = {name: torch.tensor(values) for name, values in expected["embeddings"].items()}
    codes = quantizer.encode(embeddings).codes
    assert {name: values.tolist() for name, values in codes.items()} == expected["codes"]


def test_an_earlier_recommender_keeps_what_was_added_and_removed():
    expected = json.loads((CHANGED / "expected.json").read_text())
    model, processor = (kind.from_pretrained(CHANGED / "recommender") for kind in (AutoModel, AutoProcessor))
    best = model.recommend(expected["histories"], top_k=8)
    assert best.items.tolist() == expected["items"]
    torch.testing.assert_close(best.scores, torch.tensor(expected["scores"]), rtol=1e-4, atol=1e-5)

    added = NUM_ITEMS + 1
    assert processor([["id-new", "id-4"]]) == [[added, 4]]
    assert processor.convert_rows_to_titles([added]) == ["new part"]
    everything = model.recommend([[1]], top_k=NUM_ITEMS - 1, return_contributions=True)
    assert REMOVED not in everything.items and added in everything.items
    # Trained items score by their ID vectors, too.
    assert ((everything.contributions["id"] == 0) == (everything.items == added)).all()
    # The catalogue can go on changing: the quantizer still is the model's.
    rows = model.add_items(new_embeddings(), quantizer=AutoModel.from_pretrained(CHANGED / "quantizer"))
    again = model.recommend([[1]], top_k=2, allowed_items=[added, *rows])
    torch.testing.assert_close(again.scores[0, 0], again.scores[0, 1])


def test_an_earlier_processor_knows_its_items():
    processor = AutoProcessor.from_pretrained(EARLIER / "recommender")
    assert processor([["id-3", "id-40"]]) == [[3, 40]]
    assert processor.convert_rows_to_titles([1]) == ["part 1"]


@pytest.mark.parametrize("name", ["recommender", "sasrec", "quantizer"])
def test_a_newer_major_format_is_refused_with_a_sentence(name, tmp_path):
    shutil.copytree(EARLIER / name, tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    # A setting of a newer format need not fit this one's types.
    config |= {"format_version": FORMAT_VERSION + 1, "num_items": "many"}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has format {FORMAT_VERSION + 1}, .* reads formats up to {FORMAT_VERSION}"):
        AutoModel.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["recommender", "recommender_lora", "sasrec", "quantizer"])
def test_weights_in_a_pickle_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(EARLIER)
    shutil.copytree(EARLIER / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / name / "pytorch_model.bin")
    for arguments in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=r"holds no model\.safetensors, and weights in pickle files are not read"):
            AutoModel.from_pretrained(tmp_path / name, **arguments)


def test_a_base_model_in_a_pickle_is_refused(tmp_path, monkeypatch):
    shutil.copytree(EARLIER / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / "base" / "pytorch_model.bin")
    shutil.copytree(EARLIER / "recommender_lora", tmp_path / "recommender_lora")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="needs its base model 'base', which cannot be loaded"):
        AutoModel.from_pretrained("recommender_lora")


def test_what_is_saved_names_its_format_and_brings_its_code(tmp_path):
    AutoModel.from_pretrained(EARLIER / "recommender").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == FORMAT_VERSION
    assert config["auto_map"] == {
        "AutoConfig": "configuration_mmesid.MMESIDConfig",
        "AutoModel": "modeling_mmesid.MMESIDForSequentialRecommendation",
    }
    for name in [reference.split(".")[0] for reference in config["auto_map"].values()]:
        assert (tmp_path / f"{name}.py").is_file()
    # Whatever a module imports from its siblings came along.
    for path in tmp_path.glob("*.py"):
        for sibling in re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE):
            assert (tmp_path / f"{sibling}.py").is_file(), f"{path.name} needs {sibling}"
