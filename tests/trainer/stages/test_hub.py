"""The round trip: what the stages publish is loaded in fresh processes, with this package and without it."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from modeling_mmesid import MMESIDProcessor

from .conftest import TRAINING, finetune_flags


PACKAGES = ("modeling_mmesid", "mmesid")


def run_python(code, environment, *arguments, interpreter=sys.executable):
    """Starts a process, which does not look for modules in the working directory, and returns it."""
    return subprocess.Popen(
        [interpreter, "-P", "-c", code, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


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


def printed(process):
    """The last line that a process prints, as JSON."""
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def ask(environment, path, method="GET"):
    request = urllib.request.Request(f"{environment['HF_ENDPOINT']}/_test/{path}", method=method)
    with urllib.request.urlopen(request) as response:
        return response.read()


@pytest.fixture(scope="module")
def histories(tiny_run):
    item_ids = MMESIDProcessor.from_pretrained(tiny_run / "recommender").item_ids
    return [item_ids[3:7], item_ids[20:21], item_ids[40:60]]


PUSH = """
import json, sys, urllib.request
from huggingface_hub import HfApi, constants, hf_hub_download
from mmesid.trainer.cli import main

root, api = sys.argv[1], HfApi()


def push(directory, name, *flags):
    try:
        main(["push", "--directory", f"{root}/{directory}", "--repo_id", f"tester/{name}", *flags])
    except SystemExit as stop:
        assert stop.code == 2
    return api.repo_info(f"tester/{name}", repo_type="dataset" if directory == "prepared" else "model").sha


links = ["--links", "dataset=tester/shop", "sasrec=tester/sasrec", "quantizer=tester/codes", "recommender=tester/best"]
push("prepared", "shop", *links)
push("sasrec", "sasrec", *links)
push("quantizer", "codes", *links)

# The second large file breaks off; the push that follows sends what is missing, in one commit.
request = urllib.request.Request(f"{constants.ENDPOINT}/_test/break_uploads/1", method="POST")
urllib.request.urlopen(request)
broken = push("recommender", "best", *links)
first = push("recommender", "best", *links)
again = push("recommender", "best", *links)

# A pull request leaves main alone and can be loaded by its name.
requested = push("recommender", "best", "--create_pr", "true")
card = hf_hub_download("tester/best", "README.md", revision="refs/pr/1")
related = {
    name: open(hf_hub_download(f"tester/{name}", "README.md", repo_type="dataset" if name == "shop" else None)).read()
    for name in ("shop", "sasrec", "codes", "best")
}
print(json.dumps([broken, first, again, requested, "Related repositories" in open(card).read(), related]))
"""


@pytest.fixture(scope="module")
def published(tiny_run, hub_environment):
    return printed(run_python(PUSH, hub_environment, str(tiny_run)))


def test_pushing_breaking_off_pushing_again_and_asking_for_a_pull(published, hub_environment):
    broken, first, again, requested, links_in_pull_request, cards = published
    assert broken == "0" * 40 and first != broken, "the broken upload left a commit"
    assert first == again, "nothing changed, and there is a new commit"
    assert requested == first, "the pull request changed main"
    assert not links_in_pull_request
    for name, card in cards.items():
        related = card.split("Related repositories")[1]
        assert {other for other in cards if f"[tester/{other}]" in related} == set(cards) - {name}
    uploads = json.loads(ask(hub_environment, "uploads"))
    assert len(uploads) == len(set(uploads)), "a large file was sent twice"
    # One commit on main, one on the pull request.
    commits = json.loads(ask(hub_environment, "history/models/tester/best"))
    assert len(commits) == 2
    assert {
        "README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "semantic_ids.parquet", "eval_results.json", "figures/singular_spectrum.png", "modeling_mmesid.py",
        "configuration_mmesid.py", "processing_mmesid.py", "pipeline_mmesid.py",
    } <= set(commits[0])  # fmt: skip


TOP_10 = """
best = model.recommend(processor(histories))
print(json.dumps([processor.convert_rows_to_item_ids(best.items), best.scores.tolist()]))
"""
IMPORTS = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

histories = json.loads(sys.argv[1])
"""
REMOTE = """
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

assert [find_spec(name) for name in ("modeling_mmesid", "mmesid")] == [None] * 2
try:
    version("mmesid")
    raise AssertionError("this environment has the package")
except PackageNotFoundError:
    pass
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
PIPELINE = """
recommender = pipeline("sequential-recommendation", model="tester/best", trust_remote_code=True)
users = recommender(histories)
one = recommender(histories[0], top_k=3, batch_size=1, denied_items=[users[0][0]["item_id"]])
assert [item["item_id"] for item in one] == [item["item_id"] for item in users[0][1:4]]
for item in users[0]:
    assert set(item) == {"item_id", "title", "score", "contributions"}
    assert set(item["contributions"]) == {"id", "collaborative", "text"}
    assert abs(sum(item["contributions"].values()) - item["score"]) < 1e-3
