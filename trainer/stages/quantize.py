"""
Trains the MM-RQ-VAE on the items' embeddings and writes the checkpoint, the semantic IDs of all items, how healthy
they are, and two pictures: the use of the codes, and the distances before and after quantization.

    mmesid quantize --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --output_dir runs/quickstart/quantizer
    accelerate launch -m mmesid.trainer.stages.quantize --prepared_dir ... --embeddings_dir ... --output_dir ...
"""

import dataclasses

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from mmesid.hub_cards import save_card
from modeling_mmesid import MMRQVAEConfig, MMRQVAEModel

from ..data.prepared import PreparedDataset
from ..data.tables import load_table, table_encoders, table_path
from ..quantizer.initialization import initialize
from ..quantizer.items import ItemTables
from ..quantizer.trainer import MMRQVAETrainer
from ..running.arguments import QuantizeArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import early_stopping, fit, trainer_arguments


logger = logging.get_logger(__name__)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(QuantizeArguments, argv)
    paths = {modality: table_path(arguments.embeddings_dir, modality) for modality in arguments.modalities}
    run = StageRun(
        "quantize",
        arguments,
        inputs={"prepared_dir": arguments.prepared_dir, "embeddings_dir": list(paths.values())},
    )
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    tables = {modality: load_table(path, modality, data.num_items) for modality, path in paths.items()}
    items = ItemTables(tables)
    if not 0 < arguments.validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {arguments.validation_fraction}; it must lie between 0 and 1, for "
            "held-out items choose the checkpoint."
        )
    training, held_out = items.split(arguments.validation_fraction, torch.Generator().manual_seed(arguments.seed))
    config = MMRQVAEConfig(
        modalities=arguments.modalities,
        embedding_dims=[table.embeddings.shape[1] for table in tables.values()],
        num_quantizers=arguments.num_quantizers,
        codebook_size=arguments.codebook_size,
        codebook_dim=arguments.codebook_dim,
        encoder_hidden_dims=arguments.encoder_hidden_dims,
        objective=arguments.objective,
        distance_focus=arguments.distance_focus,
        codebook_loss_weight=arguments.codebook_loss_weight,
        commitment_loss_weight=arguments.commitment_loss_weight,
        alignment_loss_weight=arguments.alignment_loss_weight,
        alignment_temperature=arguments.alignment_temperature,
        sinkhorn_epsilons=arguments.sinkhorn_epsilons,
        resolve_collisions=arguments.resolve_collisions,
    )
    set_seed(arguments.seed)
    model = MMRQVAEModel(config)
    run.details.update(data=data.statistics, encoders=table_encoders(arguments.embeddings_dir, arguments.modalities))
    with run as staging:
        initialize(model.to(arguments.device), training, arguments.seed)
        trainer = MMRQVAETrainer(
            model, trainer_arguments(arguments, run), training, held_out, data, callbacks=early_stopping(arguments)
        )
        trainer.draft_record = run.draft_record
        fit(trainer)
        evaluated = trainer.evaluate()
        run.metrics["held_out"] = {
            name.removeprefix("eval_"): value
            for name, value in evaluated.items()
            if name.startswith(("eval_tau", "eval_reconstruction", "eval_recall", "eval_loss"))
        }
        if PartialState().is_main_process:
            model.save_pretrained(staging)
            metrics, details = trainer.describe(staging)
            logger.warning("Semantic IDs: %s", metrics)
            run.metrics.update(metrics)
            run.details.update(details, parameters=model.num_parameters())
            save_card(staging, dataclasses.asdict(run.draft_record()))
    trainer.publish(arguments.output_dir)


if __name__ == "__main__":
    run_as_script("quantize", main)
