"""Initialisation, training, revival, resume and evaluation of the quantizer on toy tables."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mmesid.trainer.quantizer.evaluation import code_metrics, encode_items, history_distances, quantized_rows
from mmesid.trainer.quantizer.initialization import fit_linear_decoder, initialize
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainer, WeightedSampler
from mmesid.trainer.running.arguments import QuantizeArguments
from modeling_mmesid.configuration_mmrqvae import MMRQVAEConfig
from modeling_mmesid.modeling_mmrqvae import MMRQVAEModel


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
    shape = {"num_quantizers": 2, "codebook_size": 16, "codebook_dim": 16, "num_anchors": 150}
    if settings.get("objective", "stress") != "stress":
        shape["encoder_hidden_dims"] = [24]
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


def test_draws_follow_the_weights_and_change_with_the_epoch_alone():
    weights = torch.tensor([1.0, 3.0, 0.5, 7.5])
    sampler = WeightedSampler(weights, 40, seed=0)
    first, counts = list(sampler), []
    assert list(sampler) == first and len(sampler) == len(first)
    for epoch in range(200):
        sampler.set_epoch(epoch)
        drawn = torch.bincount(torch.tensor(list(sampler)), minlength=4)
        expected = 40 * weights / weights.sum()
        assert ((drawn - expected).abs() < 1).all(), drawn
        counts.append(drawn.double())
    torch.testing.assert_close(torch.stack(counts).mean(0), expected.double(), atol=0.15, rtol=0)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_training_draws_items_by_their_weights(tmp_path):
    items = toy_items(200)
    items.weights[:] = 1e-3
    items.weights[items.rows[:60]] = 1e3
    trainer = toy_trainer(tmp_path, toy_model(), items, passes_per_epoch=2)
    heavy = {tuple(row) for row in items.embeddings["text"][items.rows[:60]].tolist()}
    drawn = [tuple(row) for batch in trainer.get_train_dataloader() for row in batch["embeddings"]["text"].tolist()]
    assert len(drawn) == 2 * len(trainer.train_dataset)
    assert sum(row in heavy for row in drawn) > 0.99 * len(drawn)


def test_items_of_more_weight_are_the_first_anchors(tmp_path):
    items = toy_items(300)
    items.weights[1:] = torch.where(torch.arange(300) % 3 == 0, 1e6, 1.0)
    model = toy_model(num_anchors=150)
    initialize(model, items)
    branch, rows = model.branches["text"], items.rows_with("text")
    heavy = branch.standardize(items.embeddings["text"][rows[items.weights[rows] > 1]])
    is_heavy = (branch.anchors[:, None] == heavy).all(2).any(1)
    assert is_heavy[: len(heavy)].all() and not is_heavy[len(heavy) :].any()


def test_split_is_a_partition():
    items = toy_items(50)
    training, held_out = items.split(0.1, torch.Generator().manual_seed(3))
    assert len(held_out) == round(0.1 * len(items))
    assert sorted([*training.rows.tolist(), *held_out.rows.tolist()]) == items.rows.tolist()


# Standardized embeddings have a variance of 1 a dimension: of the 16 of a code vector, or of the 20 of their own.
@pytest.mark.parametrize(("objective", "variance"), [("stress", 16.0), ("distance", 20.0)])
def test_initialisation_looks_at_present_items_alone_and_reconstructs(objective, variance):
    items = toy_items()
    settings = {"objective": objective, "num_anchors": items.fewest()}
    model = toy_model(**settings)
    poisoned = ItemTables({name: table.clone() for name, table in items.embeddings.items()}, items.present)
    for name, table in poisoned.embeddings.items():
        table[~items.present[name]] = 1e9
    initialize(model, items)
    other = toy_model(**settings)
    initialize(other, poisoned)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    original = items.embeddings["text"][items.present["text"]]
    branch = model.branches["text"]
    torch.testing.assert_close(branch.input_mean, original.mean(0))
    torch.testing.assert_close(branch.standardize(original).square().sum(1).mean(), torch.tensor(variance))
    codes, _ = encode_items(model, items)
    restored = model.decode({"text": codes["text"][items.present["text"]].long()})["text"]
    left = (restored - original).square().sum() / (original - original.mean(0)).square().sum()
    # One k-means of 16 codes on the whole leaves more than two residual ones.
    assert left < 0.35
    if objective == "stress":
        # The search leaves the k-means at once; the anchors start there.
        codes = {name: model.branches[name].anchor_codes for name in codes}
    metrics = code_metrics(codes, 16)
    assert all(metrics[f"dead@{level}_{name}"] == 0 for level in (1, 2) for name in codes)


def test_initialisation_keeps_distances_in_a_latent_wide_enough():
    items, model = toy_items(), toy_model(objective="distance", codebook_dim=20)
    initialize(model, items)
    rows = items.present["text"].nonzero()[:40, 0]
    original = items.embeddings["text"][rows]
    branch = model.branches["text"]
    latents = branch.latents(branch.standardize(original))
    torch.testing.assert_close(torch.pdist(latents) * branch.input_scale, torch.pdist(original), rtol=1e-4, atol=1e-4)


def test_too_few_items_for_the_codebook_are_refused():
    with pytest.raises(ValueError, match="'collaborative'.*512 codes.*codebook_size"):
        initialize(toy_model(codebook_size=512), toy_items())
    fewest = toy_items().fewest()
    with pytest.raises(ValueError, match=f"{fewest} items.*fewer than the {fewest + 1} anchors.*num_anchors"):
        initialize(toy_model(num_anchors=fewest + 1), toy_items())


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
    assert logged[-1]["dead@1_text"] == round(16 * (1 - logged[-1]["use@1_text"]))
    # 228 items and 256 IDs: some meet, not all.
    assert 0 < logged[-1]["collisions_text"] < 1
    codes, quantized = encode_items(model, items)
    assert code_metrics(codes, 16)["use@1_text"] > 0.9
    missing = ~items.present["text"]
    assert (codes["text"][missing] == -1).all() and (quantized["text"][missing] == 0).all()


@pytest.mark.parametrize("objective", ["stress", "mse"])
def test_dead_codes_are_moved_to_where_items_are(tmp_path, objective):
    items, model = toy_items(), toy_model(objective=objective)
    initialize(model, items)
    branch = model.branches["text"]
    with torch.no_grad():
        branch.quantizer.layers[1].codebook[3:9] = 1e3
        if objective == "stress":
            # No anchor has a dead code, or it would not be dead.
            branch.anchor_codes[:, 1] = branch.anchor_codes[:, 1] % 3
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=4, load_best_model_at_end=False)
    trainer.train()
    assert model.code_vectors("text").abs().max() < 100
    codes, _ = encode_items(model, items)
    assert code_metrics(codes, 16)["dead@2_text"] <= 2


def test_balanced_levels_get_the_same_codes_in_training_in_the_export_and_alone(tmp_path):
    items = toy_items()
    perplexity = {}
    for epsilon in (0.0, 0.003):
        model = toy_model(objective="mse", encoder_projection=True, sinkhorn_epsilons=[0.0, epsilon])
        initialize(model, items)
        trainer = toy_trainer(tmp_path, model, items, num_train_epochs=2, load_best_model_at_end=False)
        trainer.train()
        codes, _ = encode_items(model, items)
        perplexity[epsilon] = code_metrics(codes, 16)["perplexity@2_text"]
        rows = items.present["text"].nonzero()[:9, 0]
        batch = {"text": items.embeddings["text"][rows]}
        assert torch.equal(codes["text"][rows].long(), model.train()(batch).codes["text"])
        alone = [model.encode({"text": row[None]}).codes["text"][0] for row in batch["text"]]
        assert torch.equal(codes["text"][rows].long(), torch.stack(alone))
        offsets = [layer.offsets.abs().max() for layer in model.branches["text"].quantizer.layers]
        assert offsets[0] == 0 and (offsets[1] > 0) == (epsilon > 0)
    assert perplexity[0.003] > perplexity[0.0]


@pytest.mark.parametrize("objective", ["stress", "distance"])
def test_resolved_ids_are_unique_within_each_modality(objective):
    items, model = toy_items(), toy_model(objective=objective, codebook_size=24)
    initialize(model, items)
    before, _ = encode_items(model, items)
    model.config.resolve_collisions = True
    codes, quantized = encode_items(model, items)
    for modality, present in items.present.items():
        assert code_metrics(before, 24)[f"collisions_{modality}"] > 0
        assert code_metrics(codes, 24)[f"collisions_{modality}"] == 0
        assert ((codes[modality] >= 0).all(1) == present).all()
        assert torch.equal(quantized[modality], quantized_rows(model, modality, codes[modality]))
        kept = (codes[modality] == before[modality]).all(1)
        assert len(torch.unique(before[modality][present], dim=0)) == (kept & present).sum()


def test_averaged_code_vectors_go_to_the_means_of_their_residuals(tmp_path):
    items, model = toy_items(), toy_model(objective="mse", num_quantizers=1)
    initialize(model, items)
    settings = {"codebook_ema_decay": 0.5, "learning_rate": 0.0, "load_best_model_at_end": False}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "num_train_epochs": 40}
    trainer = toy_trainer(tmp_path, model, items, per_device_train_batch_size=300, **settings)
    branch = model.branches["text"]
    with torch.no_grad():
        branch.quantizer.layers[0].codebook += 0.02 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    trainer.train()
    rows = trainer.train_dataset.rows
    inputs = items.embeddings["text"][rows[items.present["text"][rows]]]
    latents = branch.latents(branch.standardize(inputs)).detach()
    codes = branch.quantizer.encode(latents)[:, 0]
    means = torch.stack([latents[codes == code].mean(0) for code in range(16)])
    torch.testing.assert_close(model.code_vectors("text")[0].detach(), means, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", ["stress", "distance"])
def test_averages_are_refused_where_distances_decide(tmp_path, objective):
    with pytest.raises(ValueError, match=f"codebook_ema_decay.*'{objective}'"):
        toy_trainer(tmp_path, toy_model(objective=objective), toy_items(), codebook_ema_decay=0.9)


def test_training_under_bf16_autocast_keeps_float32_weights_and_reproducible_codes(tmp_path):
    items, model = toy_items(), toy_model()
    initialize(model, items)
    before = model.code_vectors("text").detach().clone()
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=1, bf16=True, load_best_model_at_end=False)
    trainer.train()
    metrics = trainer.evaluate()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not torch.equal(model.code_vectors("text"), before)
    assert np.isfinite(metrics["eval_loss"]) and 0 < metrics["eval_tau"] < 1


def test_codes_that_workers_would_keep_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataloader_persistent_workers keeps the codes of the first epoch"):
        toy_trainer(tmp_path, toy_model(), toy_items(), dataloader_num_workers=1, dataloader_persistent_workers=True)


@pytest.mark.parametrize("drop_last", [False, True])
def test_health_is_logged_once_an_epoch(tmp_path, drop_last):
    items, model = toy_items(), toy_model(objective="mse")
    initialize(model, items)
    settings = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=3, dataloader_drop_last=drop_last, **settings)
    trainer.train()
    assert len(trainer.train_dataset) % 128 > 0
    logged = [entry["epoch"] for entry in trainer.state.log_history if "use@1_text" in entry]
    assert len(logged) == 3


def test_a_large_table_is_read_in_parts(tmp_path, monkeypatch):
    class Recorder:
        """A table that tells how many rows were asked for at once."""

        def __init__(self, table):
            self.table, self.largest = table, 0

        def __len__(self):
            return len(self.table)

        def __getitem__(self, rows):
            self.largest = max(self.largest, len(rows))
            return self.table[rows]

    for module in ("items", "initialization", "evaluation"):
        monkeypatch.setattr(f"mmesid.trainer.quantizer.{module}.ENCODING_BATCH", 64)
    monkeypatch.setattr("mmesid.trainer.quantizer.initialization.KMEANS_ITEMS", 6)
    items, whole, model = toy_items(), toy_model(), toy_model()
    read = ItemTables({name: Recorder(table) for name, table in items.embeddings.items()}, items.present, items.rows)
    initialize(model, read)
    codes, quantized = encode_items(model, read, return_quantized=False)
    assert quantized == {} and all(table.largest <= 64 for table in read.embeddings.values())
    # What does not come from the sample is that of the whole table.
    initialize(whole, items)
    for name in items.embeddings:
        for buffer in ("input_mean", "input_scale", "anchors"):
            left, right = (getattr(one.branches[name], buffer) for one in (whole, model))
            torch.testing.assert_close(left, right)
    assert code_metrics(codes, 16)["use@1_text"] > 0.8


def test_history_distances_are_those_of_present_pairs_and_identity_has_tau_one():
    items, model = toy_items(), toy_model()
    initialize(model, items)
    codes, quantized = encode_items(model, items)
    sequences = [{"history": [1, 2, 3, 4, 5], "target": 6}, {"history": [7, 8, 9], "target": 10}]
    pairs = history_distances(model, "text", items, codes["text"], sequences)
    expected = [
        (user, (quantized["text"][item] - quantized["text"][example["target"]]).norm().item())
        for user in np.random.default_rng(0).permutation(2)
        for example in [sequences[user]]
        for item in example["history"]
        if items.present["text"][item] and items.present["text"][example["target"]]
    ]
    assert list(zip(pairs.users, pairs.after)) == [(user, pytest.approx(value)) for user, value in expected]
    pairs.after = pairs.before * 2
    assert pairs.metrics() == {"tau": pytest.approx(1), "tau_pooled": pytest.approx(1)}


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
    items, model = toy_items(120), toy_model(num_anchors=60)
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

    branch = model.branches["text"]
    anchors = (branch.anchors * branch.input_scale + branch.input_mean).numpy()
    coded = branch.quantizer.decode(branch.anchor_codes).detach().numpy()
    taus = []
    for row in rows[items.present["text"][rows]]:
        before = np.linalg.norm(items.embeddings["text"][row].numpy() - anchors, axis=1)
        after = np.linalg.norm(quantized["text"][row].numpy() - coded, axis=1)
        signs = [np.sign(values[:, None] - values) for values in (before, after)]
        taus.append((signs[0] * signs[1]).sum() / np.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum()))
    assert metrics["eval_tau_text"] == pytest.approx(np.mean(taus), abs=0.01)


def test_the_decoder_keeps_up_with_the_code_vectors(tmp_path):
    items, model = toy_items(), toy_model()
    initialize(model, items)
    trainer = toy_trainer(tmp_path, model, items, load_best_model_at_end=False)
    trainer.train()
    codes, quantized = encode_items(model, items)
    rows = trainer.train_dataset.rows_with("text")
    original = items.embeddings["text"][rows]
    inputs = torch.cat([quantized["text"][rows], torch.ones(len(rows), 1)], 1)
    best = inputs @ torch.linalg.lstsq(inputs, original).solution
    restored = model.decode({"text": codes["text"][rows].long()})["text"].detach()
    # Of all linear decoders hardly any does better.
    assert (restored - original).square().sum() < 1.1 * (best - original).square().sum()


@torch.no_grad()
def test_the_decoder_of_a_space_that_code_vectors_do_not_fill_is_that_of_least_squares():
    items, model = toy_items(), toy_model(codebook_dim=80, codebook_size=12)
    initialize(model, items)
    branch = model.branches["text"]
    rows = items.rows_with("text")
    codes = torch.randint(12, (len(rows), 2), generator=torch.Generator().manual_seed(0))
    fit_linear_decoder(branch, items, "text", codes)
    inputs = torch.cat([branch.quantizer.decode(codes), torch.ones(len(rows), 1)], 1).double()
    ridge = 0.01 * inputs.square().sum() / inputs.shape[1]
    # Least squares with the ridge as rows of its own.
    inputs = torch.cat([inputs, ridge.sqrt() * torch.eye(81, dtype=torch.float64)])
    outputs = torch.cat([branch.standardize(items.embeddings["text"][rows]).double(), torch.zeros(81, 20)])
    solution = torch.linalg.lstsq(inputs, outputs).solution.float()
    torch.testing.assert_close(branch.decoder[0].weight, solution[:-1].T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(branch.decoder[0].bias, solution[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [32, 8192])
@pytest.mark.parametrize("objective", ["stress", "paper"])
def test_spaces_as_narrow_and_as_wide_as_decoders_are_trained(tmp_path, objective, width):
    items = toy_items(100)
    model = toy_model(objective=objective, codebook_dim=width, codebook_size=8, num_anchors=30)
    training, held_out = items.split(0.2, torch.Generator().manual_seed(0))
    initialize(model, training)
    trainer = toy_trainer(tmp_path, model, items, num_train_epochs=1, save_strategy="no", load_best_model_at_end=False)
    before = model.code_vectors("text").detach().clone()
    trainer.train()
    assert not torch.equal(model.code_vectors("text"), before)
    _, quantized = encode_items(model, items)
    assert quantized["text"].shape == (len(items.present["text"]), width)
    assert trainer.evaluate()["eval_tau_text"] > 0.2
