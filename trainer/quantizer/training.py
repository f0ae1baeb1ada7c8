"""Training the quantizer: what the stage does, as Python calls."""

import copy

import torch
from transformers import set_seed

from modeling_mmesid.configuration_mmrqvae import MMRQVAEConfig
from modeling_mmesid.modeling_mmrqvae import MMRQVAEModel

from ..data.prepared import PreparedDataset
from ..data.tables import EmbeddingTable, check_table
from ..running.training import MADE_BY_CALL, early_stopping, fit, refuse_arguments, temporary_arguments
from .evaluation import encode_items
from .initialization import initialize, usual_codebook_size
from .items import ItemTables
from .trainer import REFUSED, MMRQVAETrainer, MMRQVAETrainingArguments


def quantize(
    data: PreparedDataset,
    tables: dict[str, EmbeddingTable],
    config: MMRQVAEConfig | None = None,
    args: MMRQVAETrainingArguments | None = None,
    **kwargs,
) -> tuple[MMRQVAEModel, dict[str, torch.Tensor]]:
    """
    Trains the quantizer on the embeddings of the items, keeps the epoch that is best on held-out ones, and gives every
    item its semantic IDs.

    Args:
        data ([`PreparedDataset`]): The dataset that the tables are made from.
        tables (`dict[str, EmbeddingTable]`): Embeddings of each modality; the first is the anchor of the alignment.
        config ([`MMRQVAEConfig`], *optional*): Codes, encoders and loss; `modalities` and `embedding_dims` are taken
            from the tables.
        args ([`MMRQVAETrainingArguments`], *optional*): Settings of the training. Without them checkpoints go to a
            temporary directory.
        **kwargs: Further arguments of [`MMRQVAETrainer`], such as `callbacks`.

    Returns:
        `tuple[MMRQVAEModel, dict[str, torch.Tensor]]`: The quantizer in evaluation mode, and for each modality the
        codes of all items, `(items + 1, num_quantizers)`, -1 where an item lacks it.

    Raises:
        ValueError: If the tables do not fit the data, hold NaN or infinity, or have fewer items of a modality than
            there are codes, or an argument of a `Trainer` has no meaning here.
    """
    tables = {modality: check_table(table, modality, data.num_items) for modality, table in tables.items()}
    with temporary_arguments(args, MMRQVAETrainingArguments) as args:
        trainer = quantizer_trainer(tables, config or MMRQVAEConfig(), args, data, **kwargs)
        fit(trainer)
    return trainer.model.eval(), encode_items(trainer.model, trainer.train_dataset)


def quantizer_trainer(
    tables: dict[str, EmbeddingTable],
    config: MMRQVAEConfig,
    args: MMRQVAETrainingArguments,
    data: PreparedDataset | None = None,
    **kwargs,
) -> MMRQVAETrainer:
    """The trainer of [`quantize`], its model initialized, for users who need more than the model and the codes."""
    refuse_arguments(kwargs, MADE_BY_CALL | REFUSED)
    callbacks = [*early_stopping(args), *(kwargs.pop("callbacks", None) or ())]
    training, held_out = ItemTables(tables).split(args.validation_fraction, torch.Generator().manual_seed(args.seed))
    config = copy.deepcopy(config)
    config.modalities = list(tables)
    config.embedding_dims = [table.embeddings.shape[1] for table in tables.values()]
    if config.codebook_size is None:
        config.codebook_size = usual_codebook_size(min(len(training.rows_with(modality)) for modality in tables))
    config.validate()
    set_seed(args.seed)
    model = MMRQVAEModel(config).to(args.device)
    initialize(model, training, args.seed)
    return MMRQVAETrainer(model, args, training, held_out, data, callbacks=callbacks, **kwargs)
