"""
Trains the MM-RQ-VAE on the items' embeddings and writes the checkpoint, the semantic IDs of all items, how healthy
they are, and two pictures: the use of the codes, and the distances before and after quantization.

    mmesid quantize --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --output_dir runs/quickstart/quantizer
    accelerate launch -m mmesid.trainer.stages.quantize --prepared_dir ... --embeddings_dir ... --output_dir ...
"""

from dataclasses import dataclass, field

from accelerate import PartialState

from modeling_mmesid import MMRQVAEConfig

from ..data.prepared import PreparedDataset
from ..data.tables import load_table, table_encoders, table_path
from ..publishing.repository import present
from ..quantizer.trainer import MMRQVAETrainingArguments
from ..quantizer.training import quantizer_trainer
from ..quantizer.verdict import summary
from ..running.arguments import ReaderArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import fit, trainer_arguments
from ..running.training_log import trackers_at_rest


@dataclass(kw_only=True)
class QuantizeArguments(ReaderArguments):
    """
    Train the MM-RQ-VAE, whose codes are the items' semantic IDs, and write the codes of every item.

    Args:
        > Data

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

    embeddings_dir: str
    modalities: list[str] = field(default_factory=lambda: ["collaborative", "text"])

    def check(self, **settings) -> None:
        super().check(modalities=self.modalities, **settings)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(QuantizeArguments, argv)
    paths = {modality: table_path(arguments.embeddings_dir, modality) for modality in arguments.modalities}
    inputs = {"prepared_dir": arguments.prepared_dir, "embeddings_dir": list(paths.values())}
    run = StageRun("quantize", arguments, inputs)
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    tables = {modality: load_table(path, modality, data.num_items) for modality, path in paths.items()}
    run.details.update(data=data.statistics, encoders=table_encoders(arguments.embeddings_dir, arguments.modalities))
    with run as staging:
        trainer = quantizer_trainer(tables, MMRQVAEConfig(**arguments.config), trainer_arguments(arguments, run), data)
        trainer.draft_record = run.draft_record
        fit(trainer)
        with trackers_at_rest(trainer):
            run.metrics["held_out"] = trainer.measure()
        if PartialState().is_main_process:
            trainer.model.save_pretrained(staging)
            metrics, details = trainer.describe(staging)
            run.metrics.update(metrics)
            run.details.update(details, parameters=trainer.model.num_parameters())
            present(run, trainer)
    trainer.publish(arguments.output_dir)
    if PartialState().is_main_process:
        print("\n" + summary(run.metrics, arguments.modalities), flush=True)


if __name__ == "__main__":
    run_as_script("quantize", main)
