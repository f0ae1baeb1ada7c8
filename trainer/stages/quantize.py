"""
Trains the MM-RQ-VAE on the items' embeddings and writes the checkpoint, the semantic IDs of all items, how healthy
they are, and two pictures: the use of the codes, and the distances before and after quantization.

    mmesid quantize --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --output_dir runs/quickstart/quantizer
    accelerate launch -m mmesid.trainer.stages.quantize --prepared_dir ... --embeddings_dir ... --output_dir ...
"""

import dataclasses
from dataclasses import dataclass, field

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
from ..quantizer.trainer import MMRQVAETrainer, MMRQVAETrainingArguments
from ..running.arguments import StageArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import early_stopping, fit, trainer_arguments


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class QuantizeArguments(StageArguments):
    """
    Train the MM-RQ-VAE, whose codes are the items' semantic IDs, and write the codes of every item.

    Args:
        > Data

        prepared_dir (`str`): Directory written by `mmesid prepare`.
        embeddings_dir (`str`): Directory of the tables written by `mmesid embed`, one <modality>.safetensors each.
        modalities (`list[str]`, *optional*, defaults to `["collaborative", "text"]`): Tables to quantize; the first is
            the anchor of the alignment.
    """

    config_class = MMRQVAEConfig
    model_settings = {
        "Codes": (
            "num_quantizers", "codebook_size", "codebook_dim", "encoder_hidden_dims", "sinkhorn_epsilons",
            "resolve_collisions",
        ),
        "Loss": (
            "objective", "distance_focus", "codebook_loss_weight", "commitment_loss_weight", "alignment_loss_weight",
            "alignment_temperature",
        ),
    }  # fmt: skip
    training_class = MMRQVAETrainingArguments

    prepared_dir: str
    embeddings_dir: str
    modalities: list[str] = field(default_factory=lambda: ["collaborative", "text"])

    def check(self, **settings) -> None:
        super().check(modalities=self.modalities, embedding_dims=[1] * len(self.modalities), **settings)


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
    training, held_out = items.split(
        arguments.training.validation_fraction, torch.Generator().manual_seed(arguments.training.seed)
    )
    config = MMRQVAEConfig(
        modalities=arguments.modalities,
        embedding_dims=[table.embeddings.shape[1] for table in tables.values()],
        **arguments.config,
    )
    set_seed(arguments.training.seed)
    model = MMRQVAEModel(config)
    run.details.update(data=data.statistics, encoders=table_encoders(arguments.embeddings_dir, arguments.modalities))
    with run as staging:
        initialize(model.to(arguments.training.device), training, arguments.training.seed)
        trainer = MMRQVAETrainer(
            model,
            trainer_arguments(arguments, run),
            training,
            held_out,
            data,
            callbacks=early_stopping(arguments.training),
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
