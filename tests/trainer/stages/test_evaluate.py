"""What evaluation promises for the directories that it reads and writes."""

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel

from mmesid.trainer.data.prepared import STATISTICS_FILE, PreparedDataset
from mmesid.trainer.publishing.repository import save_record
from mmesid.trainer.running.arguments import parse
from mmesid.trainer.running.records import RECORD_NAME, StageRecord, StageRun
from mmesid.trainer.stages import evaluate


@pytest.fixture
def evaluated(tiny_run, tmp_path):
    """Evaluates directories under `tmp_path` by name."""

    def run(*names, prepared=tiny_run / "prepared"):
        evaluate.main(
            ["--prepared_dir", str(prepared), "--output_dir", str(tmp_path / "evaluation"), "--use_cpu",
             "true", "--bootstrap_resamples", "20", "--model_dirs", *(str(tmp_path / name) for name in names)]
        )  # fmt: skip

    return run


@pytest.fixture
def checkpoint(tiny_run, tmp_path) -> Path:
    """A SASRec that was not evaluated yet."""
    shutil.copytree(tiny_run / "sasrec", tmp_path / "sasrec")
    forget_figures(tmp_path / "sasrec")
    return tmp_path / "sasrec"


def forget_figures(directory: Path) -> None:
    """As the stage left it when it wrote it (again)."""
    record = StageRecord.load(directory)
    record.details.pop("comparison")
    save_record(directory, dataclasses.replace(record, metrics={}))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}


def refuse(*_):
    raise AssertionError("It ranked before it knew that it could finish.")


def test_a_stage_that_did_not_finish_is_named_before_anything_is_ranked(
    tiny_run, tmp_path, checkpoint, evaluated, monkeypatch
):
    before = contents(checkpoint)
    shutil.copytree(tiny_run / "sasrec", tmp_path / "stopped", ignore=shutil.ignore_patterns(RECORD_NAME))
    monkeypatch.setattr(evaluate, "baseline_ranks", refuse)
    monkeypatch.setattr(evaluate, "model_ranks", refuse)
    with pytest.raises(FileNotFoundError, match=r"stopped/record\.json' does not exist; run the stage"):
        evaluated("sasrec", "stopped")
    assert contents(checkpoint) == before
    assert not (tmp_path / "evaluation").exists()


def test_a_stage_whose_result_ranks_nothing_is_named(tiny_run, tmp_path, checkpoint, evaluated):
    shutil.copytree(tiny_run / "quantizer", tmp_path / "quantizer")
    with pytest.raises(ValueError, match="quantizer' was written by the stage 'quantize'; .* of sasrec and finetune"):
        evaluated("sasrec", "quantizer")


def test_cards_are_left_alone_if_the_results_cannot_be_written(checkpoint, evaluated, monkeypatch):
    def publish(run):
        raise OSError("disk full")

    before = contents(checkpoint)
    monkeypatch.setattr(StageRun, "_publish", publish)
    with pytest.raises(OSError, match="disk full"):
        evaluated("sasrec")
    assert contents(checkpoint) == before


def test_a_card_that_lost_its_figures_gets_them_back_without_ranking(tmp_path, checkpoint, evaluated, monkeypatch):
    evaluated("sasrec")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    ndcg = f"{results['sasrec']['test']['ndcg@10']:.4f}"
    card = checkpoint / "README.md"
    assert ndcg in card.read_text()
    forget_figures(checkpoint)
    assert ndcg not in card.read_text()
    monkeypatch.setattr(evaluate, "model_ranks", refuse)
    evaluated("sasrec")
    assert ndcg in card.read_text()
    # What was added is not added again: a card may be edited by hand in between.
    card.write_text(card.read_text() + "\nEdited.\n")
    evaluated("sasrec")
    assert card.read_text().endswith("Edited.\n")


@pytest.mark.parametrize("synthetic", [True, False])
def test_the_results_say_whether_the_data_are_synthetic(tiny_run, tmp_path, checkpoint, evaluated, synthetic):
    shutil.copytree(tiny_run / "prepared", tmp_path / "prepared")
    statistics = json.loads((tmp_path / "prepared" / STATISTICS_FILE).read_text()) | {"synthetic": synthetic}
    (tmp_path / "prepared" / STATISTICS_FILE).write_text(json.dumps(statistics))
    evaluated("sasrec", prepared=tmp_path / "prepared")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {name: result["synthetic"] for name, result in results.items()} == dict.fromkeys(
        ("popularity", "co_occurrence", "sasrec"), synthetic
    )
    # The card has it from the data; there it is no figure.
    assert "synthetic" not in StageRecord.load(checkpoint).metrics


def test_the_scores_of_several_models_are_added(tiny_run, tmp_path):
    """Against the sum of what both models give the test users' targets and all other items."""
    both = f"both={tiny_run / 'sasrec'}+{tiny_run / 'recommender'}"
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--output_dir", str(tmp_path / "sum"), "--use_cpu", "true"]
    evaluate.main([*flags, "--bootstrap_resamples", "20", "--baselines", "--sums", both])
    results = json.loads((tmp_path / "sum" / "results.json").read_text())
    assert list(results) == ["both"]
    assert [training["stage"] for training in results["both"]["trainings"]] == ["sasrec", "finetune"]
    models = [AutoModel.from_pretrained(tiny_run / name).eval() for name in ("sasrec", "recommender")]
    test, ranks = PreparedDataset.load(tiny_run / "prepared").sequences("test"), []
    for user in range(20):
        history, target = test[user]["history"].tolist(), test[user]["target"]
        candidates = models[0].config.num_items - len(set(history))
        with torch.no_grad():
            best = [model.recommend([history], top_k=candidates) for model in models]
        totals = sum(torch.zeros(81).scatter(0, one.items[0], one.scores[0].float()) for one in best)
        left = [item for item in range(1, 81) if item not in history]
        ranks.append(int((totals[left] >= totals[target]).sum()))
    table = pq.read_table(tmp_path / "sum" / "ranks" / "test.parquet")
    assert table["both"].to_pylist()[:20] == ranks


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sums", "a=x+x"], "--sums a=x+x does not have the form"),
        (["--sums", "a"], "--sums a does not have the form"),
        (["--model_dirs", "x/transitions"], "A model is called 'transitions', as the baseline is"),
        (["--model_dirs", "x/a", "--sums", "a=x+y"], "Two models are called 'a'"),
        (["--baselines", "tgh"], "--baselines names 'tgh'; choose of popularity"),
        (["--baselines", "transitions"], "read texts; give --embeddings_dir"),
        (["--baselines"], "Nothing is to be ranked"),
    ],
)
def test_what_cannot_be_ranked_is_named(flags, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        parse(evaluate.EvaluateArguments, ["--prepared_dir", "p", "--output_dir", "o", *flags])


def test_json_alone_goes_to_the_standard_output(tiny_run, capsys):
    directory = tiny_run / "evaluation"
    models = [str(tiny_run / "sasrec"), str(tiny_run / "recommender")]
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--model_dirs", *models, "--output_dir", str(directory)]
    evaluate.main([*flags, "--use_cpu", "true", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert "up to date" in captured.err


def test_a_model_is_gone_before_the_next_one_is_loaded(tmp_path, checkpoint, evaluated, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "again")
    loaded, load = [], evaluate.load_model

    def watched(directory):
        gc.collect()
        assert not any(model() for model in loaded)
        model = load(directory)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluate, "load_model", watched)
    evaluated("sasrec", "again")
    assert len(loaded) == 2
