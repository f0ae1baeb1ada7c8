"""The stages behind the encoders, one after the other, on files and in real processes."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Config, GPT2Model, LlamaModel

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import load_table
from mmesid.trainer.metrics.ranking.analysis import metrics
from mmesid.trainer.publishing.repository import publication
from mmesid.trainer.quantizer.semantic_ids import read_semantic_ids
from mmesid.trainer.recommender.evaluation import baseline_ranks, model_ranks
from mmesid.trainer.recommender.small_llama import new_llama_config, train_tokenizer
from mmesid.trainer.recommender.training import SIMILARITY_WEIGHT, build_recommender
from mmesid.trainer.running.arguments import parse
from mmesid.trainer.running.records import StageRecord, processor_name
from mmesid.trainer.stages import evaluate, finetune, prepare, recommend
from mmesid.trainer.stages.finetune import FinetuneArguments
from modeling_mmesid import (
    MMESIDForSequentialRecommendation,
    MMESIDProcessor,
    MMRQVAEModel,
    SASRecConfig,
    SASRecForSequentialRecommendation,
)

from ...gguf_files import write_gguf
from ...processes import run_in_two, run_python
from .conftest import finetune_flags


def test_every_directory_holds_a_record_and_a_card(tiny_run):
    for name in ("prepared", "sasrec", "quantizer", "recommender"):
        record = StageRecord.load(tiny_run / name)
        assert record.outputs and record.fingerprint
        card = (tiny_run / name / "README.md").read_text()
        assert "synthetic" in card.lower()
        assert processor_name() in card
        assert str(tiny_run) not in card
    assert (tiny_run / "quantizer" / "semantic_ids.parquet").is_file()


@pytest.fixture(scope="module")
def content(tiny_run) -> tuple:
    """Data, tables, quantizer and semantic IDs as `finetune` reads them, of the modality text."""
    data = PreparedDataset.load(tiny_run / "prepared")
    tables = {"text": load_table(tiny_run / "embeddings" / "text.safetensors", "text", data.num_items)}
    codes = read_semantic_ids(tiny_run / "quantizer" / "semantic_ids.parquet", data.item_ids, ["text"])
    return data, tables, MMRQVAEModel.from_pretrained(tiny_run / "quantizer"), codes


def test_code_embeddings_start_from_the_trained_code_vectors(content):
    _, tables, quantizer, codes = content
    # Item 5 has no text.
    assert not tables["text"].present[5] and torch.equal((codes["text"] >= 0).all(1), tables["text"].present)
    for start in ("trained", "random"):
        settings = {"code_initialization": start, "item_token_scale": 2.0}
        model, _ = build_recommender(*content, hidden_size=16, **settings)
        assert model.config.item_token_scale == 2
        factors = (model.model.items.modalities["text"].code_vectors / quantizer.code_vectors("text")).detach()
        assert torch.allclose(factors, factors[0, 0, 0], rtol=1e-4) == (start == "trained")


def test_semantic_ids_that_do_not_fit_are_refused(content, tiny_run, tmp_path):
    data, tables, quantizer, codes = content
    path = tiny_run / "quantizer" / "semantic_ids.parquet"
    with pytest.raises(ValueError, match="holds the semantic IDs of other items, or in another order; write it again"):
        read_semantic_ids(path, ["", *reversed(data.item_ids[1:])], ["text"])
    with pytest.raises(ValueError, match="has no column 'visual', only item_id, collaborative, text"):
        read_semantic_ids(path, data.item_ids, ["visual"])
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged' cannot be read"):
        read_semantic_ids(tmp_path / "damaged", data.item_ids, ["text"])
    moved = {"text": codes["text"].roll(1, 1).where(tables["text"].present[:, None], -1)}
    with pytest.raises(ValueError, match="other codes of 'text' than they have"):
        build_recommender(data, tables, quantizer, moved, hidden_size=16)
    with pytest.raises(ValueError, match="give both for the same modalities, and the quantizer"):
        build_recommender(data, tables, None, codes)
    other = SASRecForSequentialRecommendation(SASRecConfig(num_items=data.num_items - 1, hidden_size=8))
    with pytest.raises(ValueError, match=f"knows {data.num_items - 1} items, but the data have {data.num_items}"):
        build_recommender(data, sasrec=other)


def test_results_agree_with_ranking_by_hand(tiny_run):
    """nDCG@10 of the recommender on test, from `recommend` over the whole catalogue, one user at a time."""
    data = PreparedDataset.load(tiny_run / "prepared")
    model = MMESIDForSequentialRecommendation.from_pretrained(tiny_run / "recommender")
    test = data.sequences("test")
    gains = []
    for user in range(len(test)):
        history, target = test[user]["history"].tolist(), test[user]["target"]
        best = model.recommend([history], top_k=10).items[0].tolist()
        gains.append(1 / np.log2(best.index(target) + 2) if target in best else 0.0)
    results = json.loads((tiny_run / "evaluation" / "results.json").read_text())
    assert results["recommender"]["test"]["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-9)


def test_results_table_and_cards_name_every_model_and_the_synthetic_data(tiny_run):
    table = (tiny_run / "evaluation" / "results.md").read_text()
    assert "synthetic" in table
    results = json.loads((tiny_run / "evaluation" / "results.json").read_text())
    for name, result in results.items():
        # Validation, test, and test by group.
        assert table.count(f"| {name} |") == 3
        if name in ("sasrec", "recommender"):
            assert f"{result['test']['ndcg@10']:.4f}" in (tiny_run / name / "README.md").read_text()
    assert max(map(len, table.splitlines())) < 300
    assert set(results) == {"popularity", "co_occurrence", "sasrec", "recommender"}


def test_groups_and_intervals_belong_to_the_test_figures(tiny_run):
    results = json.loads((tiny_run / "evaluation" / "results.json").read_text())
    ranks = pq.read_table(tiny_run / "evaluation" / "ranks" / "test.parquet")
    data = PreparedDataset.load(tiny_run / "prepared")
    assert ranks["user_id"].to_pylist() == data.sequences("test").user_ids
    for name, result in results.items():
        low, high = result["test_confidence"]["hr@20"]
        assert low <= result["test"]["hr@20"] <= high
        assert result["test"]["mrr"] == pytest.approx(np.mean(1 / ranks[name].to_numpy()))
        assert ("test_differences" in result) == (name in ("sasrec", "recommender"))
        for other, differences in result.get("test_differences", {}).items():
            values, others = ((ranks[one].to_numpy() <= 10).astype(float) for one in (name, other))
            found = differences["hr@10"]
            assert other != name and found["difference"] == pytest.approx((values - others).mean())
            # The normal approximation of what the bootstrap estimates.
            half = 1.96 * (values - others).std() / np.sqrt(150)
            assert found["interval"] == pytest.approx(found["difference"] + np.array([-half, half]), abs=0.02)
            assert f"{found['difference']:+.4f} (" in (tiny_run / name / "README.md").read_text()
        for kind in ("test_by_frequency", "test_by_history_length"):
            groups = result[kind].values()
            assert sum(group["users"] for group in groups) == 150
            mean = sum(group["users"] * group["ndcg@10"] for group in groups) / 150
            assert mean == pytest.approx(result["test"]["ndcg@10"])


def test_evaluating_again_prints_the_table_without_ranking_again(tiny_run, capsys):
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tiny_run / "evaluation")]
    flags += ["--use_cpu", "true", "--model_dirs", str(tiny_run / "sasrec"), str(tiny_run / "recommender")]
    evaluate.main(flags)
    printed = capsys.readouterr().out
    assert "up to date" in printed
    assert (tiny_run / "evaluation" / "results.md").read_text() in printed


def test_models_of_one_name_are_refused(tiny_run, tmp_path):
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tmp_path), "--model_dirs"]
    with pytest.raises(ValueError, match="are called 'sasrec'"):
        evaluate.main([*flags, str(tiny_run / "sasrec"), str(tiny_run / "sasrec") + "/"])


def test_a_checkpoint_that_names_code_is_refused_and_nobody_is_asked(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked on standard input"))
    shutil.copytree(tiny_run / "sasrec", tmp_path / "sasrec")
    config = json.loads((tmp_path / "sasrec" / "config.json").read_text())
    config |= {"model_type": "of_others", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "sasrec" / "config.json").write_text(json.dumps(config))
    (tmp_path / "sasrec" / "code.py").write_text("raise SystemExit('it ran')")
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tmp_path / "evaluation")]
    with pytest.raises(ValueError, match="holds a model of the type 'of_others', and those that rank are mmesid_sas"):
        evaluate.main([*flags, "--use_cpu", "true", "--model_dirs", str(tmp_path / "sasrec")])
    assert not (tmp_path / "evaluation").exists()


def test_popularity_by_hand(tiny_run):
    data = PreparedDataset.load(tiny_run / "prepared")
    test, hits = data.sequences("test"), 0
    for user in range(len(test)):
        candidates = {*range(1, data.num_items + 1)} - {*test[user]["history"].tolist()}
        target = test[user]["target"]
        hits += target in candidates and sum(data.frequencies[[*candidates]] >= data.frequencies[target]) <= 10
    assert (baseline_ranks("popularity", data)["test"] <= 10).sum() == hits


def test_checkpoint_recommends_the_same_in_a_new_process(tiny_run):
    processor = MMESIDProcessor.from_pretrained(tiny_run / "recommender")
    histories = [processor.item_ids[3:7], processor.item_ids[20:21]]
    model = MMESIDForSequentialRecommendation.from_pretrained(tiny_run / "recommender")
    expected = model.recommend(processor(histories))
    code = (
        "import json, sys\n"
        "from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor\n"
        "processor = MMESIDProcessor.from_pretrained(sys.argv[1])\n"
        "model = MMESIDForSequentialRecommendation.from_pretrained(sys.argv[1])\n"
        "output = model.recommend(processor(json.loads(sys.argv[2])))\n"
        "print(json.dumps([processor.convert_rows_to_item_ids(output.items), output.scores.tolist()]))\n"
    )
    process = run_python("-c", code, tiny_run / "recommender", json.dumps(histories))
    item_ids, scores = json.loads(process.stdout.splitlines()[-1])
    assert item_ids == processor.convert_rows_to_item_ids(expected.items)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-5)


def test_recommend_chooses_among_allowed_items_and_says_what_scores_are_made_of(tiny_run, tmp_path, capsys):
    ids = MMESIDProcessor.from_pretrained(tiny_run / "recommender").item_ids
    flags = ["--model_dir", str(tiny_run / "recommender"), "--history", *ids[3:6], "--top_k", "2"]
    flags += ["--allowed_items", *ids[10:13], "--denied_items", ids[11], "--return_contributions", "true"]
    recommend.main(flags)
    printed = capsys.readouterr().out
    assert ids[10] in printed and ids[12] in printed and ids[11] not in printed and "text " in printed
    recommend.main([*flags, "--output_file", str(tmp_path / "out.jsonl")])
    (user,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {item["item_id"] for item in user["recommendations"]} == {ids[10], ids[12]}
    for item in user["recommendations"]:
        assert sum(item["contributions"].values()) == pytest.approx(item["score"], abs=1e-4)


def test_recommend_prints_titles(tiny_run, capsys):
    processor = MMESIDProcessor.from_pretrained(tiny_run / "recommender")
    model_dir = str(tiny_run / "recommender")
    recommend.main(["--model_dir", model_dir, "--history", *processor.item_ids[:3], "--top_k", "4"])
    printed = capsys.readouterr().out
    assert processor.titles[2] in printed and len(printed.strip().splitlines()) == 5


NOWHERE = "' is not on this machine, and the Hub at .* does not give it"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", NOWHERE),
        ("./nowhere", NOWHERE),
        ("runs/mine/recommender", NOWHERE),
        ("{}/prepared", "' holds no recommender, it lacks 'config.json'; name a dir"),
        ("{}/sasrec", "' holds no recommender, it lacks 'processor_config.json'"),
    ],
)
def test_what_is_no_recommender_is_named(tiny_run, name, words):
    name = name.format(tiny_run)
    with pytest.raises(FileNotFoundError, match=f"'{name}{words}"):
        recommend.main(["--model_dir", name, "--history", "sku000007"])


def test_unchanged_stage_is_skipped_and_a_failing_one_leaves_the_result(tiny_run, capsys, monkeypatch):
    before = (tiny_run / "recommender" / "model.safetensors").stat().st_mtime_ns
    finetune.main(finetune_flags(tiny_run, "recommender"))
    assert "up to date" in capsys.readouterr().out

    monkeypatch.setattr(finetune, "present", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune.main([*finetune_flags(tiny_run, "recommender"), "--seed", "7"])
    assert (tiny_run / "recommender" / "model.safetensors").stat().st_mtime_ns == before
    assert not list((tiny_run / "recommender").glob(".staging*"))


def test_the_papers_items_by_one_flag(tiny_run, content):
    arguments = parse(FinetuneArguments, [*finetune_flags(tiny_run, "unused"), "--paper", "true"])
    model, _ = build_recommender(*content, hidden_size=16, **arguments.config)
    parts = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("model.items.")}
    # The ID embeddings are the score head's: no token holds one.
    assert parts == {"fusion", "id_embeddings", "modalities", "token_mlp"}


def test_finetune_without_tables_says_which_flag(tiny_run):
    with pytest.raises(ValueError, match="--embeddings_dir is not set"):
        finetune.main(["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tiny_run / "nothing")])


def test_evaluating_on_another_catalogue_is_refused(tiny_run, tmp_path):
    other = str(tmp_path / "other")
    prepare.main(["--source", "synthetic", "--num_items", "60", "--num_users", "60", "--output_dir", other])
    flags = ["--prepared_dir", other, "--output_dir", str(tmp_path / "evaluation")]
    with pytest.raises(ValueError, match="knows 80 items"):
        evaluate.main([*flags, "--model_dirs", str(tiny_run / "sasrec")])


@pytest.fixture
def base(tiny_run, tmp_path):
    """A decoder on disk, with its tokenizer."""
    data = PreparedDataset.load(tiny_run / "prepared")
    tokenizer = train_tokenizer(data.texts[1:], 400)
    torch.manual_seed(0)
    LlamaModel(new_llama_config(tokenizer, 64, 1, 512)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_lora_on_a_pretrained_backbone_from_disk(tiny_run, base, tmp_path):
    decoder = ["--backbone_name_or_path", str(base), "--lora_r", "4"]
    finetune.main([*finetune_flags(tiny_run, "unused", *decoder), "--output_dir", str(tmp_path / "lora")])

    record = StageRecord.load(tmp_path / "lora")
    assert record.details["trainable_parameters"] < record.details["parameters"]
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    model = AutoModel.from_pretrained(tmp_path / "lora")
    frozen = LlamaModel.from_pretrained(base).state_dict()
    for name, value in model.model.backbone.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name
    assert any(value.abs().max() > 0 for name, value in model.model.backbone.state_dict().items() if "lora_B" in name)


def test_a_decoder_in_a_folder_is_no_base_model_of_the_hub(tiny_run, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    # As a repository would be called, owner/name.
    flags = ["--backbone_name_or_path", f"{tmp_path.name}/base", "--lora_r", "0", "--num_train_epochs", "1"]
    finetune.main([*finetune_flags(tiny_run, "unused", *flags), "--output_dir", str(tmp_path / "full")])
    _, files = publication(tmp_path / "full", "me/full")
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model is None and "| base model | base |" in card.text
    assert str(tmp_path) not in card.content


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="QLoRA needs bitsandbytes; pip install 'mmesid[qlora]'")
def test_lora_on_a_quantized_backbone(tiny_run, base, tmp_path):
    decoder = ["--backbone_name_or_path", str(base), "--quantization", "nf4"]
    flags = finetune_flags(tiny_run, "unused", *decoder)
    finetune.main([*flags, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "qlora")])
    assert StageRecord.load(tmp_path / "qlora").metrics["validation"]["mrr"] > 0
    config = AutoConfig.from_pretrained(tmp_path / "qlora")
    assert config.backbone_config.quantization_config["bnb_4bit_quant_type"] == "nf4"
    assert AutoModel.from_pretrained(tmp_path / "qlora").recommend([[1, 2, 3]]).items.shape == (1, 10)


def test_a_backbone_that_is_trained_in_full_cannot_be_quantized(tiny_run, base):
    decoder = ["--backbone_name_or_path", str(base), "--quantization", "nf4"]
    flags = finetune_flags(tiny_run, "unused", *decoder)
    with pytest.raises(ValueError, match="--lora_r 0 trains in full"):
        finetune.main([*flags, "--lora_r", "0"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora_r 16", "--lora_r has no use without a pretrained decoder, --backbone_name_or_path; leave it out"),
        ("--gguf_file a.gguf", "--gguf_file has no use without a pretrained decoder"),
        ("--backbone_name_or_path b --hidden_size 64", "--hidden_size has no use beside a pretrained decoder"),
        ("--backbone_name_or_path b --lora_r 0 --lora_alpha 8", "--lora_alpha has no use beside --lora_r 0"),
        (
            "--backbone_name_or_path b --freeze_backbone true --backbone_learning_rate 1e-4",
            "--backbone_learning_rate has no use beside --freeze_backbone",
        ),
        ("--without codes --code_initialization random", "--code_initialization has no use for items without codes"),
        ("--backbone_name_or_path b --gguf_file a.gguf --quantization nf4", "a quantization of their own; drop"),
    ],
)
def test_settings_that_nothing_reads_are_refused(flags, words):
    needed = "--prepared_dir a --embeddings_dir b --quantizer_dir c --output_dir d".split()
    with pytest.raises(ValueError, match=words):
        finetune.main([*needed, *flags.split()])


@pytest.mark.skipif(find_spec("gguf") is None, reason="GGUF files need gguf; pip install 'mmesid[gguf]'")
def test_lora_on_a_decoder_in_a_gguf_file(tiny_run, base, tmp_path):
    llama, folder = LlamaModel.from_pretrained(base), tmp_path / "packed"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", llama, AutoTokenizer.from_pretrained(base))
    with pytest.raises(ValueError, match="tiny.gguf' is a file; give its folder, and --gguf_file tiny.gguf"):
        finetune.main(finetune_flags(tiny_run, "unused", "--backbone_name_or_path", str(folder / "tiny.gguf")))
    decoder = ["--backbone_name_or_path", str(folder), "--gguf_file", "tiny.gguf", "--num_train_epochs", "1"]
    finetune.main([*finetune_flags(tiny_run, "unused", *decoder), "--output_dir", str(tmp_path / "tuned")])
    model = AutoModel.from_pretrained(tmp_path / "tuned")
    frozen = llama.state_dict()
    for name, value in model.model.backbone.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name
    # The prompt in the words of the tokenizer that the file holds.
    whole, _ = build_recommender(PreparedDataset.load(tiny_run / "prepared"), backbone=base)
    assert model.config.prompt_suffix_ids == whole.config.prompt_suffix_ids
    program = (
        "import sys; from modeling_mmesid import MMESIDForSequentialRecommendation as Model; "
        "print(Model.from_pretrained(sys.argv[1]).recommend([[1, 2, 3]]).items.tolist())"
    )
    told = run_python("-c", program, str(tmp_path / "tuned"), cwd=tmp_path)
    assert told.stdout.splitlines()[-1] == str(model.eval().recommend([[1, 2, 3]]).items.tolist())


def test_adapters_go_where_they_are_told_in_a_backbone_with_other_names(content, base):
    GPT2Model(GPT2Config(vocab_size=4096, n_embd=16, n_layer=1, n_head=2)).save_pretrained(base)
    data = content[0]
    with pytest.raises(ValueError, match="no layer called gate_proj, up_proj, down_proj; .* lora_target_modules"):
        build_recommender(data, backbone=base)
    for given, expected in ((["all-linear"], {"c_attn", "c_fc", "c_proj"}), (["c_attn", "c_fc"], {"c_attn", "c_fc"})):
        model, _ = build_recommender(data, backbone=base, lora_target_modules=given)
        adapted = {name.split(".")[-4] for name, _ in model.model.backbone.named_parameters() if "lora_A" in name}
        assert adapted == expected
    frozen, _ = build_recommender(data, backbone=base, freeze_backbone=True)
    assert not any(parameter.requires_grad for parameter in frozen.model.backbone.parameters())


INTERRUPT = """
import sys
from transformers import Trainer
from mmesid.trainer.stages import finetune
stop_after, argv = int(sys.argv[1]), sys.argv[2:]
step = Trainer.training_step
steps = 0
def counted(self, *args, **kwargs):
    global steps
    steps += 1
    if steps > stop_after:
        sys.exit(9)
    return step(self, *args, **kwargs)
