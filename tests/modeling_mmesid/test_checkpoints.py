"""What holds for the checkpoints of all models: formats, precision, pickles, the code that travels along."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModel, set_seed
from transformers.utils import logging

from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    MMRQVAEConfig,
    MMRQVAEModel,
    SASRecConfig,
    SASRecForSequentialRecommendation,
)
from modeling_mmesid.checkpoints import FORMAT_VERSION, add_companions

from .conftest import HISTORIES, NUM_ITEMS, item_tables, llama_config, new_model, settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base_model):
    """Directory with one checkpoint of each kind; the one with an adapter names its base model by a relative path."""
    root = tmp_path_factory.mktemp("saved")
    shutil.copytree(base_model, root / "base")
    set_seed(0)
    lora = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        base_model, lora={"r": 2, "target_modules": "all-linear"}, **settings()
    )
    lora.initialize_items(**item_tables())
    lora.config.base_model_name_or_path = "base"
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 16, "initializer_range": 0.5}
    models = {
        "recommender": new_model(),
        "recommender_paper": new_model(share_item_table=False, use_item_ids=False),
        "recommender_lora": lora,
        "sasrec": SASRecForSequentialRecommendation(SASRecConfig(**sizes)),
        "quantizer": MMRQVAEModel(MMRQVAEConfig(modalities=["text"], embedding_dims=[12])),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["recommender", "recommender_paper", "recommender_lora", "sasrec"])
def test_half_precision_recommends_nearly_the_same(name, dtype, saved, monkeypatch):
    monkeypatch.chdir(saved)
    full, half = AutoModel.from_pretrained(name), AutoModel.from_pretrained(name, dtype=dtype)
    assert any(parameter.dtype == dtype for parameter in half.parameters())
    # Codes, masks and counts are no floats to be rounded.
    kinds = {key: tensor.dtype for key, tensor in full.state_dict().items() if not tensor.is_floating_point()}
    assert {key: half.state_dict()[key].dtype for key in kinds} == kinds
    if name != "sasrec":
        # What `dtype` means does not depend on where the decoder's weights are.
        assert half.dtype == half.model.backbone.dtype == dtype
        tensors = half.model.items.state_dict().values()
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    best = half.recommend(HISTORIES, top_k=10)
    exact = full.recommend(HISTORIES, top_k=40 - max(map(len, HISTORIES)))
    for user in range(len(best.items)):
        score = dict(zip(exact.items[user].tolist(), exact.scores[user].tolist()))
        given = dict(zip(best.items[user].tolist(), best.scores[user].tolist()))
        spread = exact.scores[user].max() - exact.scores[user].min()
        assert max(abs(given[item] - score[item]) for item in given.keys() & score.keys()) < 0.05 * spread
        assert len(given.keys() & set(list(score)[:15])) == 10


@pytest.mark.parametrize("name", ["recommender", "sasrec", "quantizer"])
def test_a_newer_major_format_is_refused_with_a_sentence(name, tmp_path, saved):
    shutil.copytree(saved / name, tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    # A setting of a newer format need not fit this one's types.
    config |= {"format_version": FORMAT_VERSION + 1, "num_items": "many"}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has format {FORMAT_VERSION + 1}, .* reads formats up to {FORMAT_VERSION}"):
        AutoModel.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["recommender", "recommender_lora", "sasrec", "quantizer"])
def test_weights_in_a_pickle_are_refused(name, tmp_path, saved, monkeypatch):
    monkeypatch.chdir(saved)
    shutil.copytree(saved / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / name / "pytorch_model.bin")
    for arguments in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=r"holds no model\.safetensors, and weights in pickle files are not read"):
            AutoModel.from_pretrained(tmp_path / name, **arguments)


def test_a_base_model_in_a_pickle_is_refused(tmp_path, saved, monkeypatch):
    shutil.copytree(saved / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / "base" / "pytorch_model.bin")
    shutil.copytree(saved / "recommender_lora", tmp_path / "recommender_lora")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="needs its base model 'base', which cannot be loaded"):
        AutoModel.from_pretrained("recommender_lora")


CLASSES = {
    "recommender": MMESIDForSequentialRecommendation,
    "sasrec": SASRecForSequentialRecommendation,
    "quantizer": MMRQVAEModel,
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"", "damaged or of another model"),
        (b"[]", "it holds no JSON object"),
        (b"\xff{}", "damaged or of another model"),
        (b'{"a":' * 3000, "damaged or of another model"),
        (b" " * 2**24 + b"{}", "it has more than 16,777,216 bytes"),
        ({"format_version": None}, "format_version of this checkpoint is None"),
        ({"initializer_range": "wide"}, "initializer_range.*damaged or|damaged or .*initializer_range"),
        ({"initializer_range": 1e300}, r"initializer_range is 1e\+300"),
        ({"hidden_size": 10**9, "codebook_dim": 2 * 10**9, "num_items": 2 * 10**9}, "damaged or|asks for .* numbers"),
        ({"dtype": False}, "dtype is .*, which is none of torch's"),
        ({"id2label": 5}, "damaged or of another model"),
        (
            {"num_hidden_layers": 10**8, "num_quantizers": 10**8, "num_items": -1},
            r"1e\+08, and no model has more than",
        ),
    ],
)
def test_a_damaged_configuration_is_told_in_a_sentence(name, change, message, tmp_path, saved):
    shutil.copytree(saved / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    file.write_bytes(
        json.dumps(json.loads(file.read_bytes()) | change).encode() if isinstance(change, dict) else change
    )
    with pytest.raises(ValueError, match=message) as error:
        CLASSES[name].from_pretrained(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_damaged_or_of_other_sizes_are_told_in_a_sentence(tmp_path, saved):
    shutil.copytree(saved / "sasrec", tmp_path / "sasrec")
    config = json.loads((tmp_path / "sasrec" / "config.json").read_text())
    (tmp_path / "sasrec" / "config.json").write_text(json.dumps(config | {"num_items": NUM_ITEMS + 1}))
    with pytest.raises(ValueError, match="have other shapes than its configuration says .*item_embeddings"):
        SASRecForSequentialRecommendation.from_pretrained(tmp_path / "sasrec")
    (tmp_path / "sasrec" / "config.json").write_text(json.dumps(config | {"num_items": 10**9}))
    with pytest.raises(ValueError, match=r"asks for 16,0\d\d,\d\d\d,\d\d\d numbers and its weights hold \d+,\d\d\d;"):
        SASRecForSequentialRecommendation.from_pretrained(tmp_path / "sasrec")
    (tmp_path / "sasrec" / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "sasrec" / "model.safetensors").read_bytes()
    for damaged in (whole[:-100], whole[:100], b""):
        (tmp_path / "sasrec" / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="weights .*sasrec.* damaged"):
            SASRecForSequentialRecommendation.from_pretrained(tmp_path / "sasrec")


def test_an_adapter_is_loaded_into_the_backbone_or_refused(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(saved)
    model = AutoModel.from_pretrained("recommender_lora")
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in adapter:
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert config["auto_mapping"]["base_model_class"] == "LlamaModel"
    expected = model.recommend(HISTORIES).scores

    other = AutoModel.from_pretrained("recommender_lora").eval()
    assert not torch.equal(other.recommend(HISTORIES).scores, expected)
    other.load_adapter(tmp_path / "trained" / "adapter")
    assert torch.equal(other.recommend(HISTORIES).scores, expected)

    wide = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        "base", lora={"r": 4, "target_modules": "all-linear"}, **settings()
    )
    with pytest.raises(ValueError, match=r"has the shape \(2, \d+\) in .* load an adapter of the same rank"):
        wide.load_adapter(tmp_path / "trained" / "adapter")
    with pytest.raises(ValueError, match="has no adapter, so none can be loaded into it"):
        new_model().load_adapter(tmp_path / "trained" / "adapter")


def test_a_base_model_in_a_folder_is_found_from_everywhere_or_named(tmp_path, saved, monkeypatch):
    shutil.copytree(saved / "base", tmp_path / "decoder")
    monkeypatch.chdir(tmp_path)
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained("decoder", freeze_backbone=True, **settings())
    model.save_pretrained(tmp_path / "frozen")
    monkeypatch.chdir(saved)
    AutoModel.from_pretrained(tmp_path / "frozen")
    (tmp_path / "decoder").rename(tmp_path / "moved")
    with pytest.raises(OSError, match="needs its base model in the folder '.*decoder', which is not there; put it"):
        AutoModel.from_pretrained(tmp_path / "frozen")
    moved = AutoModel.from_pretrained(tmp_path / "frozen", base_model_name_or_path=str(tmp_path / "moved"))
    assert moved.config.base_model_name_or_path == str(tmp_path / "moved")
    # Another decoder of the same shape.
    torch.nn.init.normal_(next(model.model.backbone.parameters()))
    model.model.backbone.save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="The base model in '.*decoder' is another than '.*frozen' was trained on"):
        AutoModel.from_pretrained(tmp_path / "frozen")


def test_code_of_a_base_model_is_refused_and_nobody_is_asked(tmp_path, saved, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked on standard input"))
    shutil.copytree(saved / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "of_others", "auto_map": named}))
    (tmp_path / "base" / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        MMESIDForSequentialRecommendation.from_backbone_pretrained(tmp_path / "base", **settings())
    shutil.copytree(saved / "recommender_lora", tmp_path / "recommender_lora")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained("recommender_lora")


@pytest.mark.parametrize("outside", ["../sasrec/model.safetensors", "/model.safetensors", "..\\\\model.safetensors"])
def test_an_index_that_names_files_outside_the_checkpoint_is_refused(outside, tmp_path, saved):
    model = AutoModel.from_pretrained(saved / "quantizer")
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    index = tmp_path / "model.safetensors.index.json"
    assert AutoModel.from_pretrained(tmp_path).num_parameters() == model.num_parameters()
    shard = next(tmp_path.glob("*.safetensors"))
    index.write_text(index.read_text().replace(shard.name, outside))
    with pytest.raises(ValueError, match="names '.*model.safetensors', which lies outside its folder"):
        AutoModel.from_pretrained(tmp_path)


def test_companions_outside_the_folder_of_their_list_are_not_published(tmp_path):
    for name in ("stage", "published"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").touch()
    companions = {"weights": {}, "files": {"../secret": None}}
    (tmp_path / "stage" / "companions.json").write_text(json.dumps(companions))
    with pytest.raises(ValueError, match=r"names '\.\./secret', which lies outside its folder"):
        add_companions(tmp_path / "published", str(tmp_path / "stage"), "tester/thief")


def test_what_is_saved_names_its_format_and_brings_its_code(tmp_path, saved):
    AutoModel.from_pretrained(saved / "recommender").save_pretrained(tmp_path)
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


def test_a_small_checkpoint_loads_without_a_bar_and_the_library_keeps_its_own(saved, capfd):
    AutoModel.from_pretrained(saved / "sasrec")
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_mmesid.checkpoints.SLOW_BYTES", 0)
        AutoModel.from_pretrained(saved / "sasrec")
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.parametrize("cut", [False, True], ids=["one table", "parts of a wider table"])
def test_tables_that_share_their_memory_can_be_saved(cut, tmp_path):
    set_seed(0)
    config = MMESIDConfig(backbone_config=llama_config(), **settings(embedding_dims=[8, 8], num_quantizers=0))
    model = MMESIDForSequentialRecommendation(config).eval()
    wide = torch.randn(NUM_ITEMS + 1, 16)
    second = wide[:, 8:] if cut else wide[:, :8].contiguous()
    first = wide[:, :8] if cut else second
    model.initialize_items(torch.arange(NUM_ITEMS + 1), {"collaborative": first, "text": second})
    model.save_pretrained(tmp_path)
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    assert torch.equal(loaded.recommend(HISTORIES).scores, model.recommend(HISTORIES).scores)
