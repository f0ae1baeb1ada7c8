"""When a training stops, and how it goes on: on SASRec, whose stage is the quickest."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.metrics.ranking.analysis import metrics
from mmesid.trainer.recommender.evaluation import model_ranks
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.running.training import fit
from mmesid.trainer.stages import sasrec

from .conftest import TRAINING


EPOCHS = 30


class Interrupted(Exception):
    pass


class Training:
    """Runs the stage, its step size too large to improve for long; keeps the trainer and counts the steps."""

    def __init__(self, prepared_dir, monkeypatch):
        self.flags = [
            "--prepared_dir", str(prepared_dir), "--hidden_size", "16", *TRAINING, "--learning_rate", "5e-2",
            "--num_train_epochs", str(EPOCHS),
        ]  # fmt: skip
        step = Trainer.training_step

        def counted(trainer, *args, **kwargs):
            if self.steps == self.stop_after:
                raise Interrupted
            self.steps += 1
            return step(trainer, *args, **kwargs)

        def kept(trainer):
            self.trainer = trainer
            fit(trainer)

        monkeypatch.setattr(Trainer, "training_step", counted)
        monkeypatch.setattr(sasrec, "fit", kept)

    def __call__(self, output_dir, *flags, stop_after=None):
        self.steps, self.stop_after = 0, stop_after
        sasrec.main([*self.flags, "--output_dir", str(output_dir), *flags])

    @property
    def curve(self) -> list[float]:
        """The validation metric of every epoch; behind them the stage evaluates once more, what it saves."""
        history = [entry["eval_ndcg@10"] for entry in self.trainer.state.log_history if "eval_ndcg@10" in entry]
        return history[:-1]


@pytest.fixture
def training(tiny_run, monkeypatch):
    return Training(tiny_run / "prepared", monkeypatch)


def saved_weights(directory):
    return AutoModel.from_pretrained(directory).state_dict()


def assert_same_weights(directory, expected):
    for name, weights in saved_weights(directory).items():
        torch.testing.assert_close(weights, expected[name], rtol=0, atol=0, msg=name)


def test_training_stops_early_and_saves_the_best_epoch(tiny_run, training, tmp_path):
    training(tmp_path / "out", "--early_stopping_patience", "1")
    *improving, last = training.curve
    assert len(improving) + 1 < EPOCHS
    assert improving == sorted(improving) and last < improving[-1]
    assert StageRecord.load(tmp_path / "out").metrics["validation"]["ndcg@10"] == pytest.approx(improving[-1])
    # The saved weights themselves, ranked anew.
    data = PreparedDataset.load(tiny_run / "prepared")
    ranks = model_ranks([AutoModel.from_pretrained(tmp_path / "out")], data, "validation")
    assert metrics(ranks)["ndcg@10"] == pytest.approx(improving[-1])


def test_patience_0_trains_to_the_end(training, tmp_path):
    training(tmp_path / "out", "--early_stopping_patience", "0", "--num_train_epochs", "14")
    assert len(training.curve) == 14
    assert training.curve != sorted(training.curve)


def test_without_evaluation_the_last_epoch_is_kept(training, tmp_path):
    training(tmp_path / "out", "--eval_strategy", "no", "--save_strategy", "no", "--num_train_epochs", "2")
    # The one evaluation is the stage's, of what it saves.
    assert training.curve == [] and training.trainer.state.epoch == 2
    assert_same_weights(tmp_path / "out", training.trainer.model.state_dict())
    assert StageRecord.load(tmp_path / "out").metrics["validation"]["mrr"] > 0


def test_what_diverges_stops_and_leaves_earlier_outputs(training, tmp_path):
    training(tmp_path / "out", "--num_train_epochs", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    diverging = ["--learning_rate", "1e38", "--max_grad_norm", "0"]
    for flags, message in (
        ([], r"The loss is (nan|inf) in step [2-4], of the users \w.*: training has diverged and nothing of it is"),
        # There is no later step whose loss would tell.
        (["--max_steps", "1", "--learning_rate", "inf"], "--learning_rate is inf"),
        (["--max_steps", "1", "--weight_decay", "1e38"], "The weight '.*' holds NaN or infinity after the training"),
    ):
        with pytest.raises(ValueError, match=message):
            training(tmp_path / "out", *diverging, *flags)
        assert {path: path.read_bytes() for path in before} == before
        assert not (tmp_path / "new").exists()


def test_a_resumed_training_ends_with_the_same_weights(training, tmp_path):
    """Batches, dropout, optimizer and patience go on as if nothing had been: the interruption comes in the epoch that
    exhausts the patience."""
    patience = ["--early_stopping_patience", "2"]
    training(tmp_path / "whole", *patience)
    curve, steps, expected = training.curve, training.steps, saved_weights(tmp_path / "whole")
    assert len(curve) < EPOCHS and curve[-2] < curve[-3]
    with pytest.raises(Interrupted):
        training(tmp_path / "resumed", *patience, stop_after=steps - 1)
    assert not (tmp_path / "resumed" / "record.json").exists()
    # As it comes from the Hub, into a directory that no run wrote.
    shutil.copytree(get_last_checkpoint(training.trainer.args.output_dir), tmp_path / "downloads" / "last-checkpoint")
    downloaded = ["--resume_from_checkpoint", str(tmp_path / "downloads" / "last-checkpoint")]
    for name, flags in (("elsewhere", downloaded), ("resumed", [])):
        training(tmp_path / name, *patience, *flags)
        assert training.steps == steps // len(curve), "one epoch was left"
        assert training.curve == curve
        assert_same_weights(tmp_path / name, expected)


def test_a_training_that_is_resumed_within_an_epoch_ends_with_the_same_weights(training, tmp_path, capsys):
    by_steps = ["--num_train_epochs", "4"]
    for name in ("save", "eval"):
        by_steps += [f"--{name}_strategy", "steps", f"--{name}_steps", "4"]
    training(tmp_path / "whole", *by_steps)
    steps, expected = training.steps, saved_weights(tmp_path / "whole")
    assert steps == 12 and training.curve[-1] == max(training.curve), "what is saved comes after the interruption"
    with pytest.raises(Interrupted):
        training(tmp_path / "resumed", *by_steps, stop_after=11)
    # What a run leaves that is killed while it writes the next one: weights without a state, or half of it.
    for number, state in ((97, None), (98, '{"epoch": 3.0, "log_his'), (99, '{"log_history": [{"epoch": 1}')):
        half = Path(training.trainer.args.output_dir, f"checkpoint-{number}")
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
        if state is not None:
            (half / "trainer_state.json").write_text(state)
    capsys.readouterr()
    training(tmp_path / "resumed", *by_steps)
    assert re.search("training goes on from '.*checkpoint-8', which an interrupted run left", capsys.readouterr().out)
    # After the eighth step, the second of its epoch.
    assert training.steps == 4
    assert_same_weights(tmp_path / "resumed", expected)