Trainer.training_step = counted
finetune.main(argv)
print("STEPS", steps)
"""


def test_killed_training_resumes_where_it_stopped(tiny_run, tmp_path):
    flags = [*finetune_flags(tiny_run, "unused"), "--output_dir", str(tmp_path / "resumed"), "--num_train_epochs", "3"]
    killed = run_python("-c", INTERRUPT, "7", *flags)
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "resumed" / "record.json").exists()
    again = run_python("-c", INTERRUPT, "1000", *flags)
    # 3 epochs of 3 steps; two epochs had a checkpoint.
    assert "STEPS 3" in again.stdout
    assert (tmp_path / "resumed" / "record.json").is_file()


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A catalogue of the same size whose 151 users two processes cannot share evenly."""
    odd = tmp_path_factory.mktemp("odd")
    prepare.main(["--source", "synthetic", "--num_items", "80", "--num_users", "151", "--output_dir", str(odd)])
    return odd


def test_two_processes_give_the_ranks_of_one(tiny_run, odd, tmp_path):
    """Exact: no user is dropped or counted twice."""
    # Copies: the figures on other data go to the records of the models.
    models = [str(shutil.copytree(tiny_run / name, tmp_path / name)) for name in ("sasrec", "recommender")]
    flags = [
        "--prepared_dir", str(odd), "--use_cpu", "true", "--per_device_eval_batch_size", "32",
        "--model_dirs", *models, "--output_dir",
    ]  # fmt: skip
    finished = run_in_two("-m", "mmesid.trainer.stages.evaluate", *flags, tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    assert StageRecord.load(tmp_path / "two").hardware.endswith("2 processes")
    evaluate.main([*flags, str(tmp_path / "one")])
    for split in ("validation", "test"):
        two, one = (pq.read_table(tmp_path / name / "ranks" / f"{split}.parquet") for name in ("two", "one"))
        assert len(set(two["user_id"].to_pylist())) == 151
        assert two.equals(one)
    assert (tmp_path / "two" / "results.md").read_text() == (tmp_path / "one" / "results.md").read_text()


KEEP_HISTORY = """
import json, sys
from accelerate import PartialState
from mmesid.trainer.stages import finetune
fit = finetune.fit
def kept(trainer):
    fit(trainer)
    if PartialState().is_main_process:
        with open(sys.argv[1], "w") as file:
            json.dump(trainer.state.log_history, file)
finetune.fit = kept
finetune.main(sys.argv[2:])
"""


def test_two_processes_train_and_validate_as_one_does(tiny_run, odd, tmp_path):
    """Exact, in training and after it: a user counted twice or left out would move every mean."""
    flags = [*finetune_flags(tiny_run, "unused"), "--output_dir", str(tmp_path / "two"), "--ddp_backend", "gloo"]
    flags += ["--prepared_dir", str(odd), "--per_device_eval_batch_size", "32"]
    finished = run_in_two("-c", KEEP_HISTORY, tmp_path / "history.json", *flags)
    assert finished.returncode == 0, finished.stderr
    record = StageRecord.load(tmp_path / "two")
    assert record.hardware.endswith("2 processes")
    model = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "two")
    assert model.recommend([[1, 2, 3]]).items.shape == (1, 10)

    data = PreparedDataset.load(odd)
    expected = metrics(model_ranks([AutoModel.from_pretrained(tmp_path / "two")], data, "validation"))
    assert record.metrics["validation"] == pytest.approx(expected, abs=1e-12)
    in_training = [entry for entry in json.loads((tmp_path / "history.json").read_text()) if "eval_mrr" in entry]
    best = max(in_training, key=lambda entry: entry["eval_ndcg@10"])
    # As it was before the weights were chosen.
    model.scorers.weights = dict.fromkeys(model.scorers.weights, SIMILARITY_WEIGHT)
    expected = metrics(model_ranks([model], data, "validation"))
    assert {name: best[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-12)
