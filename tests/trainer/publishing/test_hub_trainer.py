"""What a Trainer publishes besides the model: checkpoints to resume from, and links to other repositories."""

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModel, TrainerCallback, TrainingArguments

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.windows import EvaluationHistories, TrainingWindows
from mmesid.trainer.recommender.sasrec_trainer import SASRecTrainer, SASRecTrainingArguments
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation


HUB = {"push_to_hub": True, "hub_model_id": "tester/resumed", "hub_token": "hf_loopback"}


class Collect(TrainerCallback):
    """Waits for the push of every checkpoint and keeps its commit."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.commits = []

    def on_save(self, args, state, control, **kwargs):
        self.commits.append(self.trainer.push_in_progress.jobs[0].result().oid)


class BestAtEpoch(SASRecTrainer):
    best_epoch = 1

    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_nearness": -abs(self.state.epoch - self.best_epoch)}


@pytest.fixture(scope="module")
def sequences():
    generator = np.random.default_rng(0)
    users, rows = [str(user) for user in range(24)], generator.integers(1, 31, 24 * 7, dtype=np.int32)
    return Sequences(users, rows[24:], np.arange(25) * 6, rows[:24])


def make_trainer(directory, sequences, best_epoch, **settings):
    torch.manual_seed(0)
    trainer = BestAtEpoch(
        SASRecForSequentialRecommendation(SASRecConfig(num_items=30, hidden_size=8)),
        TrainingArguments(
            str(directory), num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch", learning_rate=3e-2,
            per_device_train_batch_size=8, load_best_model_at_end=True, use_cpu=True, disable_tqdm=True,
            metric_for_best_model="nearness", greater_is_better=True, save_total_limit=1, report_to="none", **settings,
        ),
        train_dataset=TrainingWindows(sequences, 6),
        eval_dataset=EvaluationHistories(sequences),
    )  # fmt: skip
    trainer.best_epoch = best_epoch
    return trainer


def same(left, right):
    return all(map(torch.equal, left.state_dict().values(), right.state_dict().values()))


def test_a_published_checkpoint_resumes_to_the_weights_of_an_uninterrupted_training(on_hub, sequences, tmp_path):
    # Resumed is from the second of three epochs: with the best one before it, and with the best to come.
    for best_epoch, strategy, name in ((1, "checkpoint", "last-checkpoint"), (3, "all_checkpoints", "checkpoint-6")):
        trainer = make_trainer(tmp_path / f"{best_epoch}", sequences, best_epoch, hub_strategy=strategy, **HUB)
        trainer.add_callback(collect := Collect(trainer))
        trainer.hub_links = {"dataset": "tester/data"}
        trainer.train()
        assert (trainer.state.best_global_step, trainer.state.global_step) == (3 * best_epoch, 9)
        local = tmp_path / f"{best_epoch}-hub"
        snapshot_download("tester/resumed", revision=collect.commits[-2], local_dir=local)
        assert ModelCard.load(local / "README.md").data.datasets == ["tester/data"]
        assert len(AutoModel.from_pretrained(local).recommend([[1, 2]]).items[0]) == 10
        resumed = make_trainer(tmp_path / f"{best_epoch}-resumed", sequences, best_epoch)
        resumed.train(resume_from_checkpoint=str(local / name))
        assert resumed.state.log_history[0] == trainer.state.log_history[0]
        assert resumed.state.best_global_step == trainer.state.best_global_step
        assert same(resumed.model, trainer.model), best_epoch
        assert not same(resumed.model, AutoModel.from_pretrained(local / name))
    trainer.push_to_hub(links={"recommender": "tester/best"})
    files = on_hub.files("tester/resumed")
    card = ModelCard(files["README.md"].decode())
    measured, ranked = {result.metric_type: result.metric_value for result in card.data.eval_results}, trainer.rank()
    assert measured == pytest.approx({name: ranked[name] for name in measured}) and measured["mrr"] > 0
    assert card.data.datasets is None and "[tester/best](https://huggingface.co/tester/best)" in card.text
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors", "config.json"}
    for name in ("last-checkpoint", "checkpoint-3", "checkpoint-6", "checkpoint-9"):
        assert {f"{name}/{file}" for file in state} <= set(files)
    assert "checkpoint-9/best/model.safetensors" in files
    assert {"README.md", "eval_results.json", "model.safetensors", "modeling_sasrec.py"} <= set(files)
    assert not any(name.endswith(".bin") for name in files)
    assert str(tmp_path).encode() not in on_hub.everything()


def test_links_are_read_from_the_arguments_and_checkpoints_of_fsdp_are_refused(tmp_path):
    arguments = SASRecTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, hub_links=["dataset=me/data"], hub_strategy="checkpoint"
    )
    model = SASRecForSequentialRecommendation(SASRecConfig(num_items=3, hidden_size=8))
    trainer = SASRecTrainer(model, arguments, eval_dataset=[{"history": [1], "target": 2}])
    assert trainer.hub_links == {"dataset": "me/data"}
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="hub_strategy 'checkpoint' would publish the checkpoints of DeepSpeed or FS"):
        trainer.init_hf_repo()
