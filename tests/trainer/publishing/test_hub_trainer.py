"""What a Trainer publishes besides the model: checkpoints to resume from, and links to related repositories."""

import json
import subprocess
import sys
import urllib.request

import pytest
from transformers.trainer_utils import HubStrategy

from mmesid.trainer.recommender.sasrec_trainer import SASRecTrainer, SASRecTrainingArguments
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation


def run(code, environment, *arguments):
    """What a process prints last, as JSON."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


RESUME = """
import json, os, sys
import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from transformers import AutoModel, TrainerCallback, TrainingArguments
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation
from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.windows import EvaluationHistories, TrainingWindows
from mmesid.trainer.recommender.sasrec_trainer import SASRecTrainer

generator = np.random.default_rng(0)
sequences = Sequences(
    [str(user) for user in range(24)], generator.integers(1, 31, 24 * 6, dtype=np.int32), np.arange(25) * 6,
    generator.integers(1, 31, 24, dtype=np.int32),
)
commits = []


class Collect(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        commits.append(trainer.push_in_progress.jobs[0].result().oid)


class BestAtEpoch(SASRecTrainer):
    best_epoch = 1

    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_nearness": -abs(self.state.epoch - self.best_epoch)}


def make_trainer(directory, best_epoch, **settings):
    torch.manual_seed(0)
    trainer = BestAtEpoch(
        SASRecForSequentialRecommendation(SASRecConfig(num_items=30, hidden_size=8)),
        TrainingArguments(
            f"{sys.argv[1]}/{directory}", num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
            learning_rate=3e-2, per_device_train_batch_size=8, load_best_model_at_end=True, use_cpu=True,
            metric_for_best_model="nearness", greater_is_better=True, disable_tqdm=True, save_total_limit=1,
            report_to="none", **settings,
        ),
        train_dataset=TrainingWindows(sequences, 6), eval_dataset=EvaluationHistories(sequences),
    )
    trainer.best_epoch = best_epoch
    return trainer


def same(left, right):
    return all(map(torch.equal, left.state_dict().values(), right.state_dict().values()))


hub = {"push_to_hub": True, "hub_model_id": "tester/resumed", "hub_token": "hf_loopback"}
# Resumed is from the second of three epochs, with the best one before it, the best one itself, and the best to come.
for best_epoch, strategy, name in (
    (1, "checkpoint", "last-checkpoint"), (2, "all_checkpoints", "checkpoint-6"), (3, "checkpoint", "last-checkpoint"),
):
    trainer = make_trainer(f"{best_epoch}", best_epoch, hub_strategy=strategy, **hub)
    trainer.add_callback(Collect())
    trainer.hub_links = {"dataset": "tester/data"}
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.global_step) == (3 * best_epoch, 9)
    local = snapshot_download("tester/resumed", revision=commits[-2], local_dir=f"{sys.argv[1]}/{best_epoch}-hub")
    assert ModelCard.load(f"{local}/README.md").data.datasets == ["tester/data"]
    assert len(AutoModel.from_pretrained(local).recommend([[1, 2]]).items[0]) == 10
    # In the third, one that the first left there, which must not be taken for this one's.
    assert os.path.isdir(f"{local}/{name}/best") == (best_epoch != 2)
    resumed = make_trainer(f"{best_epoch}-resumed", best_epoch)
    resumed.train(resume_from_checkpoint=f"{local}/{name}")
    assert resumed.state.log_history[0] == trainer.state.log_history[0]
    assert resumed.state.best_global_step == trainer.state.best_global_step
    assert same(resumed.model, trainer.model), best_epoch
    assert same(resumed.model, AutoModel.from_pretrained(f"{local}/{name}")) == (best_epoch == 2)
trainer.push_to_hub(links={"recommender": "tester/best"})
card = ModelCard.load("tester/resumed")
assert card.data.datasets is None and "[tester/best](https://huggingface.co/tester/best)" in card.text
print(json.dumps(sorted(HfApi().list_repo_files("tester/resumed"))))
"""


def test_a_published_checkpoint_resumes_to_the_weights_of_an_uninterrupted_training(hub_environment, tmp_path):
    files = run(RESUME, hub_environment, str(tmp_path))
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors", "config.json"}
    for name in ("last-checkpoint", "checkpoint-3", "checkpoint-6", "checkpoint-9"):
        assert {f"{name}/{file}" for file in state} <= set(files)
    assert "checkpoint-9/best/model.safetensors" in files
    assert {"README.md", "eval_results.json", "model.safetensors", "modeling_sasrec.py"} <= set(files)
    assert not any(name.endswith(".bin") for name in files)
    with urllib.request.urlopen(f"{hub_environment['HF_ENDPOINT']}/_test/everything") as response:
        published = response.read()
    assert b"last-checkpoint/trainer_state.json" in published and str(tmp_path).encode() not in published


def test_a_stage_takes_links(tmp_path):
    def make_trainer(link):
        arguments = SASRecTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_links=[link])
        model = SASRecForSequentialRecommendation(SASRecConfig(num_items=3, hidden_size=8))
        return SASRecTrainer(model, arguments, eval_dataset=[])

    assert make_trainer("dataset=me/data").hub_links == {"dataset": "me/data"}
    with pytest.raises(ValueError, match="--hub_links cousin=me/data does not have the form kind=owner/name"):
        make_trainer("cousin=me/data")


def test_checkpoints_of_deepspeed_and_fsdp_are_refused(tmp_path):
    arguments = SASRecTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.hub_strategy = HubStrategy.CHECKPOINT
    trainer = SASRecTrainer(
        SASRecForSequentialRecommendation(SASRecConfig(num_items=3, hidden_size=8)), arguments, eval_dataset=[]
    )
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="hub_strategy 'checkpoint' would publish the checkpoints of DeepSpeed or FS"):
        trainer.init_hf_repo()