print(json.dumps([[[item[key] for item in user] for user in users] for key in ("item_id", "score")]))
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
for arguments in (
    {"cache_dir": sys.argv[2], "local_files_only": True},
    {"revision": "refs/pr/1"},
    {"device_map": "cpu"},
    {"dtype": torch.float32},
):
    other = AutoModel.from_pretrained("tester/best", **arguments).recommend(rows)
    assert torch.equal(other.items, best.items) and torch.equal(other.scores, best.scores), arguments
for arguments in (
    {},
    {"cache_dir": sys.argv[2], "local_files_only": True},
    {"revision": "refs/pr/1"},
):
    assert AutoConfig.from_pretrained("tester/best", **arguments).num_items == model.config.num_items
    assert AutoProcessor.from_pretrained("tester/best", **arguments)(histories) == rows
assert AutoModel.from_pretrained("tester/best", dtype=torch.bfloat16).dtype == torch.bfloat16
# The task is registered: no flag, and none of the checkpoint's code.
recommended = pipeline("sequential-recommendation", model="tester/best")(histories)
assert [[item["score"] for item in user] for user in recommended] == best.scores.tolist()
on_disk = AutoModel.from_pretrained(sys.argv[3]).recommend(rows)
assert torch.equal(on_disk.items, best.items) and torch.equal(on_disk.scores, best.scores)
"""


def test_three_ways_in_give_bit_equal_recommendations(
    published, tiny_run, histories, hub_environment, without_package, tmp_path
):
    # The modules of remote code are kept under HF_HOME: each way has its own. MKL's sums would depend on where in
    # memory a process happens to have its tensors.
    environments = [
        hub_environment | {"HF_HOME": str(tmp_path / name), "MKL_CBWR": "COMPATIBLE"} for name in ("a", "b", "c")
    ]
    given = json.dumps(histories)
    disk = str(tiny_run / "recommender")
    # Whoever tests a checkout may have it there.
    bare = [{name: value for name, value in one.items() if name != "PYTHONPATH"} for one in environments]
    ways = [
        run_python(IMPORTS + INSTALLED + TOP_10, environments[0], given, str(tmp_path / "cache"), disk),
        run_python(IMPORTS + REMOTE + TOP_10, bare[1], given, interpreter=without_package),
        run_python(IMPORTS + PIPELINE, bare[2], given, interpreter=without_package),
    ]
    installed, remote, through_pipeline = [printed(way) for way in ways]
    assert installed == remote
    assert installed == through_pipeline
    assert [len(ranking) for ranking in installed[0]] == [10, 10, 10]


CARDS = """
import contextlib, io, json, re
from huggingface_hub import DatasetCard, ModelCard

