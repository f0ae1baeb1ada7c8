"""What a training leaves beside its outputs."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from mmesid.trainer.publishing.repository import publication
from mmesid.trainer.running import arguments
from mmesid.trainer.running.arguments import parse
from mmesid.trainer.running.records import StageRecord, input_digest
from mmesid.trainer.stages import sasrec

from .conftest import TRAINING


@pytest.mark.parametrize(
    "name, split, metric",
    [
        ("sasrec", "validation", "ndcg@10"),
        ("quantizer", "held_out", "tau"),
        ("recommender", "validation", "ndcg@10"),
    ],
)
def test_the_log_has_every_epoch_and_the_best(tiny_run, name, split, metric):
    log, record = json.loads((tiny_run / name / "training_log.json").read_text()), StageRecord.load(tiny_run / name)
    epochs = 3 if name == "sasrec" else 2
    assert [row["epoch"] for row in log["history"]] == list(range(1, epochs + 1)) and log["epochs"] == epochs
    assert all(row["loss"] > 0 and row["learning_rate"] >= 0 and row["step"] > 0 for row in log["history"])
    assert not [key for row in log["history"] for key in (*row, *row["evaluation"]) if key.endswith("runtime")]
    values = [row["evaluation"][metric] for row in log["history"]]
    assert log["metric"] == metric and log["best_value"] == max(values)
    assert log["best_epoch"] == log["kept_epoch"] == 1 + values.index(max(values))
    # The weights that are kept were measured again; a recommender has other scores beside the decoder's by then.
    if name != "recommender":
        assert record.metrics[split][metric] == pytest.approx(log["best_value"], abs=1e-6)
    assert record.details["training"] == {key: value for key, value in log.items() if key != "history"}
    with Image.open(tiny_run / name / "figures" / "training.png") as picture:
        assert picture.format == "PNG" and picture.width > 900
    assert "figures/training.png" in (tiny_run / name / "README.md").read_text()


def test_the_record_has_all_settings(tiny_run):
    settings = StageRecord.load(tiny_run / "recommender").details["settings"]
    expected = {"hidden_size": 16, "num_train_epochs": 2.0, "lora_r": 8, "token_dropout": 0.4, "weight_decay": 0.0}
    assert {name: settings[name] for name in expected} == expected
    assert not settings.keys() & {"prepared_dir", "output_dir", "disable_tqdm", "use_cpu", "hub_token"}


class Tracker(TrainerCallback):
    """Writes where trackers write by default, and what codecarbon writes."""

    heard: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        Tracker.heard.append(logs)
        tracked = Path(args.output_dir)
        (tracked / "runs").mkdir(exist_ok=True)
        (tracked / "runs" / "events").write_text(f"{args.output_dir} {len(Tracker.heard)}")
        row = "0.5,0.25,Norway\n"
        (tracked / "emissions.csv").write_text(f"energy_consumed,emissions,country_name\n{row * 2}")


def test_what_trackers_write_stays_and_is_not_published(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    directory = tmp_path / "tracked"
    flags = ["--prepared_dir", str(tiny_run / "prepared"), "--hidden_size", "16", "--num_train_epochs", "2", *TRAINING]
    sasrec.main([*flags, "--output_dir", str(directory), "--report_to", "tensorboard"])
    # Two losses, two evaluations, the end of the training; nothing of the evaluation afterwards.
    assert len(Tracker.heard) == 5 and "train_runtime" in Tracker.heard[-1]
    assert (directory / "logs" / "runs" / "events").read_text().endswith(" 5")
    assert not (directory / "checkpoints").exists()
    record = StageRecord.load(directory)
    assert record.details["energy"] == {"kwh": 1.0, "co2_kg": 0.5, "location": "Norway"}
    _, files = publication(directory, "me/model")
    assert "training_log.json" in files and not [name for name in files if name.startswith("logs")]
    # Stages that read the checkpoint do not run again because of what was said about it.
    before = input_digest(directory)
    record.outputs |= {"logs/runs/events": "0", "figures/training.png": "0", "training_log.json": "0"}
    (directory / "record.json").write_text(json.dumps(vars(record)))
    assert input_digest(directory) == before


@pytest.mark.parametrize("name", arguments.TRACKER_EXTRAS)
def test_a_tracker_that_an_extra_installs_is_named_by_it(name, monkeypatch):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match=rf"is not installed; pip install 'mmesid\[{name}\]'"):
        parse(sasrec.SASRecArguments, ["--prepared_dir", "data", "--output_dir", "out", "--report_to", name])
