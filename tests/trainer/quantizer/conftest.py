"""Toy tables, and quantizers and trainers for them."""

import pytest
import torch

from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.quantizer.initialization import initialize
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainer, MMRQVAETrainingArguments
from modeling_mmesid.configuration_mmrqvae import MMRQVAEConfig
from modeling_mmesid.modeling_mmrqvae import MMRQVAEModel


WIDTHS = {"collaborative": 12, "text": 20}


def toy_items(items: int = 300, factors: int = 6) -> ItemTables:
    """Two tables of which either lacks a tenth of the items."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(items + 1, factors, generator=generator)
    embeddings = {
        name: 3 + torch.tanh(factors @ torch.randn(factors.shape[1], width, generator=generator))
        for name, width in WIDTHS.items()
    }
    tables = {}
    for name, values in embeddings.items():
        present = torch.rand(items + 1, generator=generator) > 0.1
        present[0] = False
        tables[name] = EmbeddingTable(values * present[:, None], present)
    return ItemTables(tables)


def toy_model(**settings) -> MMRQVAEModel:
    torch.manual_seed(0)
    shape = {"num_quantizers": 2, "codebook_size": 16, "codebook_dim": 16, "encoder_hidden_dims": [24]}
    return MMRQVAEModel(
        MMRQVAEConfig(modalities=list(WIDTHS), embedding_dims=list(WIDTHS.values()), **shape | settings)
    )


def toy_trainer(directory, model: MMRQVAEModel, items: ItemTables, **settings) -> MMRQVAETrainer:
    defaults = {"num_train_epochs": 8, "per_device_train_batch_size": 128, "disable_tqdm": True, "use_cpu": True}
    arguments = MMRQVAETrainingArguments(output_dir=str(directory), **defaults | settings)
    training, held_out = items.split(0.2, torch.Generator().manual_seed(0))
    return MMRQVAETrainer(model, arguments, training, held_out)


@pytest.fixture(scope="session")
def items() -> ItemTables:
    return toy_items()


@pytest.fixture
def model(items) -> MMRQVAEModel:
    """An initialized quantizer for distances."""
    model = toy_model()
    initialize(model, items)
    return model
