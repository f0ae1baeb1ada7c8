"""What is fitted without a gradient, against closed forms."""

import pytest
import torch

from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.quantizer.evaluation import code_metrics, encode_items
from mmesid.trainer.quantizer.initialization import (
    fit_linear_decoder,
    initialize,
    revive_codes,
    usual_codebook_size,
)
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainingArguments
from mmesid.trainer.quantizer.training import quantizer_trainer
from modeling_mmesid import MMRQVAEConfig, MMRQVAEModel

from .conftest import toy_items, toy_model


def test_initialization_looks_at_present_items_alone_and_reconstructs(items, model):
    poisoned = {}
    for name, (embeddings, present) in items.tables.items():
        poisoned[name] = EmbeddingTable(embeddings.masked_fill(~present[:, None], 1e9), present)
    other = toy_model()
    initialize(other, ItemTables(poisoned))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name

    embeddings, present = items.tables["text"]
    original, branch = embeddings[present], model.branches["text"]
    torch.testing.assert_close(branch.input_mean, original.mean(0))
    # A variance of 1 for each of the 20 dimensions.
    torch.testing.assert_close(branch.standardize(original).square().sum(1).mean(), torch.tensor(20.0))
    codes = encode_items(model, items)
    restored = model.decode({"text": codes["text"][present].long()})["text"]
    # One k-means of 16 codes on the whole leaves more than two residual ones.
    assert (restored - original).square().sum() < 0.35 * (original - original.mean(0)).square().sum()
    metrics = code_metrics(codes, 16)
    assert all(metrics[f"dead@{level}_{name}"] == 0 for level in (1, 2) for name in codes)


def test_a_latent_wide_enough_keeps_the_distances(items):
    model = toy_model(codebook_dim=24)
    initialize(model, items)
    original = items.tables["text"].embeddings[items.rows_with("text")[:40]]
    branch = model.branches["text"]
    distances = torch.pdist(branch.latents(original)) * branch.input_scale
    torch.testing.assert_close(distances, torch.pdist(original), rtol=1e-4, atol=1e-4)


def test_projections_are_turned_towards_the_anchor(items, model):
    both = items.rows_with("collaborative", "text")
    left, right = (model.branches[name].latents(items.tables[name].embeddings[both]) for name in items.tables)
    # No rotation brings them closer: the product with the anchor is symmetric and positive (orthogonal Procrustes).
    product = (left.T @ right).double()
    torch.testing.assert_close(product, product.T, atol=1e-2, rtol=1e-3)
    assert torch.linalg.eigvalsh(product).min() > -1e-2


@pytest.mark.parametrize(
    ("count", "size", "remedy"),
    [(300, 512, "set codebook_size to 64, say"), (20, 19, "set codebook_size to 4, say")]
    + [(4, 4, "set codebook_size to 2, say"), (1, 2, "prepare more items that have it")],
)
def test_too_few_items_for_the_codebook_are_refused_with_what_helps(count, size, remedy):
    items = toy_items(count)
    fewest = len(items.rows_with("collaborative"))
    with pytest.raises(
        ValueError, match=f"^{fewest} items .*'collaborative', fewer than the {size} codes.*; {remedy}"
    ):
        initialize(toy_model(codebook_size=size), items)


def test_a_large_table_is_read_in_parts(items, monkeypatch):
    asked = []

    class Recorder(torch.Tensor):
        """A table that tells how many rows are asked for at once."""

        def __getitem__(self, rows):
            asked.append(len(rows))
            return super().__getitem__(rows).as_subclass(torch.Tensor)

    monkeypatch.setattr("mmesid.trainer.quantizer.items.READ_ITEMS", 64)
    monkeypatch.setattr("mmesid.trainer.quantizer.initialization.KMEANS_ITEMS", 6)
    tables = {
        name: EmbeddingTable(table.as_subclass(Recorder), present) for name, (table, present) in items.tables.items()
    }
    read, model, whole = ItemTables(tables), toy_model(), toy_model()
    initialize(model, read)
    codes = encode_items(model, read)
    assert max(asked) == 64
    # What does not come from the sample is that of the whole table.
    initialize(whole, items)
    for name, branch in model.branches.items():
        torch.testing.assert_close(branch.input_mean, whole.branches[name].input_mean)
        torch.testing.assert_close(branch.input_scale, whole.branches[name].input_scale)
    assert code_metrics(codes, 16)["use@1_text"] > 0.8


@pytest.mark.parametrize("codebook_dim", [16, 80])
@torch.no_grad()
def test_the_linear_decoder_is_that_of_least_squares(items, codebook_dim):
    # The code vectors span 80 dimensions in part.
    model = toy_model(codebook_dim=codebook_dim, codebook_size=12)
    initialize(model, items)
    branch, rows = model.branches["text"], items.rows_with("text")
    original = items.tables["text"].embeddings[rows]
    branch.decoder[0].weight.normal_()
    fit_linear_decoder(branch, items, "text")
    quantized = branch.quantizer.decode(branch.encode(original))
    inputs = torch.cat([quantized, torch.ones(len(rows), 1)], 1).double()
    ridge = 0.01 * inputs.square().sum() / (codebook_dim + 1)
    # Least squares with the ridge as rows of its own.
    inputs = torch.cat([inputs, ridge.sqrt() * torch.eye(codebook_dim + 1, dtype=torch.float64)])
    outputs = torch.cat([branch.standardize(original).double(), torch.zeros(codebook_dim + 1, 20)])
    solution = torch.linalg.lstsq(inputs, outputs).solution.float()
    torch.testing.assert_close(branch.decoder[0].weight, solution[:-1].T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(branch.decoder[0].bias, solution[-1], atol=1e-5, rtol=1e-4)


def test_dead_codes_move_to_what_items_leave_to_their_level(items, model):
    branch, before = model.branches["text"], model.code_vectors("text").detach().clone()
    dead = torch.zeros(2, 16, dtype=torch.bool)
    dead[0, 4], dead[1, 3:9] = True, True
    latents = branch.latents(items.tables["text"].embeddings[items.rows_with("text")])
    first = branch.quantizer.layers[0]
    residuals = [latents, latents - first.decode(first.encode(latents))]
    revive_codes(branch, items, "text", dead, torch.Generator().manual_seed(0))
    for level, after in enumerate(model.code_vectors("text")):
        assert torch.equal(after[~dead[level]], before[level][~dead[level]])
        moved = after[dead[level]]
        assert ((moved[:, None] - residuals[level]).norm(dim=-1).min(1).values < 1e-5).all()
        assert len(torch.unique(moved, dim=0)) == len(moved)


def test_the_codebook_follows_the_catalogue_unless_it_is_set(items, tmp_path):
    sizes = {1: 2, 16: 2, 31: 2, 32: 4, 600: 64, 2047: 128, 2048: 256, 10**7: 256}
    assert {count: usual_codebook_size(count) for count in sizes} == sizes
    arguments = MMRQVAETrainingArguments(tmp_path, validation_fraction=0.2)
    for config, size in ((MMRQVAEConfig(), 16), (MMRQVAEConfig(codebook_size=5), 5)):
        # A fifth of 300 is held out, and a tenth lacks each modality.
        assert quantizer_trainer(items.tables, config, arguments).model.config.codebook_size == size
    assert MMRQVAEModel(MMRQVAEConfig()).config.codebook_size == 256, "no catalogue to go by"
