"""A decoder in a GGUF file: loaded, kept by name and digest, merged, and refused where it is another or damaged."""

import shutil

import pytest
import torch
from transformers import LlamaModel, set_seed

from mmesid.trainer.recommender.small_llama import train_tokenizer
from modeling_mmesid import MMESIDForSequentialRecommendation, checkpointing_mmesid
from modeling_mmesid.checkpointing_mmesid import gguf_path

from ..gguf_files import write_gguf
from .conftest import HISTORIES, item_tables, llama_config, settings


pytest.importorskip("gguf", reason="GGUF files need gguf; pip install 'mmesid[gguf]'")

LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def llamas() -> list[LlamaModel]:
    """Two of the same shape."""
    set_seed(1)
    return [LlamaModel(llama_config(vocab_size=300, num_key_value_heads=1)) for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llamas):
    folder = tmp_path_factory.mktemp("packed")
    for name, llama in zip(("one", "other"), llamas, strict=True):
        write_gguf(folder / f"{name}.gguf", llama, train_tokenizer(["red lamp", "blue chair"], 300))
    return folder


def recommender(name_or_path, *, backbone_kwargs=None, **kwargs) -> MMESIDForSequentialRecommendation:
    set_seed(2)
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        name_or_path, backbone_kwargs={"gguf_file": "one.gguf"} | (backbone_kwargs or {}), **settings(), **kwargs
    )
    model.initialize_items(**item_tables())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("kwargs", [{"lora": LORA}, {"lora": LORA, "num_hidden_layers": 1}, {"freeze_backbone": True}])
def test_its_weights_are_those_of_the_file_and_checkpoints_load_again(folder, llamas, tmp_path, monkeypatch, kwargs):
    # The library would take this one.
    shutil.copy(folder / "other.gguf", tmp_path / "one.gguf")
    monkeypatch.chdir(tmp_path)
    model = recommender(folder, **kwargs)
    weights = llamas[0].state_dict()
    backbone = model.model.backbone.state_dict()
    frozen = {name.replace(".base_layer", ""): backbone[name] for name in backbone if "lora_" not in name}
    left_out = ("layers.1.",) if "num_hidden_layers" in kwargs else ()
    assert frozen.keys() == {name for name in weights if not name.startswith(left_out)}
    assert all(torch.equal(frozen[name], weights[name]) for name in frozen)
    expected = model.recommend(HISTORIES).scores
    model.save_pretrained("tuned")
    model.save_pretrained("merged", merge_backbone=True)
    tuned = MMESIDForSequentialRecommendation.from_pretrained("tuned")
    assert torch.equal(tuned.recommend(HISTORIES).scores, expected)
    merged = MMESIDForSequentialRecommendation.from_pretrained("merged")
    torch.testing.assert_close(merged.recommend(HISTORIES).scores, expected)
    assert merged.config.base_model_file is None


def test_it_is_trained_in_full(folder, tmp_path):
    model = recommender(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    assert torch.equal(loaded.recommend(HISTORIES).scores, model.recommend(HISTORIES).scores)


def test_another_file_in_its_place_is_noticed(folder, tmp_path):
    shutil.copy(folder / "one.gguf", tmp_path / "one.gguf")
    recommender(tmp_path, freeze_backbone=True).save_pretrained(tmp_path / "frozen")
    shutil.copy(folder / "other.gguf", tmp_path / "one.gguf")
    with pytest.raises(ValueError, match="is another than '.*frozen' was trained on; put that one back"):
        MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "frozen")
    (tmp_path / "one.gguf").unlink()
    with pytest.raises(OSError, match=r"needs its base model .* cannot be loaded.* no.* file named one.gguf"):
        MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "frozen")


def test_one_of_the_hub_stays_with_its_commit(folder, tmp_path):
    """As a Hub's cache keeps them: two commits, and the branch that moves from one to the other."""
    repository, commits = tmp_path / "cache" / "models--tester--packed", ("a" * 40, "b" * 40)
    (repository / "refs").mkdir(parents=True)
    for commit, name in zip(commits, ("one", "other"), strict=True):
        (repository / "snapshots" / commit).mkdir(parents=True)
        shutil.copy(folder / f"{name}.gguf", repository / "snapshots" / commit / "one.gguf")
    (repository / "refs" / "main").write_text(commits[0])
    cached = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = recommender("tester/packed", lora=LORA, backbone_kwargs=cached)
    assert (model.config.base_model_name_or_path, model.config.base_model_revision) == ("tester/packed", commits[0])
    model.save_pretrained(tmp_path / "tuned")
    (repository / "refs" / "main").write_text(commits[1])
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "tuned", **cached)
    assert torch.equal(loaded.recommend(HISTORIES).scores, model.recommend(HISTORIES).scores)


def test_what_cannot_be_read_is_told_in_a_sentence(folder, tmp_path, monkeypatch):
    whole = (folder / "one.gguf").read_bytes()
    for damaged in (whole[:-3000], whole[:3000], b"no weights"):
        (tmp_path / "one.gguf").write_bytes(damaged)
        with pytest.raises(ValueError, match="The GGUF file '.*one.gguf' is damaged or of another model"):
            recommender(tmp_path)
    with pytest.raises(ValueError, match="num_hidden_layers is 3, and '.*' has 2; give 1 to 2"):
        recommender(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match="has a quantization of its own; leave out quantization_config"):
        recommender(folder, backbone_kwargs={"quantization_config": {"load_in_4bit": True}})
    monkeypatch.setattr(checkpointing_mmesid, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs the package gguf .* not installed; pip install 'mmesid\[gguf\]'"):
        gguf_path(folder, "one.gguf")
