"""Initialisation, training, revival, resume and evaluation of the quantizer on toy tables."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modeling_mmesid.configuration_mmrqvae import MMRQVAEConfig
from modeling_mmesid.modeling_mmrqvae import MMRQVAEModel
from trainer.arguments import QuantizeArguments
from trainer.mmrqvae_trainer import ItemTables, MMRQVAETrainer, code_metrics, encode_items, initialize


def toy_items(items: int = 300, factors: int = 6) -> ItemTables:
    generator = torch.Generator().manual_seed(0)
    widths = {"collaborative": 12, "text": 20}
    factors = torch.randn(items + 1, factors, generator=generator)
    embeddings = {
        name: 3 + torch.tanh(factors @ torch.randn(factors.shape[1], width, generator=generator))
        for name, width in widths.items()
    }
    present = {name: torch.rand(items + 1, generator=generator) > 0.1 for name in widths}
    for name in widths:
        present[name][0] = False
        embeddings[name][~present[name]] = 0
    return ItemTables(embeddings, present)


def toy_model(**settings) -> MMRQVAEModel:
    torch.manual_seed(0)
    shape = {"num_quantizers": 2, "codebook_size": 16, "codebook_dim": 16, "encoder_hidden_dims": [24]}
    return MMRQVAEModel(
        MMRQVAEConfig(modalities=["collaborative", "text"], embedding_dims=[12, 20], **shape | settings)
    )


def toy_trainer(tmp_path, model, items, **settings) -> MMRQVAETrainer:
    arguments = QuantizeArguments(
        output_dir=str(tmp_path),
        prepared_dir="",
        embeddings_dir="",
        **{"num_train_epochs": 8, "per_device_train_batch_size": 128, "disable_tqdm": True, "use_cpu": True}
        | settings,
    )
    training, held_out = items.split(0.2, torch.Generator().manual_seed(0))
    return MMRQVAETrainer(model, arguments, training, held_out)


def test_batches_hold_the_rows_asked_for_and_never_the_padding():
    items = toy_items(50)
    assert 0 not in items.rows
    batch = items.__getitems__([3, 1])
    rows = items.rows[[3, 1]]
    assert torch.equal(batch["embeddings"]["text"], items.embeddings["text"][rows])
    assert torch.equal(batch["present"]["text"], items.present["text"][rows])
    with pytest.raises(ValueError, match="'text': 51, 'collaborative': 50"):
        ItemTables({"text": torch.zeros(51, 2), "collaborative": torch.zeros(50, 2)}, items.present)


def test_split_is_a_partition():
    items = toy_items(50)
    training, held_out = items.split(0.1, torch.Generator().manual_seed(3))
    assert len(held_out) == round(0.1 * len(items))
    assert sorted([*training.rows.tolist(), *held_out.rows.tolist()]) == items.rows.tolist()


def test_initialisation_looks_at_present_items_alone_and_reconstructs():
    items, model = toy_items(), toy_model()
    poisoned = ItemTables({name: table.clone() for name, table in items.embeddings.items()}, items.present)
    for name, table in poisoned.embeddings.items():
        table[~items.present[name]] = 1e9
    initialize(model, items)
    other = toy_model()
    initialize(other, poisoned)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    original = items.embeddings["text"][items.present["text"]]
    branch = model.branches["text"]
    torch.testing.assert_close(branch.input_mean, original.mean(0))
    torch.testing.assert_close(branch.standardize(original).square().mean(), torch.tensor(1.0))
    codes, _ = encode_items(model, items)
    restored = model.decode({"text": codes["text"][items.present["text"]].long()})["text"]
    left = (restored - original).square().sum() / (original - original.mean(0)).square().sum()
    # One k-means of 16 codes on the whole leaves more than two residual ones.
    assert left < 0.35
    metrics = code_metrics(codes, 16)
    assert all(metrics[f"dead@{level}_{name}"] == 0 for level in (1, 2) for name in codes)


def test_initialisation_keeps_distances_in_a_latent_wide_enough():
    items, model = toy_items(), toy_model(codebook_dim=20)
    initialize(model, items)
    rows = items.present["text"].nonzero()[:40, 0]
    original = items.embeddings["text"][rows]
    latents = model.branches["text"].encode(original)
    torch.testing.assert_close(
        torch.pdist(latents) * model.branches["text"].input_scale, torch.pdist(original), rtol=1e-4, atol=1e-4
    )


def test_too_few_items_for_the_codebook_are_refused():
    with pytest.raises(ValueError, match="'collaborative'.*512 codes.*codebook_size"):
        initialize(toy_model(codebook_size=512), toy_items())


def test_training_for_reconstruction_improves_it_on_held_out_items(tmp_path):
    items, model = toy_items(), toy_model(objective="mse")
    initialize(model, items)
    settings = {"metric_for_best_model": "reconstruction_text", "greater_is_better": False, "learning_rate": 3e-3}
    trainer = toy_trainer(tmp_path, model, items, per_device_train_batch_size=40, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reconstruction_text"] < before["eval_reconstruction_text"] - 0.01


def test_training_for_distances_improves_them_logs_health_and_encodes_present_items(tmp_path):
    # More dimensions than code vectors can follow: k-means leaves something to gain.
    items, model = toy_items(300, factors=30), toy_model()
    initialize(model, items)
    settings = {"load_best_model_at_end": False, "learning_rate": 1e-3}
    trainer = toy_trainer(tmp_path, model, items, per_device_train_batch_size=60, **settings)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_tau"] > before["eval_tau"] + 0.003
    assert 0 <= after["eval_recall@1_text"] <= 1
    logged = [entry for entry in trainer.state.log_history if "perplexity@2_text" in entry]
    assert len(logged) == 8 and 1 <= logged[-1]["perplexity@2_text"] <= 16
    codes, quantized = encode_items(model, items)
    assert code_metrics(codes, 16)["use@1_text"] > 0.9
    missing = ~items.present["text"]
    assert (codes["text"][missing] == -1).all() and (quantized["text"][missing] == 0).all()


def test_dead_codes_are_moved_to_residuals(tmp_path):
    items, model = toy_items(), toy_model()
    initialize(model, items)
    with torch.no_grad():
        model.branches["text"].quantizer.layers[1].codebook[3:9] = 1e3
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=3, load_best_model_at_end=False)
    trainer.train()
    assert model.code_vectors("text").abs().max() < 100
    codes, _ = encode_items(model, items)
    assert code_metrics(codes, 16)["dead@2_text"] <= 2


class Interruption(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch >= 2:
            raise KeyboardInterrupt


def test_interrupted_training_resumes_to_the_same_weights(tmp_path):
    items = toy_items()
    weights = []
    for name in ("whole", "interrupted"):
        model = toy_model()
        initialize(model, items)
        settings = {"num_train_epochs": 4, "load_best_model_at_end": False, "seed": 5}
        trainer = toy_trainer(tmp_path / name, model, items, **settings)
        if name == "interrupted":
            trainer.add_callback(Interruption())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            model = toy_model()
            trainer = toy_trainer(tmp_path / name, model, items, **settings)
            trainer.train(resume_from_checkpoint=get_last_checkpoint(tmp_path / name))
        else:
            trainer.train()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_held_out_recall_and_tau_equal_a_count(tmp_path):
    items, model = toy_items(120), toy_model()
    initialize(model, items)
    trainer = toy_trainer(tmp_path, model, items)
    metrics = trainer.evaluate()
    rows = trainer.eval_dataset.rows
    _, quantized = encode_items(model, items)
    both = rows[items.present["collaborative"][rows] & items.present["text"][rows]]
    left, right = (quantized[name][both].double().numpy() for name in ("collaborative", "text"))
    cosine = (left @ right.T) / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)
    found = [int((row >= row[item] - 1e-6).sum() == 1) for item, row in enumerate(cosine)]
    assert metrics["eval_recall@1_text"] == pytest.approx(np.mean(found))
