"""Training, revival, balance and resume of the quantizer on toy tables."""

import copy

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mmesid.trainer.quantizer.evaluation import code_metrics, encode_items
from mmesid.trainer.quantizer.initialization import initialize

from .conftest import toy_items, toy_model, toy_trainer


UNEVALUATED = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def test_training_for_reconstruction_improves_it_on_held_out_items(tmp_path, items):
    model = toy_model(objective="mse")
    initialize(model, items)
    settings = {"metric_for_best_model": "reconstruction_text", "greater_is_better": False, "learning_rate": 3e-3}
    trainer = toy_trainer(tmp_path, model, items, per_device_train_batch_size=40, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reconstruction_text"] < before["eval_reconstruction_text"] - 0.01


def test_training_for_distances_improves_them(tmp_path):
    # More dimensions than code vectors can follow: k-means leaves something to gain.
    items, model = toy_items(300, factors=30), toy_model()
    initialize(model, items)
    trainer = toy_trainer(tmp_path, model, items, per_device_train_batch_size=60, **UNEVALUATED)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_tau"] > before["eval_tau"] + 0.003
    assert 0 <= after["eval_recall@1_text"] <= 1


@pytest.mark.parametrize("settings", [{"dataloader_drop_last": True}, {"gradient_accumulation_steps": 3}])
def test_the_end_of_an_epoch_logs_the_mean_losses_and_the_health_of_the_codes(tmp_path, items, model, settings):
    trainer = toy_trainer(
        tmp_path, model, items, num_train_epochs=3, per_device_train_batch_size=50, learning_rate=0.0,
        codebook_learning_rate=0.0, **settings, **UNEVALUATED,
    )  # fmt: skip
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.objective_loss.item()))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "use@1_text" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2, 3]
    steps = len(trainer.get_train_dataloader())
    for epoch, entry in enumerate(logged):
        assert entry["objective_loss"] == pytest.approx(np.mean(seen[epoch * steps : (epoch + 1) * steps]), rel=1e-4)
    # Nothing was learnt, so that all epochs have the codes of the training items.
    codes = {name: values[trainer.train_dataset.rows] for name, values in encode_items(model, items).items()}
    for name, value in code_metrics(codes, 16).items():
        assert name == "collisions" or logged[-1][name] == pytest.approx(value), name


def test_dead_codes_are_revived_after_the_last_step_of_the_epoch(tmp_path, items, model):
    with torch.no_grad():
        model.branches["text"].quantizer.layers[1].codebook[3:9] = 1e3
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=1, **UNEVALUATED)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "dead@2_text" in entry]
    assert logged["dead@2_text"] >= 6
    codebook = model.branches["text"].quantizer.layers[1].codebook
    assert codebook.abs().max() < 100
    momentum = trainer.optimizer.state[codebook]["exp_avg"]
    assert momentum[3:9].abs().max() == 0 and momentum.abs().max() > 0
    assert code_metrics(encode_items(model, items), 16)["dead@2_text"] <= 3


def test_balanced_levels_get_the_same_codes_in_training_in_the_export_and_alone(tmp_path, items):
    perplexity = {}
    for epsilon in (0.0, 0.003):
        model = toy_model(objective="mse", encoder_projection=True, sinkhorn_epsilons=[0.0, epsilon])
        initialize(model, items)
        toy_trainer(tmp_path, model, items, num_train_epochs=2, **UNEVALUATED).train()
        codes = encode_items(model, items)
        perplexity[epsilon] = code_metrics(codes, 16)["perplexity@2_text"]
        rows = items.rows_with("text")[:9]
        batch = {"text": items.tables["text"].embeddings[rows]}
        assert torch.equal(codes["text"][rows].long(), model.train()(batch).codes["text"])
        alone = [model.encode({"text": row[None]}).codes["text"][0] for row in batch["text"]]
        assert torch.equal(codes["text"][rows].long(), torch.stack(alone))
        offsets = [layer.offsets.abs().max() for layer in model.branches["text"].quantizer.layers]
        assert offsets[0] == 0 and (offsets[1] > 0) == (epsilon > 0)
    assert perplexity[0.003] > perplexity[0.0]


def test_training_under_bf16_autocast_keeps_float32_weights(tmp_path, items, model):
    before = model.code_vectors("text").detach().clone()
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=1, bf16=True, **UNEVALUATED)
    trainer.train()
    metrics = trainer.evaluate()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not torch.equal(model.code_vectors("text"), before)
    assert np.isfinite(metrics["eval_loss"]) and 0 < metrics["eval_tau"] < 1


class Interruption(TrainerCallback):
    """Ends the process, as it were, once the checkpoint of a step is written."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Epochs of 5 steps: the checkpoint of step 6 lies within the second, that of step 10 at its end.
@pytest.mark.parametrize(("save_steps", "accumulation", "stop"), [(3, 1, 6), (5, 1, 10), (4, 2, 4)])
def test_a_training_resumed_anywhere_ends_with_the_same_weights(tmp_path, items, save_steps, accumulation, stop):
    settings = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": save_steps, "seed": 5}
    settings |= {"per_device_train_batch_size": 48, "gradient_accumulation_steps": accumulation}
    settings |= {"eval_strategy": "no", "load_best_model_at_end": False, "codebook_learning_rate": 0.1}
    # Codes that die all the time, and levels that are balanced.
    shape = {"codebook_size": 128, "sinkhorn_epsilons": [0.0, 0.003]}
    initialized = toy_model(**shape)
    initialize(initialized, items)
    whole = copy.deepcopy(initialized)
    toy_trainer(tmp_path / "whole", whole, items, **settings).train()
    trainer = toy_trainer(tmp_path / "interrupted", initialized, items, **settings)
    trainer.add_callback(Interruption(stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = toy_model(**shape)
    trainer = toy_trainer(tmp_path / "interrupted", resumed, items, **settings)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(tmp_path / "interrupted"))
    ends = [entry for entry in trainer.state.log_history if "dead@1_text" in entry]
    assert len(ends) == 4 and any(entry["dead@2_text"] > 0 for entry in ends if entry["step"] >= stop)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_space_as_wide_as_decoders_is_trained(tmp_path):
    items = toy_items(100)
    model = toy_model(codebook_dim=2048, codebook_size=8, encoder_hidden_dims=[])
    initialize(model, items)
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=1, **UNEVALUATED)
    before = model.code_vectors("text").detach().clone()
    trainer.train()
    assert not torch.equal(model.code_vectors("text"), before)
    assert trainer.evaluate()["eval_tau_text"] > 0.2
