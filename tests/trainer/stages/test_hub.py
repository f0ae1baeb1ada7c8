"""The round trip: what the stages publish is loaded in fresh processes, with this package and without it."""

import contextlib
import copy
import io
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard, HfApi, ModelCard
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaModel, pipeline

from mmesid.trainer.cli import main
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.quantizer.initialization import initialize
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainer, MMRQVAETrainingArguments
from modeling_mmesid import (
    MMESIDForSequentialRecommendation,
    MMESIDProcessor,
    MMRQVAEConfig,
    MMRQVAEModel,
    SASRecForSequentialRecommendation,
)

from .conftest import TRAINING, finetune_flags


PACKAGES = ("modeling_mmesid", "mmesid")
# A family of repositories: directory and kind by name.
FAMILY = {
    "shop": ("prepared", "dataset"),
    "sasrec": ("sasrec", "sasrec"),
    "codes": ("quantizer", "quantizer"),
    "best": ("recommender", "recommender"),
}
LINKS = [f"{kind}=tester/{name}" for name, (_, kind) in FAMILY.items()]


def push(tiny_run, name, *flags):
    """Pushes one of the family and returns the commit that its main branch is at."""
    directory, kind = FAMILY[name]
    with contextlib.suppress(SystemExit):
        main(["push", "--directory", str(tiny_run / directory), "--repo_id", f"tester/{name}", *flags])
    return HfApi().repo_info(f"tester/{name}", repo_type="dataset" if kind == "dataset" else "model").sha


def card_of(hub, name):
    return hub.files(f"tester/{name}", "datasets" if name == "shop" else "models")["README.md"].decode()


@pytest.fixture(scope="module")
def published(tiny_run, on_hub):
    """The Hub with the whole family; the recommender's first push broke off, and a pull request is open on it."""
    on_hub.uploads.clear()
    for name in ("shop", "sasrec", "codes"):
        push(tiny_run, name, "--links", *LINKS)
    # The second large file breaks off; the push that follows sends what is missing, in one commit.
    on_hub.uploads_left = 1
    broken = push(tiny_run, "best", "--links", *LINKS)
    first = push(tiny_run, "best", "--links", *LINKS)
    again = push(tiny_run, "best", "--links", *LINKS)
    requested = push(tiny_run, "best", "--create_pr", "true")
    assert broken == "0" * 40 and first != broken, "the broken upload left a commit"
    assert first == again, "nothing changed, and there is a new commit"
    assert requested == first, "the pull request changed main"
    assert len(on_hub.uploads) == len(set(on_hub.uploads)), "a large file was sent twice"
    return on_hub


def test_a_repository_holds_what_the_stage_wrote_and_links_to_its_family(published):
    # One commit on main, one on the pull request.
    whole, requested = published.history("tester/best")
    assert {
        "README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "semantic_ids.parquet", "eval_results.json", "figures/singular_spectrum.png", "modeling_mmesid.py",
        "configuration_mmesid.py", "processing_mmesid.py", "pipeline_mmesid.py",
    } <= set(whole)  # fmt: skip
    assert not {"record.json", "companions.json"} & set(whole)
    assert b"Related repositories" not in requested["README.md"]
    for name in FAMILY:
        related = card_of(published, name).split("## Related repositories")[1]
        assert {other for other in FAMILY if f"[tester/{other}]" in related} == set(FAMILY) - {name}


@pytest.fixture(scope="module")
def histories(tiny_run):
    item_ids = MMESIDProcessor.from_pretrained(tiny_run / "recommender").item_ids
    return [item_ids[3:7], item_ids[20:21], item_ids[40:60]]


@pytest.fixture(scope="module")
def without_package(tmp_path_factory):
    """The interpreter of an environment that holds the libraries of this one, and this package not at all."""
    root = tmp_path_factory.mktemp("without_package")
    venv.create(root, symlinks=True, with_pip=False)
    paths = {"base": str(root), "platbase": str(root)}
    for scheme in ("purelib", "platlib"):
        target = Path(sysconfig.get_path(scheme, vars=paths))
        for path in Path(sysconfig.get_path(scheme)).iterdir():
            ours = path.name in PACKAGES or "mmesid" in path.name
            if not (ours or path.suffix == ".pth" or (target / path.name).exists()):
                (target / path.name).symlink_to(path)
    return root / "bin" / "python"


