"""
Trains the MM-RQ-VAE on the items' embeddings and writes the checkpoint, the semantic IDs of all items, how healthy
they are, and two pictures: the use of the codes, and the distances before and after quantization.

    mmesid quantize --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --output_dir runs/quickstart/quantizer
    accelerate launch -m trainer.stages.quantize --prepared_dir ... --embeddings_dir ... --output_dir ...
"""

import dataclasses

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from hub_cards import save_card
from hub_cards.figures import draw_code_use, draw_distances
from modeling_mmesid import MMRQVAEConfig, MMRQVAEModel

from ..arguments import QuantizeArguments, parse
from ..commands import run_as_script
from ..data.prepared import PreparedDataset
from ..encoders.tables import load_table, table_encoders, table_path
from ..mmrqvae_trainer import ItemTables, MMRQVAETrainer, code_metrics, encode_items, history_distances, initialize
from ..records import StageRun
from ..semantic_ids import SEMANTIC_IDS_NAME, semantic_id_examples, write_semantic_ids
from ..training import early_stopping, fit, trainer_arguments


logger = logging.get_logger(__name__)

FIGURES_NAME = "figures"


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
    items = ItemTables(
        {name: table for name, (table, _) in tables.items()},
        {name: mask for name, (_, mask) in tables.items()},
        weights=(1 + data.frequencies.double()) ** arguments.frequency_exponent,
    )
    if not 0 < arguments.validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {arguments.validation_fraction}; it must lie between 0 and 1, for "
            "held-out items choose the checkpoint."
        )
    training, held_out = items.split(arguments.validation_fraction, torch.Generator().manual_seed(arguments.seed))
    config = MMRQVAEConfig(
        modalities=arguments.modalities,
        embedding_dims=[table.shape[1] for table in items.embeddings.values()],
        num_quantizers=arguments.num_quantizers,
        codebook_size=arguments.codebook_size,
        codebook_dim=arguments.codebook_dim,
        encoder_hidden_dims=arguments.encoder_hidden_dims,
        objective=arguments.objective,
        objective_weight=arguments.objective_weight,
        distance_focus=arguments.distance_focus,
        num_anchors=max(min(arguments.num_anchors, training.fewest()), 1),
        codebook_loss_weight=arguments.codebook_loss_weight,
        commitment_loss_weight=arguments.commitment_loss_weight,
        alignment=arguments.alignment,
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
            model, trainer_arguments(arguments, run), training, held_out, callbacks=early_stopping(arguments)
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
            codes, _ = encode_items(model, items, return_quantized=False)
            sequences = data.sequences("validation")
            distances = {
                modality: history_distances(model, modality, items, codes[modality], sequences, seed=arguments.seed)
                for modality in codes
            }
            run.metrics["items"] = code_metrics(codes, config.codebook_size)
            run.metrics["histories"] = {modality: pairs.metrics() for modality, pairs in distances.items()}
            logger.warning("Semantic IDs: %s; %s", run.metrics["items"], run.metrics["histories"])
            model.save_pretrained(staging)
            write_semantic_ids(staging / SEMANTIC_IDS_NAME, data.item_ids, codes)
            draw_code_use(
                staging / FIGURES_NAME / "code_use.png",
                {modality: values.numpy() for modality, values in codes.items()},
                config.codebook_size,
            )
            draw_distances(
                staging / FIGURES_NAME / "distances.png",
                {modality: (pairs.before, pairs.after) for modality, pairs in distances.items()},
                {
                    modality: f"{modality}, Kendall's tau {metrics['tau']:.3f}"
                    for modality, metrics in run.metrics["histories"].items()
                },
            )
            run.details.update(
                parameters=model.num_parameters(),
                semantic_id_examples=semantic_id_examples(codes, data.frequencies, data.item_ids, data.titles),
            )
            save_card(staging, dataclasses.asdict(run.draft_record()))
    trainer.publish(arguments.output_dir)


if __name__ == "__main__":
    run_as_script("quantize", main)