printed = {}
for name in ("shop", "sasrec", "codes", "best"):
    card = (DatasetCard if name == "shop" else ModelCard).load(f"tester/{name}")
    card.validate()
    section = card.text.split("## How to load")[1].split("\\n## ")[0]
    printed[name] = []
    for code in re.findall("```python\\n(.*?)```", section, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        printed[name].append(out.getvalue())
print(json.dumps(printed))
"""


def test_the_code_on_every_published_card_runs_as_it_stands(published, tiny_run, hub_environment, tmp_path):
    said = printed(run_python(CARDS, hub_environment | {"HF_HOME": str(tmp_path)}))
    titles = pq.read_table(tiny_run / "prepared" / "items.parquet")["title"].to_pylist()
    assert said["shop"][0].rstrip().endswith(titles[0])
    assert said["sasrec"][0].startswith("tensor([[") and "'item_id': 'sku000000'" in said["codes"][0]
    three_ways = said["best"]
    assert len(three_ways) == 3 and len(set(three_ways)) == 1
    ranking = three_ways[0].splitlines()
    assert len(ranking) == 10 and all(line.split("  ")[-1] in titles for line in ranking)


BY_THE_LIBRARY = """
import json, sys
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaModel, pipeline
from modeling_mmesid import MMESIDForSequentialRecommendation

root, api = sys.argv[1], HfApi()
model = AutoModel.from_pretrained(f"{root}/recommender")
model.push_to_hub("tester/by-model", create_pr=True)
assert "README.md" not in api.list_repo_files("tester/by-model")
model.push_to_hub("tester/by-model", links={"dataset": "tester/shop", "sasrec": "tester/sasrec"})
recommender = pipeline("sequential-recommendation", model=f"{root}/recommender")
recommender.push_to_hub("tester/by-pipeline", links={"dataset": "tester/shop"})
for name, linked in (("by-model", ["shop", "sasrec"]), ("by-pipeline", ["shop"])):
    card = ModelCard.load(f"tester/{name}")
    assert card.data.datasets == ["tester/shop"]
    related = card.text.split("## Related repositories")[1].split("## ")[0]
    assert related.count("https://huggingface.co/") == len(linked)
    assert all(f"[tester/{other}](https://huggingface.co/" in related for other in linked)
model.save_pretrained(f"{sys.argv[2]}/saved", push_to_hub=True, repo_id="tester/by-saving")
for name in ("sasrec", "quantizer"):
    AutoModel.from_pretrained(f"{root}/{name}").push_to_hub(f"tester/by-model-{name}")
files = {
    name: sorted(api.list_repo_files(f"tester/{name}"))
    for name in ("by-model", "by-pipeline", "by-saving", "by-model-sasrec", "by-model-quantizer")
}
results = [open(hf_hub_download(f"tester/{name}", "eval_results.json")).read() for name in ("by-model", "best")]
assert results[0] == results[1]
text = ModelCard.load("tester/by-model").text
assert 'from_pretrained("tester/by-model")' in text and "this/repository" not in text
rows = AutoProcessor.from_pretrained("tester/by-model")([json.loads(sys.argv[3])])
assert torch.equal(AutoModel.from_pretrained("tester/by-model").recommend(rows).scores, model.recommend(rows).scores)

# Other weights are not what the card measured; what is already there stays.
with torch.no_grad():
    model.model.items.fusion.output.bias.add_(torch.tensor([1.0, 0.0, 0.0]))
model.push_to_hub("tester/changed")
files["changed"] = api.list_repo_files("tester/changed")
AutoProcessor.from_pretrained(f"{root}/recommender").push_to_hub("tester/changed")
changed = pipeline("sequential-recommendation", model="tester/changed")(json.loads(sys.argv[3]))
assert [item["score"] for item in changed] == model.recommend(rows).scores[0].tolist()

base = f"{sys.argv[2]}/base"
LlamaModel(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
).save_pretrained(base)
local = MMESIDForSequentialRecommendation.from_backbone_pretrained(base, freeze_backbone=True, num_items=3)
try:
    local.push_to_hub("tester/local")
except ValueError as error:
    files["local"] = api.list_repo_files("tester/local")
    print(json.dumps([files, str(error)]))
"""


def test_models_and_pipelines_push_what_the_stage_left(published, tiny_run, histories, hub_environment, tmp_path):
    arguments = [str(tiny_run), str(tmp_path), json.dumps(histories[0])]
    files, refusal = printed(run_python(BY_THE_LIBRARY, hub_environment, *arguments))
    (whole, *_), (sasrec,), (quantizer,) = [
        json.loads(ask(hub_environment, f"history/models/tester/{name}")) for name in ("best", "sasrec", "codes")
    ]
    assert {"semantic_ids.parquet", "eval_results.json", "figures/fusion_weights.png", "tokenizer.json"} <= set(whole)
    assert files["by-model"] == files["by-pipeline"] == files["by-saving"] == whole
    assert files["by-model-sasrec"] == sasrec and files["by-model-quantizer"] == quantizer
    assert "eval_results.json" not in files["changed"] and "model.safetensors" in files["changed"]
    assert files["local"] == [] and "names its base model by the folder" in refusal


ADAPTER = """
import json, sys, urllib.request
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, LlamaConfig, LlamaModel, pipeline
from transformers.utils import is_bitsandbytes_available
from modeling_mmesid import MMESIDForSequentialRecommendation


def refused(name, **arguments):
    try:
        AutoModel.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        return str(error)


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
LlamaModel(config).push_to_hub("tester/base")
model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
    "tester/base", num_items=80, lora={"r": 2, "target_modules": ["up_proj", "down_proj"]}
)
model.initialize_items(torch.arange(81))
model.eval().push_to_hub("tester/adapter", revision="v1")
best = model.recommend([[1, 2, 3]])
model.save_pretrained(f"{sys.argv[1]}/saved", push_to_hub=True, repo_id="tester/adapter-saved")
assert set(HfApi().list_repo_files("tester/adapter-saved")) == set(
    HfApi().list_repo_files("tester/adapter", revision="v1")
)
loaded = AutoModel.from_pretrained("tester/adapter", revision="v1")
assert torch.equal(loaded.recommend([[1, 2, 3]]).scores, best.scores)
assert {"adapter/adapter_model.safetensors", "modeling_mmesid.py"} <= set(
    HfApi().list_repo_files("tester/adapter", revision="v1")
)
assert AutoModel.from_pretrained(
    "tester/adapter", revision="v1", dtype=torch.bfloat16, device_map="cpu"
).model.backbone.dtype == torch.bfloat16
if is_bitsandbytes_available():
    quantized = AutoModel.from_pretrained(
        "tester/adapter", revision="v1", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert "4bit" in type(quantized.model.backbone.layers[0].self_attn.q_proj).__name__.lower()
    assert quantized.recommend([[1, 2, 3]]).items.shape == (1, 10)

# Model, processor and pipeline as one, through the pipeline's own method.
recommender = pipeline("sequential-recommendation", model="tester/best")
recommender.push_to_hub("tester/pipeline")
assert AutoProcessor.from_pretrained("tester/pipeline").item_ids == recommender.processor.item_ids

# Weights in a pickle alone.
api = HfApi()
api.create_repo("tester/pickled")
api.upload_file(repo_id="tester/pickled", path_in_repo="pytorch_model.bin", path_or_fileobj=b"pickle")
config = recommender.model.config.to_json_string().encode()
api.upload_file(repo_id="tester/pickled", path_in_repo="config.json", path_or_fileobj=config)
urllib.request.urlopen(urllib.request.Request(f"{constants.ENDPOINT}/_test/gate/models/tester/base", method="POST"))
print(json.dumps([
    refused("tester/adapter", revision="v1", token=False, cache_dir=sys.argv[1]),
    refused("tester/nothing"),
    refused("tester/adapter", revision="v2"),
    refused("tester/pickled"),
    refused("tester/best", revision="0" * 40),
]))
"""


def test_an_adapter_and_what_cannot_be_loaded(published, hub_environment, tmp_path):
    gated, missing, no_revision, pickled, empty = printed(run_python(ADAPTER, hub_environment, str(tmp_path)))
    assert "'tester/adapter' needs its base model 'tester/base'" in gated and "accept the terms" in gated
    assert "tester/nothing" in missing and "not a valid model identifier" in missing
    assert "v2" in no_revision
    assert "'tester/pickled' holds no model.safetensors, and weights in pickle files are not read" in pickled
    assert "config.json" in empty


TRAIN = """
import json, sys
from huggingface_hub import HfApi
from mmesid.trainer.cli import main

main(["finetune", *sys.argv[1:-1]])
sha = HfApi().model_info("tester/trained").sha
main(["push", "--directory", sys.argv[-1], "--repo_id", "tester/trained"])
print(json.dumps([sha, HfApi().model_info("tester/trained").sha]))
"""
LONE_TRAINER = """
import copy, json, sys
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, TrainingArguments
from modeling_mmesid import MMRQVAEConfig, MMRQVAEModel, SASRecConfig, SASRecForSequentialRecommendation
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.windows import EvaluationHistories, TrainingWindows
from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.quantizer.initialization import initialize
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainer, MMRQVAETrainingArguments
from mmesid.trainer.recommender.sasrec_trainer import SASRecTrainer

data = PreparedDataset.load(sys.argv[1])
arguments = TrainingArguments(
    sys.argv[2], num_train_epochs=1, eval_strategy="epoch", use_cpu=True, report_to="none", disable_tqdm=True,
    push_to_hub=True, hub_model_id="tester/lone", hub_strategy="end", hub_token="hf_loopback",
)
trainer = SASRecTrainer(
    SASRecForSequentialRecommendation(SASRecConfig(num_items=80, hidden_size=16)), arguments,
    train_dataset=TrainingWindows(data.sequences("train"), 50),
    eval_dataset=EvaluationHistories(data.sequences("validation")),
)
trainer.train()
assert HfApi().list_repo_files("tester/lone") == []
trainer.push_to_hub()
card = ModelCard.load("tester/lone")
measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
model = AutoModel.from_pretrained("tester/lone")
assert torch.equal(model.recommend([[1, 2]]).items, trainer.model.eval().recommend([[1, 2]]).items)

torch.manual_seed(0)
tables = {"collaborative": torch.randn(81, 8), "text": torch.randn(81, 6)}
items = ItemTables({name: EmbeddingTable(table, torch.arange(81) > 0) for name, table in tables.items()})
training, held_out = items.split(0.1, torch.Generator().manual_seed(0))
config = MMRQVAEConfig(
    modalities=list(tables), embedding_dims=[8, 6], num_quantizers=2, codebook_size=8, codebook_dim=8
)
quantizer = MMRQVAEModel(config)
initialize(quantizer, training)


def quantize(model, name, data, **hub):
    arguments = MMRQVAETrainingArguments(
        output_dir=f"{sys.argv[2]}-{name}", num_train_epochs=2, use_cpu=True,
        disable_tqdm=True, metric_for_best_model="tau", push_to_hub=True, hub_model_id=f"tester/{name}",
        hub_token="hf_loopback", **hub,
    )
    trainer = MMRQVAETrainer(model, arguments, training, held_out, data)
    trainer.train()
    trainer.push_to_hub(links={"dataset": "tester/shop"})


# Pushes that search for all semantic IDs change nothing in the training.
undescribed = copy.deepcopy(quantizer)
quantize(quantizer, "lone-codes", data, hub_strategy="every_save", hub_always_push=True)
quantize(undescribed, "lone-model", None, hub_strategy="end")
assert all(map(torch.equal, quantizer.state_dict().values(), undescribed.state_dict().values()))
expected = quantizer.eval().encode(tables).codes["text"]
for name in ("lone-codes", "lone-model"):
    card = ModelCard.load(f"tester/{name}")
    assert card.data.datasets == ["tester/shop"]
    scope = {}
    exec(card.text.split("```python")[1].split("```")[0], scope)
    assert torch.equal(scope["model"].encode(tables).codes["text"], expected)
    if name == "lone-codes":
        assert scope["semantic_ids"]["item_id"].to_pylist() == data.item_ids[1:]
        assert scope["semantic_ids"]["text"].to_pylist() == expected[1:].tolist()
        assert all(picture in card.text for picture in ("figures/code_use.png", "figures/distances.png"))
print(json.dumps([HfApi().list_repo_files("tester/lone"), measured, trainer.rank()]))
"""


def test_a_trainer_publishes_the_same_card_and_files(tiny_run, hub_environment, tmp_path):
    flags = [*finetune_flags(tiny_run, "unused"), "--output_dir", str(tmp_path / "trained"), "--push_to_hub", "true"]
    flags += ["--hub_model_id", "tester/trained", "--hub_strategy", "checkpoint", "--hub_token", "hf_loopback"]
    stage = run_python(TRAIN, hub_environment, *flags, str(tmp_path / "trained"))
    lone = run_python(LONE_TRAINER, hub_environment, str(tiny_run / "prepared"), str(tmp_path / "lone"))
    after_training, after_push = printed(stage)
    assert after_training == after_push, "`mmesid push` found something else to send"
    commits = json.loads(ask(hub_environment, "history/models/tester/trained"))
    state = {f"last-checkpoint/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
    assert all(state <= set(files) for files in commits)
    *during, last = [[name for name in files if not name.startswith("last-checkpoint/")] for files in commits]
    assert during and all(set(files) == set(last) for files in during)
    assert {"README.md", "modeling_mmesid.py", "semantic_ids.parquet", "eval_results.json"} <= set(last)

    files, measured, ranked = printed(lone)
    assert measured == pytest.approx({name: ranked[name] for name in measured}) and measured["mrr"] > 0
    assert {"README.md", "config.json", "model.safetensors", "modeling_sasrec.py", "eval_results.json"} <= set(files)
    assert not any(name.endswith((".bin", ".pt", ".pth")) or "trainer_state" in name for name in [*files, *last])
    (alone,) = json.loads(ask(hub_environment, "history/models/tester/lone-model"))
    codes = json.loads(ask(hub_environment, "history/models/tester/lone-codes"))
    added = {"semantic_ids.parquet", "figures/code_use.png", "figures/distances.png"}
    assert len(codes) == 3 and all(set(names) == set(alone) | added for names in codes)


ENCODER = """
import json, sys
import torch
from huggingface_hub import HfApi, ModelCard
from mmesid.trainer.cli import main

main(["encoder", *sys.argv[1:]])
card = ModelCard.load("tester/encoder")
scope = {}
exec(card.text.split("```python")[1].split("```")[0], scope)
inputs = scope["processor"](text=["a red mug"], return_tensors="pt")
assert scope["model"].get_text_features(**inputs).pooler_output.shape == (1, 8)
print(json.dumps([HfApi().list_repo_files("tester/encoder"), card.text]))
"""


def test_a_trained_encoder_is_published_with_its_card(tiny_run, hub_environment, tmp_path):
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tmp_path / "encoder")]
    flags += ["--num_train_epochs", "2"]
    flags += ["--image_size", "32", "--hidden_size", "32", "--num_hidden_layers", "1", "--projection_dim", "8"]
    flags += ["--push_to_hub", "true", "--hub_model_id", "tester/encoder", "--hub_token", "hf_loopback", *TRAINING]
    files, card = printed(run_python(ENCODER, hub_environment, *flags))
    assert {"README.md", "eval_results.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not any(name.endswith(".bin") for name in files)
    assert "SYNTHETIC data" in card and "| recall@10 |" in card


def test_nothing_of_the_builder_is_published(published, tiny_run, hub_environment):
    everything = ask(hub_environment, "everything")
    assert b"models/tester/best/model.safetensors" in everything
    private = [hub_environment["HF_TOKEN"], hub_environment["HF_HOME"], str(tiny_run), str(Path.cwd()), os.getcwd()]
    private += [f"{Path.home()}/", f"{sysconfig.get_path('purelib')}/"]
    for secret in private:
        assert secret.encode() not in everything, secret
    code = b"".join(path.read_bytes() for path in Path(sys.modules["modeling_mmesid"].__file__).parent.glob("*.py"))
    host = socket.gethostname().encode()
    # A machine may be called by a word of ours, or by letters that any weights hold.
    assert len(host) < 6 or host in code or host not in everything