IMPORTS = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

histories = json.loads(sys.argv[1])
"""
REMOTE = """
from importlib.util import find_spec

assert [find_spec(name) for name in ("modeling_mmesid", "mmesid")] == [None] * 2
# First of all: whatever the pipeline needs, it fetches itself.
recommender = pipeline("sequential-recommendation", model="tester/best", trust_remote_code=True)
users = recommender(histories)
one = recommender(histories[0], top_k=3, batch_size=1, denied_items=[users[0][0]["item_id"]])
assert [item["item_id"] for item in one] == [item["item_id"] for item in users[0][1:4]]
for item in users[0]:
    assert set(item) == {"item_id", "title", "score", "contributions"}
    assert set(item["contributions"]) == {"id", "collaborative", "text", "text_similarity"}
    assert abs(sum(item["contributions"].values()) - item["score"]) < 1e-3

model = AutoModel.from_pretrained("tester/best", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("tester/best", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
sasrec = AutoModel.from_pretrained("tester/sasrec", trust_remote_code=True)
assert sasrec.recommend([[1, 2]], top_k=3).items.shape == (1, 3)
revised = AutoModel.from_pretrained("tester/best", revision="refs/pr/1", trust_remote_code=True)
assert revised.config.num_items == AutoConfig.from_pretrained("tester/best", trust_remote_code=True).num_items
quantizer = AutoModel.from_pretrained("tester/codes", trust_remote_code=True)
assert quantizer.encode({"text": torch.zeros(2, 24)}).codes["text"].shape == (2, 3)
"""
INSTALLED = """
import modeling_mmesid

try:
    AutoModel.from_pretrained("tester/best", local_files_only=True, cache_dir=sys.argv[2])
    raise AssertionError("a file came from nowhere")
except OSError:
    pass
model = AutoModel.from_pretrained("tester/best", cache_dir=sys.argv[2])
assert isinstance(model, modeling_mmesid.MMESIDForSequentialRecommendation)
processor = AutoProcessor.from_pretrained("tester/best", cache_dir=sys.argv[2])
rows = processor(histories)
best = model.recommend(rows)
for arguments in ({}, {"cache_dir": sys.argv[2], "local_files_only": True}, {"revision": "refs/pr/1"}):
    other = AutoModel.from_pretrained("tester/best", **arguments).recommend(rows)
    assert torch.equal(other.items, best.items) and torch.equal(other.scores, best.scores), arguments
    assert AutoConfig.from_pretrained("tester/best", **arguments).num_items == model.config.num_items
    assert AutoProcessor.from_pretrained("tester/best", **arguments)(histories) == rows
# The task is registered: no flag, and none of the checkpoint's code.
users = pipeline("sequential-recommendation", model="tester/best")(histories)
on_disk = AutoModel.from_pretrained(sys.argv[3]).recommend(rows)
assert torch.equal(on_disk.items, best.items) and torch.equal(on_disk.scores, best.scores)
"""
RESULT = """
best = model.recommend(processor(histories))
ids, scores = processor.convert_rows_to_item_ids(best.items), best.scores.tolist()
assert [[[item[key] for item in user] for user in users] for key in ("item_id", "score")] == [ids, scores]
print(json.dumps([ids, scores]))
"""


def test_every_way_in_gives_bit_equal_recommendations(
    published, tiny_run, histories, hub_environment, without_package, tmp_path
):
    # The modules of remote code are kept under HF_HOME: each way has its own. MKL's sums would depend on where in
    # memory a process happens to have its tensors. Whoever tests a checkout may have it in PYTHONPATH.
    installed = hub_environment | {"HF_HOME": str(tmp_path / "installed"), "MKL_CBWR": "COMPATIBLE"}
    remote = {name: value for name, value in installed.items() if name != "PYTHONPATH"}
    remote["HF_HOME"] = str(tmp_path / "remote")
    arguments = [json.dumps(histories), str(tmp_path / "cache"), str(tiny_run / "recommender")]
    ways = [
        # -P: no modules from the working directory.
        subprocess.Popen(
            [interpreter, "-P", "-c", IMPORTS + code + RESULT, *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for code, environment, interpreter in (
            (INSTALLED, installed, sys.executable), (REMOTE, remote, without_package)
        )
    ]  # fmt: skip
    printed = []
    for way in ways:
        stdout, stderr = way.communicate(timeout=900)
        assert way.returncode == 0, stderr
        printed.append(json.loads(stdout.splitlines()[-1]))
    assert printed[0] == printed[1]
    assert [len(ranking) for ranking in printed[0][0]] == [10, 10, 10]


def printed_by(text):
    """What every piece of Python in a text prints."""
    printed = []
    for code in re.findall("```python\n(.*?)```", text, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        printed.append(out.getvalue())
    return printed


def test_the_code_on_every_published_card_and_in_the_readme_runs_as_it_stands(published, tiny_run):
    said = {}
    for name in FAMILY:
        card = (DatasetCard if name == "shop" else ModelCard).load(f"tester/{name}")
        card.validate()
        said[name] = printed_by(card.text.split("## How to load")[1].split("\n## ")[0])
    items = pq.read_table(tiny_run / "prepared" / "items.parquet")
    (first, *_), titles = items["item_id"].to_pylist(), items["title"].to_pylist()
    assert said["shop"][0].startswith("{'user_id': ") and said["shop"][0].endswith(f"}} {titles[0]}\n")
    assert said["codes"][0].startswith(f"[{{'item_id': '{first}', 'collaborative': [")
    sasrec = SASRecForSequentialRecommendation.from_pretrained(tiny_run / "sasrec")
    assert said["sasrec"] == [f"{sasrec.recommend([[1, 2, 3]], top_k=10).items}\n"]
    model = MMESIDForSequentialRecommendation.from_pretrained(tiny_run / "recommender")
    best = model.recommend([[1, 2, 3]], top_k=10)
    expected = "".join(
        f"{score:8.3f}  {titles[row - 1]}\n" for row, score in zip(best.items[0].tolist(), best.scores[0].tolist())
    )
    assert said["best"] == [expected] * 3
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    snippet = next(part for part in readme.split("```") if part.startswith("python") and "MMESIDProcessor" in part)
    assert printed_by(f"```{snippet}```".replace("runs/quickstart/recommender", str(tiny_run / "recommender"))) == [
        expected
    ]


def test_models_and_pipelines_push_what_the_stage_left(published, tiny_run, histories, tmp_path):
    model = AutoModel.from_pretrained(tiny_run / "recommender")
    model.push_to_hub("tester/by-model", create_pr=True, commit_description="for a look")
    assert published.files("tester/by-model") == {}
    model.push_to_hub("tester/by-model")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="tester/by-saving", revision="v2")
    recommender = pipeline("sequential-recommendation", model=str(tiny_run / "recommender"))
    with pytest.raises(TypeError, match="no setting 'topk'; it has top_k, exclude_history"):
        recommender(histories, topk=3)
    recommender.push_to_hub("tester/by-pipeline", private=True, tags=["shop"])
    _, whole = published.history("tester/best")
    for name in ("by-model", "by-saving", "by-pipeline"):
        files = published.history(f"tester/{name}")[-1]
        card = whole["README.md"].replace(b"tester/best", f"tester/{name}".encode())
        assert files["README.md"] == card and f'from_pretrained("tester/{name}")'.encode() in card
        # Its results name a data set, which only `push` links to.
        assert set(files) == set(whole) - {".eval_results/mmesid.yaml"}
        assert all(files[name] == whole[name] for name in files if not name.endswith((".md", "config.json")))
    assert published.repositories["models", "tester/by-pipeline"].private
    rows = AutoProcessor.from_pretrained("tester/by-model")(histories)
    loaded = AutoModel.from_pretrained("tester/by-model")
    assert torch.equal(loaded.recommend(rows).scores, model.recommend(rows).scores)
    for name in ("sasrec", "codes"):
        AutoModel.from_pretrained(tiny_run / FAMILY[name][0]).push_to_hub(f"tester/by-model-{name}")
        whole = set(published.files(f"tester/{name}")) - {".eval_results/mmesid.yaml"}
        assert set(published.files(f"tester/by-model-{name}")) == whole


def test_other_weights_are_pushed_without_what_belongs_to_the_stage_s(published, tiny_run, histories):
    model = AutoModel.from_pretrained(tiny_run / "recommender")
    with torch.no_grad():
        model.model.items.fusion.output.bias.add_(torch.tensor([1.0, 0.0, 0.0]))
    model.push_to_hub("tester/changed")
    assert "eval_results.json" not in published.files("tester/changed")
    # What is already there stays.
    AutoProcessor.from_pretrained(tiny_run / "recommender").push_to_hub("tester/changed")
    (changed,) = pipeline("sequential-recommendation", model="tester/changed")(histories[:1])
    rows = AutoProcessor.from_pretrained("tester/changed")(histories[:1])
    assert [item["score"] for item in changed] == model.recommend(rows).scores[0].tolist()


def small_llama():
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )


def test_a_base_model_in_a_folder_is_not_pushed(on_hub, tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    local = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        tmp_path / "base", freeze_backbone=True, num_items=3
    )
    with pytest.raises(ValueError, match="names its base model by the folder"):
        local.push_to_hub("tester/local")
    with pytest.raises(ValueError, match="names its base model by the folder"):
        local.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="tester/local")
    assert ("models", "tester/local") not in on_hub.repositories


@pytest.fixture(scope="module")
def adapter(on_hub):
    """A recommender with an adapter, published on the branch v1 as its base model is on main."""
    small_llama().push_to_hub("tester/base")
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        "tester/base", num_items=80, lora={"r": 2, "target_modules": ["up_proj", "down_proj"]}
    )
    model.initialize_items(torch.arange(81))
    model.eval().push_to_hub("tester/adapter", revision="v1")
    return model


def test_an_adapter_is_published_and_loaded_with_its_base_model(adapter, on_hub, tmp_path):
    adapter.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="tester/adapter-saved")
    files = HfApi().list_repo_files("tester/adapter", revision="v1")
    assert {"adapter/adapter_model.safetensors", "modeling_mmesid.py"} <= set(files)
    assert set(files) == set(on_hub.files("tester/adapter-saved"))
    loaded = AutoModel.from_pretrained("tester/adapter", revision="v1")
    assert torch.equal(loaded.recommend([[1, 2, 3]]).scores, adapter.recommend([[1, 2, 3]]).scores)
    half = AutoModel.from_pretrained("tester/adapter", revision="v1", dtype=torch.bfloat16, device_map="cpu")
    assert half.model.backbone.dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_refused_with_a_sentence(adapter, on_hub, tmp_path):
    on_hub.repositories["models", "tester/base"].gated = True
    for name, arguments, message in (
        ("tester/adapter", {"revision": "v1", "token": False, "cache_dir": tmp_path}, "accept the terms"),
        ("tester/nothing", {}, "tester/nothing.* not a valid model identifier"),
        ("tester/adapter", {"revision": "v2"}, "v2"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            AutoModel.from_pretrained(name, **arguments)


HUB = ["--push_to_hub", "true", "--hub_token", "hf_loopback"]


def test_a_stage_publishes_during_training_what_push_sends_afterwards(published, tiny_run, tmp_path):
    flags = [*finetune_flags(tiny_run, "unused"), "--output_dir", str(tmp_path / "trained"), *HUB]
    flags += ["--hub_model_id", "tester/trained", "--hub_strategy", "checkpoint", "--hub_links", *LINKS[:1]]
    main(["finetune", *flags])
    sha = HfApi().model_info("tester/trained").sha
    main(["push", "--directory", str(tmp_path / "trained"), "--repo_id", "tester/trained"])
    assert HfApi().model_info("tester/trained").sha == sha, "`mmesid push` found something else to send"
    commits = published.history("tester/trained")
    state = {f"last-checkpoint/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
    assert all(state <= set(files) for files in commits)
    *during, last = [{name for name in files if not name.startswith("last-checkpoint/")} for files in commits]
    assert during and all(files == last for files in during)
    assert {"README.md", "modeling_mmesid.py", "semantic_ids.parquet", "eval_results.json"} <= last
    assert not any(name.endswith((".bin", ".pt", ".pth")) or "trainer_state" in name for name in last)
    # The card in the directory has the links, too.
    AutoModel.from_pretrained(tmp_path / "trained").push_to_hub("tester/by-trained")
    for name in ("trained", "by-trained"):
        assert ModelCard(card_of(published, name)).data.datasets == ["tester/shop"]


def test_pushes_of_a_quantizer_change_nothing_in_its_training(on_hub, tiny_run, tmp_path):
    torch.manual_seed(0)
    tables = {"collaborative": torch.randn(81, 8), "text": torch.randn(81, 6)}
    items = ItemTables({name: EmbeddingTable(table, torch.arange(81) > 0) for name, table in tables.items()})
    training, held_out = items.split(0.1, torch.Generator().manual_seed(0))
    sizes = {"embedding_dims": [8, 6], "num_quantizers": 2, "codebook_size": 8, "codebook_dim": 8}
    described = MMRQVAEModel(MMRQVAEConfig(modalities=list(tables), **sizes))
    initialize(described, training)
    alone = copy.deepcopy(described)
    data = PreparedDataset.load(tiny_run / "prepared")
    for model, name, data_of_items, strategy in (
        (described, "lone-codes", data, "every_save"),
        (alone, "lone-model", None, "end"),
    ):
        arguments = MMRQVAETrainingArguments(
            output_dir=str(tmp_path / name), num_train_epochs=2, use_cpu=True, disable_tqdm=True,
            metric_for_best_model="tau", push_to_hub=True, hub_model_id=f"tester/{name}", hub_token="hf_loopback",
            hub_strategy=strategy, hub_always_push=True,
        )  # fmt: skip
        trainer = MMRQVAETrainer(model, arguments, training, held_out, data_of_items)
        trainer.train()
        trainer.push_to_hub(links={"dataset": "tester/shop"})
    assert all(map(torch.equal, described.state_dict().values(), alone.state_dict().values()))
    added = {"semantic_ids.parquet", "figures/code_use.png", "figures/distances.png"}
    history = on_hub.history("tester/lone-codes")
    assert len(on_hub.history("tester/lone-model")) == 1
    assert len(history) == 3 and all(set(files) == {*on_hub.files("tester/lone-model"), *added} for files in history)
    codes = described.eval().encode(tables).codes["text"]
    for name in ("lone-model", "lone-codes"):
        card = ModelCard(card_of(on_hub, name))
        assert card.data.datasets == ["tester/shop"]
        scope = {}
        exec(card.text.split("```python")[1].split("```")[0], scope)
        assert torch.equal(scope["model"].encode(tables).codes["text"], codes)
    assert scope["semantic_ids"]["item_id"].to_pylist() == data.item_ids[1:]
    assert scope["semantic_ids"]["text"].to_pylist() == codes[1:].tolist()
    assert all(f"]({name})" in card.text for name in added if name.endswith(".png"))


def test_a_trained_encoder_is_published_with_its_card(on_hub, tiny_run, tmp_path):
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tmp_path / "encoder"), *HUB]
    flags += ["--num_train_epochs", "2", "--image_size", "32", "--hidden_size", "32"]
    main(["encoder", *flags, "--hub_model_id", "tester/encoder", *TRAINING])
    files = on_hub.files("tester/encoder")
    assert {"README.md", "eval_results.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not any(name.endswith(".bin") for name in files)
    card = files["README.md"].decode()
    assert "SYNTHETIC data" in card and "| recall@10 |" in card
    scope = {}
    exec(card.split("```python")[1].split("```")[0], scope)
    inputs = scope["processor"](text=["a red mug"], return_tensors="pt")
    assert scope["model"].get_text_features(**inputs).pooler_output.shape == (1, 32)


def test_nothing_of_the_builder_is_published(published, tiny_run, hub_environment):
    everything = published.everything()
    assert b"models/tester/best/model.safetensors" in everything
    private = [os.environ["HF_TOKEN"], os.environ["HF_HOME"], str(tiny_run), str(Path.cwd())]
    private += [f"{Path.home()}/", f"{sysconfig.get_path('purelib')}/"]
    for secret in private:
        assert secret.encode() not in everything, secret
    code = b"".join(path.read_bytes() for path in Path(sys.modules["modeling_mmesid"].__file__).parent.glob("*.py"))
    host = socket.gethostname().encode()
    # A machine may be called by a word of ours, or by letters that any weights hold.
    assert len(host) < 6 or host in code or host not in everything
